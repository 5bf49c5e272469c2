# SPDX-License-Identifier: Apache-2.0
"""Our consumer: it asks admission before a worker takes a job, and turns an acknowledgement into a hold."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dramatiq.broker import Broker, Consumer, MessageProxy
from dramatiq.errors import ConnectionClosed, DecodeError
from dramatiq.message import Message

from tideover import clock, events
from tideover.attempt import note_of
from tideover.core.admission import Expire, Hold, decide, unless_one_runs
from tideover.core.job import Criticality, End, Job, is_criticality
from tideover.core.route import Permit
from tideover.store.account import Ledger
from tideover.store.backlog import Backlog, Fetched, HeldFacts
from tideover.store.client import FAILED
from tideover.store.keys import wait_key_text
from tideover.store.stories import Line, Stories
from tideover.task import STAMP, AITask

if TYPE_CHECKING:
    from tideover.health import Health

FIRST_IDLE_S = 0.005

RECLAIM_S = 10.0
"""How often a consumer looks for jobs that it has fetched without knowing: redis-py may repeat a fetch whose reply was lost."""

NO_AGE_LIMIT_MS = 2**53
"""In memory, for a job that was held: dramatiq's AgeLimit would count the outage. Its expiry still holds."""


def stamp_of(message: Any) -> dict[str, Any]:
    """What tideover wrote into a message's options; empty where it wrote nothing that makes sense."""
    stamp = message.options.get(STAMP)
    return stamp if isinstance(stamp, dict) else {}


def criticality_of(message: Any, task: AITask[Any, Any]) -> Criticality:
    """A job's criticality: as stamped, else as its task says for these arguments, else *deferrable*, which can lose nothing."""
    stamped = stamp_of(message).get("criticality")
    if is_criticality(stamped):
        return stamped
    return task.criticality_for(message.args, message.kwargs) or "deferrable"


def told(verdict: Hold | Expire) -> str:
    return f"hold ({verdict.reason})" if isinstance(verdict, Hold) else "expire"


def verdict_over_models(job: Job, health: Health, permit: Permit | None) -> Hold | Expire | None:
    """The verdict over the models that the job's task calls; None: nothing is known that speaks against running."""
    now = clock.now()
    if job.expires_at is not None and now >= job.expires_at:
        return Expire()
    return unless_one_runs([decide(job, health.chain(job, model, {}), now=now, permit=permit) for model in job.models])


