# SPDX-License-Identifier: Apache-2.0
"""What pace each route and model bears, of what all processes tell about their calls: the leader computes, all follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tideover import clock, events
from tideover.core import progress as progressing
from tideover.core.breaker import Breaker
from tideover.core.pacing import Pace, Pacer, after, begun, braked, decayed, pace_of, unheard
from tideover.core.policy import PacePolicy
from tideover.core.progress import Progress
from tideover.store.paces import ALL, Paces, Standing

EVERY_S = 0.25
ORDERS_S = 1.0
"""How soon an operator's word is followed."""
IDLE_S = 60.0
"""A pace that nobody asked for so long begins anew."""


MOST_FLAPS = 4
"""Who opened again soon, and so often, doubles ever more slowly; not more slowly than that."""
CROWDED_S = 2.0
"""How long it is remembered that the workers had no room."""


class Pacemaker:
    """The paces of one namespace. The notes are in Redis, so that the next leader goes on where the last one stopped.

    `policy_of`: what the settings say of the pace of a breaker. `most_in_flight`: calls over its route that they allow at one
    time, of all processes.
    """

    def __init__(self, paces: Paces, policy_of: Callable[[str], PacePolicy], most_in_flight: Callable[[str], float]) -> None:
        self.paces, self.policy_of, self.most_in_flight = paces, policy_of, most_in_flight
        self.leads = True
        """Whether this process computes the paces, or follows who does."""
        self.held: Counter[str] = Counter()
        """Jobs that wait for each breaker."""
        self.released: dict[str, float] = {}
        """Jobs that were released for each breaker so far, by all processes."""
        self.refused_at: dict[str, float] = {}
        """When a live call last got no turn over the route of a breaker."""
        self._latest: dict[str, tuple[float, Pace, Pacer]] = {}
        self._crowded: dict[str, float] = {}
        self._orders: tuple[float, dict[str, dict[str, Any]]] = (-ORDERS_S, {})

    def crowded(self, key: str) -> None:
        """Notes that the workers had no room for what a breaker would have let go."""
        self._crowded[key] = clock.monotonic()

    def expect(self, held: Counter[str], breaker_of: Callable[[str], Breaker]) -> None:
        """Notes how many jobs wait for each breaker now; where none does any more, that is told as well."""
        over = self.held.keys() - held.keys()
        self.held = held
        for key in over if self.leads else ():
            self._made(key, breaker_of(key))

    def rate(self, key: str, breaker: Breaker) -> float:
        """How many calls releases may cause per second just now: what the route bears, or less if an operator said so."""
        pace, pacer = self.pace(key, breaker)
        orders = (self.orders().get(name) for name in (key, ALL))
        caps = [order["max_rate"] * pacer.calls_each for order in orders if order is not None]  # orders count jobs
        return float(min([pace.rate, *caps]))

    def orders(self) -> dict[str, dict[str, Any]]:
        """What operators said, as far as its time is not over."""
        read_at, orders = self._orders
        if clock.monotonic() - read_at >= ORDERS_S:
            now_ms = clock.now_ms()
            orders = {key: order for key, order in self.paces.orders().items() if now_ms < (order["until_ms"] or now_ms + 1)}
            self._orders = (clock.monotonic(), orders)
        return orders

    def pace(self, key: str, breaker: Breaker) -> tuple[Pace, Pacer]:
        """What the route bears, and what its calls are like; looked at four times a second."""
        latest = self._latest.get(key)
        if latest is None or clock.monotonic() - latest[0] >= EVERY_S:
            found = self._made(key, breaker) if self.leads else self._followed(key, breaker)
            latest = self._latest[key] = (clock.monotonic(), *found)
        return latest[1:]

    def _followed(self, key: str, breaker: Breaker) -> tuple[Pace, Pacer]:
        """By the leader's notes; they fade if it renews them no more."""
        now = clock.now()
        seen = self.paces.read(key, now)
        policy = self.policy_of(key)
        pacer = self._known(seen, breaker, now, policy)
        pacer = replace(pacer, rate=decayed(pacer.rate, now - pacer.at, policy))
        return self._pace(key, breaker, pacer, seen, now), pacer

    def _made(self, key: str, breaker: Breaker) -> tuple[Pace, Pacer]:
        now = clock.now()
        seen = self.paces.read(key, now)
        policy = self.policy_of(key)
        known, news = self._known(seen, breaker, now, policy), seen.news
        began = known.at == now
        pacer = known if began else self._pacer(known, breaker, seen, now, policy)
        pace = self._pace(key, breaker, pacer, seen, now)
        progress = self._progress(None if began else seen.progress, self.held[key], round(news.released), now)
        self.released[key], self.refused_at[key] = seen.felt.released, seen.refused_at
        self.paces.publish(key, seen, pacer, pace, progress, breaker)
        if seen.factor != pace.factor:
            events.pace_changed(key, pace.rate, pace.factor)
        return pace, pacer

    def _known(self, seen: Standing, breaker: Breaker, now: float, policy: PacePolicy) -> Pacer:
        """Where the controller stood, if that is not of an earlier recovery or long ago."""
        known = seen.pacer
        if known is None or seen.recovered_at != breaker.recovered_at or now - known.at > IDLE_S:
            return begun(now, policy, known)
        return known

    def _pace(self, key: str, breaker: Breaker, pacer: Pacer, seen: Standing, now: float) -> Pace:
        limits = seen.limits if breaker.state == "recovering" else {}
        most = self.most_in_flight(key)
        pace = pace_of(breaker, pacer, limits, now=now, policy=self.policy_of(key), most_in_flight=most)
        crowded = pace.rate > 0 and clock.monotonic() - self._crowded.get(key, -CROWDED_S) < CROWDED_S
        return replace(pace, factor="workers") if crowded else pace

    def _pacer(self, pacer: Pacer, breaker: Breaker, seen: Standing, now: float, policy: PacePolicy) -> Pacer:
        """Who opened again soon after it had recovered doubles half as fast."""
        policy = replace(policy, double_s=policy.double_s * 2.0 ** min(breaker.flaps, MOST_FLAPS))
        if seen.braked_at != breaker.braked_at:
            return braked(pacer, now, policy)
        match breaker.state:
            case "recovering":
                return after(pacer, seen.news, seen.limits, now=now, policy=policy)
            case "closed":
                return unheard(pacer, seen.news.released, breaker.base.per_s, now=now, policy=policy)
            case "suspect" | "open" | "half-open":
                return replace(pacer, at=now)

    def _progress(self, progress: Progress | None, held: int, gone: int, now: float) -> Progress:
        return progressing.begun(held, now) if progress is None else progressing.after(progress, held, gone, now)
