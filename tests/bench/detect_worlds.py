# SPDX-License-Identifier: Apache-2.0
"""A provider on a simulated clock, our detection and recovery on it (the very functions of `core`), and the rules of the peers.

Latencies as in the recorded outages: first token after 0.9 s in the median (lognormal, sigma 0.6), the whole answer after 5 s
(0.8), errors after 0.6 s (0.7). Peers see what ends, as they do today; ours sees first tokens, and calls that are overdue.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from tideover.core.breaker import (
    Breaker,
    Transition,
    Witnesses,
    burst_says,
    is_probe_due,
    judge,
    moved,
    probe_wait_s,
    threshold,
    weigh,
)
from tideover.core.detector import MEMORY_S, Base, Charts, Evidence, Run, Steps, after, is_brownout
from tideover.core.latency import LEAST_S
from tideover.core.policy import BreakerPolicy

TICK_S = 0.05
"""How often a process sends its evidence."""
GAP_S, BURST_GAP_S, FIRST_GAP_S = 0.5, 0.3, 2.0
CLIENT_TIMEOUT_S = 60.0
WARM_S = 60.0
"""Healthy traffic before an onset at 0."""
ALONE = Witnesses()
POLICY = BreakerPolicy()


@dataclass(frozen=True)
class World:
    """Calls per second, and the share that fails before and after 0; `hangs`: those that fail then never answer."""

    rate: float
    share: float
    usual: float = 0.005
    hangs: bool = False


def lognormal(luck: random.Random, median: float, sigma: float) -> float:
    return median * math.exp(sigma * luck.gauss(0.0, 1.0))


@dataclass(frozen=True)
class Call:
    began: float
    first_s: float
    ended: float
    failed: bool


def calls(world: World, luck: random.Random, until: float) -> Iterator[Call]:
    at = -max(WARM_S, 30 / world.rate)
    while (at := at + luck.expovariate(world.rate)) < until:
        failed = luck.random() < (world.share if at >= 0 else world.usual)
        if failed and world.hangs and at >= 0:
            yield Call(at, math.inf, at + CLIENT_TIMEOUT_S, True)
        elif failed:
            error_s = lognormal(luck, 0.6, 0.7)
            yield Call(at, error_s, at + error_s, True)
        else:
            first_s = lognormal(luck, 0.9, 0.6)
            yield Call(at, first_s, at + max(first_s, lognormal(luck, 5.0, 0.8)), False)


@dataclass
class Seen:
    """When ours was suspect, sure of a brown-out, and open (inf: never)."""

    suspect: float = math.inf
    brownout: float = math.inf
    opened: float = math.inf


def ours(world: World, seed: int, until: float) -> Seen:
    """First tokens, overdue calls and probes, one after the other, on the charts of the core."""
    luck = random.Random(seed)
    events: list[tuple[float, int, Evidence]] = []
    for n, call in enumerate(calls(world, luck, until)):
        if call.first_s > LEAST_S:
            heappush(events, (tick(call.began + LEAST_S), n, "failed"))
            if not call.failed:
                heappush(events, (tick(call.began + call.first_s), n, "back"))
        else:
            heappush(events, (tick(call.began + call.first_s), n, "failed" if call.failed else "ok"))
    learned = world.rate * MEMORY_S
    breaker = Breaker(base=Base(calls=learned, failed=learned * world.usual), charts=Charts(ok=100), began_at=-1e6)
    found, probing = Seen(), False
    while events and (event := heappop(events))[0] < until:
        now, n, kind = event
        breaker = replace(breaker, charts=after(breaker.charts, [(kind, 1)], Steps.of(breaker.base)), seen_at=now)
        probing = probing and n >= 0
        if now >= 0 and not probing and is_probe_due(breaker, now, POLICY):
            probing = True
            heappush(events, (tick(now + GAP_S + lateness(world, luck)), -1, probe(world, luck, now)))
        if now >= 0 and is_brownout(breaker.charts, threshold(breaker, now)):
            found.brownout = min(found.brownout, now)
        change = judge(breaker, ALONE, now=now, waiting=False, policy=POLICY)
        if change is not None:
            breaker = moved(breaker, change, now)
        if now >= 0 and breaker.state == "suspect":
            found.suspect = min(found.suspect, now)
        if breaker.state == "open":
            found.opened = now
            found.suspect = min(found.suspect, now)
            break
    return found


def probe(world: World, luck: random.Random, now: float) -> Evidence:
    return "failed" if luck.random() < (world.share if now >= 0 else world.usual) else "ok"


def lateness(world: World, luck: random.Random) -> float:
    return LEAST_S if world.hangs else lognormal(luck, 0.6, 0.7)


def tick(at: float) -> float:
    return math.ceil(at / TICK_S) * TICK_S


# the peers: when does a rule give up, of what has ended?

Rule = Callable[[Iterable[tuple[float, bool]]], float]


def in_a_row(n: int) -> Rule:
    def rule(ended: Iterable[tuple[float, bool]]) -> float:
        row = 0
        for at, failed in ended:
            row = row + 1 if failed else 0
            if row >= n and at >= 0:
                return at
        return math.inf

    return rule


def of_the_last(calls_: int, share: float) -> Rule:
    def rule(ended: Iterable[tuple[float, bool]]) -> float:
        last: deque[bool] = deque(maxlen=calls_)
        for at, failed in ended:
            last.append(failed)
            if len(last) == calls_ and sum(last) >= share * calls_ and at >= 0:
                return at
        return math.inf

    return rule


def within(seconds: float, least: int, share: float) -> Rule:
    def rule(ended: Iterable[tuple[float, bool]]) -> float:
        last: deque[tuple[float, bool]] = deque()
        failures = 0
        for at, failed in ended:
            last.append((at, failed))
            failures += failed
            while last[0][0] < at - seconds:
                failures -= last.popleft()[1]
            if failed and len(last) >= least and failures >= share * len(last) and at >= 0:
                return at
        return math.inf

    return rule


def pybreaker_itself(ended: Iterable[tuple[float, bool]]) -> float:
    """The package, with its defaults: five in a row. What it sees is what ended; its own clock is not needed to open."""
    import pybreaker

    breaker = pybreaker.CircuitBreaker()

    def call(failed: bool) -> None:
        if failed:
            raise OSError

    for at, failed in ended:
        try:
            breaker.call(call, failed)
        except (OSError, pybreaker.CircuitBreakerError):
            if breaker.current_state == "open":
                if at >= 0:
                    return at
                breaker.close()
    return math.inf


PEERS: dict[str, Rule] = {
    "five in a row": in_a_row(5),
    "resilience4j: 50 % of 100 calls": of_the_last(100, 0.5),
    "Polly v8: 10 % of 100 in 30 s": within(30.0, 100, 0.1),
    "Hystrix: 50 % of 20 in 10 s": within(10.0, 20, 0.5),
    "LiteLLM: over 50 % of 5 in 60 s": within(60.0, 5, 0.5001),
}


def peer(rule: Rule, world: World, seed: int, until: float) -> float:
    found = rule(sorted((call.ended, call.failed) for call in calls(world, random.Random(seed), until)))
    return found if found < until else math.inf


def wasted(world: World, seed: int, opened: float, until: float) -> int:
    """Calls that began after the onset and before the opening."""
    return sum(0 <= call.began < min(opened, until) for call in calls(world, random.Random(seed), until))


# months without an outage


def false_alarms(rate: float, usual: float, days: float, seed: int) -> tuple[int, int]:
    """Openings and suspicions of a healthy route. Between two failures are successes only: it goes from one to the next."""
    luck, at, until = random.Random(seed), 0.0, days * 86_400
    learned = rate * MEMORY_S
    base = Base(calls=learned, failed=learned * usual)
    well = Breaker(base=base, charts=Charts(ok=100), began_at=-1e6)
    breaker, opened, suspected = well, 0, 0

    def takes(run: Run) -> None:
        nonlocal breaker, opened, suspected
        breaker = replace(breaker, charts=after(breaker.charts, [run], Steps.of(base)), seen_at=at)
        change = judge(breaker, ALONE, now=at, waiting=False, policy=POLICY)
        if change is not None:
            suspected += change.to == "suspect"
            opened += change.to == "open"
            breaker = well if change.to == "open" else moved(breaker, change, at)

    while at < until:
        row = math.floor(math.log(1 - luck.random()) / math.log(1 - usual))
        at += luck.gammavariate(row + 1, 1 / rate)
        takes(("ok", row))
        takes(("failed", 1))
        while is_probe_due(breaker, at, POLICY):
            takes(("failed" if luck.random() < usual else "ok", 1))
    return opened, suspected


# the end of an outage


@dataclass(frozen=True)
class Outage:
    """It lasts so long; then its failures fade away over `ramp_s`."""

    lasts_s: float
    share: float
    ramp_s: float

    def share_at(self, at: float) -> float:
        if at < self.lasts_s:
            return self.share
        if at < self.lasts_s + self.ramp_s:
            return self.share * (1 - (at - self.lasts_s) / self.ramp_s)
        return 0.005

    @property
    def over_at(self) -> float:
        """When four of five calls are answered again."""
        return self.lasts_s + (self.ramp_s * (1 - 0.2 / self.share) if self.ramp_s else 0.0)


@dataclass(frozen=True)
class Recovery:
    """Seconds from the true end to the first release; closes before; probes; seconds that critical jobs went elsewhere."""

    late_s: float
    premature: int
    probes: int
    elsewhere_s: float


def burst(outage: Outage, luck: random.Random, at: float) -> tuple[bool, float, int]:
    """A first probe, and once one is answered another after each `BURST_GAP_S`; what they say, when, and how many they were."""

    def asked(began: float) -> tuple[float, bool]:
        failed = luck.random() < outage.share_at(began)
        return began + (lognormal(luck, 0.6, 0.7) if failed else lognormal(luck, 0.9, 0.6)), failed

    now, next_at, weight, made = at, at, 0.0, 0
    under_way: list[tuple[float, bool]] = []
    while (says := burst_says(weight)) is None:
        if not under_way or next_at <= under_way[0][0]:
            heappush(under_way, asked(next_at))
            now, made = next_at, made + 1
            next_at += BURST_GAP_S if weight else FIRST_GAP_S
        else:
            now, failed = heappop(under_way)
            next_at = min(next_at, now + BURST_GAP_S) if weight == 0.0 else next_at
            weight = weigh(weight, answered=not failed)
    return says, now, made


def recovered(outage: Outage, seed: int, rate: float = 10.0) -> Recovery:
    luck, at, premature, probes, elsewhere_s = random.Random(seed), 1.5, 0, 0, 0.0
    learned = rate * MEMORY_S
    breaker = Breaker(base=Base(calls=learned, failed=learned * 0.005))
    breaker, opened_at = moved(breaker, Transition(to="open", why="529"), at), at
    while True:
        at += probe_wait_s(breaker, at, POLICY)
        breaker = moved(breaker, Transition(to="half-open", why="529"), at)
        says, at, made = burst(outage, luck, at)
        probes += made
        breaker = moved(breaker, Transition(to="recovering" if says else "open", why="529"), at)
        if not says:
            continue
        elsewhere_s += at - opened_at
        if outage.share_at(at) <= 0.2:
            return Recovery(max(0.0, at + 0.1 - outage.over_at), premature, probes, elsewhere_s)
        premature += 1
        while breaker.state != "open":
            at += luck.expovariate(rate)
            kind: Evidence = "failed" if luck.random() < outage.share_at(at) else "ok"
            breaker = replace(breaker, charts=after(breaker.charts, [(kind, 1)], Steps.of(breaker.base)))
            change = judge(breaker, ALONE, now=at, waiting=True, policy=POLICY)
            if change is not None:
                breaker = moved(breaker, change, at)
            if outage.share_at(at) <= 0.2:
                return Recovery(0.0, premature, probes, elsewhere_s)
        opened_at = at
