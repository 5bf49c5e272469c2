# SPDX-License-Identifier: Apache-2.0
"""Three processes share breakers through whatever Hypothesis thinks of: outcomes, probes, operators, clocks, lost messages.

Each has a real `Health` on the real store; nobody runs their threads, so that each step is one of these. Time goes by in Redis:
its instants move into the past. A process's own clock may be a day off.

Deterministic; to look further: `pytest tests/store/test_breaker_machine.py --hypothesis-profile=explore --hypothesis-seed=7`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import redis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tideover import clock
from tideover.core.breaker import TRANSITIONS, Breaker, Forced, Transition, in_force, is_probe_due
from tideover.core.detector import MOST_H, TOP
from tideover.core.outcome import OK, of_response
from tideover.core.route import is_task_key, route_key, task_key
from tideover.evidence import Flight
from tideover.health import Health
from tideover.settings import load
from tideover.store.breakers import NUMBERS, Batch, Breakers
from tideover.store.keys import Keys
from tideover.store.registry import Registry

ROUTE, MODEL, TASK = "anthropic", "claude-opus-4-8", "shop.tasks.answer"
MODEL_KEY, ROUTE_KEY, TASK_KEY = f"{ROUTE}/{MODEL}", route_key(ROUTE), task_key(TASK)
KEYS = (MODEL_KEY, ROUTE_KEY, TASK_KEY)
PROCESSES = 3
LEASE_S = 30.0
STEPS = 60
OUTCOMES = {
    "ok": OK,
    "overloaded": of_response(529, {}, None),
    "front door": of_response(502, {"content-type": "text/html"}, b"<html>"),
    "throttled": of_response(429, {"retry-after": "7"}, b"{}"),
    "key refused": of_response(401, {}, b"{}"),
    "no such model": of_response(404, {}, b'{"type": "error", "error": {"type": "not_found_error", "message": "model: x"}}'),
    "refused as wrong": of_response(400, {}, b"{}"),
}
THE_PROCESSES = st.integers(0, PROCESSES - 1)
JOBS = st.integers(0, 30).map(str)


@dataclass
class Process:
    """One process, what it has under way, and how far its clock is off."""

    health: Health
    flights: list[Flight] = field(default_factory=list)
    off_s: float = 0.0
    is_cut: bool = False

    @contextmanager
    def acting(self) -> Iterator[Health]:
        """By its own clock."""
        clock._ahead = time.time() - time.monotonic() + self.off_s
        try:
            yield self.health
        finally:
            clock._ahead = None


@dataclass
class Probe:
    """A prober that believes it may ask, and since when by the machine's own count of time."""

    by: Process
    key: str
    taken: Breaker
    since_s: float


