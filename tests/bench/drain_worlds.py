# SPDX-License-Identifier: Apache-2.0
"""A provider that comes back, a backlog, live traffic, and controllers that bring the backlog home, on a simulated clock.

The provider has a limit per organisation (a bucket of five seconds: 429 with retry-after and headers) and a capacity that it
does not tell (529), and each call that it refuses costs it a part of one: that is what keeps providers down that are hurried.
Ours are the very functions of `tideover.core`: charts, breaker, probes and pace.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import count
from typing import Literal

from tideover.core import pacing, progress
from tideover.core.breaker import Breaker, Transition, Witnesses, burst_says, judge, moved, probe_wait_s, weigh
from tideover.core.detector import MEMORY_S, Base, Steps, after
from tideover.core.pacing import Felt, Limit, Limits
from tideover.core.policy import BreakerPolicy, PacePolicy
from tideover.plan import MOST_TURN_S

USUAL = 0.002
"""Share of calls that fails for no reason."""
LIMIT_BURST_S, CAPACITY_BURST_S = 5.0, 2.0
REFUSAL_COST = 0.02
"""Of a 429, in calls; what a 529 costs is the profile's."""
LIVE_PER_S, CRITICAL = 12.0, 0.3
LIVE_PATIENCE_S = 60.0
"""Deadline of a live deferrable job, after it came."""
TICK_S = 0.25
GUESS_S = 5.0
"""How often it is noted what is told of the end."""
MOST_S, MOST_ATTEMPTS = 20_000.0, 2_500_000
POLICY, BREAKERS = PacePolicy(), BreakerPolicy(settle_max_s=math.inf)
RECOVERING = Breaker(state="recovering")


@dataclass(frozen=True)
class Profile:
    """`limit_per_s`: what the provider tells; `capacity`: calls per second that it can bear at an instant."""

    name: str
    limit_per_s: float
    capacity: Callable[[float], float]
    refusal_cost: float
    accelerates: bool = False
    """Its limit follows what was sent lately (Anthropic's acceleration limits)."""


def ramp(low: float, high: float, over_s: float) -> Callable[[float], float]:
    return lambda at: low + (high - low) * min(1.0, at / over_s)


def relapse(at: float) -> float:
    if 1200 <= at < 1500:
        return 1.0
    return 6 + 24 * min(1.0, (at if at < 1200 else at - 1500) / 600)


PROFILES = (
    Profile("A clean", 20.0, lambda _: 40.0, 0.1),
    Profile("B slow ramp", 20.0, ramp(5, 40, 900), 0.1),
    Profile("C relapse", 20.0, relapse, 0.3, accelerates=True),
    Profile("D hidden capacity", 50.0, lambda _: 16.0, 0.2),
)


@dataclass(frozen=True)
class Answer:
    status: Literal[200, 429, 529]
    took_s: float
    retry_after_s: float
    limit: Limit


class Provider:
    def __init__(self, profile: Profile, luck: random.Random) -> None:
        self.profile, self.luck, self.at = profile, luck, 0.0
        self.left = profile.limit_per_s * LIMIT_BURST_S
        self.room = profile.capacity(0.0) * CAPACITY_BURST_S
        self.accepted: deque[float] = deque()
        self.throttled = self.overloaded = 0

    def limit_per_s(self, at: float) -> float:
        if not self.profile.accelerates:
            return self.profile.limit_per_s
        while self.accepted and self.accepted[0] < at - 60:
            self.accepted.popleft()
        return min(self.profile.limit_per_s, max(8.0, 1.5 * len(self.accepted) / 60))

    def call(self, at: float) -> Answer:
        elapsed_s, self.at = at - self.at, at
        capacity, limit = self.profile.capacity(at), self.limit_per_s(at)
        self.left = min(limit * LIMIT_BURST_S, self.left + limit * elapsed_s)
        self.room = min(capacity * CAPACITY_BURST_S, self.room + capacity * elapsed_s)
        if self.left < 1:
            self.throttled += 1
            self.room -= REFUSAL_COST
            return Answer(429, 0.15, (1 - self.left) / limit + self.luck.random(), Limit(limit, 0.0))
        if self.room < 1 or self.luck.random() < USUAL:
            self.overloaded += 1
            self.room = max(-3 * capacity, self.room - self.profile.refusal_cost)
            return Answer(529, math.exp(math.log(0.6) + 0.5 * self.luck.gauss(0, 1)), 0.0, Limit(limit, self.left))
        self.left, self.room = self.left - 1, self.room - 1
        if self.profile.accelerates:
            self.accepted.append(at)
        load = min(1.5, 1 - self.room / (CAPACITY_BURST_S * capacity))
        took_s = math.exp(math.log(4.0) + 0.6 * self.luck.gauss(0, 1)) * (1 + max(0.0, load) ** 3)
        return Answer(200, took_s, 0.0, Limit(limit, self.left))


