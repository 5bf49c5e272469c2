# SPDX-License-Identifier: Apache-2.0
"""What is held and what for: numbers from the counts of groups, ages from the first jobs of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tideover.core.admission import Reason
from tideover.ops.access import Space
from tideover.store.backlog import PAGE
from tideover.store.facts import Group, HeldFacts, Member

FIRST = 50
"""So many first jobs are read of a group at the most, to tell the oldest and the next expiry."""
MOST_READ = 500
"""So many are read in all: of few groups several each, of many one each, of thousands one of each of the largest."""

Kind: TypeAlias = tuple[tuple[str, ...], Reason]
"""Wait key and reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldGroup:
    """Jobs that wait for the same breakers for the same reason; those that need review wait for none.

    `oldest_at`, `next_expiry_at`: of the first jobs of its groups (of the largest groups, where there are thousands).
    """

    waits_for: tuple[str, ...]
    reason: Reason
    jobs: int
    critical: int
    oldest_at: float | None
    next_expiry_at: float | None


def groups_of(space: Space) -> Iterator[HeldGroup]:
    """What is held, by wait key and reason."""
    alike: dict[Kind, list[Group]] = defaultdict(list)
    for queue in space.registry.queues():
        for group in space.backlog.groups(queue):
            alike[group.facet.breaker_keys, group.facet.reason].append(group)
    first = first_of(space, list(alike.values()))
    for wait_key, reason in sorted(alike):
        yield group_of(wait_key, reason, alike[wait_key, reason], first.get((wait_key, reason), ()))


def first_of(space: Space, alike: Sequence[Sequence[Group]]) -> Mapping[Kind, Sequence[HeldFacts]]:
    """The facts of the first jobs of these groups, by wait key and reason."""
    each = max(1, MOST_READ // max(1, len(alike)))
    largest = [group for groups in alike for group in sorted(groups, key=lambda group: -group.n)[:each]]
    depth = max(1, min(FIRST, MOST_READ // max(1, len(largest))))
    found: dict[Kind, list[HeldFacts]] = defaultdict(list)
    for queue in {group.queue for group in largest}:
        for page in paged(space.backlog.heads([group for group in largest if group.queue == queue], depth)):
            for facts in space.backlog.facts_of(page):
                found[facts.breaker_keys, facts.reason].append(facts)
    return found


def paged(members: Sequence[Member]) -> Iterator[Sequence[Member]]:
    return (members[start : start + PAGE] for start in range(0, len(members), PAGE))


def group_of(wait_key: tuple[str, ...], reason: Reason, groups: Sequence[Group], first: Sequence[HeldFacts]) -> HeldGroup:
    expiries = [facts.expires_ms for facts in first if facts.expires_ms is not None]
    return HeldGroup(
        waits_for=wait_key,
        reason=reason,
        jobs=sum(group.n for group in groups),
        critical=sum(group.n for group in groups if group.facet.criticality == "critical"),
        oldest_at=min(facts.held_ms for facts in first) / 1000 if first else None,
        next_expiry_at=min(expiries) / 1000 if expiries else None,
    )
