# SPDX-License-Identifier: Apache-2.0
"""This process's view of every route: reading costs a dict lookup, reporting an append. One thread does the rest."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tideover import clock, events
from tideover.attempt import Attempt
from tideover.core.admission import Hold, hold_for_any
from tideover.core.breaker import CLOSED, Breaker, Transition, judge
from tideover.core.job import Job
from tideover.core.outcome import Outcome, of_task_error
from tideover.core.route import Hop, breaker_key
from tideover.settings import Mode, Settings
from tideover.store.breakers import Breakers, Reading
from tideover.store.client import FAILED
from tideover.store.registry import Registry

STRICTNESS: dict[Mode, int] = {"act": 0, "observe": 1, "bypass": 2}
FLUSH_S = 0.05
REFRESH_S = 1.0
MOST_QUEUED = 10_000
MOST_MODELS = 50
"""Models learned of one task: more are names made up at run time, not models."""
QUIET_S = 2.0
"""The pause after a 429 that names none."""
LEAST_QUIET_S = 0.5
MOST_QUIET_S = 3600.0


@dataclass(frozen=True, slots=True)
class Report:
    """One call's outcome on its way to the shared breaker."""

    key: str
    generation: int
    failed: bool
    why: str
    job_id: str
    quiet_s: float = 0.0


