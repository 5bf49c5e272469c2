# SPDX-License-Identifier: Apache-2.0
"""Ending held jobs by hand: they become dead letters, which can be restored for 7 days."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tideover import events
from tideover.ops import results
from tideover.ops.access import Operator, Space
from tideover.ops.acts import (
    AT_ONCE,
    Batch,
    ChosenGroup,
    MovedJob,
    Progress,
    Selection,
    groups_of,
    moved_job,
    tell_lines,
    telling_how_many,
)
from tideover.store.facts import GROUP, Group, HeldFacts, Member
from tideover.store.stories import Line, told_by


@dataclass(frozen=True, slots=True, kw_only=True)
class Discard:
    """`gone`: chosen, but not held any more, or held anew, when their turn came. `in_review`: not chosen, because a human must
    look at them first; discarding those takes their ids or their reason. `untold`: discarded, but Redis would not take down
    their stories.
    """

    jobs: tuple[MovedJob, ...]
    gone: int
    in_review: int
    untold: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscardPreview:
    """What a discard would do now."""

    would_discard: int
    in_review: int
    groups: tuple[ChosenGroup, ...]


def preview_discard(selection: Selection) -> DiscardPreview:
    """What `discard` would do now; it changes nothing."""
    return DiscardPreview(would_discard=selection.size, in_review=selection.in_review, groups=groups_of(selection))


def discard(
    operator: Operator, selection: Selection, *, who: str, because: str, progress: Progress = lambda _: None
) -> Discard:
    """Ends chosen held jobs as discarded. Whoever waits for one gets `JobFailed`, which says why; so does its story.

    Raises:
      StoreUnavailable: Redis does not answer any more; the message says how many were discarded.
    """
    done: list[MovedJob] = []
    untold = 0
    with telling_how_many(operator, done, selection.size, "discarded"):
        for batch in selection.batches:
            for start in range(0, len(batch.members), AT_ONCE):
                members = batch.members[start : start + AT_ONCE]
                ended = end(batch, members)
                done += [moved_job(batch, facts) for facts in ended]
                untold += tell(operator, batch.space, ended, who, because)
                progress(len(members))
    return Discard(jobs=tuple(done), gone=selection.size - len(done), in_review=selection.in_review, untold=untold)


def end(batch: Batch, members: Sequence[bytes]) -> list[HeldFacts]:
    """Ends those of these jobs that are held as they were when they were chosen."""
    backlog = batch.space.backlog
    held = backlog.facts_of([Member(Group(batch.queue, m[:GROUP], batch.facet(m), 0), m) for m in members])
    ended = backlog.expire(batch.queue, held, "discarded") if held else []
    return [facts for facts, ok in zip(held, ended, strict=True) if ok]


def tell(operator: Operator, space: Space, ended: Sequence[HeldFacts], who: str, because: str) -> int:
    """Tells stories, waiters and the log of discarded jobs; of how many the story failed.

    After they ended and not before, as where jobs expire: one that is released at this moment runs, and must find no result.
    """
    now = operator.now()
    said = {"while": "held", "who": who, "because": because}
    lines = [line for f in ended for line in (*told_by(f), Line(f.job_id, now, "discarded", {"task": f.task, **said}))]
    untold = tell_lines(space, lines)
    for facts in ended:
        results.fail(operator, facts.queue, facts.task, facts.job_id, "discarded", because)
        events.job_discarded(facts.job_id, facts.task, facts.queue, who, because)
    return untold