class Gate:
    """Admission for one worker process, and the moves that follow from it."""

    def __init__(self, broker: Broker, worker: str, health: Health, ledger: Ledger, backlog: Backlog, stories: Stories) -> None:
        self.broker, self.worker, self.health = broker, worker, health
        self.ledger, self.backlog, self.stories = ledger, backlog, stories
        self.closing = False
        """Set at the first SIGTERM: nothing more is fetched, and what was not begun goes back."""
        self.taken: dict[str, dict[str, MessageProxy]] = defaultdict(dict)
        """By queue: what this process has fetched and not yet parted with, over all consumers that dramatiq builds."""

    def job(self, message: Any) -> Job | None:
        """What admission may know of a message; None when it is no AI task's."""
        task = self.broker.actors.get(message.actor_name)
        if not isinstance(task, AITask):
            return None
        expires_ms = stamp_of(message).get("expires_ms")
        return Job(
            id=message.message_id,
            task=message.actor_name,
            criticality=criticality_of(message, task),
            routes=task.routes(),
            models=tuple(task.models or sorted(self.health.models.get(message.actor_name, ()))),
            expires_at=expires_ms / 1000 if isinstance(expires_ms, int | float) else None,
            reroute_when_deferrable=task.reroute_when_deferrable,
        )

    def verdict(self, message: MessageProxy) -> Hold | Expire | None:
        """Whether a message must not run now. None: let it run; where to is decided call by call."""
        try:
            job = self.job(message)
            verdict = None if job is None else verdict_over_models(job, self.health, note_of(message).permit)
        except Exception:  # noqa: BLE001 - a fault of ours lets the job run as stock dramatiq would
            events.fault_inside("admission")
            return None
        if job is None or verdict is None or self.health.mode == "bypass":
            return None
        if self.health.mode == "observe":
            events.verdict_observed(job.id, job.task, told(verdict))
            return None
        return verdict

    def hold(self, queue: str, held: Sequence[tuple[MessageProxy, Hold]]) -> None:
        """Holds fetched messages; this is their acknowledgement."""
        groups: dict[tuple[tuple[str, ...], str], list[HeldFacts]] = defaultdict(list)
        for message, verdict in held:
            job = self.job(message)
            assert job is not None, "only jobs of AI tasks are held"
            groups[verdict.wait_key, verdict.reason].append(self._facts(queue, message, job, verdict))
        for (wait_key, reason), facts in groups.items():
            ours = self.backlog.hold(self.worker, queue, wait_key, facts, self.health.settings.max_wait_s)
            done = [fact for fact, ok in zip(facts, ours, strict=True) if ok]
            if done:
                events.jobs_held(queue, len(done), reason, wait_key)
                self._tell_held(done, new={message.message_id for message, _ in held if not is_storied(message)})

    def settle(self, queue: str, message: MessageProxy, end: End) -> None:
        """Ends a fetched message in the account; this is its acknowledgement."""
        attempt = note_of(message).attempt
        served = [] if attempt is None else [f"{served.route}:{served.model}" for served in attempt.served]
        line = Line(message.message_id, clock.now(), end, {"task": message.actor_name, "served": served})
        if end == "expired":
            self.tell(line)  # first, because whoever waits for an expired job finds no result, and reads its story
        if not self.ledger.settle(self.worker, queue, redis_id(message), message.message_id, end):
            return
        match end:
            case "unexplained":
                events.job_end_unexplained(message.message_id, message.actor_name)
            case "expired":
                events.job_expired(message.message_id, message.actor_name, queue)
            case "succeeded" | "failed" | "discarded":
                if end == "failed" or is_storied(message) or (attempt is not None and attempt.rerouted):
                    self.tell(line)

    def tell(self, *lines: Line) -> None:
        """Adds to stories. They explain; they decide nothing, so failing to tell is no failure of the job."""
        try:
            self.stories.add(lines)
        except FAILED as error:
            events.store_unavailable("telling stories of jobs", type(error).__name__)

    def _facts(self, queue: str, message: MessageProxy, job: Job, verdict: Hold) -> HeldFacts:
        attempt = note_of(message).attempt
        return HeldFacts(
            redis_id=redis_id(message),
            job_id=message.message_id,
            task=message.actor_name,
            queue=queue,
            criticality=job.criticality,
            wait_key=wait_key_text(verdict.wait_key),
            reason=verdict.reason,
            generation=verdict.generation,
            held_ms=clock.now_ms(),
            sent_ms=message.message_timestamp,
            expires_ms=stamp_of(message).get("expires_ms"),
            detail=attempt.detail if attempt else "",
        )

    def _tell_held(self, facts: Sequence[HeldFacts], new: Container[str]) -> None:
        now = clock.now()
        lines = []
        for fact in facts:
            if fact.job_id in new:
                first = {"task": fact.task, "criticality": fact.criticality}
                lines.append(Line(fact.job_id, fact.sent_ms / 1000, "enqueued", first))
            why = {"reason": fact.reason, "waits_for": fact.breaker_keys, "generation": fact.generation, "detail": fact.detail}
            lines.append(Line(fact.job_id, now, "held", why))
        self.tell(*lines)


def redis_id(message: Any) -> str:
    """dramatiq's name of one copy of a message in Redis; a retry has another."""
    return str(message.options["redis_message_id"])


def is_ours(options: Mapping[str, Any]) -> bool:
    """Whether a producer with tideover sent it, so that it is in the account already."""
    stamp = options.get(STAMP)
    return isinstance(stamp, dict) and "sent_ms" in stamp


def is_storied(message: Any) -> bool:
    """Whether this job has a story: then its end belongs to it."""
    return stamp_of(message).get("storied") is True


def mark_storied(message: Any) -> None:
    """In memory; a retry takes the mark along."""
    message.options[STAMP] = {**stamp_of(message), "storied": True}


