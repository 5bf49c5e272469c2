# SPDX-License-Identifier: Apache-2.0
"""Asks a route that is down whether it is back: a few one-token calls, by one process, which cost no job anything."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from tideover import clock, events
from tideover.core.breaker import Breaker, Transition, probe_due
from tideover.core.route import split_key
from tideover.health import Health

EVERY_S = 0.25
AT_ONCE = 4


class Prober:
    """Probes whatever is due; a probe that hangs keeps no other from its turn."""

    def __init__(self, health: Health) -> None:
        self.health = health
        self._pool = ThreadPoolExecutor(AT_ONCE, "tideover-probe")
        self._running: dict[str, Future[None]] = {}

    def turn(self) -> None:
        if self.health.mode == "bypass":
            return
        self._running = {key: running for key, running in self._running.items() if not running.done()}
        now = clock.now()
        for key, view in list(self.health.views.items()):
            if key not in self._running and probe_due(view, now=now, policy=self.health.policy):
                self._begin(key, view)

    def stop(self) -> None:
        """Waits for probes under way: each has its timeout."""
        self._pool.shutdown(cancel_futures=True)

    def _begin(self, key: str, view: Breaker) -> None:
        route, model = split_key(key)
        if route not in self.health.settings.routes or self.health.settings.route(route).model(model) is None:
            return
        if view.state == "open" and not self.health.move(key, view, Transition("half-open", view.why)):
            return
        self._running[key] = self._pool.submit(self._probe, key, route, model)

    def _probe(self, key: str, route: str, model: str) -> None:
        """Half-open to recovering when all probes succeed, back to open at the first that fails."""
        from tideover.providers import wire

        try:
            view = self.health.view(key)
            for _ in range(self.health.policy.probes):
                outcome = wire.probe(route, model)
                events.probe_answered(key, outcome.answered, outcome.why)
                if not outcome.answered:
                    self.health.move(key, view, Transition("open", outcome.why))
                    return
                self.health.report(key, view.generation, outcome, "probe")
            self.health.move(key, view, Transition("recovering", "probes answered"))
        except Exception:  # noqa: BLE001 - a half-open breaker whose prober failed is probed again
            events.fault_inside("probe")
