# SPDX-License-Identifier: Apache-2.0
"""Our consumer of one queue: it fetches, asks the gate, and turns an acknowledgement into an end, a hold or a giving back."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from dramatiq.broker import Consumer, MessageProxy
from dramatiq.errors import ConnectionClosed, DecodeError
from dramatiq.message import Message

from tideover import answering, clock, events
from tideover.attempt import Note, note_of
from tideover.core.admission import Expire, GiveBack, Hold
from tideover.degrading import keep
from tideover.errors import StoreUnavailable
from tideover.gate import Gate, is_ours, mark_storied, redis_id, twin_of
from tideover.results import store_expired
from tideover.stamp import STAMP, stamp_of
from tideover.store.backlog import HELD_AT_ONCE, Fetched
from tideover.store.client import FAILED

NOT_TAKEN: Final[tuple[type[Exception], ...]] = (*FAILED, StoreUnavailable)
"""Redis did not make a move; dramatiq tries again."""

FIRST_IDLE_S = 0.005

GATHER_S = 0.002
"""How long a consumer with little room waits for more of it: a fetch for each job that ends would cost more than many a job."""

MOST_SKEW_MS = 1000
"""How far this machine's clock may be set while delayed jobs are in memory, where dramatiq goes by it."""

REST_S = 1.0
"""How long a consumer leaves its queue to others after it gave jobs back, because only this process cannot reach a route."""

RECLAIM_S = 10.0
"""How often a consumer looks for jobs that it has fetched without knowing: redis-py may repeat a fetch whose reply was lost."""


class QuietProxy(MessageProxy):
    """A message that shows no arguments when dramatiq logs it: they may be prompts."""

    def __init__(self, message: Message[Any], note: Note) -> None:
        super().__init__(message)
        self.tideover_note = note
        self.queue_name, self.actor_name = message.queue_name, message.actor_name  # MessageProxy looks them up each time
        self.message_id, self.options = message.message_id, message.options

    def __str__(self) -> str:
        return f"{self.actor_name}, job {self.message_id}"

    __repr__ = __str__


def repeat_hooks(note: Note) -> None:
    """Runs hooks again that Redis failed when the function had ended: the answer has been paid for."""
    while note.again:
        note.again[0]()
        note.again.pop(0)
        note.follow_up_failed = False