def optimum_s(profile: Profile, jobs: int) -> float:
    """The earliest end there is: all that limit and capacity leave beside live traffic goes to the backlog."""
    at, served = 0.0, 0.0
    while served < jobs + LIVE_PER_S * at and at < 1e5:
        served += min(profile.limit_per_s, profile.capacity(at)) * (1 - USUAL) * 0.5
        at += 0.5
    return at


# how much may start now


class Controller:
    """`governs_all`: live calls count, and deferrable ones wait in the line. `limited`: its pace does not grow any more."""

    governs_all = False
    limited = False

    def __init__(self) -> None:
        self.under_way = 0

    def allows(self, at: float) -> bool:
        raise NotImplementedError

    def sent(self, at: float) -> None:
        self.under_way += 1

    def hears(self, answer: Answer, at: float, *, held: bool) -> None:
        self.under_way -= held

    def begins(self, at: float) -> None:
        """A recovery."""


class Fixed(Controller):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.next_at = rate, 0.0

    def allows(self, at: float) -> bool:
        return at >= self.next_at

    def sent(self, at: float) -> None:
        super().sent(at)
        self.next_at = max(self.next_at, at - 1.0) + 1 / self.rate


class AllAtOnce(Controller):
    """As many at a time as there are worker threads."""

    def __init__(self, threads: int = 200) -> None:
        super().__init__()
        self.limit = float(threads)

    def allows(self, at: float) -> bool:
        return self.under_way < self.limit


class AIMD(AllAtOnce):
    """Concurrency: slow start, additive increase, a cut at any loss (once per answer time)."""

    def __init__(self) -> None:
        super().__init__()
        self.begins(-9.0)
        self.answer_s, self.quiet_until = 5.0, 0.0

    def begins(self, at: float) -> None:
        self.limit, self.slow_start, self.cut_at = 2.0, True, at

    def allows(self, at: float) -> bool:
        return super().allows(at) and at >= self.quiet_until

    def hears(self, answer: Answer, at: float, *, held: bool) -> None:
        super().hears(answer, at, held=held)
        if answer.status == 200:
            self.answer_s += 0.05 * (answer.took_s - self.answer_s)
            if held and self.under_way * 2 >= self.limit:
                self.limit = min(2000.0, self.limit + (1.0 if self.slow_start else 1 / self.limit))
            return
        self.quiet_until = max(self.quiet_until, at + answer.retry_after_s)
        if at - self.cut_at > self.answer_s:
            self.limit, self.cut_at, self.slow_start = max(1.0, 0.7 * self.limit), at, False


class Gradient2(AllAtOnce):
    """Netflix' concurrency-limits: the long-term answer time against the latest."""

    def __init__(self) -> None:
        super().__init__(20)
        self.long_s = 0.0

    def begins(self, at: float) -> None:
        self.limit = 20.0

    def hears(self, answer: Answer, at: float, *, held: bool) -> None:
        super().hears(answer, at, held=held)
        if answer.status != 200:
            return
        self.long_s = self.long_s + (answer.took_s - self.long_s) / 600 if self.long_s else answer.took_s
        if self.long_s > 2 * answer.took_s:
            self.long_s *= 0.95
        if self.under_way >= self.limit / 2:
            gradient = max(0.5, min(1.0, 1.5 * self.long_s / answer.took_s))
            self.limit = max(1.0, min(200.0, 0.8 * self.limit + 0.2 * (self.limit * gradient + 4)))


