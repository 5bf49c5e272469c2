# SPDX-License-Identifier: Apache-2.0
"""Putting dead letters back into their queues, as jobs that begin anew."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from dramatiq.message import Message

from tideover import events
from tideover.core.job import End
from tideover.ops.access import Operator, Space
from tideover.ops.acts import AT_ONCE, MovedJob, Progress, tell_lines, telling_how_many
from tideover.ops.dead import DeadLetter, DeadSelection, RestoredBefore, letters_of
from tideover.ops.renewal import readable, renewed
from tideover.ops.results import names_of
from tideover.stamp import stamp_of, tenant_of
from tideover.store.stories import Line

ExpiresIn = float | None | Literal["same"]
"""Seconds that the answers of restored jobs are useful from now on; None: for ever; *same*: as long as when they were sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredJob(MovedJob):
    """`ended`: how it had ended; None: nobody wrote that down."""

    ended: End | None
    expires_at: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """`before`: asked for, but restored already. `gone`: chosen, but no dead letters any more when their turn came.
    `unreadable`: nobody can read them, so they stay. `untold`: restored, but Redis would not take down their stories.
    """

    jobs: tuple[RestoredJob, ...]
    before: tuple[RestoredBefore, ...]
    gone: int
    unreadable: int
    untold: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadGroup:
    """Dead letters that are alike; `first_at`, `last_at`: between these they ended."""

    namespace: str
    lane: str
    task: str
    ended: End | None
    tenant: str
    tag: str
    jobs: int
    first_at: float
    last_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePreview:
    """What a restore would do now."""

    would_restore: int
    before: tuple[RestoredBefore, ...]
    unreadable: int
    groups: tuple[DeadGroup, ...]


def preview_restore(selection: DeadSelection) -> RestorePreview:
    """What `restore` would do now; it changes nothing."""
    alike: dict[tuple[object, ...], list[DeadLetter]] = defaultdict(list)
    for one in selection.letters:
        alike[one.space.name, one.queue, one.task, one.end, one.tenant, one.tag].append(one)
    return RestorePreview(
        would_restore=len(selection.letters),
        before=selection.before,
        unreadable=selection.unreadable,
        groups=tuple(group_of(letters) for letters in sorted(alike.values(), key=len, reverse=True)),
    )


def group_of(letters: Sequence[DeadLetter]) -> DeadGroup:
    one, ended_at = letters[0], [letter.ended_at for letter in letters]
    return DeadGroup(
        namespace=one.space.name,
        lane=one.queue,
        task=one.task,
        ended=one.end,
        tenant=one.tenant,
        tag=one.tag,
        jobs=len(letters),
        first_at=min(ended_at),
        last_at=max(ended_at),
    )


def restore(
    operator: Operator,
    selection: DeadSelection,
    *,
    who: str,
    why: str | None,
    expires_in: ExpiresIn = "same",
    progress: Progress = lambda _: None,
) -> Restored:
    """Puts chosen dead letters back at the end of their queues, each as a new job of the account, and tells their stories so.

    They begin anew: no attempt is spent, their age and the time until their expiry begin now, what waiters would find of their
    first life is deleted. From there on they go as any job does: in an outage they are held.

    Raises:
      StoreUnavailable: Redis does not answer any more; the message says how many were restored.
    """
    work = Restoring(operator, who, why, expires_in)
    with telling_how_many(operator, work.jobs, len(selection.letters), "restored"):
        for space, letters in parts(selection.letters):
            work.part(space, letters)
            progress(len(letters))
    return Restored(
        jobs=tuple(work.jobs),
        before=selection.before,
        gone=len(selection.letters) - len(work.jobs),
        unreadable=selection.unreadable,
        untold=work.untold,
    )


def parts(letters: Sequence[DeadLetter]) -> Iterator[tuple[Space, list[DeadLetter]]]:
    """Those of one queue, not too many at once, in the order in which they were chosen."""

    def place(letter: DeadLetter) -> tuple[str, str]:
        return letter.space.name, letter.queue

    for _, alike in groupby(sorted(letters, key=place), key=place):
        found = list(alike)
        for start in range(0, len(found), AT_ONCE):
            yield found[start].space, found[start : start + AT_ONCE]


class Restoring:
    """A restore under way."""

    def __init__(self, operator: Operator, who: str, why: str | None, expires_in: ExpiresIn) -> None:
        self.operator, self.said, self.expires_in = operator, {"who": who, "reason": why}, expires_in
        self.jobs: list[RestoredJob] = []
        self.untold = 0

    def part(self, space: Space, letters: Sequence[DeadLetter]) -> None:
        """Restores dead letters of one queue, and tells it."""
        bodies = letters_of(space).bodies(letters[0].queue, [letter.redis_id for letter in letters])
        now = self.operator.now()  # before they can run: what they come to stands behind this in their stories
        told = []
        for letter in letters:
            message = readable(bodies.get(letter.redis_id, b""))
            if message is not None and self.one(letter, message, now):
                facts = {"task": letter.task, "ended": letter.end, **self.said}
                told.append(Line(letter.job_id, now, "restored", facts))
                events.job_restored(letter.job_id, letter.task, letter.queue, str(self.said["who"]))
        self.untold += tell_lines(space, told)

    def one(self, letter: DeadLetter, message: Message[Any], now: float) -> bool:
        """Restores one; False: it is no dead letter any more, or a job with its idempotency key is alive."""
        backlog, letters = letter.space.backlog, letters_of(letter.space)
        if "once" in stamp_of(message) and backlog.place(letter.job_id, letter.space.registry.queues()) is not None:
            return False
        same = self.expires_in == "same"
        expires_in_ms = self.expires_in * 1000 if isinstance(self.expires_in, float | int) else None
        fresh = renewed(message, letter.queue, round(now * 1000, 3), expires_in_ms, same=same)
        letters.drop(names_of(self.operator, message))  # before, because what it comes to may be there a moment after
        if not letters.restore(letter.queue, letter.redis_id, letter.job_id, fresh.encode(), tenant_of(fresh)):
            return False
        expires_ms = stamp_of(fresh).get("expires_ms")
        job = RestoredJob(
            id=letter.job_id,
            namespace=letter.space.name,
            task=letter.task,
            lane=letter.queue,
            ended=letter.end,
            expires_at=None if expires_ms is None else expires_ms / 1000,
        )
        self.jobs.append(job)
        return True
