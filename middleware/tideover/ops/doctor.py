# SPDX-License-Identifier: Apache-2.0
"""Is it armed? What is read of each namespace and of Redis, and one sentence about what the checks say of it.

Groups and counts say what is held, however much it is; only a sample of the jobs themselves is looked at.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tideover.ops.access import Operator, Space, reaching
from tideover.ops.checklist import Check, checks, of_servers
from tideover.ops.drain import orders_of
from tideover.ops.hurdles import Sample, Seen
from tideover.ops.standing import Standing, standing
from tideover.ops.values import counted
from tideover.store.client import safekeeping
from tideover.store.facts import Group

MOST_SAMPLED = 1000
"""Held jobs of a namespace whose facts and body are looked for: the first of each group, of the largest groups if there are
more."""
LOOKS, LOOK_S = 20, 0.1
"""How often, and how long apart, the leader of the drain is looked for: who was killed keeps its lease for 3 s at most, and
every worker asks for it several times a second, so that nobody has it only where none takes its turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceDiagnosis:
    """`held`: jobs that should drain, those that need review not among them; `stay`: those of them that would not, by their
    groups: jobs of the sample that lack their body are told by their check only."""

    namespace: str
    armed: bool
    sentence: str
    held: int
    stay: int
    checks: tuple[Check, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """`armed`: nothing blocks, in any namespace."""

    armed: bool
    sentence: str
    namespaces: tuple[NamespaceDiagnosis, ...]
    redis: tuple[Check, ...]


def diagnose(operator: Operator) -> Diagnosis:
    """Whether each namespace's backlog would drain if its provider came back now; if not, why, and what to do.

    Raises:
      StoreUnavailable: Redis does not answer.
    """
    with reaching(operator.settings):
        several = len(operator.spaces) > 1
        found = tuple(diagnosed(look(operator, space, several=several)) for space in operator.spaces)
        redis = tuple(of_servers(safekeeping(operator.client)))
    armed = all(one.armed for one in found) and not any(check.severity == "blocks" for check in redis)
    return Diagnosis(armed=armed, sentence=overall(found, redis), namespaces=found, redis=redis)


def look(operator: Operator, space: Space, *, several: bool) -> Seen:
    now = operator.now()
    stands = standing(space, operator.settings, now)
    groups = tuple(group for queue in space.registry.queues() for group in space.backlog.groups(queue))
    return Seen(
        standing=stands,
        groups=groups,
        orders=orders_of(space, now),
        leader=leader_of(space, stands),
        schema=space.registry.schema(),
        sample=sample_of(space, groups),
        option=f" -n {shlex.quote(space.name)}" if several else "",
    )


def leader_of(space: Space, stands: Standing) -> str | None:
    """The worker that leads the drain. Where there are workers, it is looked for a while."""
    patient = any(not worker.silent for worker in stands.workers)
    for left in reversed(range(LOOKS if patient else 1)):
        if (leader := space.registry.leader("drain")) is not None:
            return leader
        if left:
            time.sleep(LOOK_S)
    return None


def sample_of(space: Space, groups: Sequence[Group]) -> Sample:
    """The first jobs of each group, as many as may be looked at."""
    largest = sorted(groups, key=lambda group: -group.n)[:MOST_SAMPLED]
    each = max(1, MOST_SAMPLED // max(1, len(largest)))
    looked_at, without_facts, without_body = 0, list[str](), list[str]()
    for queue in sorted({group.queue for group in largest}):
        members = space.backlog.heads([group for group in largest if group.queue == queue], each)
        for_want_of_facts, for_want_of_body = space.backlog.incomplete(members)
        looked_at += len(members)
        without_facts += for_want_of_facts
        without_body += for_want_of_body
    return Sample(looked_at=looked_at, without_facts=tuple(without_facts), without_body=tuple(without_body))


def diagnosed(seen: Seen) -> NamespaceDiagnosis:
    """What the checks come to."""
    found = checks(seen)
    blocking = [check for check in found if check.severity == "blocks"]
    held, stay = sum(group.n for group in seen.waiting), seen.stay
    if blocking:
        most = max(blocking, key=lambda check: check.jobs)
        stays = f"{stay:,} of {counted(held, 'held job')} would stay: " if stay else ""
        sentence = f"not armed: {stays}{most.sentence}"
    else:
        review = seen.standing.needs_review
        would = f"{counted(held, 'held job')} would drain" if held else "nothing waits, and a backlog would drain"
        sentence = f"armed: {would}" + (f"; {counted(review, 'more job')} in need of review would stay" if review else "")
    return NamespaceDiagnosis(
        namespace=seen.standing.namespace,
        armed=not blocking,
        sentence=sentence,
        held=held,
        stay=stay,
        checks=tuple(found),
    )


def overall(found: Sequence[NamespaceDiagnosis], redis: Sequence[Check]) -> str:
    """One sentence over all namespaces."""
    unarmed = [one for one in found if not one.armed]
    if not unarmed and (blocking := [check for check in redis if check.severity == "blocks"]):
        return f"not armed: {blocking[0].sentence}"
    if len(found) == 1:
        return found[0].sentence
    if unarmed:
        return f"not armed: {len(unarmed)} of {len(found)} namespaces, {', '.join(one.namespace for one in unarmed)}"
    if not found:
        return "armed: nothing is here, tideover was never used in this Redis"
    return f"armed: {counted(sum(one.held for one in found), 'held job')} of {len(found)} namespaces would drain"