class GatedConsumer(Consumer):
    """dramatiq's consumer of one queue, with our scripts. Used by its ConsumerThread; acks come from other threads."""

    def __init__(self, gate: Gate, queue: str, prefetch: int, poll_s: float) -> None:
        self.gate, self.queue, self.prefetch, self.poll_s = gate, queue, prefetch, poll_s
        self.delayed = queue.endswith(".DQ")
        self.taken = gate.taken[queue]
        if self.delayed:
            self.taken.clear()  # dramatiq keeps them in memory and drops them whenever it rebuilds a consumer
        self._ready: deque[MessageProxy] = deque()
        self._room = threading.Event()
        self._wanted = 1
        """The room that is waited for."""
        self._idle_s = FIRST_IDLE_S
        self._reclaim_at = self._rest_until = 0.0
        self._skew_ms = clock.skew_ms()

    def __next__(self) -> MessageProxy | None:
        if self.delayed and abs(clock.skew_ms() - self._skew_ms) > MOST_SKEW_MS:
            raise ConnectionClosed(ValueError("this machine's clock was set"))  # type: ignore[no-untyped-call]  # begin anew
        try:
            if clock.monotonic() >= self._reclaim_at:
                self._reclaim()
            if not self._ready:
                self._fill()
        except FAILED as error:
            self._reclaim_at = 0.0
            raise ConnectionClosed(error) from None  # type: ignore[no-untyped-call]
        return self._ready.popleft() if self._ready else None

    def ack(self, message: MessageProxy) -> None:
        note = note_of(message)
        with self._parting([message]):
            repeat_hooks(note)
            if note.taken_over or note.handed_over:
                return
            if note.hold is not None:
                self.gate.hold(self.queue, [(message, note.hold)])
            elif note.follow_up_failed or note.give_back:
                self.gate.backlog.give_back(self.gate.worker, self.queue, [redis_id(message)])
            else:
                if note.end == "succeeded" and note.attempt is not None:
                    keep(self.gate.degrade_of(message), note.attempt, message, note.result)
                if note.end == "succeeded" and self.gate.health.mode == "act" and twin_of(message):
                    answering.answer(self.gate, self.queue, message, note.result)
                self.gate.settle(self.queue, message, note.end or "unexplained")

    def nack(self, message: MessageProxy) -> None:
        with self._parting([message]):
            if note_of(message).taken_over or note_of(message).handed_over:
                return
            self.gate.settle(self.queue, message, "expired" if note_of(message).end == "expired" else "failed")

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        given = list(messages)
        if given:
            with self._parting(given):
                self.gate.backlog.give_back(self.gate.worker, self.queue, [redis_id(message) for message in given])

    def close(self) -> None:
        waiting, self._ready = list(self._ready), deque()
        try:
            self.requeue(waiting)
        finally:  # what could not be given back is reclaimed, which it is not while we say that we have it
            for message in waiting:
                self.taken.pop(redis_id(message), None)

    @contextmanager
    def _parting(self, messages: Sequence[MessageProxy]) -> Iterator[None]:
        """Forgets messages once their move is made; while Redis is gone they stay ours, and dramatiq tries again."""
        for message in messages:
            note_of(message).parting = True
        try:
            yield
        except NOT_TAKEN as error:
            for message in messages:
                note_of(message).parting = False
            if not self.gate.leaving:
                raise ConnectionClosed(error) from None  # type: ignore[no-untyped-call]
            events.store_unavailable(
                "the last move before this worker leaves; the job will be given back", type(error).__name__
            )
        for message in messages:
            if self.taken.get(redis_id(message)) is message:  # else its successor, which may have its id, was fetched since
                del self.taken[redis_id(message)]
        if self.prefetch - len(self.taken) >= self._wanted:
            self._room.set()

    def _reclaim(self) -> None:
        n = self.gate.backlog.reclaim(self.gate.worker, self.queue, list(self.taken))
        if n:
            events.jobs_reclaimed(self.queue, n)
        self._reclaim_at = clock.monotonic() + RECLAIM_S

    def _fill(self) -> None:
        if self.gate.closing or len(self.taken) >= self.prefetch or clock.monotonic() < self._rest_until:
            self._wait_for_room(1, self.poll_s)
            return
        enough = max(1, self.prefetch // 4)
        if self.prefetch - len(self.taken) < enough:
            self._wait_for_room(enough, GATHER_S)
        room = 0 if self.gate.closing else self.prefetch - len(self.taken)
        if room <= 0:
            return
        jobs, missing = self.gate.backlog.fetch(self.gate.worker, self.queue, room)
        for lost in missing:
            events.job_body_missing(self.queue, lost)
        if jobs:
            self._idle_s = FIRST_IDLE_S
            self._admit([job for job in jobs if not self._knows(job)])  # given back meanwhile, and ours again
        else:
            self._wait_for_room(self.prefetch + (not self.taken), self._idle_s)  # what ends here may have sent another job
            self._idle_s = min(self.poll_s, self._idle_s * 2)

    def _wait_for_room(self, wanted: int, most_s: float) -> None:
        """Until that many more fit in, but not for longer than that."""
        self._wanted = wanted
        self._room.clear()
        if self.gate.closing or self.prefetch - len(self.taken) < wanted:
            self._room.wait(most_s)

    def _knows(self, job: Fetched) -> bool:
        note = None if (known := self.taken.get(job.redis_id)) is None else note_of(known)
        return note is not None and not note.handed_over and not note.parting

    def _admit(self, jobs: Sequence[Fetched]) -> None:
        self.gate.hold(self.queue, self._not_admitted(jobs))

    def _not_admitted(self, jobs: Sequence[Fetched]) -> Iterator[tuple[MessageProxy, Hold]]:
        """Makes the others ready. Asks a few at a time, for the sake of who holds those: Redis works meanwhile."""
        for start in range(0, len(jobs), HELD_AT_ONCE):
            messages = [m for job in jobs[start : start + HELD_AT_ONCE] if (m := self._decode(job)) is not None]
            strangers = [redis_id(message) for message in messages if not is_ours(message.options)]
            if strangers and self.gate.ledger.adopt(self.gate.worker, self.queue, strangers):
                events.jobs_adopted(self.queue, len(strangers))
            for message in messages:
                verdict = None if self.delayed else self.gate.verdict(message)
                match verdict:
                    case None:
                        self.taken[redis_id(message)] = message
                        self._ready.append(message)
                    case Hold():
                        yield message, verdict
                    case GiveBack():
                        self.gate.backlog.give_back(self.gate.worker, self.queue, [redis_id(message)])
                        self._rest_until = clock.monotonic() + REST_S
                    case Expire():
                        store_expired(self.gate.broker, message.queue_name, message.actor_name, message.message_id)
                        self.gate.settle(self.queue, message, "expired")

    def _decode(self, job: Fetched) -> MessageProxy | None:
        """The message as dramatiq hands it out; one that nobody can read is held for review, as it is."""
        try:
            message = Message.decode(job.body)
            message.options["redis_message_id"] = job.redis_id
        except (DecodeError, AttributeError, TypeError) as error:
            self.gate.hold_unreadable(self.queue, job, type(error).__name__)
            return None
        proxy = QuietProxy(message, Note(mark=job.mark, body=job.body, fetched_at=clock.monotonic()))
        if self.delayed and isinstance(proxy.options.get("eta"), int):
            proxy.options["eta"] -= clock.skew_ms()
        if job.mark.held_ms:
            self._forgive_age(proxy, job.mark.held_ms)
            mark_storied(proxy)
        return proxy

    def _forgive_age(self, message: MessageProxy, held_ms: int) -> None:
        """In memory: dramatiq's AgeLimit must not count the time that a job was held."""
        task = self.gate.broker.actors.get(message.actor_name)
        limits = [message.options.get("max_age"), task.options.get("max_age") if task else None, *self.gate.max_ages]
        limit_ms = next((limit for limit in limits if limit), None)
        if limit_ms:
            stamp = stamp_of(message)
            message.options["max_age"] = limit_ms + held_ms - stamp.get("forgiven_ms", 0)  # a retry takes both along
            message.options[STAMP] = {**stamp, "forgiven_ms": held_ms}