class Cubic(Fixed):
    """botocore's adaptive mode: CUBIC on the rate (beta 0.7, C 0.4)."""

    def __init__(self) -> None:
        super().__init__(2.0)
        self.sent_at: deque[float] = deque()
        self.begins(0.0)

    def begins(self, at: float) -> None:
        self.rate, self.best, self.cut_at = 1.0, 2.0, at

    def sent(self, at: float) -> None:
        super().sent(at)
        self.sent_at.append(at)

    def hears(self, answer: Answer, at: float, *, held: bool) -> None:
        super().hears(answer, at, held=held)
        while self.sent_at and self.sent_at[0] < at - 5:
            self.sent_at.popleft()
        measured = max(0.5, len(self.sent_at) / 5)
        if answer.status == 200:
            k = (self.best * 0.3 / 0.4) ** (1 / 3)
            self.rate = max(0.5, min(2 * measured, 0.4 * (at - self.cut_at - k) ** 3 + self.best))
        elif at - self.cut_at > 1:
            self.best, self.cut_at = min(self.rate, 1.2 * measured), at
            self.rate = max(0.5, 0.7 * self.best)


class Ours(Controller):
    """`core.pacing`, asked four times a second for a pace that a bucket then allows, as the leader and the scripts do."""

    governs_all = True

    def __init__(self, *, told_limits: bool = True) -> None:
        super().__init__()
        self.told_limits = told_limits
        self.begins(0.0)

    def begins(self, at: float) -> None:
        self.pacer, self.felt = pacing.begun(at, POLICY), Felt()
        self.limits: Limits = {}
        self.tokens, self.filled_at, self.rate = 1.0, at, POLICY.start_rate

    def brake(self, at: float) -> None:
        self.pacer, self.tokens = pacing.braked(self.pacer, at, POLICY), 0.0
        self.rate = self.pacer.rate

    def tick(self, at: float) -> None:
        self.pacer = pacing.after(self.pacer, self.felt, self.limits, now=at, policy=POLICY)
        pace = pacing.pace_of(RECOVERING, self.pacer, self.limits, now=at, policy=POLICY)
        self.rate, self.limited, self.felt = pace.rate, pace.factor != "ramp", Felt()

    def allows(self, at: float) -> bool:
        self.fill(at)
        return self.tokens >= 1

    def turn(self, at: float) -> float | None:
        """How long a critical call waits for its turn; None: it goes elsewhere."""
        self.fill(at)
        wait_s = max(0.0, 1 - self.tokens) / max(self.rate, POLICY.start_rate)
        return None if wait_s > MOST_TURN_S else wait_s

    def fill(self, at: float) -> None:
        self.tokens = min(max(1.0, TICK_S * self.rate), self.tokens + (at - self.filled_at) * self.rate)
        self.filled_at = at

    def sent(self, at: float) -> None:
        self.tokens -= 1
        self.felt = replace(self.felt, sent=self.felt.sent + 1)

    def hears(self, answer: Answer, at: float, *, held: bool) -> None:
        felt = self.felt
        if self.told_limits:
            self.limits = {"requests": answer.limit}
        if answer.status == 200:
            self.felt = replace(felt, ok=felt.ok + 1, took_s=felt.took_s + answer.took_s)
        elif answer.status == 529:
            self.felt = replace(felt, lost=felt.lost + 1)
        else:
            quiet_s = max(felt.quiet_s, answer.retry_after_s)
            self.felt = replace(felt, throttled=felt.throttled + 1, quiet_s=quiet_s)


# the drain


@dataclass(order=True)
class Job:
    """`order`: who goes first. Live jobs and held ones wait in one line."""

    order: float
    nth: int
    came: float = field(compare=False)
    deadline: float = field(compare=False)
    kind: Literal["held", "critical", "live"] = field(compare=False, default="held")
    tries: int = field(compare=False, default=0)


Order = Literal["earliest deadline first", "first in first out"]


@dataclass
class Told:
    """What a drain came to. `finished_s`: inf if it did not end."""

    finished_s: float = math.inf
    attempts: int = 0
    jobs: int = 0
    throttled: int = 0
    openings: int = 0
    brakes: int = 0
    missed: int = 0
    elsewhere: int = 0
    critical_s: list[float] = field(default_factory=list)
    live_s: list[float] = field(default_factory=list)
    guesses: list[tuple[float, float, float]] = field(default_factory=list)
    """When it was guessed when the backlog would be gone, at the soonest and at the latest."""
    emptied_s: float = 0.0


