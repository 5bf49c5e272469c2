# SPDX-License-Identifier: Apache-2.0
"""Turns what calls came to into evidence, sends it, and acts on what the breakers then say. One thread at a time."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING

from tideover import clock
from tideover.core import detector
from tideover.core.breaker import CLOSED, Transition, Witnesses, judge, judge_task
from tideover.core.detector import Charts, Steps, is_down
from tideover.core.latency import LEAST_S, UNKNOWN_S, overdue_s
from tideover.core.outcome import Outcome
from tideover.core.pacing import Limits
from tideover.core.policy import BreakerPolicy
from tideover.core.route import is_task_key, route_key
from tideover.errors import ConfigurationError
from tideover.evidence import Flight, Gathered, Pending, Pressure
from tideover.store.breakers import Batch, Reading
from tideover.store.client import FULL

if TYPE_CHECKING:
    from tideover.health import Health

FLUSH_S = 0.05
FLUSH_PER_REPORTER_S = 0.004
"""Where many processes report on one breaker each does so a little less often, all evidence alike: 64 of them every 0.26 s."""
STUDY_S = 30.0
"""How often learned latencies are read, and how often a working credential is noted."""
QUIET_S = 2.0
"""The pause after a 429 that names none."""
LEAST_QUIET_S = 0.5
MOST_QUIET_S = 3600.0
WORKED_S = 86_400.0
"""A credential that worked within this time, or a model that answered, is not misconfigured when it is refused."""
OTHERS_WORK_S = 300.0
"""Where another credential worked so lately, the trouble is this process's own."""
PARKED_PROBES = 4
"""How much less often than an open one a parked route is asked, where its provider names no date."""
MOST_PARKS = 100
STILL_S = 1.0
"""Who does nothing for so long stands still."""
SPARE = 0.5
"""A 429 although more than this share of its limit is left is not about our pace."""


def quiet_s(outcome: Outcome) -> float:
    """How long a provider wants to be left in peace."""
    return QUIET_S if outcome.retry_after_s is None else min(max(outcome.retry_after_s, LEAST_QUIET_S), MOST_QUIET_S)


def parked_wait_s(outcome: Outcome, policy: BreakerPolicy) -> float:
    """When to ask a parked route again: at the date that it names, if it names one."""
    return PARKED_PROBES * policy.probe_max_s if outcome.retry_after_s is None else outcome.retry_after_s


