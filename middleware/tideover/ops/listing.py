# SPDX-License-Identifier: Apache-2.0
"""The backlog: held jobs by their facts, never by their bodies, and what is queued beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

from tideover.core.admission import Reason
from tideover.core.job import Criticality
from tideover.ops.access import Misasked, Operator, reaching
from tideover.ops.search import ANY, Filter, Search, cursor_of, place_of
from tideover.ops.standing import Lane, lanes_of
from tideover.store.facts import Facet, HeldFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldJob:
    """A held job. `release_by_at`: its expiry or the longest it is to wait, which orders it; `detail`: its last failure.

    `holds`: how often it was held, this time included.
    """

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
    tenant: str
    tag: str
    holds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceLanes:
    namespace: str
    lanes: tuple[Lane, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A page of the jobs that are meant, the most urgent first. `next`: where the following page begins; None: there is none.

    `matching`: how many are meant, on whatever page; if not `complete` at least so many, because an exact number would take a
    look at each. `looked_at`: how many jobs this page looked at one by one; `gave_up`: these were too many, before it was full.
    """

    asked_at: float
    jobs: tuple[HeldJob, ...]
    matching: int
    complete: bool
    looked_at: int
    gave_up: bool
    next: str | None
    namespaces: tuple[NamespaceLanes, ...]


def backlog(operator: Operator, chosen: Filter = ANY, *, after: str | None = None, limit: int = 50) -> Listing:
    """Held jobs of all the operator's namespaces: the first `limit` that are meant, from `after` (`Listing.next`) on.

    One that is held from the first page to the last is on exactly one of them.

    Raises:
      Misasked: `after` is no cursor.
    """
    place = place_of(after)
    with reaching(operator.settings):
        now = operator.now()
        search = Search(operator.spaces, chosen, int(now * 1000))
        found = list(islice(search.jobs(limit + 1, place), limit + 1)) if limit else []
        jobs = tuple(held_job(part.space.name, facts) for part, _, facts in found[:limit])
        goes_on_at = found[limit - 1][1].key if len(found) > limit > 0 else search.stopped_at
        lanes = tuple(NamespaceLanes(namespace=s.name, lanes=lanes_of(s.ledger.read())) for s in operator.spaces)
    seen_all = limit > 0 and after is None and goes_on_at is None
    return Listing(
        asked_at=now,
        jobs=jobs,
        matching=len(found) if seen_all else max(search.certain, len(found)),
        complete=seen_all or not search.must_sift,
        looked_at=search.looked_at,
        gave_up=search.stopped_at is not None and len(found) <= limit,
        next=None if goes_on_at is None else cursor_of(goes_on_at),
        namespaces=lanes,
    )


def held_job(namespace: str, facts: HeldFacts) -> HeldJob:
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
        release_by_at=facts.by_ms / 1000,
        tenant=facts.tenant,
        tag=facts.tag,
        holds=facts.holds,
    )


By = Literal["task", "reason", "criticality", "tenant", "tag", "waits-for"]
BYS: tuple[By, ...] = get_args(By)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Held jobs with one value. `shared`: it stands for several, because there are too many tenants or tags to tell apart."""

    value: str
    jobs: int
    critical: int
    shared: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """What is in the backlog, the largest first. `complete` False: not all jobs that may be meant were looked at."""

    asked_at: float
    by: By
    jobs: int
    complete: bool
    looked_at: int
    slices: tuple[Slice, ...]


def breakdown(operator: Operator, by: str, chosen: Filter = ANY) -> Breakdown:
    """How many held jobs there are of each task, reason, tenant...

    Raises:
      Misasked: nothing is counted by this.
    """
    asked = next((known for known in BYS if known == by), None)
    if asked is None:
        raise Misasked(f"nothing is counted by {by!r}; it is one of {', '.join(BYS)}")
    jobs, critical = Counter[tuple[str, bool]](), Counter[tuple[str, bool]]()
    with reaching(operator.settings):
        now = operator.now()
        search = Search(operator.spaces, chosen, int(now * 1000))
        for facet, n in facets(search):
            value = value_of(asked, facet)
            jobs[value] += n
            critical[value] += n if facet.criticality == "critical" else 0
    slices = (Slice(value=v[0], jobs=n, critical=critical[v], shared=v[1]) for v, n in jobs.items())
    return Breakdown(
        asked_at=now,
        by=asked,
        jobs=jobs.total(),
        complete=search.stopped_at is None,
        looked_at=search.looked_at,
        slices=tuple(sorted(slices, key=lambda one: (-one.jobs, one.value))),
    )


def facets(search: Search) -> Iterator[tuple[Facet, int]]:
    """What is meant: groups of which all jobs are, then jobs of the others one by one."""
    for part in search.parts:
        yield from ((group.facet, group.n) for group in part.groups if group.id not in part.sifted)
    yield from ((facts.facet, 1) for facts in search.sift())


def value_of(by: By, facet: Facet) -> tuple[str, bool]:
    """The value that jobs with this facet are counted under, and whether it stands for several."""
    match by:
        case "tenant" | "tag":
            value = facet.tenant if by == "tenant" else facet.tag
            return value, bool(facet.salt and value)
        case "waits-for":
            return facet.wait_key, False
        case "task" | "reason" | "criticality":
            return getattr(facet, by), False