class World:
    """One drain. What fails is tried again, from the line; critical calls go elsewhere the second time."""

    def __init__(
        self, profile: Profile, controller: Controller, held: int, seed: int, order: Order = "earliest deadline first"
    ):
        self.luck = random.Random(seed)
        self.provider, self.controller, self.order = Provider(profile, self.luck), controller, order
        self.events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self.nth, self.at, self.left, self.told = count(), 0.0, held, Told(jobs=held)
        learned = LIVE_PER_S * MEMORY_S
        base = Base(calls=learned, failed=learned * USUAL)
        self.breaker = Breaker(state="recovering", base=base, since=0.001, recovered_at=0.001)
        self.line: list[Job] = []
        self.waiting, self.gone, self.guessed_at, self.progress = held, 0, 0.0, progress.begun(held, 0.0)
        for _ in range(held):
            draw = self.luck.random()
            within_s = 1800.0 if draw < 0.1 else 3600.0 if draw < 0.4 else 14_400.0
            came = -7200 * self.luck.random()
            self.wait(Job(0.0, next(self.nth), came, within_s * (0.8 + 0.4 * self.luck.random())))

    def wait(self, job: Job) -> None:
        if self.order == "earliest deadline first":
            job.order = job.deadline
        else:
            job.order = job.came if job.kind == "held" else -1e9 + job.came
        heappush(self.line, job)

    def later(self, at: float, act: Callable[..., None], *facts: object) -> None:
        heappush(self.events, (at, next(self.nth), act, facts))

    def run(self) -> Told:
        self.later(self.luck.expovariate(LIVE_PER_S), self.live)
        self.later(0.0, self.tick)
        while self.left and self.told.attempts < MOST_ATTEMPTS:
            self.at, _, act, facts = heappop(self.events)
            if self.at > MOST_S:
                break
            act(*facts)
        if not self.left:
            self.told.finished_s = self.at
        self.told.throttled = self.provider.throttled
        self.told.missed += self.left
        return self.told

    @property
    def is_open(self) -> bool:
        return self.breaker.is_down

    def live(self) -> None:
        self.later(self.at + self.luck.expovariate(LIVE_PER_S), self.live)
        kind: Literal["critical", "live"] = "critical" if self.luck.random() < CRITICAL else "live"
        job = Job(0.0, next(self.nth), self.at, self.at + LIVE_PATIENCE_S, kind)
        self.told.jobs += 1
        self.arrives(job)

    def arrives(self, job: Job) -> None:
        """A critical call goes at once, and elsewhere if the breaker is open; where all is governed other live ones wait."""
        governed = self.controller.governs_all
        if job.kind == "critical" and (self.is_open or (wait_s := self.turn()) is None):
            self.told.elsewhere += 1
        elif job.kind == "critical" and wait_s > 0:
            self.controller.sent(self.at)
            self.later(self.at + wait_s, self.start, job)
        elif job.kind == "critical" or not (governed or self.is_open):
            if governed:
                self.controller.sent(self.at)
            self.start(job)
        else:
            self.wait(job)
            self.pump()

    def turn(self) -> float | None:
        return self.controller.turn(self.at) if isinstance(self.controller, Ours) else 0.0

    def tick(self) -> None:
        if isinstance(self.controller, Ours):
            self.controller.tick(self.at)
            self.guess()
        self.pump()
        self.later(self.at + TICK_S / 5, self.tick_between, 4)

    def tick_between(self, left: int) -> None:
        self.pump()
        self.later(self.at + TICK_S / 5, self.tick_between if left > 1 else self.tick, *([left - 1] if left > 1 else []))

    def guess(self) -> None:
        """What `tideover drain status` would say now of the end."""
        self.progress = progress.after(self.progress, len(self.line), self.gone, self.at)
        self.gone = 0
        left = progress.left(self.progress, limited=self.controller.limited)
        if left is not None and not self.is_open and self.at - self.guessed_at >= GUESS_S and self.waiting:
            self.guessed_at = self.at
            self.told.guesses.append((self.at, self.at + left.soonest_s, self.at + left.latest_s))

    def pump(self) -> None:
        while not self.is_open and self.line and self.controller.allows(self.at):
            self.controller.sent(self.at)
            job = heappop(self.line)
            self.gone += 1
            if job.kind == "held" and job.tries == 0:
                self.waiting -= 1
                self.told.emptied_s = self.at
            self.start(job, asked=True)

    def start(self, job: Job, *, asked: bool = False) -> None:
        self.told.attempts += 1
        answer = self.provider.call(self.at)
        self.later(self.at + answer.took_s, self.ends, job, answer, self.at, asked)

    def ends(self, job: Job, answer: Answer, began: float, asked: bool) -> None:
        self.controller.hears(answer, self.at, held=asked)
        self.judge(answer, began)
        if answer.status == 200:
            self.succeeds(job)
        elif job.kind == "critical" and job.tries:
            self.told.elsewhere += 1
        else:
            job.tries += 1
            self.later(self.at + answer.retry_after_s + 1 + 2 * self.luck.random(), self.tries_again, job)
        self.pump()

    def tries_again(self, job: Job) -> None:
        self.arrives(job)

    def succeeds(self, job: Job) -> None:
        match job.kind:
            case "held":
                self.left -= 1
                self.told.missed += self.at > job.deadline
            case "critical":
                self.told.critical_s.append(self.at - job.came)
            case "live":
                self.told.live_s.append(self.at - job.came)

    # the breaker

    def judge(self, answer: Answer, began: float) -> None:
        breaker = self.breaker
        if answer.status == 429 or breaker.is_down or began < breaker.began_at:
            return
        kind: Literal["ok", "failed"] = "ok" if answer.status == 200 else "failed"
        charts = after(breaker.charts, [(kind, 1)], Steps.of(breaker.base))
        self.breaker = breaker = replace(breaker, charts=charts, seen_at=self.at)
        change = judge(breaker, Witnesses(), now=self.at, waiting=True, policy=BREAKERS)
        if change is None:
            return
        if change.to == "recovering" and isinstance(self.controller, Ours):
            self.controller.brake(self.at)
            self.told.brakes += 1
        elif change.to == "recovering":  # the others know no brake
            change = replace(change, to="open")
        self.breaker = moved(breaker, change, self.at)
        if self.is_open:
            self.told.openings += 1
            self.later(self.at + probe_wait_s(self.breaker, self.at, BREAKERS), self.probe, 0.0)

    def probe(self, weight: float) -> None:
        self.told.attempts += 1
        self.later(self.at + 0.3, self.probed, weigh(weight, answered=self.provider.call(self.at).status != 529))

    def probed(self, weight: float) -> None:
        says = burst_says(weight)
        if says is None:
            self.probe(weight)
            return
        self.breaker = moved(self.breaker, Transition(to="half-open", why="probe"), self.at)
        self.breaker = moved(self.breaker, Transition(to="recovering" if says else "open", why="probed"), self.at)
        if says:
            self.controller.begins(self.at)
            self.pump()
        else:
            self.later(self.at + probe_wait_s(self.breaker, self.at, BREAKERS), self.probe, 0.0)