class Reporter:
    """Evidence of this process on its way to the shared breakers."""

    def __init__(self, health: Health) -> None:
        self.health, self.breakers = health, health.breakers
        self._lock = threading.Lock()
        self._failed_jobs: dict[str, tuple[int, set[str]]] = {}
        self._unsent = Gathered(self._failed_jobs)
        self._quiet: dict[str, float] = {}
        self._pressures: defaultdict[str, Pressure] = defaultdict(Pressure)
        self._reporters = 1
        self._parks: deque[tuple[Flight, Outcome]] = deque(maxlen=MOST_PARKS)
        self._own: dict[str, tuple[int, Charts]] = {}
        """Charts of this process's evidence alone, with their era."""
        self.with_limits: set[str] = set()
        """Routes whose answers carry rate-limit headers."""
        self._gathered_at = clock.monotonic()
        self._limits: dict[str, float] = {}
        self._studied_at = 0.0
        self._noted: dict[str, tuple[str, float]] = {}

    @property
    def pause_s(self) -> float:
        """How often to send, for Redis' sake."""
        return max(FLUSH_S, FLUSH_PER_REPORTER_S * self._reporters)

    def limit_s(self, key: str, *, asks_little: bool = False) -> float:
        """When a call of this breaker without a first token is overdue. `asks_little`: a probe."""
        return self._limits.get(key) or (LEAST_S if asks_little else UNKNOWN_S)

    def flush(self) -> None:
        """Sends what was noted since last time. What Redis did not take is sent next time."""
        with self._lock:
            self._gather()
            for route in [route for route, (_, at) in self._noted.items() if at < 0]:
                self._note_credential(route)
            for key in list(self._quiet):
                self._take_in(key, self.breakers.report(key, self.health.process, quiet_s=self._quiet[key]))
                del self._quiet[key]
            for (key, era), pending in list(self._unsent.items()):
                reading = self._send(key, era, pending)
                del self._unsent[key, era]  # before anything else may fail: it is counted
                self._act_on(key, reading)
            while self._parks:  # after the evidence, which may say that it has just worked
                self._set_aside(*self._parks[0])
                self._parks.popleft()
            while self._pressures:
                key, pressure = next(iter(self._pressures.items()))
                self.health.paces.feel(key, pressure.felt, live=pressure.live, limits=self.health.flights.limits.pop(key, {}))
                del self._pressures[key]
            if clock.monotonic() - self._studied_at > STUDY_S:
                self._study()

    def forget(self) -> None:
        """What was noted in a time without Redis says nothing of now: maybe only this machine had no network."""
        with self._lock:
            self._gather()
            self._unsent.clear()
            self._failed_jobs.clear()
            self._own.clear()
            self._parks.clear()
            self._pressures.clear()

    def decide_alone(self) -> None:
        """While Redis is gone: this process's own evidence moves this process's own view, by the same rules."""
        with self._lock:
            self._gather()
        for key, (era, charts) in list(self._own.items()):
            view = self.health.views.get(key, CLOSED)
            if era == view.era:
                alone = replace(view, charts=charts)
                change = self.judged(key, Reading(alone, Witnesses(), clock.now()))
                if change is not None:
                    self.health.move(key, alone, change)

    def _gather(self) -> None:
        """What ended and what is overdue, as evidence; each call once."""
        still = self._excuse()
        for flight in self.health.flights.overdue(self.limit_s, LEAST_S):
            why = f"no first token within {self.limit_s(flight.key):.0f} s"
            flight.counted = self._unsent.failed(flight.key, flight.eras[0], flight.job_id, why)
            if flight.paced:
                self._pressures[flight.key].overdue()
        for flight, ended, took_s in self.health.flights.paced():
            if ended is not None and ended.timed_out and (still or flight.delayed):
                continue
            self._pressures[flight.key].add(flight, ended, took_s, 0.0 if ended is None else quiet_s(ended))
        for flight, outcome in self.health.flights.ended():
            if not (outcome.timed_out and (still or flight.delayed)):
                self._weigh(flight, outcome)
        for key, era, job_id, refused in self.health.flights.jobs():
            if refused:
                self._unsent.failed(key, era, job_id, "its requests are refused as wrong")
            else:
                self._unsent.succeeded(key, era)
        self._learn_own()

    def _excuse(self) -> bool:
        """Whether this process stood still, or its event loop did: that makes no call overdue, and no time limit count."""
        now, last = clock.monotonic(), self._gathered_at
        self._gathered_at = now
        pulse_at = last if self.health.pulse_at is None else self.health.pulse_at
        still = max(now - last, now - pulse_at) > STILL_S
        if still:
            self.health.flights.excuse(now - last)
        return still

    def _weigh(self, flight: Flight, outcome: Outcome) -> None:
        (model_era, route_era), route = flight.eras, route_key(flight.route)
        if flight.counted and not outcome.counts_as_failure:
            self._unsent.taken_back(flight.key, model_era, flight.job_id)
        match outcome.kind:
            case "ok":
                if flight.key != route and not flight.counted:
                    self._unsent.succeeded(flight.key, model_era)
                if flight.key != route:
                    self._unsent.took(flight)
                self._unsent.succeeded(route, route_era)
                self._worked(flight)
            case "throttle" if self.is_spurious(flight.route, outcome):
                self._unsent.failed(flight.key, model_era, flight.job_id, f"{outcome.why}, with most of its limit left")
            case "throttle":
                self._quiet[flight.key] = max(self._quiet.get(flight.key, 0.0), quiet_s(outcome))
            case "auth" | "quota" | "model":
                self._parks.append((flight, outcome))
            case "outage" | "ambiguous" if flight.first_s is not None:
                self._unsent.lapsed(flight.key, model_era, outcome.why)
            case "outage" | "ambiguous" if outcome.scope == "route":
                self._unsent.failed(route, route_era, flight.job_id, outcome.why)
            case "outage" | "ambiguous" if not flight.counted:
                self._unsent.failed(flight.key, model_era, flight.job_id, outcome.why)
            case "outage" | "ambiguous" | "caller" | "local":
                pass

    def is_spurious(self, route: str, outcome: Outcome) -> bool:
        """Whether a 429 cannot be about our pace: most of the limit is left, or it says nothing where it used to."""
        if outcome.headroom is None:
            return route in self.with_limits and outcome.retry_after_s is None
        return outcome.headroom > SPARE

    def note_limits(self, flight: Flight, limits: Limits, outcome: Outcome) -> None:
        """Notes what an answer says of the account's limits."""
        if flight.paced:
            self.health.flights.limits[flight.key] = limits
        if outcome.kind == "ok":
            self.with_limits.add(flight.route)

    def _worked(self, flight: Flight) -> None:
        digest, noted_at = self._noted.get(flight.route, ("", -STUDY_S))
        if not flight.foreign and clock.monotonic() - abs(noted_at) > STUDY_S:
            self._noted[flight.route] = (digest, -1.0)

    def _note_credential(self, route: str) -> None:
        digest = self.credential(route)
        with suppress(FULL):  # the next one tells it; evidence must not wait for room
            self.breakers.note_credential(route, digest, clock.now())
        self._noted[route] = (digest, clock.monotonic())

    def credential(self, route: str) -> str:
        """A digest of the route's credential, which tells one from another and nothing more."""
        try:
            key = self.health.settings.api_key(route)
        except ConfigurationError:
            key = None
        return "none" if key is None else sha256(key.encode()).hexdigest()[:12]

    def _set_aside(self, flight: Flight, outcome: Outcome) -> None:
        """What a refused credential, spent money or an unknown model means: an outage, our own trouble, or a parked route."""
        now, route, digest = clock.now(), route_key(flight.route), self.credential(flight.route)
        key = flight.key if outcome.kind == "model" else route
        if outcome.kind == "model" and key == route:  # one of too many names
            return
        if outcome.kind == "model" and now - self.health.views.get(key, CLOSED).ok_at < WORKED_S:
            self._unsent.failed(key, flight.eras[0], flight.job_id, outcome.why)
            return
        if outcome.kind == "auth":
            worked = self.breakers.credentials(flight.route)
            if now - worked.get(digest, 0.0) < WORKED_S:
                self._unsent.failed(route, flight.eras[1], flight.job_id, outcome.why)
                return
            if any(now - at < OTHERS_WORK_S for at in worked.values()):
                self.health.step_apart(route, f"{outcome.why}; another process's credential works")
                return
        assert outcome.kind in ("auth", "quota", "model")
        wait_s = parked_wait_s(outcome, self.health.policy)
        seen = self.breakers.read([key])[key]
        if not seen.is_down and seen.era == flight.eras[1 if key == route else 0]:  # else it began before somebody mended it
            parking = Transition(to="open", why=outcome.why, parked=outcome.kind, probe_at=now + wait_s, credential=digest)
            self.health.move(key, seen, parking)

    def _learn_own(self) -> None:
        for (key, era), pending in self._unsent.items():
            known, charts = self._own.get(key, (era, Charts()))
            new, pending.learned = pending.runs[pending.learned :], len(pending.runs)
            steps = Steps.of(self.health.views.get(key, CLOSED).base)
            self._own[key] = (era, detector.after(charts if known == era else Charts(), new, steps))

    def _send(self, key: str, era: int, pending: Pending) -> Reading:
        batch = Batch(era=era, runs=pending.runs, why=pending.why, latencies=pending.latencies)
        return self.breakers.report(key, self.health.process, batch, known=self.health.views.get(key))

    def _act_on(self, key: str, reading: Reading) -> None:
        self._reporters = reading.by.reporters
        self._take_in(key, reading)
        change = self.judged(key, reading)
        if change is not None:
            self.health.move(key, reading.breaker, change)
        self._look_at_own(key, reading)

    def _take_in(self, key: str, reading: Reading) -> None:
        self.health.see({key: reading.breaker})

    def judged(self, key: str, reading: Reading, *, waiting: bool = True) -> Transition | None:
        """What its charts, and the time, do to a breaker. `waiting`: jobs are held for it, or may be."""
        breaker, now, policy = reading.breaker, reading.now, self.health.policy
        if is_task_key(key):
            return judge_task(breaker, now=now, waiting=waiting, policy=policy)
        return judge(breaker, reading.by, now=now, waiting=waiting, policy=policy)

    def _look_at_own(self, key: str, reading: Reading) -> None:
        """Trouble that only this process has is its own; what others see as well is theirs, too."""
        era, charts = self._own.get(key, (0, Charts()))
        breaker = reading.breaker
        if is_task_key(key):  # a defect of its code: no other process would fare better
            return
        if reading.by.agree or breaker.is_down:
            self.health.rejoin(key)
        elif era == breaker.era and is_down(charts, breaker.base.threshold):
            self.health.step_apart(key, breaker.why)

    def released(self, key: str, n: int) -> None:
        """Notes that jobs were let go for a breaker; the pace hears of it with the calls."""
        with self._lock:
            pressure = self._pressures[key]
            pressure.felt = replace(pressure.felt, released=pressure.felt.released + n)

    def forget_own(self, key: str) -> None:
        self._own.pop(key, None)

    def _study(self) -> None:
        """Reads how long first tokens take, over all processes."""
        self._studied_at = clock.monotonic()
        for key in self._models():
            if (limit_s := overdue_s(self.breakers.latencies(key))) is not None:
                self._limits[key] = limit_s

    def _models(self) -> Iterator[str]:
        return (key for key in list(self.health.views) if not key.endswith("/*") and not is_task_key(key))
