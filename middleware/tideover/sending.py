# SPDX-License-Identifier: Apache-2.0
"""Sending jobs: room for them, sending once, sending many."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any
from uuid import uuid4
from weakref import WeakKeyDictionary

import dramatiq
from dramatiq.broker import Broker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.message import Message

from tideover import clock, events
from tideover.arguments import largest_argument
from tideover.core.job import CRITICALITIES
from tideover.errors import CapacityReached, ConfigurationError, InvalidJob, StoreUnavailable, TideoverError
from tideover.results import store_expired
from tideover.stamp import stamp_of
from tideover.store.account import UNLIMITED, Acceptance, Ledger, NewJob, Room
from tideover.store.backlog import Backlog
from tideover.store.client import store_errors
from tideover.store.facts import HeldFacts, bucket
from tideover.store.registry import Registry
from tideover.store.stories import Line, Stories, told_by
from tideover.task import AITask, first_sending

if TYPE_CHECKING:
    from tideover.settings import Settings

AT_ONCE = 250
AT_ONCE_BYTES = 4_194_304
"""Jobs, and bytes, that one script accepts: more would block Redis for too long."""

LEAST_LIMIT = 1024
"""The lowest `max_payload_bytes` that there is."""

FOLLOW_UP = "-"


class Sending(threading.local):
    """The message that this thread is enqueueing, between dramatiq's hook and its store."""

    message: Message[Any] | None = None
    gathered: list[Parcel] | None = None
    """Where `send_many` gathers jobs instead of accepting them one by one."""


sending = Sending()

senders: WeakKeyDictionary[Broker, Sender] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Parcel:
    """A new job, the list that it goes to, and the room that it must find."""

    queue: str
    job: NewJob
    room: Room