class Stock(World):
    """Everything is released at once into one line: 200 threads, the SDK tries twice more, then dramatiq backs off."""

    def wait(self, job: Job) -> None:
        job.order = job.came
        heappush(self.line, job)

    def live(self) -> None:
        self.later(self.at + self.luck.expovariate(LIVE_PER_S), self.live)
        kind: Literal["critical", "live"] = "critical" if self.luck.random() < CRITICAL else "live"
        self.told.jobs += 1
        self.wait(Job(0.0, next(self.nth), self.at, self.at + LIVE_PATIENCE_S, kind))
        self.pump()

    def judge(self, answer: Answer, began: float) -> None:
        """There is no breaker."""

    def ends(self, job: Job, answer: Answer, began: float, asked: bool) -> None:
        if answer.status == 200:
            self.controller.hears(answer, self.at, held=True)
            self.succeeds(job)
        elif job.tries % 3 < 2:  # the SDK's own retries keep the thread
            backs_off_s = answer.retry_after_s or min(8.0, 0.5 * 2 ** (job.tries % 3)) * (1 - 0.25 * self.luck.random())
            job.tries += 1
            self.later(self.at + backs_off_s, self.start, job)
        else:
            self.controller.hears(answer, self.at, held=True)
            job.tries += 1
            backs_off_s = min(7 * 86_400.0, 15.0 * 2 ** (job.tries // 3 - 1)) * (0.5 + 0.5 * self.luck.random())
            self.later(self.at + backs_off_s, self.tries_again, job)
        self.pump()

    def tries_again(self, job: Job) -> None:
        heappush(self.line, job)
        self.pump()