class QuietProxy(MessageProxy):
    """A message that shows no arguments when dramatiq logs it: they may be prompts."""

    def __str__(self) -> str:
        return f"{self.actor_name}, job {self.message_id}"

    __repr__ = __str__


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
        self._idle_s = FIRST_IDLE_S
        self._reclaim_at = 0.0

    def __next__(self) -> MessageProxy | None:
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
            if note.store_again is not None:
                note.store_again()
                note.store_again = None
            if note.hold is not None:
                self.gate.hold(self.queue, [(message, note.hold)])
            elif note.follow_up_failed:
                self.gate.backlog.give_back(self.gate.worker, self.queue, [redis_id(message)])
            else:
                self.gate.settle(self.queue, message, note.end or "unexplained")

    def nack(self, message: MessageProxy) -> None:
        with self._parting([message]):
            self.gate.settle(self.queue, message, "expired" if note_of(message).end == "expired" else "failed")

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        given = list(messages)
        if given:
            with self._parting(given):
                self.gate.backlog.give_back(self.gate.worker, self.queue, [redis_id(message) for message in given])

    def close(self) -> None:
        waiting, self._ready = list(self._ready), deque()
        for message in waiting:
            self.taken.pop(redis_id(message), None)
        self.requeue(waiting)

    @contextmanager
    def _parting(self, messages: Sequence[MessageProxy]) -> Iterator[None]:
        """Forgets messages once their move is made; while Redis is gone they stay ours, and dramatiq tries again."""
        try:
            yield
        except FAILED as error:
            raise ConnectionClosed(error) from None  # type: ignore[no-untyped-call]
        for message in messages:
            self.taken.pop(redis_id(message), None)
        self._room.set()

    def _reclaim(self) -> None:
        n = self.gate.backlog.reclaim(self.gate.worker, self.queue, list(self.taken))
        if n:
            events.jobs_reclaimed(self.queue, n)
        self._reclaim_at = clock.monotonic() + RECLAIM_S

    def _fill(self) -> None:
        room = 0 if self.gate.closing else self.prefetch - len(self.taken)
        if room <= 0:
            self._room.clear()
            if self.gate.closing or len(self.taken) >= self.prefetch:
                self._room.wait(self.poll_s)
            return
        jobs, missing = self.gate.backlog.fetch(self.gate.worker, self.queue, room)
        for lost in missing:
            events.job_body_missing(self.queue, lost)
        if jobs:
            self._idle_s = FIRST_IDLE_S
            self._admit(jobs)
        else:
            self._room.clear()
            self._room.wait(self._idle_s)
            self._idle_s = min(self.poll_s, self._idle_s * 2)

    def _admit(self, jobs: Sequence[Fetched]) -> None:
        messages = [message for job in jobs if (message := self._decode(job)) is not None]
        strangers = [redis_id(message) for message in messages if not is_ours(message.options)]
        if strangers and self.gate.ledger.adopt(self.gate.worker, self.queue, strangers):
            events.jobs_adopted(self.queue, len(strangers))
        held: list[tuple[MessageProxy, Hold]] = []
        for message in messages:
            verdict = None if self.delayed else self.gate.verdict(message)
            match verdict:
                case None:
                    self.taken[redis_id(message)] = message
                    self._ready.append(message)
                case Hold():
                    held.append((message, verdict))
                case Expire():
                    self.gate.settle(self.queue, message, "expired")
        if held:
            self.gate.hold(self.queue, held)

    def _decode(self, job: Fetched) -> MessageProxy | None:
        """The message as dramatiq hands it out; one that nobody can read becomes a dead letter, kept as it is."""
        try:
            message = Message.decode(job.body)
            message.options["redis_message_id"] = job.redis_id
        except (DecodeError, AttributeError, TypeError) as error:
            events.job_unreadable(self.queue, job.redis_id, type(error).__name__)
            if b'"sent_ms"' not in job.body:  # nobody can read whose it is; ours carry this
                self.gate.ledger.adopt(self.gate.worker, self.queue, [job.redis_id])
            self.gate.ledger.settle(self.gate.worker, self.queue, job.redis_id, job.redis_id, "failed")
            return None
        proxy = QuietProxy(message)
        if job.permit is not None:
            note_of(proxy).permit = Permit.parse(job.permit)
            proxy.options["max_age"] = NO_AGE_LIMIT_MS
            mark_storied(proxy)
        return proxy
