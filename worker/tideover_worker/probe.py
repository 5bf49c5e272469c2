# SPDX-License-Identifier: Apache-2.0
"""Asks a route that is down, or may be, whether it answers: one-token calls, by one process, which cost no job anything.

First the front door, which is free and proves no model; then the model itself, until the answers decide. After that held jobs
are the next to try it, at the pace of a recovering route.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import count
from queue import Empty, SimpleQueue

from tideover import clock, events
from tideover.core.breaker import Breaker, Transition, burst_says, is_probe_due, next_probe_at, weigh
from tideover.core.outcome import OK, Outcome
from tideover.core.route import WHOLE, is_task_key, route_key, split_key
from tideover.health import LONG_APART_S, Health
from tideover.reporting import parked_wait_s
from tideover.store.client import FAILED

EVERY_S = 0.1
AT_ONCE = 8
GAP_S = 0.5
"""Between probes where there is doubt."""
BURST_GAP_S = 0.3
"""Between the probes of a burst, whether or not those before were answered: first tokens may take seconds."""
FIRST_GAP_S = 2.0
"""The same before any of them was answered."""
LEASE_S = 30.0
"""How long one process may take for a burst; its probes end before."""
PASS_ON_S = 1.0
"""How long the process whose probe failed leaves the next one to others, whose network may be better."""
APART_S = 5.0
"""How often a process that alone finds a route down asks it."""
BURST_S = 28.0
"""How long a burst, or the asking where there is doubt, may take: it ends before its lease."""
MOST_UNANSWERED = 6
"""Probes of a burst that are under way at once."""
STOP_LOOK_S = 0.5
HOUR_S = 3600.0
SPENT_S = 60.0
"""How often it is asked once the probes of the hour are spent."""
YOUNG_S, OLD_GAP_S = 60.0, 5.0
"""Who is suspect for longer is asked less often: then held jobs try it, too."""


class Prober:
    """Probes whatever is due; a probe that hangs keeps no other from its turn."""

    def __init__(self, health: Health) -> None:
        self.health = health
        self._pool = ThreadPoolExecutor(AT_ONCE, "tideover-probe")
        self._doubts = ThreadPoolExecutor(AT_ONCE, "tideover-doubt")
        self._askers = ThreadPoolExecutor(AT_ONCE * MOST_UNANSWERED, "tideover-ask")
        self._running: dict[str, Future[None]] = {}
        self._not_before: dict[str, float] = {}
        self._made: dict[str, deque[float]] = {}
        self._stop = threading.Event()

    def turn(self) -> None:
        if self.health.mode == "bypass":
            return
        self._running = {key: running for key, running in self._running.items() if not running.done()}
        now = clock.now()
        for key in self._apart_unasked():
            self.health.rejoin(key)
        for key in {**self.health.views, **self.health.apart}:
            view = self.health.views.get(key)
            if key in self._running or clock.monotonic() < self._not_before.get(key, 0.0) or not self._may_ask(key):
                continue
            if key in self.health.apart:
                if self.health.settings.routes[split_key(key)[0]].probe:
                    self._begin(key, self._ask_apart, key)
            elif view is not None and is_probe_due(view, now, self.health.policy) and not self._waits_for_route(key):
                self._take(key, view, now)

    def stop(self) -> None:
        """Waits for probes under way: each has its timeout."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        self._doubts.shutdown(cancel_futures=True)
        self._askers.shutdown(cancel_futures=True)

    def _apart_unasked(self) -> list[str]:
        """Where nobody may ask, a job tries again after a while whether this process reaches the route by now."""
        routes, long_ago = self.health.settings.routes, clock.monotonic() - LONG_APART_S
        names = ((key, split_key(key)[0], since) for key, since in self.health.apart.items())
        return [key for key, name, since in names if since < long_ago and name in routes and not routes[name].probe]

    def _may_ask(self, key: str) -> bool:
        """Whether it names a route of ours that may be probed, and has probes left for this hour."""
        name, model = split_key(key)
        routes = self.health.settings.routes
        if is_task_key(key) or name not in routes or not (model == WHOLE or routes[name].model(model) is not None):
            return False
        made = self._made.setdefault(key, deque())
        while made and clock.monotonic() - made[0] > HOUR_S:
            made.popleft()
        return len(made) < self.health.policy.max_probes_per_hour or clock.monotonic() - made[-1] > SPENT_S

    def _gap_s(self, usual_s: float) -> float:
        """Between two probes: less than usual where the owner has a route asked much more often than every five seconds."""
        return min(usual_s, self.health.policy.probe_after_s / 10)

    def _waits_for_route(self, key: str) -> bool:
        """Whether the whole route is down, so that asking one of its models is in vain."""
        above = route_key(split_key(key)[0])
        return key != above and above in self.health.views and self.health.views[above].is_down

    def _take(self, key: str, view: Breaker, now: float) -> None:
        """Takes the lease, and begins."""
        if self.health.is_alone:
            taken: Breaker | None = replace(view, state="half-open" if view.is_down else view.state)
        else:
            taken = self.health.breakers.begin_probe(key, view, LEASE_S, now)
            self.health.look([key])
        if taken is None:
            return
        if not self.health.settings.routes[split_key(key)[0]].probe:
            if taken.state == "half-open":
                self.health.move(key, taken, Transition(to="recovering", why="not probed: held jobs try it"))
        elif taken.state == "half-open":
            self._begin(key, self._ask_down, key, taken)
        else:
            self._begin(key, self._ask_doubted, key, taken, doubted=True)

    def _begin(self, key: str, *call: object, doubted: bool = False) -> None:
        """Two pools, so that long doubts keep nobody from asking what is down."""
        self._running[key] = (self._doubts if doubted else self._pool).submit(self._guarded, *call)

    def _guarded(self, *call: object) -> None:
        ask, *args = call
        try:
            assert callable(ask)
            ask(*args)
        except FAILED as error:
            events.store_unavailable("probing", type(error).__name__)
        except Exception:  # noqa: BLE001 - whose lease is over is probed again
            events.fault_inside("probe")

    def _ask_down(self, key: str, taken: Breaker) -> None:
        """Half-open to recovering, or back to open, as a burst of probes says."""
        says, outcome = self._burst(key)
        if says:
            self.health.move(key, taken, Transition(to="recovering", why="probes answered"))
        if says is not False:  # nobody waits for the rest of a burst when this process leaves: its lease ends
            return
        self._not_before[key] = clock.monotonic() + PASS_ON_S
        parked = taken.parked if outcome.kind == taken.parked else ""
        probe_at = clock.now() + parked_wait_s(outcome, self.health.policy) if parked else 0.0
        credential = taken.credential if parked else ""
        change = Transition(to="open", why=outcome.why, parked=parked, probe_at=probe_at, credential=credential)
        self.health.move(key, taken, change)

    def _ask_doubted(self, key: str, taken: Breaker) -> None:
        """Adds evidence where few jobs run: it becomes suspect and opens, or calms down, as any evidence says."""
        ends_at = clock.monotonic() + BURST_S - self.health.reporter.limit_s(key, asks_little=True)
        route, model = split_key(key)
        for nth in count():
            with self.health.probing(route, self._model_of(route, model)) as flight:
                outcome = self._ask(key, knocks=nth == 0)
                self.health.end(flight, OK if outcome.answered else outcome)
            self.health.flush_quietly()
            view, now = replace(self.health.views.get(key, taken), probing_until=0.0, seen_at=0.0), clock.now()
            if view.is_down or next_probe_at(view, now, self.health.policy) is None or clock.monotonic() >= ends_at:
                break
            if self._stop.wait(OLD_GAP_S if view.state == "suspect" and now - view.since > YOUNG_S else self._gap_s(GAP_S)):
                break
        self._not_before[key] = clock.monotonic() + self._gap_s(GAP_S)
        self.health.breakers.end_probe(key, taken.fence)

    def _ask_apart(self, key: str) -> None:
        """What it finds is evidence, too: once nobody else reports, its word is enough to open."""
        says, outcome = self._burst(key)
        if says:
            self.health.rejoin(key)
        elif says is False and outcome.kind in ("outage", "ambiguous"):
            route, model = split_key(key)
            with self.health.probing(route, self._model_of(route, model)) as flight:
                self.health.end(flight, outcome)
        self._not_before[key] = clock.monotonic() + APART_S

    def _burst(self, key: str) -> tuple[bool | None, Outcome]:
        """Probes until they say that the route is back, or that it is not (None: there was no time); and the last answer.

        A few may be under way at once, because first tokens may take seconds; what is not answered yet says nothing.
        """
        weight, outcome, unanswered, nth = 0.0, OK, 0, 0
        answers: SimpleQueue[Outcome] = SimpleQueue()
        ends_at, next_at = clock.monotonic() + BURST_S, clock.monotonic()
        while (says := burst_says(weight)) is None:
            now = clock.monotonic()
            if now >= ends_at or self._stop.is_set():
                return None, outcome
            if unanswered < MOST_UNANSWERED and now >= next_at:
                self._askers.submit(lambda knocks: answers.put(self._ask(key, knocks=knocks)), nth == 0)
                unanswered, nth = unanswered + 1, nth + 1
                next_at = now + (self._gap_s(BURST_GAP_S) if weight else FIRST_GAP_S)
            wait_until = min(ends_at, next_at) if unanswered < MOST_UNANSWERED else ends_at
            with suppress(Empty):
                outcome = answers.get(timeout=max(0.001, min(wait_until - clock.monotonic(), STOP_LOOK_S)))
                next_at = min(next_at, clock.monotonic() + self._gap_s(BURST_GAP_S)) if weight == 0.0 else next_at
                weight, unanswered = weigh(weight, answered=outcome.answered), unanswered - 1
        return says, outcome

    def _ask(self, key: str, *, knocks: bool) -> Outcome:
        """One probe; `knocks`: at the front door first, which spares the model a question that could not reach it."""
        from tideover.providers import wire

        route, model = split_key(key)
        model = self._model_of(route, model)
        timeout_s = self.health.reporter.limit_s(key, asks_little=True)
        self._made.setdefault(key, deque()).append(clock.monotonic())
        outcome = wire.knock(route, timeout_s) if knocks or model == WHOLE else OK
        if outcome.answered and model != WHOLE:
            outcome = wire.probe(route, model, timeout_s)
        if outcome.kind == "throttle" and self.health.reporter.is_spurious(route, outcome):
            outcome = replace(outcome, kind="outage")
        self.health.probes += 1
        events.probe_answered(key, outcome.answered, outcome.why)
        return outcome

    def _model_of(self, route: str, model: str) -> str:
        """The model to ask: of a whole route, one that was called on it, the latest to answer; `*` if none was."""
        if model != WHOLE:
            return model
        found, views = self.health.settings.routes.get(route), self.health.views.items()
        known = [
            (view.ok_at, name)
            for key, view in views
            if key.startswith(f"{route}/") and (name := split_key(key)[1]) != WHOLE and view.ok_at > 0
            if not view.is_down and found is not None and found.model(name) is not None
        ]
        return max(known)[1] if known else WHOLE