@dataclass(frozen=True, slots=True)
class Rejected:
    """A job that was not accepted, and why."""

    message: Message[Any]
    error: Exception


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of many jobs. `duplicate`: sent before with the same idempotency key; each is the first job's message."""

    accepted: list[Message[Any]] = field(default_factory=list)
    duplicate: list[Message[Any]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


class Sender:
    """Accepts new jobs of one broker, as far as there is room."""

    def __init__(self, broker: RedisBroker, ledger: Ledger) -> None:
        self.broker, self.ledger = broker, ledger

    def accept(self, queue: str, redis_id: str, body: bytes, *, follows: str | None) -> None:
        """Accepts the job that this thread is enqueueing.

        `follows`: what it is the next step of, if it is one. A follow-up finds room in any case, and is accepted once, however
        often what it follows runs.
        """
        message, sending.message = sending.message, None
        stamp = {} if message is None else stamp_of(message)
        is_ai = message is not None and isinstance(self.broker.actors.get(message.actor_name), AITask)
        if is_ai and message is not None and len(body) > LEAST_LIMIT:
            check_size(body, message)
        room = room_of_settings() if is_ai and follows is None else UNLIMITED
        plain = follows is None and room is UNLIMITED and "tenant" not in stamp and "once" not in stamp
        if plain and sending.gathered is None and self.ledger.accept_plain(queue, redis_id, body).verdict == "accepted":
            first_sending.queue = ""
            return
        tenant, key = (said if isinstance(said := stamp.get(name), str) else "" for name in ("tenant", "once"))
        once = ("", "")
        if follows is not None:
            once = (f"{follows}>{redis_id}", FOLLOW_UP)
        elif message is not None and key:
            once = (message.message_id, key)  # not its Redis id, which is another one when it is sent anew by hand
        job = NewJob(redis_id=redis_id, body=body, tenant=tenant, once=once)
        if sending.gathered is not None:
            sending.gathered.append(Parcel(queue, job, room))
        else:
            first_sending.queue = self.one(queue, job, room).queue

    def one(self, queue: str, job: NewJob, room: Room) -> Acceptance:
        """Accepts one job; raises `CapacityReached` or `InvalidJob` when it may not be."""
        while True:
            acceptance = self.ledger.accept(queue, [job], room)[0]
            match acceptance.verdict:
                case "accepted":
                    return acceptance
                case "duplicate" if acceptance.once != job.once[1]:
                    raise InvalidJob("its idempotency key was used for other arguments within the last day")
                case "duplicate":
                    return acceptance
                case "taken":
                    job = renamed(job)
                case "full" | "tenant_full":
                    self.make_room("" if acceptance.verdict == "full" else job.tenant, room)

    def make_room(self, tenant: str, room: Room) -> None:
        """Ends the held job whose expiry, or longest wait, comes first, if the settings say so; else there is no room.

        A critical one only where no deferrable one is held.
        """
        limit = room.jobs_per_tenant if tenant else room.jobs
        full = CapacityReached(tenant or None, limit or 0)
        from tideover.settings import settings

        if settings().capacity.overflow == "reject":
            raise full
        backlog = Backlog(self.broker.client, self.ledger.keys)
        held = [facts for queue in Registry(backlog.client, backlog.keys).queues() for facts in firsts(backlog, queue, tenant)]
        if not held:
            raise full
        first = min(held, key=lambda facts: (facts.criticality == "critical", facts.order))
        if not backlog.expire(first.queue, [first])[0]:
            return  # another sender was faster, so there may be room
        store_expired(self.broker, first.queue, first.task, first.job_id)
        told = Line(first.job_id, clock.now(), "expired", {"task": first.task, "while": "held", "for_room": True})
        Stories(backlog.client, backlog.keys).add([*told_by(first), told])
        events.job_expired(first.job_id, first.task, first.queue)

    def many(self, parcels: Sequence[Parcel]) -> list[Acceptance | TideoverError]:
        """Accepts jobs, those of one list in one go; for each what became of it."""
        alike: dict[tuple[str, Room], list[int]] = defaultdict(list)
        for i, parcel in enumerate(parcels):
            alike[parcel.queue, parcel.room].append(i)
        done: dict[int, Acceptance | TideoverError] = {}
        for (queue, room), places in alike.items():
            for part in portions([(i, parcels[i].job) for i in places]):
                for (i, job), acceptance in zip(part, self.ledger.accept(queue, [job for _, job in part], room), strict=True):
                    done[i] = acceptance if acceptance.verdict == "accepted" else self.again(queue, job, room)
        return [done[i] for i in range(len(parcels))]

    def again(self, queue: str, job: NewJob, room: Room) -> Acceptance | TideoverError:
        try:
            return self.one(queue, job, room)
        except (CapacityReached, InvalidJob) as error:
            return error


def firsts(backlog: Backlog, queue: str, tenant: str) -> Iterator[HeldFacts]:
    """Of the held jobs of a queue, those of one tenant if there is one: that which goes first, by criticality."""
    of_tenant = {tenant, bucket(tenant)}  # where there are many, tenants share groups
    groups = [group for group in backlog.groups(queue) if not tenant or group.facet.tenant in of_tenant]
    for criticality in CRITICALITIES:
        walk = backlog.walk([group for group in groups if group.facet.criticality == criticality], 1)
        held = (facts for member in walk for facts in backlog.facts_of([member]) if tenant in ("", facts.tenant))
        yield from islice(held, 1)


@cache
def reader() -> Callable[[], Settings]:
    """`settings`, imported at the first send and not before: it takes as long as all the rest."""
    from tideover.settings import settings

    return settings


def room_of_settings() -> Room:
    capacity = reader()().capacity
    if capacity.max_jobs is None and capacity.max_jobs_per_tenant is None:
        return UNLIMITED
    return Room(capacity.max_jobs, capacity.max_jobs_per_tenant)


def portions(jobs: Iterable[tuple[int, NewJob]]) -> Iterator[list[tuple[int, NewJob]]]:
    """Jobs in portions that one script may accept."""
    part: list[tuple[int, NewJob]] = []
    size = 0
    for entry in jobs:
        if part and (len(part) >= AT_ONCE or size + len(entry[1].body) > AT_ONCE_BYTES):
            yield part
            part, size = [], 0
        part.append(entry)
        size += len(entry[1].body)
    if part:
        yield part


def renamed(job: NewJob) -> NewJob:
    """The job under a Redis id of its own: the same message was enqueued before, and that makes two jobs."""
    again = Message.decode(job.body).copy(options={"redis_message_id": str(uuid4())})
    return NewJob(redis_id=again.options["redis_message_id"], body=again.encode(), tenant=job.tenant, once=job.once)


def check_size(body: bytes, message: Message[Any]) -> None:
    """Raises `InvalidJob` for a job that is too large to be held in Redis by the million."""
    most = reader()().max_payload_bytes
    if len(body) > most:
        raise InvalidJob(
            f"the job has {len(body):,} bytes{largest_argument(message)}; max_payload_bytes is {most:,}. "
            "Send a reference (an id, an object's URL) instead of the content, or raise the setting"
        )


def send_many(messages: Iterable[Message[Any]], *, broker: Broker | None = None) -> Sent:
    """Sends many jobs, some hundred in one go.

    Args:
      messages: built by `task.message(...)` or `task.message_with_options(args=..., idempotency_key=...)`; a generator will do.
      broker: the dramatiq broker; None: the one that was set.

    Returns:
      The jobs by what became of them. A job that cannot be accepted is among the rejected and does not stop the others.

    Raises:
      StoreUnavailable: Redis went away. Those accepted before are in its `sent`. With idempotency keys, sending all again adds
        nothing twice.
    """
    on = broker or dramatiq.get_broker()
    if not isinstance(on, RedisBroker):
        raise ConfigurationError(f"send_many needs dramatiq's RedisBroker, not {type(on).__name__}")
    sent, source = Sent(), iter(messages)
    while part := list(islice(source, AT_ONCE)):
        try:
            send_part(on, part, sent)
        except StoreUnavailable as error:
            error.sent = sent
            raise
    return sent


def send_part(broker: RedisBroker, messages: Sequence[Message[Any]], sent: Sent) -> None:
    """One portion: dramatiq's hooks for each, and one script for all."""
    gathered: list[tuple[Message[Any], Parcel]] = []
    for message in messages:
        sending.gathered = []
        try:
            gathered.append((broker.enqueue(message), sending.gathered[0]))
        except StoreUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a hook says against one job, the others are sent
            sent.rejected.append(Rejected(message, error))
        finally:
            sending.gathered = None
    if not gathered:
        return
    with store_errors("sending jobs", accepts="jobs"):
        outcomes = senders[broker].many([parcel for _, parcel in gathered])
    for (message, _), outcome in zip(gathered, outcomes, strict=True):
        if isinstance(outcome, TideoverError):
            sent.rejected.append(Rejected(message, outcome))
        elif outcome.verdict == "duplicate":
            sent.duplicate.append(message.copy(queue_name=outcome.queue))
        else:
            sent.accepted.append(message)
