# SPDX-License-Identifier: Apache-2.0
"""The backlog: held jobs by their facts, never by their bodies, and what is queued beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import islice
from typing import get_args

from tideover.core.admission import Reason
from tideover.core.job import Criticality
from tideover.errors import ConfigurationError
from tideover.ops.access import Operator, Space, reaching
from tideover.ops.standing import Lane, lanes_of
from tideover.store.backlog import HeldFacts, HeldSet

REASONS: tuple[Reason, ...] = get_args(Reason)

MOST_READ = 100_000
"""Facts that a filtered question reads; beyond it the answer says that it is incomplete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldJob:
    """A held job. `release_by_at`: its expiry or the longest it is to wait, which orders it; `detail`: its last failure."""

    id: str
    namespace: str
    task: str
    criticality: Criticality
    lane: str
    reason: Reason
    waits_for: tuple[str, ...]
    detail: str
    sent_at: float
    held_at: float
    expires_at: float | None
    release_by_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceLanes:
    namespace: str
    lanes: tuple[Lane, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The first of the `matching` jobs, the most urgent first; `complete` False: not all held jobs were looked at."""

    asked_at: float
    jobs: tuple[HeldJob, ...]
    matching: int
    complete: bool
    namespaces: tuple[NamespaceLanes, ...]

    @property
    def more(self) -> int:
        return self.matching - len(self.jobs)


def backlog(operator: Operator, *, task: str | None = None, reason: str | None = None, limit: int = 50) -> Listing:
    """Held jobs of all the operator's namespaces, of one task or reason if said, the earliest `limit` of them."""
    if reason is not None and reason not in REASONS:
        raise ConfigurationError(f"there is no reason {reason!r}; jobs are held for {', '.join(REASONS)}")
    with reaching(operator.settings):
        now = operator.now()
        lanes = tuple(NamespaceLanes(namespace=s.name, lanes=lanes_of(s.ledger.read())) for s in operator.spaces)
        if task is None and reason is None:
            jobs = tuple(islice(held_jobs(operator), limit))
            matching, complete = max(len(jobs), sum(space.backlog.size(h) for space, h in held_sets(operator))), True
        else:
            jobs, matching, complete = search(operator, task, reason, limit)
    return Listing(asked_at=now, jobs=jobs, matching=matching, complete=complete, namespaces=lanes)


def search(operator: Operator, task: str | None, reason: str | None, limit: int) -> tuple[tuple[HeldJob, ...], int, bool]:
    """The first matching jobs, how many match, and whether all held jobs were looked at."""
    first: list[HeldJob] = []
    matching = looked_at = 0
    for job in islice(held_jobs(operator), MOST_READ):
        looked_at += 1
        if task in (None, job.task) and reason in (None, job.reason):
            matching += 1
            if len(first) < limit:
                first.append(job)
    return tuple(first), matching, looked_at < MOST_READ


def held_sets(operator: Operator) -> Iterator[tuple[Space, HeldSet]]:
    return ((space, held) for space in operator.spaces for held in space.backlog.held_sets())


def held_jobs(operator: Operator) -> Iterator[HeldJob]:
    """All held jobs, those first that must go first."""
    return merge(*(jobs_of(*of) for of in held_sets(operator)), key=lambda job: job.release_by_at)


def jobs_of(space: Space, held: HeldSet) -> Iterator[HeldJob]:
    return (held_job(space.name, by_ms, facts) for by_ms, facts in space.backlog.ordered(held))


def held_job(namespace: str, by_ms: int, facts: HeldFacts) -> HeldJob:
    return HeldJob(
        id=facts.job_id,
        namespace=namespace,
        task=facts.task,
        criticality=facts.criticality,
        lane=facts.queue,
        reason=facts.reason,
        waits_for=facts.breaker_keys,
        detail=facts.detail,
        sent_at=facts.sent_ms / 1000,
        held_at=facts.held_ms / 1000,
        expires_at=None if facts.expires_ms is None else facts.expires_ms / 1000,
        release_by_at=by_ms / 1000,
    )
