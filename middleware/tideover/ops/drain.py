# SPDX-License-Identifier: Apache-2.0
"""The drain for an operator: how fast the backlog comes home, what keeps that from being faster, its end; a word over it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from tideover.core.breaker import CLOSED, Breaker, State
from tideover.core.job import CRITICAL_SUFFIX
from tideover.core.pacing import begun, ceilings
from tideover.core.progress import left, turn_s
from tideover.core.route import above
from tideover.ops.access import Operator, Refused, Space, reaching
from tideover.ops.breakers import FRESH_S, breaker_status
from tideover.settings import Settings
from tideover.sources import did_you_mean
from tideover.store.facts import Group
from tideover.store.paces import ALL

MOST_LOOKED_AT = 10_000
"""Held jobs of which is told whether their turn comes before their expiry: those that go first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What an operator said of releases: at most so many per second (0: none), whose word it is, and until when (None: until
    it is taken back)."""

    max_rate: float
    who: str
    why: str
    since_at: float
    until_at: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainStatus:
    """What waits for one breaker. A job that any of several frees counts for each.

    `released`, `most`: of this drain: jobs that went, and with them the ones that are left. `pace`: model calls per second
    that the route bears, live ones included; `rate`: jobs per second that may be released, which an order may have lowered;
    `limited_by`: what keeps that from being higher. `soonest_at`, `latest_at`: when the last of them will have been released
    (None: nobody can tell). `will_miss`: jobs whose turn comes after their expiry, even if the provider is back at once, of the
    `MOST_LOOKED_AT` that go first.
    """

    namespace: str
    key: str
    state: State
    held: int
    released: int
    most: int
    pace: float
    rate: float
    limited_by: str
    soonest_at: float | None
    latest_at: float | None
    will_miss: int
    order: Order | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drains:
    """All drains, as of one instant, and what operators said of all breakers of a namespace."""

    asked_at: float
    drains: tuple[DrainStatus, ...]
    orders: dict[str, Order]


def drains(operator: Operator) -> Drains:
    """What is held for each breaker, and how it comes home.

    Raises:
      StoreUnavailable: Redis does not answer.
    """
    with reaching(operator.settings):
        now = operator.now()
        found = tuple(drain for space in operator.spaces for drain in drains_of(space, operator.settings, now))
        said = {space.name: order for space in operator.spaces if (order := orders_of(space, now).get(ALL)) is not None}
        return Drains(asked_at=now, drains=found, orders=said)


def drains_of(space: Space, settings: Settings, now: float) -> tuple[DrainStatus, ...]:
    groups = [group for queue in space.registry.queues() for group in space.backlog.groups(queue)]
    held: Counter[str] = Counter()
    for group in groups:
        held.update(dict.fromkeys(group.facet.breaker_keys, group.n))
    if not held:
        return ()
    known = space.breakers.read([*held, *(above(key) for key in held)])
    orders = orders_of(space, now)
    return tuple(drain_of(space, key, held[key], groups, known, orders, settings, now) for key in sorted(held))


def drain_of(
    space: Space,
    key: str,
    held: int,
    groups: list[Group],
    known: Mapping[str, Breaker],
    orders: Mapping[str, Order],
    settings: Settings,
    now: float,
) -> DrainStatus:
    told = breaker_status(key, known[key], known.get(above(key), CLOSED), settings, now)
    standing = space.paces.read(key, now)
    progress, calls_each = standing.progress, 1.0 if standing.pacer is None else standing.pacer.calls_each
    told_now = now - standing.published_at < FRESH_S
    asked = [order for order in (orders.get(key), orders.get(ALL)) if order is not None]
    order = min(asked, key=lambda one: one.max_rate, default=None)
    lowered = order is not None and order.max_rate < told.pace / calls_each
    rate = min([told.pace / calls_each, *(one.max_rate for one in asked)])
    limited_by = told.limited_by if order is None or not lowered else "paused" if order.max_rate == 0 else "own cap"
    ends = None if progress is None or rate == 0 or not told_now else left(progress, limited=limited_by != "ramp")
    return DrainStatus(
        namespace=space.name,
        key=key,
        state=told.state,
        held=held,
        released=0 if progress is None else progress.released,
        most=held if progress is None else max(held, progress.most),
        pace=told.pace,
        rate=round(rate, 2),
        limited_by=limited_by,
        soonest_at=None if ends is None else now + ends.soonest_s,
        latest_at=None if ends is None else now + ends.latest_s,
        will_miss=will_miss(space, key, groups, turn_after_s(space, key, known[key], settings, now), now),
        order=order,
    )


def will_miss(space: Space, key: str, groups: list[Group], after_s: Callable[[float], float], now: float) -> int:
    """Of the jobs that go first: those whose expiry comes before their turn, even if the provider is back at once."""
    ours = [group for group in groups if key in group.facet.breaker_keys and group.facet.reason != "coalesced"]
    lanes = sorted({group.queue for group in ours}, key=lambda queue: not queue.endswith(CRITICAL_SUFFIX))
    going = chain.from_iterable(space.backlog.browse([group for group in ours if group.queue == lane]) for lane in lanes)
    turns = enumerate(islice(going, MOST_LOOKED_AT))
    return sum(facts.expires_ms is not None and facts.expires_ms / 1000 < now + after_s(nth) for nth, facts in turns)


def turn_after_s(space: Space, key: str, breaker: Breaker, settings: Settings, now: float) -> Callable[[float], float]:
    """Seconds from its recovery, or from now on if it is up, until the nth job that waits for a breaker goes.

    How fast that is nobody knows before: by the provider's limit and by what it bore last, else by its usual traffic.
    """
    policy, standing = settings.drain.policy(), space.paces.read(key, now)
    pacer, progress = standing.pacer or begun(now, policy), standing.progress
    if not breaker.is_down and progress is not None and left(progress) is not None and progress.per_s > 0:
        per_s = progress.per_s
        return lambda nth: nth / per_s
    told = [rate for rate, _ in ceilings(pacer, standing.limits, policy)] + [pacer.best, policy.max_rate or math.inf]
    calls_per_s = max(policy.start_rate, min(told) if min(told) < math.inf else breaker.base.per_s)
    rate, most = policy.start_rate / pacer.calls_each, calls_per_s / pacer.calls_each
    double_s = max(policy.double_s, 1.5 * pacer.answer_s)
    return lambda nth: turn_s(nth, rate=rate, most=most, double_s=double_s)


def orders_of(space: Space, now: float) -> dict[str, Order]:
    said = {key: order_of(facts) for key, facts in space.paces.orders().items()}
    return {key: order for key, order in said.items() if order.until_at is None or now < order.until_at}


def order_of(facts: Mapping[str, Any]) -> Order:
    until_ms = facts["until_ms"]
    return Order(
        max_rate=facts["max_rate"],
        who=facts["who"],
        why=facts["why"],
        since_at=facts["since_ms"] / 1000,
        until_at=None if until_ms is None else until_ms / 1000,
    )


def cap_drain(operator: Operator, key: str, max_rate: float, *, for_s: float | None, who: str, why: str) -> Order:
    """Lets at most so many jobs go per second (0: none), for one breaker or for all (`*`); what is computed goes on beneath.

    Raises:
      Refused: no route has such a name, that is no rate, or the operator has several namespaces.
    """
    if not 0 <= max_rate < math.inf:
        raise Refused(f"{max_rate} is no number of jobs per second")
    with reaching(operator.settings):
        space = operator.the_space("slowing the drain")
        check_drain_key(space, key)
        since_ms = round(operator.now() * 1000)
        until_ms = None if for_s is None else since_ms + round(for_s * 1000)
        facts = {"max_rate": max_rate, "who": who, "why": why, "since_ms": since_ms, "until_ms": until_ms}
        space.paces.order(key, facts)
        return order_of(facts)


def resume_drain(operator: Operator, key: str) -> bool:
    """Takes an operator's word on the drain back; False: there was none.

    Raises:
      Refused: no route has such a name, or the operator has several namespaces.
    """
    with reaching(operator.settings):
        space = operator.the_space("resuming the drain")
        check_drain_key(space, key)
        return space.paces.countermand(key)


def check_drain_key(space: Space, key: str) -> None:
    if key == ALL or key in space.paces.orders():
        return
    keys = space.breakers.keys_known()
    if key not in keys and key.partition("/")[0] not in space.registry.routes():
        raise Refused(f"nothing waits for {key!r} in {space.name}{did_you_mean(key, keys)}. All breakers are '*'")