class Health:
    """What is known of the routes, their breakers and the mode; kept current by one thread."""

    def __init__(self, settings: Settings, breakers: Breakers, registry: Registry) -> None:
        self.settings, self.breakers, self.registry = settings, breakers, registry
        self.policy = settings.breaker.policy()
        self.views: dict[str, Breaker] = {}
        self.models: dict[str, frozenset[str]] = {}
        self.mode: Mode = settings.mode
        self._queue: deque[Report] = deque(maxlen=MOST_QUEUED)
        self._learned: deque[tuple[str, str]] = deque(maxlen=MOST_QUEUED)
        self._counted: dict[str, tuple[int, set[str]]] = {}
        self._slots = {
            name: threading.BoundedSemaphore(route.max_in_flight)
            for name, route in settings.routes.items()
            if route.max_in_flight
        }
        self._waiting: dict[str, dict[object, Callable[[], object]]] = {}
        self._reading = threading.Lock()
        """Between reading breakers and believing them: else an old answer could replace a newer one."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._gone = False

    def view(self, key: str) -> Breaker:
        return self.views.get(key, CLOSED)

    def chain(self, job: Job, model: str, refused: Mapping[str, str], unfit: Container[str] = ()) -> tuple[Hop, ...]:
        """The job's routes for one model, primary first, each with its breaker and the reason that rules it out, if any.

        `unfit` routes could not carry the request at all, so that there is no point in waiting for them.
        """
        hops = []
        for name in job.routes:
            key = breaker_key(name, model)
            serves = self.settings.route(name).model(model) is not None
            why = refused.get(name, "it could not carry this request" if name in unfit else None)
            why = why if serves else f"it has no model for {model}"
            hops.append(Hop(name, key, self.view(key), why, serves and name not in unfit))
        return tuple(hops)

    def report(self, key: str, generation: int, outcome: Outcome, job_id: str) -> None:
        """Notes how a call ended, without any I/O. What was the caller's fault, or ours, says nothing of the provider."""
        if outcome.kind == "throttle":
            quiet_s = QUIET_S if outcome.retry_after_s is None else min(max(outcome.retry_after_s, LEAST_QUIET_S), MOST_QUIET_S)
            until = max(self.view(key).throttled_until, clock.now() + quiet_s)
            self.views = {**self.views, key: replace(self.view(key), throttled_until=until)}
            self._queue.append(Report(key, generation, False, "", job_id, quiet_s))
        elif outcome.kind == "ok" or outcome.counts_as_failure:
            self._queue.append(Report(key, generation, outcome.counts_as_failure, outcome.why, job_id))

    def hold_for(self, attempt: Attempt, error: Exception) -> Hold | None:
        """The hold for a provider's failure that left a job's function; None: it is the job's own failure.

        A job that was released in this very generation is not held in it again. Then a probe decides, which takes a moment:
        if it fails too the breaker opens, in a new generation; else the failure is the job's own.
        """
        if attempt.model is None or self.mode != "act":
            return None
        outcome = of_task_error(error, now=clock.now())
        hops = [hop for hop in self.chain(attempt.job, attempt.model, {}) if hop.serves]
        if not hops or not (outcome.counts_as_failure or outcome.kind == "throttle"):
            return None
        attempt.detail = outcome.why
        if attempt.permit is not None and attempt.permit.covers(hops[0].key, hops[0].breaker):
            if not self.probe_fails(hops[0].route, attempt.model):
                return None
            hops = [hop for hop in self.chain(attempt.job, attempt.model, {}) if hop.serves]
        waits_for = hops if attempt.job.may_reroute else hops[:1]
        return hold_for_any(waits_for, "failed")

    @contextmanager
    def when_open(self, key: str, tell: Callable[[], object]) -> Iterator[None]:
        """Calls `tell`, from another thread, as soon as this breaker opens."""
        waiting = self._waiting.setdefault(key, {})
        token = object()
        waiting[token] = tell
        try:
            yield
        finally:
            waiting.pop(token, None)

    def learn(self, task: str, model: str) -> None:
        """Remembers that a task calls a model, so that its jobs can be held before they start."""
        known = self.models.get(task, frozenset())
        if model not in known and len(known) < MOST_MODELS:
            self.models = {**self.models, task: known | {model}}
            self._learned.append((task, model))

    def take_slot(self, route: str) -> bool:
        """Whether the route has room for one more call of this process; give it back with `free_slot`."""
        slots = self._slots.get(route)
        return slots is None or slots.acquire(blocking=False)

    def free_slot(self, route: str) -> None:
        if (slots := self._slots.get(route)) is not None:
            slots.release()

    def probe_fails(self, route: str, model: str) -> bool:
        """Asks a route a one-token question, and opens its breaker if it does not answer."""
        from tideover.providers import wire

        outcome = wire.probe(route, model)
        if not outcome.answered:
            try:
                self.trip(breaker_key(route, model), outcome.why)
            except FAILED as error:
                events.store_unavailable("opening a breaker", type(error).__name__)
        return not outcome.answered

    def trip(self, key: str, why: str) -> None:
        """Opens a breaker on the word of a call and a probe that failed: where few jobs run, the window would never fill."""
        reading = self._report(key)
        if reading.breaker.state in ("closed", "recovering"):
            self.move(key, reading.breaker, Transition("open", why))

    def move(self, key: str, seen: Breaker, change: Transition) -> bool:
        """Makes a transition, unless another process was faster; says so in the log once for all."""
        moved = self.breakers.transition(key, seen, change)
        if moved:
            events.breaker_changed(key, seen.state, change.to, change.why)
        with self._reading:
            self._see(self.breakers.read([key]))
        return moved

    def _see(self, fresh: Mapping[str, Breaker]) -> None:
        """Takes in what the store says, and tells the calls that wait on a route that is down now."""
        self.views = {**self.views, **fresh}
        for key, breaker in fresh.items():
            if breaker.state == "open":
                for tell in list(self._waiting.get(key, {}).values()):
                    tell()

    def start(self) -> None:
        self.refresh()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="tideover-health")
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _loop(self) -> None:
        news: Any = None
        refreshed = clock.monotonic()
        while not self._stop.is_set():
            try:
                news = news or self.breakers.listen()
                heard = news.get_message(ignore_subscribe_messages=True, timeout=FLUSH_S)
                self.flush()
                if heard or clock.monotonic() - refreshed >= REFRESH_S:
                    self.refresh()
                    refreshed = clock.monotonic()
                self._gone = False
            except FAILED as error:
                self._say_gone(error)
                news = None
                self._stop.wait(REFRESH_S)
            except Exception:  # noqa: BLE001 - this thread must outlive any defect
                events.fault_inside("health")
                self._stop.wait(REFRESH_S)
        self.flush_last()
        if news is not None:
            news.close()

    def _say_gone(self, error: Exception) -> None:
        if not self._gone:
            self._gone = True
            events.store_unavailable("following the breakers; the last opinion stands", type(error).__name__)

    def flush_last(self) -> None:
        try:
            self.flush()
        except FAILED as error:
            events.store_unavailable("reporting the last outcomes", type(error).__name__)

    def refresh(self) -> None:
        """Reads all breakers, what tasks call, and whether an operator switched tideover off."""
        with self._reading:
            self._see(self.breakers.read(self.breakers.keys_known()))
        self.models = self.registry.models()
        asked: Mode = "act" if self.registry.bypass() is None else "bypass"
        mode = max(self.settings.mode, asked, key=STRICTNESS.__getitem__)
        if mode != self.mode:
            self.mode = mode
            events.mode_changed(mode)

    def flush(self) -> None:
        """Sends the outcomes noted since last time, one script for each breaker, and lets the core judge what comes back."""
        while self._learned:
            self.registry.learn(*self._learned.popleft())
        batches: dict[tuple[str, int], list[Report]] = defaultdict(list)
        while self._queue:
            report = self._queue.popleft()
            batches[report.key, report.generation].append(report)
        for (key, generation), reports in batches.items():
            failures = [report for report in reports if report.failed and self._first_of_job(report)]
            reading = self._report(
                key,
                generation=generation,
                ok=sum(1 for report in reports if not report.failed and report.quiet_s == 0),
                failed=len(failures),
                why=failures[-1].why if failures else "",
                quiet_s=max(report.quiet_s for report in reports),
            )
            self._judge(key, reading)

    def _report(self, key: str, **calls: Any) -> Reading:
        with self._reading:
            reading = self.breakers.report(key, self.policy.window_s, **calls)
            self._see({key: reading.breaker})
        return reading

    def _judge(self, key: str, reading: Reading) -> None:
        change = judge(reading.breaker, reading.window, now=reading.now, waiting=True, policy=self.policy)
        if change is not None:
            self.move(key, reading.breaker, change)

    def _first_of_job(self, report: Report) -> bool:
        """Distinct jobs count: one job that fails ten times in a generation is one failure."""
        generation, jobs = self._counted.get(report.key, (-1, set[str]()))
        if generation != report.generation or len(jobs) > MOST_QUEUED:
            generation, jobs = report.generation, set()
        first = report.job_id not in jobs
        jobs.add(report.job_id)
        self._counted[report.key] = (generation, jobs)
        return first
