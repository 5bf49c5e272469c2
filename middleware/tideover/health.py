# SPDX-License-Identifier: Apache-2.0
"""This process's view of every route: reading costs a dict lookup, reporting an append. One thread does the rest."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from uuid import uuid4

from tideover import clock, events
from tideover.attempt import Attempt
from tideover.core.admission import Hold, hold_for_any
from tideover.core.breaker import CLOSED, Breaker, Transition, moved, together
from tideover.core.job import Job
from tideover.core.outcome import OK, Outcome, of_task_error
from tideover.core.route import WHOLE, Hop, above, breaker_key, route_key, task_key
from tideover.evidence import MOST_KEYS, PROBE, Flight, Flights, Paced
from tideover.limits import Budgets, Rates, Slots
from tideover.reporting import FLUSH_S, Reporter, quiet_s
from tideover.settings import Mode, Settings
from tideover.store.answers import Answers
from tideover.store.breakers import Breakers
from tideover.store.client import FAILED, FULL
from tideover.store.keys import BYPASS
from tideover.store.limiter import Limiter
from tideover.store.news import News
from tideover.store.paces import Paces
from tideover.store.registry import Registry
from tideover.store.spending import Spending

STRICTNESS: dict[Mode, int] = {"act": 0, "observe": 1, "bypass": 2}
REFRESH_S = 1.0
GONE_S = 0.3
MOST_MODELS = 50
"""Models learned of one task: more are names made up at run time, not models."""
LONG_APART_S = 60.0
"""Who alone finds a route down for so long reroutes its critical jobs: maybe no other process takes them."""
STALE_S = 5.0
"""After so long without Redis what calls came to meanwhile is told to nobody."""
STATIC_S = 30.0
"""How long the last opinion stands once Redis is gone. Then this process decides by what it sees itself."""
CANARY_S = 60.0
MOST_PROBES = 4
"""Probes that must all fail, beside the call itself, before one failed call is an outage."""


class Health:
    """What is known of the routes, their breakers and the mode; kept current by one thread."""

    def __init__(self, settings: Settings, breakers: Breakers, registry: Registry) -> None:
        self.settings, self.breakers, self.registry = settings, breakers, registry
        self.paces, self.answers = Paces(breakers.client, breakers.keys), Answers(breakers.client, breakers.keys)
        self.policy = settings.breaker.policy()
        self.process = uuid4().hex[:12]
        self.views: dict[str, Breaker] = {}
        """Breakers as computed, by key."""
        self.seen: dict[str, Breaker] = {}
        """What jobs see of them: routes above models, operators above both."""
        self.apart: dict[str, float] = {}
        """What only this process finds down, and since when (monotonic): its jobs are better off elsewhere."""
        self.models: dict[str, frozenset[str]] = {}
        self.mode: Mode = settings.mode
        self.flights = Flights()
        self.pulse_at: float | None = None
        """When the event loop last showed that it runs (monotonic); None: there is none."""
        self.probes = 0
        """Made since last time they were told."""
        self.reporter = Reporter(self)
        self.budgets = Budgets(self, Spending(breakers.client, breakers.keys))
        self._learned: deque[tuple[str, str]] = deque(maxlen=10_000)
        self.slots, self.rates = Slots(settings), Rates(settings, Limiter(breakers.client, breakers.keys))
        self._waiting: dict[str, dict[object, Callable[[], object]]] = {}
        self._reading = threading.RLock()
        """Between reading breakers and believing them: else an old answer could replace a newer one."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._gone_since: float | None = None

    # reading

    def view(self, key: str) -> Breaker:
        known = self.seen.get(key)
        return self.seen.get(above(key), CLOSED) if known is None else known

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
            apart_at = self.apart.get(key, self.apart.get(route_key(name)))
            if apart_at is not None and clock.monotonic() - apart_at > LONG_APART_S:
                why = why or "this process cannot reach it"
            if name != job.routes[0] and not self.budgets.left(job.task, job.budget_per_hour):
                why, serves = why or "its task's budget for this hour is spent", False
            hops.append(Hop(name, key, self.view(key), why, serves and name not in unfit, apart_at is not None))
        return tuple(hops)

    def is_paused(self, task: str) -> bool:
        """Whether most of a task's jobs are refused as wrong, so that the others wait for somebody to look."""
        view = self.seen.get(task_key(task))
        return view is not None and view.is_down

    # noting

    def begin(self, route: str, model: str, job_id: str, *, paid_by: Paced = "live", task: str = "") -> Flight:
        """Notes that a call begins; of a whole route (`*`) a knock at its front door. Until its end it may become overdue.

        `paid_by`: how it counts if its route recovers. `task`: whose budget pays for it, if one does.
        """
        key = route_key(route) if model == WHOLE else breaker_key(route, model)
        if key not in self.views and len(self.views) >= MOST_KEYS:
            key = route_key(route)
        eras = self.views.get(key, CLOSED).era, self.views.get(route_key(route), CLOSED).era
        paced: Paced = paid_by if self.view(key).state == "recovering" else ""
        return self.flights.begin(Flight(route, key, job_id, eras, paced=paced, model=model, task=task))

    def end(self, flight: Flight, outcome: Outcome) -> None:
        """Notes how a call ended, without any I/O."""
        if outcome.kind == "throttle":
            until = clock.now() + quiet_s(outcome)
            with self._reading:
                view = self.view(flight.key)
                if until > view.throttled_until:
                    self.seen = {**self.seen, flight.key: replace(view, throttled_until=until)}
        if outcome.kind == "ok":
            self.budgets.note(flight, outcome)
        self.rates.note(flight, outcome)
        self.flights.end(flight, outcome)

    def learn(self, task: str, model: str) -> None:
        """Remembers that a task calls a model, so that its jobs can be held before they start."""
        known = self.models.get(task, frozenset())
        if model not in known and len(known) < MOST_MODELS:
            self.models = {**self.models, task: known | {model}}
            self._learned.append((task, model))

    def note_job(self, task: str, job_id: str, *, refused: bool) -> None:
        """Notes that a job's calls were fine, or that its request was refused as wrong."""
        key = task_key(task)
        self.flights.note_job(key, self.views.get(key, CLOSED).era, job_id, refused=refused)

    @contextmanager
    def probing(self, route: str, model: str) -> Iterator[Flight]:
        """A call for the evidence; one that does not end says nothing."""
        flight = self.begin(route, model, f"{PROBE}{uuid4()}")
        try:
            yield flight
        finally:
            self.flights.forget(flight)

    def turn(self, key: str, most_s: float) -> float | None:
        """Takes a live call's turn on a recovering route; the seconds until it comes, None if more than `most_s`.

        Blocks for a moment. While Redis is gone nobody waits: the call counts as it comes.
        """
        try:
            return self.paces.turn(key, most_s, self.settings.drain.policy())
        except FAILED:
            return 0.0

    @contextmanager
    def when_open(self, key: str, tell: Callable[[], object]) -> Iterator[None]:
        """Calls `tell`, from another thread, as soon as this breaker opens."""
        token = object()
        with self._reading:
            self._waiting.setdefault(key, {})[token] = tell
        try:
            yield
        finally:
            with self._reading:
                self._waiting[key].pop(token)
                if not self._waiting[key]:
                    del self._waiting[key]

    # deciding

    def hold_for(self, attempt: Attempt, error: Exception) -> Hold | None:
        """The hold for a provider's failure that left a job's function; None: it is the job's own failure.

        A job that was released in this very generation is not held in it again. Then probes decide, which takes a moment: if
        they fail too the breaker opens, in a new generation; else the failure is the job's own.
        """
        if self.mode != "act":
            return None
        outcome = of_task_error(error, now=clock.now())
        if outcome.kind == "caller":
            self.note_job(attempt.job.task, attempt.job.id, refused=True)
            self.flush_quietly()
            return self.hold_while_paused(attempt.job.task)
        if attempt.model is None or (attempt.foreign and outcome.kind in ("auth", "quota", "model")):
            return None
        hops = [hop for hop in self.chain(attempt.job, attempt.model, {}) if hop.serves]
        if not hops or not (outcome.counts_as_failure or outcome.kind == "throttle"):
            return None
        attempt.detail = outcome.why
        if attempt.permit is not None and attempt.permit.covers(hops[0].key, hops[0].breaker):
            if self.settings.route(hops[0].route).probe and not self.probe_fails(hops[0].route, attempt.model):
                return None
            self.flush_quietly()
            hops = [hop for hop in self.chain(attempt.job, attempt.model, {}) if hop.serves]
            if attempt.permit.covers(hops[0].key, hops[0].breaker) and not self.is_canary(hops[0]):
                return None
        waits_for = hops if attempt.job.may_reroute else hops[:1]
        return hold_for_any(waits_for, "failed")

    def is_canary(self, hop: Hop) -> bool:
        """Whether a released job's failure costs it nothing, in the very generation: its route has yet to show that it is back.

        Where nobody may probe, that is so for a minute: a job that fails for longer fails by itself.
        """
        recovering = hop.breaker.state == "recovering"
        asked = self.settings.route(hop.route).probe or clock.now() - hop.breaker.recovered_at < CANARY_S
        return hop.apart or (recovering and asked)

    def hold_while_paused(self, task: str) -> Hold | None:
        """The hold for a job whose task is paused; None: it is not."""
        key = task_key(task)
        if not self.is_paused(task):
            return None
        return Hold((key,), "paused", self.view(key).generation, "most jobs of its task are refused as wrong")

    def probing_s(self, route: str, model: str) -> float:
        """How long `probe_fails` may take."""
        return MOST_PROBES * self.reporter.limit_s(breaker_key(route, model), asks_little=True)

    def probe_fails(self, route: str, model: str) -> bool:
        """Asks a route one-token questions, until one is answered or its breaker opens; whether it was none."""
        from tideover.providers import wire

        key = breaker_key(route, model)
        if not self.settings.route(route).probe:
            self.flush_quietly()
            return self.view(key).is_down
        for _ in range(MOST_PROBES):
            with self.probing(route, model) as flight:
                outcome = wire.probe(route, model, self.reporter.limit_s(key, asks_little=True))
                self.probes += 1  # which cost money
                events.probe_answered(key, outcome.answered, outcome.why)
                self.end(flight, OK if outcome.answered else outcome)
            if outcome.answered:
                return False
            self.flush_quietly()
            if self.view(key).is_down:
                return True
        return True

    def move(self, key: str, seen: Breaker, change: Transition) -> bool:
        """Makes a transition, unless another process was faster; says so in the log once for all."""
        if self.is_alone:
            self.see({key: replace(moved(seen, change, clock.now()), version=-1)})  # which no breaker in Redis has
            moved_it = True
        else:
            moved_it = self.breakers.transition(key, seen, change, clock.now())
            self.look([key])
        if moved_it:
            events.breaker_changed(key, seen, change)
        return moved_it

    def step_apart(self, key: str, why: str) -> None:
        """What only this process finds down: it takes no jobs for it, and leaves them to others."""
        if key not in self.apart:
            with self._reading:
                self.apart = {**self.apart, key: clock.monotonic()}
                self.seen = dict(self.seen)  # verdicts that stood do so no longer
            events.process_stepped_apart(key, why)

    def rejoin(self, key: str) -> None:
        """This process finds it as the others do, or asked it and was answered."""
        if key in self.apart:
            with self._reading:
                self.apart = {other: since for other, since in self.apart.items() if other != key}
                self.seen = dict(self.seen)
            self.reporter.forget_own(key)
            events.process_rejoined(key)

    @property
    def is_alone(self) -> bool:
        """Redis has been gone for so long that this process decides by what it sees itself."""
        return self._gone_since is not None and clock.monotonic() - self._gone_since > STATIC_S

    # following

    def look(self, keys: Sequence[str]) -> None:
        with self._reading:
            self.see(self.breakers.read(keys))

    def see(self, fresh: Mapping[str, Breaker]) -> None:
        """Takes in what the store says, and tells the calls that wait on a route that is down now."""
        now = clock.now()
        with self._reading:
            self.views = {**self.views, **fresh}
            routes = {key for key in fresh if key.endswith("/*")}
            touched = [key for key in self.views if key in fresh or above(key) in routes]
            self.seen = {**self.seen, **{key: together(self.views[key], self.over(key), now) for key in touched}}
        for key in touched:
            if self.seen[key].is_down:
                for tell in list(self._waiting.get(key, {}).values()):
                    tell()

    def over(self, key: str) -> Breaker:
        return CLOSED if key == above(key) else self.views.get(above(key), CLOSED)

    def start(self) -> None:
        events.log()  # what it loads takes a moment, which the first bad news must not wait for
        self.refresh()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="tideover-health")
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _loop(self) -> None:
        news: News | None = None
        refreshed = flushed = clock.monotonic()
        while not self._stop.is_set():
            try:
                if news is None:
                    news, refreshed = self.breakers.listen(), -REFRESH_S  # what was said meanwhile is read
                changed = news.heard(FLUSH_S)
                self._redis_is_back()
                if clock.monotonic() >= flushed + self.reporter.pause_s - FLUSH_S:
                    self.flush()
                    flushed = clock.monotonic()
                if BYPASS in changed or clock.monotonic() - refreshed >= REFRESH_S:
                    self.refresh()
                    refreshed = clock.monotonic()
                elif changed:
                    self.look(sorted(changed))
            except FAILED as error:
                part_with(news)
                news = None
                self._while_gone(error)
            except Exception:  # noqa: BLE001 - this thread must outlive any defect
                events.fault_inside("health")
                self._stop.wait(REFRESH_S)
        self.flush_quietly()
        part_with(news)

    def _redis_is_back(self) -> None:
        since, self._gone_since = self._gone_since, None
        if since is not None and clock.monotonic() - since > STALE_S:
            self.reporter.forget()

    def _while_gone(self, error: Exception) -> None:
        first = self._gone_since is None
        if first:
            self._gone_since = clock.monotonic()
            events.store_unavailable("following the breakers; the last opinion stands", type(error).__name__)
        if self.is_alone:
            self.reporter.decide_alone()
        self._stop.wait(FLUSH_S if self.is_alone or first else GONE_S)

    def flush_quietly(self) -> None:
        """Sends it if Redis is there. If not, the last opinion stands: no job must suffer for that."""
        try:
            self.flush()
        except FAILED as error:
            events.store_unavailable("reporting outcomes", type(error).__name__)

    def refresh(self) -> None:
        """Reads all breakers, what tasks call, and whether an operator switched tideover off."""
        with self._reading:
            self.see(self.breakers.read(self.breakers.keys_known()))
        self.budgets.refresh()
        self.models = self.registry.models()
        asked: Mode = "act" if self.registry.bypass() is None else "bypass"
        mode = max(self.settings.mode, asked, key=STRICTNESS.__getitem__)
        if mode != self.mode:
            self.mode = mode
            events.mode_changed(mode)

    def flush(self) -> None:
        """Sends the evidence noted since last time, one script for each breaker, and lets the core judge what comes back."""
        with suppress(FULL):  # a call's model is learned again by the next process; evidence must not wait for room
            while self._learned:
                with suppress(IndexError):  # another thread was faster
                    self.registry.learn(*self._learned.popleft())
            if n := self.probes:
                self.registry.count("probes", n)
                self.probes -= n
        self.reporter.flush()
        self.rates.flush()
        self.budgets.flush()


def part_with(news: News | None) -> None:
    if news is not None:
        with suppress(*FAILED):
            news.close()
