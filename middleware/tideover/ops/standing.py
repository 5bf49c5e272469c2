# SPDX-License-Identifier: Apache-2.0
"""How things stand: the account, breakers, routes, workers and what is held, for each namespace, read from Redis."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tideover.core.admission import Reason
from tideover.core.breaker import Breaker, State, probe_wait_s
from tideover.core.job import End
from tideover.core.pacing import rate
from tideover.ops.access import Operator, Space, reaching
from tideover.settings import Settings
from tideover.store.account import Account
from tideover.store.backlog import HeldFacts

MOST_READ = 10_000
"""Facts read of one held set to tell reasons apart; of the rest only the number is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """Jobs of one lane; `delayed` is the part of `queued` that waits for a retry or a delay."""

    queue: str
    queued: int
    delayed: int
    running: int
    held: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerStatus:
    """A route and model. `since_at`: of this state; `opened_at`: of the latest opening; `pace`: releases per second."""

    key: str
    state: State
    generation: int
    since_at: float | None
    opened_at: float | None
    why: str
    throttled_until_at: float | None
    next_probe_at: float | None
    pace: float

    @property
    def is_down(self) -> bool:
        return self.state in ("open", "half-open")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteStatus:
    name: str
    kind: str
    models: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStatus:
    """`models`: those that it names or was seen to call."""

    name: str
    queue: str
    criticality: str
    routes: tuple[str, ...]
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """`seen_at`: its last sign of life; `silent`: so long ago that it counts as dead."""

    id: str
    host: str
    pid: int
    mode: str
    version: str
    queues: tuple[str, ...]
    since_at: float
    seen_at: float | None
    silent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldGroup:
    """Jobs that wait for the same breakers for the same reason; `reason` None: beyond what was read."""

    waits_for: tuple[str, ...]
    reason: Reason | None
    jobs: int
    critical: int
    oldest_at: float | None
    next_expiry_at: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bypass:
    """Who switched tideover off, and until when (None: until somebody switches it on)."""

    who: str
    why: str | None
    since_at: float | None
    until_at: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One namespace. `strangers`: workers without tideover that have fetched jobs; with them the sum does not hold."""

    namespace: str
    asked_at: float
    mode: str | None
    bypass: Bypass | None
    accepted: int
    queued: int
    delayed: int
    running: int
    held: int
    ends: dict[End, int]
    lost: int
    not_adopted: int
    lanes: tuple[Lane, ...]
    breakers: tuple[BreakerStatus, ...]
    routes: tuple[RouteStatus, ...]
    tasks: tuple[TaskStatus, ...]
    workers: tuple[WorkerStatus, ...]
    strangers: tuple[str, ...]
    held_groups: tuple[HeldGroup, ...]
    counters: dict[str, int]


def standings(operator: Operator) -> tuple[Standing, ...]:
    """How each namespace of the operator stands."""
    with reaching(operator.settings):
        now = operator.now()
        return tuple(standing(space, operator.settings, now) for space in operator.spaces)


def standing(space: Space, settings: Settings, now: float) -> Standing:
    account, queues = space.ledger.read(), space.registry.queues()
    heartbeats, workers = space.registry.heartbeats(), workers_of(space, settings, now)
    known, lanes = {worker.id for worker in workers}, [name for queue in queues for name in (queue, f"{queue}.DQ")]
    bypass = bypass_of(space)
    modes = sorted({worker.mode for worker in workers})
    return Standing(
        namespace=space.name,
        asked_at=now,
        mode="bypass" if bypass is not None else (" and ".join(modes) if modes else None),
        bypass=bypass,
        accepted=account.accepted,
        queued=account.queued,
        delayed=account.places("delayed"),
        running=account.running,
        held=account.held,
        ends=account.ends,
        lost=account.lost,
        not_adopted=account.not_adopted,
        lanes=lanes_of(account),
        breakers=tuple(breaker_status(key, b, settings, now) for key, b in space.breakers_known().items()),
        routes=tuple(RouteStatus(name=name, **facts) for name, facts in sorted(space.registry.routes().items())),
        tasks=tasks_of(space),
        workers=workers,
        strangers=tuple(name for name in sorted(heartbeats) if name not in known and space.backlog.fetched(name, lanes) > 0),
        held_groups=tuple(groups_of(space)),
        counters=dict(sorted(space.registry.counters().items())),
    )


def lanes_of(account: Account) -> tuple[Lane, ...]:
    return tuple(
        Lane(queue=queue, queued=count.queued, delayed=count.delayed, running=count.running, held=count.held)
        for queue, count in sorted(account.queues.items())
    )


def breaker_status(key: str, breaker: Breaker, settings: Settings, now: float) -> BreakerStatus:
    probes = breaker.state == "open"
    return BreakerStatus(
        key=key,
        state=breaker.state,
        generation=breaker.generation,
        since_at=instant(breaker.since),
        opened_at=instant(breaker.opened_at),
        why=breaker.why,
        throttled_until_at=breaker.throttled_until if breaker.throttled_until > now else None,
        next_probe_at=breaker.since + probe_wait_s(breaker, settings.breaker.policy()) if probes else None,
        pace=rate(breaker, now=now, policy=settings.drain.policy()),
    )


def instant(at: float) -> float | None:
    """In the store 0 stands for never."""
    return None if at == 0 else at


def tasks_of(space: Space) -> tuple[TaskStatus, ...]:
    learned = space.registry.models()
    return tuple(
        TaskStatus(
            name=name,
            queue=facts["queue"],
            criticality=facts["criticality"],
            routes=tuple(facts["routes"]),
            models=tuple(sorted({*facts["models"], *learned.get(name, ())})),
        )
        for name, facts in sorted(space.registry.tasks().items())
    )


def workers_of(space: Space, settings: Settings, now: float) -> tuple[WorkerStatus, ...]:
    heartbeats, dead_after_s = space.registry.heartbeats(), settings.worker.heartbeat_timeout_s
    return tuple(
        worker_status(worker_id, facts, heartbeats.get(worker_id), now - dead_after_s)
        for worker_id, facts in sorted(space.registry.workers().items())
    )


def worker_status(worker_id: str, facts: dict[str, Any], seen_at: float | None, alive_since: float) -> WorkerStatus:
    return WorkerStatus(
        id=worker_id,
        host=facts["host"],
        pid=facts["pid"],
        mode=facts["mode"],
        version=facts["version"],
        queues=tuple(facts["queues"]),
        since_at=facts["since"],
        seen_at=seen_at,
        silent=seen_at is None or seen_at < alive_since,
    )


def bypass_of(space: Space) -> Bypass | None:
    facts = space.registry.bypass()
    if facts is None:
        return None
    since_at, until_at = (None if facts.get(name) is None else facts[name] / 1000 for name in ("since_ms", "until_ms"))
    return Bypass(who=facts["who"], why=facts.get("why"), since_at=since_at, until_at=until_at)


def groups_of(space: Space) -> Iterator[HeldGroup]:
    """What is held, by wait key and reason; what was not read, or has no facts, as a group without a reason."""
    sizes: dict[tuple[str, ...], int] = defaultdict(int)
    read: dict[tuple[str, ...], list[HeldFacts]] = defaultdict(list)
    for held in space.backlog.held_sets():
        sizes[held.breaker_keys] += space.backlog.size(held)
        read[held.breaker_keys] += islice(space.backlog.browse(held), MOST_READ)
    for wait_key, jobs in read.items():
        for reason in sorted({facts.reason for facts in jobs}):
            yield group_of(wait_key, reason, [facts for facts in jobs if facts.reason == reason])
        unread = sizes[wait_key] - len(jobs)
        if unread > 0:
            yield HeldGroup(waits_for=wait_key, reason=None, jobs=unread, critical=0, oldest_at=None, next_expiry_at=None)


def group_of(wait_key: tuple[str, ...], reason: Reason, jobs: list[HeldFacts]) -> HeldGroup:
    expiries = [facts.expires_ms for facts in jobs if facts.expires_ms is not None]
    return HeldGroup(
        waits_for=wait_key,
        reason=reason,
        jobs=len(jobs),
        critical=sum(facts.criticality == "critical" for facts in jobs),
        oldest_at=min(facts.held_ms for facts in jobs) / 1000,
        next_expiry_at=min(expiries) / 1000 if expiries else None,
    )
