# SPDX-License-Identifier: Apache-2.0
"""Which dead letters are meant: jobs that failed, expired or were discarded, by id or by a filter.

No index knows them, so their bodies are read; what is shown of them is never an argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from dramatiq.message import Message

from tideover.core.job import ENDS, End
from tideover.errors import JobNotFound
from tideover.ops.access import Misasked, Operator, Refused, Space, find_job, reaching
from tideover.ops.explanation import Where, end_told, locate
from tideover.ops.renewal import readable
from tideover.ops.values import iso
from tideover.stamp import stamp_of, tenant_of
from tideover.store.letters import Letter, Letters
from tideover.store.stories import Line

Restorable = Literal["failed", "expired", "discarded"]
RESTORABLE: tuple[Restorable, ...] = get_args(Restorable)
KEPT = "dead letters are kept for 7 days (dramatiq's dead_message_ttl)"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadFilter:
    """What dead letters must have to be meant; None: anything. An empty tenant or tag means none.

    `ended`: how the job ended; one of which nobody wrote that down has no end. `ended_within_s`: so many seconds ago at most.

    Raises:
      Misasked: no dead letter ends so, or the duration is negative.
    """

    task: str | None = None
    ended: str | None = None
    tenant: str | None = None
    tag: str | None = None
    ended_within_s: float | None = None

    def __post_init__(self) -> None:
        if self.ended is not None and self.ended not in RESTORABLE:
            raise Misasked(f"no dead letter has ended {self.ended!r}; it is one of {', '.join(RESTORABLE)}")
        if self.ended_within_s is not None and not 0 <= self.ended_within_s < float("inf"):
            raise Misasked(f"{self.ended_within_s} s is no duration; it is 0 or more")

    def takes(self, letter: DeadLetter) -> bool:
        asked = (self.task, letter.task), (self.ended, letter.end), (self.tenant, letter.tenant), (self.tag, letter.tag)
        return all(wanted in (None, value) for wanted, value in asked)


class DeadLetter(NamedTuple):
    """A dead letter, without its body. `end`: as its story tells it; None: nobody wrote it down."""

    space: Space
    queue: str
    redis_id: str
    job_id: str
    ended_at: float
    end: End | None
    task: str
    tenant: str
    tag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredBefore:
    """A job that was asked for and is restored already; `state`: where it is now."""

    id: str
    namespace: str
    state: Where
    end: End | None


@dataclass(frozen=True, slots=True)
class DeadSelection:
    """Dead letters as they were chosen; one that comes later is not in it. `unreadable`: passed over, nobody can read them."""

    letters: tuple[DeadLetter, ...]
    before: tuple[RestoredBefore, ...] = ()
    unreadable: int = 0


def letters_of(space: Space) -> Letters:
    return Letters(space.backlog.client, space.backlog.keys)


def choose_dead_jobs(operator: Operator, ids: Sequence[str]) -> DeadSelection:
    """The dead letters of these jobs, by id or its first characters; those that were restored before are named.

    Raises:
      JobNotFound: nothing is known of one of them, or its dead letter is gone.
      Refused: one of them is no dead letter, but alive, or has succeeded.
    """
    with reaching(operator.settings):
        found = [the_letter(operator, asked) for asked in dict.fromkeys(ids)]
    letters = dict.fromkeys(one for one in found if isinstance(one, DeadLetter))
    return DeadSelection(tuple(letters), tuple(one for one in found if isinstance(one, RestoredBefore)))


def the_letter(operator: Operator, asked: str) -> DeadLetter | RestoredBefore:
    try:
        space, job_id = find_job(operator, asked)
    except JobNotFound:
        untold = (one for space in operator.spaces if (one := letter_of(space, asked)) is not None)
        if (letter := next(untold, None)) is None:
            raise
        return letter
    where, _, _ = locate(space, job_id)
    story = space.stories.of(job_id)
    if where in ("ended", "lost") and (letter := letter_of(space, job_id)) is not None:
        return letter
    latest = next((line for line in reversed(story) if line.event in ("restored", *RESTORABLE)), None)
    end = end_told(story) if where == "ended" else None
    if latest is not None and latest.event == "restored":
        return RestoredBefore(id=job_id, namespace=space.name, state=where, end=end)
    raise no_letter(space, job_id, where, end, None if latest is None else latest.at)


def no_letter(space: Space, job_id: str, where: Where, end: End | None, ended_at: float | None) -> Refused | JobNotFound:
    """Why a job cannot be restored."""
    if where != "ended":
        way = f"; `tideover release {job_id}` lets it run" if where == "held" else ""
        return Refused(f"job {job_id} is no dead letter: it is {where}{way}. `tideover explain {job_id}` says more")
    if end == "succeeded":
        return Refused(f"job {job_id} is no dead letter: it has succeeded, so there is nothing to restore")
    oldest_at = letters_of(space).oldest_at(space.registry.queues())
    ended = "" if ended_at is None else f", and it {'ended' if end is None else end} at {iso(ended_at)}"
    oldest = "there is none now" if oldest_at is None else f"the oldest there is ended at {iso(oldest_at)}"
    return JobNotFound(f"the dead letter of job {job_id} is gone: {KEPT}{ended}; {oldest}. Send the job again instead")


def letter_of(space: Space, job_id: str) -> DeadLetter | None:
    """The dead letter of a job by its whole id."""
    for queue, letter in letters_of(space).like(job_id, space.registry.queues()):
        message = readable(letter.body)
        if message is None and letter.redis_id == job_id:
            raise Refused(f"job {job_id} cannot be restored from here: its message cannot be decoded")
        if message is not None and message.message_id == job_id:
            return dead_letter(space, queue, letter, message, letters_of(space).last_words([job_id])[0])
    return None


def dead_letter(space: Space, queue: str, letter: Letter, message: Message[Any], told: Line | None) -> DeadLetter:
    tag = stamp_of(message).get("tag", "")
    return DeadLetter(
        space=space,
        queue=queue,
        redis_id=letter.redis_id,
        job_id=message.message_id,
        ended_at=letter.ended_at,
        end=None if told is None else next((end for end in ENDS if end == told.event), None),
        task=message.actor_name,
        tenant=tenant_of(message),
        tag=tag if isinstance(tag, str) else "",
    )


def choose_dead(operator: Operator, chosen: DeadFilter) -> DeadSelection:
    """All dead letters of one namespace that are meant, those first whose jobs ended first.

    Raises:
      Refused: the operator has several namespaces.
      JobNotFound: there is no such dead letter.
    """
    unreadable, found = 0, []
    with reaching(operator.settings):
        space = operator.the_space("restoring dead letters")
        since_at = 0.0 if chosen.ended_within_s is None else operator.now() - chosen.ended_within_s
        for queue in space.registry.queues():
            for page in letters_of(space).pages(queue, since_at):
                known = [*read(space, queue, page)]
                unreadable += len(page) - len(known)
                found += [letter for letter in known if chosen.takes(letter)]
    if not found:
        raise JobNotFound(f"there is no such dead letter in namespace {space.name}{not_read(unreadable)}; {KEPT}")
    return DeadSelection(tuple(sorted(found, key=lambda letter: letter.ended_at)), unreadable=unreadable)


def not_read(unreadable: int) -> str:
    return f", apart from {unreadable:,} that nobody can read" if unreadable else ""


def read(space: Space, queue: str, page: Sequence[Letter]) -> Iterator[DeadLetter]:
    """Those of a page that can be read."""
    messages = [(letter, message) for letter in page if (message := readable(letter.body)) is not None]
    told = letters_of(space).last_words([message.message_id for _, message in messages])
    for (letter, message), line in zip(messages, told, strict=True):
        yield dead_letter(space, queue, letter, message, line)
