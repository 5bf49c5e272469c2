# SPDX-License-Identifier: Apache-2.0
"""How things stand: the account, breakers, routes, workers and what is held, for each namespace, read from Redis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tideover.core.job import End
from tideover.ops.access import Operator, Space, reaching
from tideover.ops.breakers import BreakerStatus, statuses
from tideover.ops.held import HeldGroup, groups_of
from tideover.ops.strangers import strangers_of
from tideover.settings import Settings
from tideover.store.account import Account


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """Jobs of one lane; `delayed` is the part of `queued` that waits for a retry or a delay."""

    queue: str
    queued: int
    delayed: int
    running: int
    held: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteStatus:
    """`domain`: its failure domain; empty: an older worker has not told it."""

    name: str
    kind: str
    models: dict[str, str]
    domain: str = ""


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
    """`seen_at`: its last sign of life; `silent`: so long ago that it counts as dead.

    `apart`: the breakers that it alone finds open, so that it leaves their jobs to others. `tasks`: the AI tasks that it has
    imported (None: it does not tell, because it has very many or is of an older version); `schema`: that of its version.
    """

    id: str
    host: str
    pid: int
    mode: str
    version: str
    queues: tuple[str, ...]
    since_at: float
    seen_at: float | None
    silent: bool
    apart: tuple[str, ...]
    tasks: tuple[str, ...] | None = None
    schema: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bypass:
    """Who switched tideover off, and until when (None: until somebody switches it on)."""

    who: str
    why: str | None
    since_at: float | None
    until_at: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One namespace. `needs_review`: held jobs that no breaker frees, because a human must look at them.

    `strangers`: workers without tideover that are about; `strangers_seen_at`: the latest in the last hour. While there is one,
    what is missing from the sum is `unaccounted`, as they may have ended it, and not `lost`.
    """

    namespace: str
    asked_at: float
    mode: str | None
    bypass: Bypass | None
    accepted: int
    queued: int
    delayed: int
    running: int
    held: int
    needs_review: int
    ends: dict[End, int]
    lost: int
    not_adopted: int
    lanes: tuple[Lane, ...]
    breakers: tuple[BreakerStatus, ...]
    routes: tuple[RouteStatus, ...]
    tasks: tuple[TaskStatus, ...]
    workers: tuple[WorkerStatus, ...]
    strangers: tuple[str, ...]
    strangers_seen_at: float | None = None
    unaccounted: int = 0
    held_groups: tuple[HeldGroup, ...]
    counters: dict[str, int]


def standings(operator: Operator) -> tuple[Standing, ...]:
    """How each namespace of the operator stands."""
    with reaching(operator.settings):
        now = operator.now()
        return tuple(standing(space, operator.settings, now) for space in operator.spaces)


def standing(space: Space, settings: Settings, now: float) -> Standing:
    account = space.ledger.read()
    workers = workers_of(space, settings, now)
    strangers = strangers_of(space, {worker.id for worker in workers}, now - settings.worker.heartbeat_timeout_s)
    bypass = bypass_of(space)
    modes = sorted({worker.mode for worker in workers})
    groups = tuple(groups_of(space))
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
        needs_review=sum(group.jobs for group in groups if group.reason == "review"),
        ends=account.ends,
        lost=account.lost if strangers.seen_at is None else 0,
        not_adopted=account.not_adopted,
        lanes=lanes_of(account),
        breakers=statuses(space.breakers_known(), settings, now),
        routes=tuple(RouteStatus(name=name, **facts) for name, facts in sorted(space.registry.routes().items())),
        tasks=tasks_of(space),
        workers=workers,
        strangers=strangers.about,
        strangers_seen_at=strangers.seen_at,
        unaccounted=0 if strangers.seen_at is None else account.lost,
        held_groups=groups,
        counters=dict(sorted(space.registry.counters().items())),
    )


def lanes_of(account: Account) -> tuple[Lane, ...]:
    return tuple(
        Lane(queue=queue, queued=count.queued, delayed=count.delayed, running=count.running, held=count.held)
        for queue, count in sorted(account.queues.items())
    )


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
        apart=tuple(facts.get("apart", ())),
        tasks=tuple(facts["tasks"]) if "tasks" in facts else None,
        schema=facts.get("schema"),
    )


def bypass_of(space: Space) -> Bypass | None:
    facts = space.registry.bypass()
    if facts is None:
        return None
    since_at, until_at = (None if facts.get(name) is None else facts[name] / 1000 for name in ("since_ms", "until_ms"))
    return Bypass(who=facts["who"], why=facts.get("why"), since_at=since_at, until_at=until_at)
