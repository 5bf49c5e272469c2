# SPDX-License-Identifier: Apache-2.0
"""The leader's part of the drain: what pace each route and model bears, of what all processes tell about their calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tideover import clock, events
from tideover.core import progress as progressing
from tideover.core.breaker import Breaker
from tideover.core.pacing import Pace, Pacer, after, begun, braked, pace_of, unheard
from tideover.core.policy import PacePolicy
from tideover.core.progress import Progress
from tideover.store.paces import ALL, Paces, Standing

EVERY_S = 0.25
ORDERS_S = 1.0
"""How soon an operator's word is followed."""
IDLE_S = 60.0
"""A pace that nobody asked for so long begins anew."""


class Pacemaker:
    """The paces of one namespace. Its notes are in Redis, so that the next leader goes on where the last one stopped."""

    def __init__(self, paces: Paces, policy: PacePolicy) -> None:
        self.paces, self.policy = paces, policy
        self.held: Counter[str] = Counter()
        """Jobs that wait for each breaker."""
        self._latest: dict[str, tuple[float, Pace]] = {}
        self._gone: Counter[str] = Counter()
        self._orders: tuple[float, dict[str, dict[str, Any]]] = (-ORDERS_S, {})

    def released(self, gone: Counter[str]) -> None:
        """Notes how many of the jobs that were released had waited for each breaker."""
        self._gone += gone

    def expect(self, held: Counter[str], breaker_of: Callable[[str], Breaker]) -> None:
        """Notes how many jobs wait for each breaker now; where none does any more, that is told as well."""
        over = self.held.keys() - held.keys()
        self.held = held
        for key in over:
            self._made(key, breaker_of(key))

    def rate(self, key: str, breaker: Breaker) -> float:
        """How many jobs may be released per second just now: what the route bears, or less if an operator said so."""
        rate = self.pace(key, breaker).rate
        caps = [order["max_rate"] for order in (self.orders().get(name) for name in (key, ALL)) if order is not None]
        return float(min([rate, *caps]))

    def orders(self) -> dict[str, dict[str, Any]]:
        """What operators said, as far as its time is not over."""
        read_at, orders = self._orders
        if clock.monotonic() - read_at >= ORDERS_S:
            now_ms = clock.now_ms()
            orders = {key: order for key, order in self.paces.orders().items() if now_ms < (order["until_ms"] or now_ms + 1)}
            self._orders = (clock.monotonic(), orders)
        return orders

    def pace(self, key: str, breaker: Breaker) -> Pace:
        """What the route bears, computed four times a second."""
        made_at, pace = self._latest.get(key, (-EVERY_S, None))
        if pace is None or clock.monotonic() - made_at >= EVERY_S:
            pace = self._made(key, breaker)
            self._latest[key] = (clock.monotonic(), pace)
        return pace

    def _made(self, key: str, breaker: Breaker) -> Pace:
        now = clock.now()
        seen, gone = self.paces.read(key, now), self._gone.pop(key, 0)
        known = seen.pacer
        if known is None or seen.recovered_at != breaker.recovered_at or now - known.at > IDLE_S:
            known = None
        pacer = begun(now, self.policy) if known is None else self._pacer(known, breaker, seen, gone, now)
        limit = seen.limit if breaker.state == "recovering" else None
        pace = pace_of(breaker, pacer, limit, now=now, policy=self.policy)
        progress = self._progress(None if known is None else seen.progress, self.held[key], gone, now)
        self.paces.publish(key, seen, pacer, pace, progress, breaker)
        if seen.factor != pace.factor:
            events.pace_changed(key, pace.rate, pace.factor)
        return pace

    def _pacer(self, pacer: Pacer, breaker: Breaker, seen: Standing, gone: int, now: float) -> Pacer:
        """Who opened again soon after it had recovered doubles half as fast."""
        policy = replace(self.policy, double_s=self.policy.double_s * 2.0 ** min(breaker.flaps, 10))
        if seen.braked_at != breaker.braked_at:
            return braked(pacer, now, policy)
        match breaker.state:
            case "recovering":
                return after(pacer, seen.news, seen.limit, now=now, policy=policy)
            case "closed":
                return unheard(pacer, gone, breaker.base.per_s, now=now, policy=policy)
            case "suspect" | "open" | "half-open":
                return replace(pacer, at=now)

    def _progress(self, progress: Progress | None, held: int, gone: int, now: float) -> Progress:
        return progressing.begun(held, now) if progress is None else progressing.after(progress, held, gone, now)
