# SPDX-License-Identifier: Apache-2.0
"""What a route may be asked for: calls at once of this process; calls, tokens and money in a time of the fleet."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from threading import BoundedSemaphore, Lock
from typing import TYPE_CHECKING

from tideover import clock, events
from tideover.core.breaker import Transition
from tideover.core.route import route_key
from tideover.evidence import MOST_QUEUED, Flight
from tideover.store.client import FAILED, FULL
from tideover.store.limiter import Limiter
from tideover.store.spending import HOUR_S, Spending

if TYPE_CHECKING:
    from tideover.core.outcome import Outcome
    from tideover.health import Health
    from tideover.settings import Settings

MILLION = 1_000_000


class Slots:
    """Calls at once over each route, of this process."""

    def __init__(self, settings: Settings) -> None:
        routes = settings.routes.items()
        self._slots = {name: BoundedSemaphore(route.max_in_flight) for name, route in routes if route.max_in_flight}

    def take(self, route: str) -> bool:
        """Whether the route has room for one more call; give it back with `free`."""
        slots = self._slots.get(route)
        return slots is None or slots.acquire(blocking=False)

    def free(self, route: str) -> None:
        if (slots := self._slots.get(route)) is not None:
            slots.release()


class Rates:
    """Calls and tokens per minute over each route, of all processes."""

    def __init__(self, settings: Settings, limiter: Limiter) -> None:
        self.settings, self.limiter = settings, limiter
        self._unsent: deque[tuple[str, int, int]] = deque(maxlen=MOST_QUEUED)
        """Route, tokens set aside, tokens that it took."""

    def limited(self, route: str) -> bool:
        limits = self.settings.route(route)
        return (limits.max_requests_per_minute, limits.max_tokens_per_minute) != (None, None)

    def allow(self, route: str, most_s: float) -> tuple[float, int] | None:
        """Takes a call's room: the seconds until it comes free, and the tokens set aside; None if it takes more than `most_s`.

        Blocks for a moment. While Redis is gone nobody waits.
        """
        limits = self.settings.route(route)
        try:
            return self.limiter.allow(route, limits.max_requests_per_minute, limits.max_tokens_per_minute, most_s)
        except FAILED:
            return 0.0, 0

    def note(self, flight: Flight, outcome: Outcome) -> None:
        """Notes what a call took of its route's limit, without I/O. One that failed took nothing."""
        if self.settings.route(flight.route).max_tokens_per_minute is not None:
            self._unsent.append((flight.route, flight.aside, sum(outcome.tokens)))

    def flush(self) -> None:
        """Tells what was noted."""
        sums: dict[str, tuple[int, int, int]] = {}
        while self._unsent:
            route, aside, took = self._unsent.popleft()
            beyond, told, tokens = sums.get(route, (0, 0, 0))
            sums[route] = (beyond + took - aside, told + (took > 0), tokens + took)
        for route, (beyond, told, tokens) in sums.items():
            with suppress(FULL):
                self.limiter.took(route, beyond, told, tokens)


class Budgets:
    """The spending of this hour, as far as this process knows it: its own at once, that of others within about a second.

    Noted without I/O, told by the thread that reports.
    """

    def __init__(self, health: Health, spending: Spending) -> None:
        self.health, self.spending = health, spending
        self.spent: dict[str, float] = {}
        self._hour = 0
        self._unsent: deque[tuple[str, float]] = deque(maxlen=MOST_QUEUED)
        self._lock = Lock()

    def note(self, flight: Flight, outcome: Outcome) -> None:
        """Notes what a call cost, without I/O: its tokens at the price of the model that the route has for it."""
        settings = self.health.settings
        model = settings.route(flight.route).model(flight.model)
        price = None if model is None else settings.prices.get(model)
        if price is not None and any(outcome.tokens):
            cost = (outcome.tokens[0] * price.input + outcome.tokens[1] * price.output) / MILLION
            self._unsent.append((f"route:{flight.route}", cost))
            if flight.task:
                self._unsent.append((f"task:{flight.task}", cost))

    def left(self, task: str, budget: float | None) -> bool:
        """Whether a task may spend more on other routes than its primary, this hour."""
        return budget is None or self._of_this_hour().get(f"task:{task}", 0.0) < budget

    def flush(self) -> None:
        """Tells what was noted; parks a route whose budget that spends, until the hour is over.

        What Redis does not take, because it is full, is told next time: breakers go on meanwhile.
        """
        with self._lock:
            try:
                self._flush()
            except FULL as error:
                events.store_unavailable("counting what calls cost", type(error).__name__)

    def _flush(self) -> None:
        costs: dict[str, float] = {}
        while self._unsent:
            name, cost = self._unsent.popleft()
            costs[name] = costs.get(name, 0.0) + cost
        if not costs:
            return
        now = clock.now()
        try:
            totals = self.spending.add(costs, now)
        except BaseException:
            self._unsent.extend(costs.items())
            raise
        self.spent = {**self._of_this_hour(), **totals}
        for route, budget in self._route_budgets():
            if (total := totals.get(f"route:{route}")) is not None and total >= budget:
                self._park(route, budget, now)

    def refresh(self) -> None:
        """Takes in what other processes spent."""
        if self.health.settings.prices:
            self._hour, self.spent = hour(), self.spending.read(clock.now())

    def _of_this_hour(self) -> dict[str, float]:
        if self._hour != hour():
            self._hour, self.spent = hour(), {}
        return self.spent

    def _route_budgets(self) -> Iterator[tuple[str, float]]:
        routes = self.health.settings.routes.items()
        return ((name, route.budget_per_hour) for name, route in routes if route.budget_per_hour is not None)

    def _park(self, route: str, budget: float, now: float) -> None:
        key = route_key(route)
        seen = self.health.breakers.read([key])[key]
        if seen.is_down:
            return
        why, over_at = f"its budget_per_hour ({budget:g}) is spent", (now // HOUR_S + 1) * HOUR_S
        events.budget_spent(route, budget)
        digest = self.health.reporter.credential(route)
        self.health.move(key, seen, Transition(to="open", why=why, parked="quota", probe_at=over_at, credential=digest))


def hour() -> int:
    return int(clock.now() // HOUR_S)