class SharedBreakers(RuleBasedStateMachine):
    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        super().__init__()
        client.flushdb()
        self.client, self.keys = client, keys
        self.store = Breakers(client, keys)
        self.processes = [self.new_process() for _ in range(PROCESSES)]
        self.probes: list[Probe] = []
        self.olds: list[tuple[str, Breaker]] = []
        self.passed_s = 0.0
        self.last = self.store.read(KEYS)

    def new_process(self) -> Process:
        config = load(environ={"TIDEOVER_REDIS_URL": "redis://unused"}, start=Path("/"))
        return Process(Health(config, Breakers(self.client, self.keys), Registry(self.client, self.keys)))

    def now_s(self) -> float:
        seconds, micros = self.client.time()
        return seconds + micros / 1e6

    def dump(self) -> dict[bytes, Any]:
        return {key: self.client.dump(key) for key in self.client.scan_iter("*")}

    # calls

    @rule(of=THE_PROCESSES, job=JOBS, whole=st.integers(0, 5))
    def begins(self, of: int, job: str, whole: int) -> None:
        """A call, now and then of the route itself: its eras are as the process sees them, however old that is."""
        process = self.processes[of]
        with process.acting() as health:
            process.flights.append(health.begin(ROUTE, "*" if whole == 0 else MODEL, job))

    @precondition(lambda self: any(process.flights for process in self.processes))
    @rule(data=st.data(), outcome=st.sampled_from(list(OUTCOMES)))
    def ends(self, data: st.DataObject, outcome: str) -> None:
        process = data.draw(st.sampled_from([process for process in self.processes if process.flights]))
        flight = process.flights.pop(data.draw(st.integers(0, len(process.flights) - 1)))
        with process.acting() as health:
            health.end(flight, OUTCOMES[outcome])

    @rule(
        of=THE_PROCESSES, outcome=st.sampled_from(["ok", "overloaded", "front door", "refused as wrong"]), n=st.integers(1, 30)
    )
    def calls(self, of: int, outcome: str, n: int) -> None:
        """A row of calls of different jobs that come to the same."""
        process = self.processes[of]
        with process.acting() as health:
            for nth in range(n):
                job = f"{self.passed_s} {len(self.olds)} {nth}"
                health.end(health.begin(ROUTE, MODEL, job), OUTCOMES[outcome])
                health.note_job(TASK, job, refused=outcome == "refused as wrong")

    @rule()
    def all_find_it_down(self) -> None:
        for of in range(PROCESSES):
            self.calls(of, "overloaded", 9)
            self.reports(of)

    @rule(of=THE_PROCESSES)
    def reports(self, of: int) -> None:
        """What a process's thread does several times a second; without Redis it decides alone, which moves nothing in Redis."""
        process, before = self.processes[of], self.dump()
        with process.acting() as health:
            if not process.is_cut:
                health.flush()
                return
            health.reporter.decide_alone()
        assert before == self.dump()

    # messages

    @rule(of=THE_PROCESSES)
    def hears(self, of: int) -> None:
        """Of all news at once, also of the lost ones."""
        process = self.processes[of]
        if process.is_cut:
            return
        with process.acting() as health:
            health.refresh()
            known = self.store.read(self.store.keys_known())
            assert known == {key: health.views[key] for key in known}

    @rule(of=THE_PROCESSES)
    def loses_redis(self, of: int) -> None:
        """For longer than the last opinion stands; or finds it again."""
        process = self.processes[of]
        process.is_cut = not process.is_cut
        process.health._gone_since = -1e9 if process.is_cut else None

    @rule(of=THE_PROCESSES)
    def restarts(self, of: int) -> None:
        """Killed, with all that it had not told."""
        gone = self.processes[of]
        self.probes = [probe for probe in self.probes if probe.by is not gone]
        self.processes[of] = self.new_process()

    # time

    @rule(of=THE_PROCESSES, off_s=st.sampled_from([-86_400.0, -40.0, 0.0, 40.0, 86_400.0]))
    def clock_jumps(self, of: int, off_s: float) -> None:
        self.processes[of].off_s = off_s

    @rule(seconds=st.sampled_from([1, 7, 11, 45, 130, 700]))
    def time_goes_by(self, seconds: int) -> None:
        """Whatever was, was so much longer ago."""
        self.passed_s += seconds
        for key in KEYS:
            row = {
                name.decode(): int(at)
                for name, at in self.client.hgetall(self.keys.breaker(key)).items()
                if name.endswith(b"_ms")
            }
            if row:
                self.client.hset(self.keys.breaker(key), mapping={name: at - 1000 * seconds for name, at in row.items() if at})
            for ages in (self.keys.reporters(key), self.keys.failing(key)):
                for member, at in self.client.zrange(ages, 0, -1, withscores=True):
                    self.client.zadd(ages, {member: at - 1000 * seconds})
        for process in self.processes:
            for flight in process.flights:
                flight.began -= seconds
        self.last = {key: replace(now, **self.numbers(key)) for key, now in self.store.read(KEYS).items()}

    def numbers(self, key: str) -> dict[str, Any]:
        return {name: getattr(self.last[key], name) for name in (*NUMBERS, "version", "state")}

    # probes

    @rule(of=THE_PROCESSES, key=st.sampled_from([MODEL_KEY, ROUTE_KEY]), knows=st.booleans())
    def would_probe(self, of: int, key: str, knows: bool) -> None:
        """Only one at a time, whatever the clocks of the others say."""
        if knows:
            self.hears(of)
        process = self.processes[of]
        with process.acting() as health:
            view = health.views.get(key)
            if process.is_cut or view is None or not is_probe_due(view, clock.now(), health.policy):
                return
            taken = self.store.begin_probe(key, view, LEASE_S, clock.now())
        others = [probe for probe in self.probes if probe.key == key and self.passed_s - probe.since_s < LEASE_S]
        assert taken is None or not others
        if taken is not None:
            self.probes = [probe for probe in self.probes if probe.by is not process or probe.key != key]
            self.probes.append(Probe(process, key, taken, self.passed_s))

    @precondition(lambda self: self.probes)
    @rule(data=st.data(), answered=st.booleans())
    def probe_ends(self, data: st.DataObject, answered: bool) -> None:
        """However late. Whose lease went to another one moves nothing."""
        probe = data.draw(st.sampled_from(self.probes))
        self.probes.remove(probe)
        before, current = self.dump(), self.store.read([probe.key])[probe.key]
        with probe.by.acting():
            if probe.taken.state == "half-open":
                change = Transition(to="recovering" if answered else "open", why="probed")
                moved = self.store.transition(probe.key, probe.taken, change, clock.now())
            else:
                self.store.end_probe(probe.key, probe.taken.fence)
                moved = False
        assert not moved or current.fence == probe.taken.fence
        if current.fence != probe.taken.fence:
            assert before == self.dump()

    # stale views

    @rule(key=st.sampled_from(KEYS))
    def remembers(self, key: str) -> None:
        self.olds.append((key, self.store.read([key])[key]))

    @precondition(lambda self: self.olds)
    @rule(data=st.data())
    def acts_on_what_it_remembers(self, data: st.DataObject) -> None:
        """It moves the breaker if it still is as it was, and else nothing at all."""
        key, seen = data.draw(st.sampled_from(self.olds))
        after = sorted(TRANSITIONS[seen.state] - {"half-open"})  # which takes a lease
        change = Transition(to=data.draw(st.sampled_from(after)), why="remembered")
        before, current = self.dump(), self.store.read([key])[key]
        is_same = all(getattr(seen, name) == getattr(current, name) for name in ("state", "generation", "era", "fence"))
        assert is_same == self.store.transition(key, seen, change, self.now_s())
        assert is_same or before == self.dump()

    @rule(key=st.sampled_from(KEYS), n=st.integers(1, 3))
    def evidence_comes_late(self, key: str, n: int) -> None:
        """What began in another era is not counted."""
        before = self.store.read([key])[key]
        told = self.store.report(key, "late", Batch(era=before.era - n, runs=[("failed", 9)]))
        assert before == told.breaker == self.store.read([key])[key]

    # operators

    @rule(
        key=st.sampled_from([MODEL_KEY, ROUTE_KEY]), state=st.sampled_from(["open", "closed"]), for_s=st.sampled_from([5, 60])
    )
    def is_forced(self, key: str, state: str, for_s: float) -> None:
        forced = self.store.force(key, state, for_s, "me", "why")
        assert isinstance(forced.forced, Forced)
        assert state == in_force(forced, self.now_s()).state
        assert self.last[key].state == forced.state  # what is computed goes on beneath

    @rule(key=st.sampled_from([MODEL_KEY, ROUTE_KEY]))
    def is_left_to_itself(self, key: str) -> None:
        self.store.unforce(key)
        breaker = self.store.read([key])[key]
        assert breaker is in_force(breaker, self.now_s())

    @rule(key=st.sampled_from(KEYS))
    def is_resumed(self, key: str) -> None:
        seen = self.store.read([key])[key]
        if seen.state == "open":
            assert self.store.transition(key, seen, Transition(to="recovering", why="resumed"), self.now_s())

    # what must hold

    @invariant()
    def each_moved_as_the_table_says(self) -> None:
        for key, now in self.store.read(KEYS).items():
            was = self.last[key]
            assert all(getattr(was, name) <= getattr(now, name) for name in ("generation", "era", "fence", "version")), key
            changes = now.version - was.version
            reached = {was.state}
            for _ in range(changes):
                reached |= {after for state in reached for after in TRANSITIONS[state]}
            assert now.state in reached, key
            assert changes >= (now.generation - was.generation) + (now.fence > was.fence and now.era == was.era)
            if changes == 0:
                assert [getattr(was, name) for name in NUMBERS] == [getattr(now, name) for name in NUMBERS], key
            assert (now.state == "half-open") <= (now.probing_until > 0), key
            assert (now.parked != "") <= now.is_down, key
            assert is_task_key(key) or "paused" != now.parked
            charts = (now.charts.brownout, now.charts.blackout, now.charts.majority)
            assert all(0 <= chart <= TOP * MOST_H and math.isfinite(chart) for chart in charts), key
            assert 0 <= now.charts.failed <= max(now.charts.calls, now.charts.failed), key
            self.last[key] = now

    @invariant()
    def nobody_counts_for_ever(self) -> None:
        for process in self.processes:
            assert all(len(pending.runs) <= 2000 for pending in process.health.reporter._unsent.values())


def test_no_order_of_events_breaks_the_rules(client: redis.Redis, keys: Keys, own_clock: None) -> None:
    """No illegal state, no two probers, no permit or view of yesterday that moves anything."""
    some = settings(stateful_step_count=STEPS, max_examples=settings.default.max_examples // 3)
    run_state_machine_as_test(lambda: SharedBreakers(client, keys), settings=some)
