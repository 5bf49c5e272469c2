# SPDX-License-Identifier: Apache-2.0
"""dramatiq's StubBroker in users' tests: with tideover on it, it keeps its jobs in a store in memory, so that they can be held.

To a test it stays a StubBroker: `join`, `flush`, `flush_all`, `queues` and `dead_letters` mean what they mean there. Below
that it is dramatiq's RedisBroker on fakeredis, so that a test runs what production runs: same scripts, same gate, same drain.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from queue import Queue
from typing import Any
from uuid import uuid4

from dramatiq import Middleware
from dramatiq.broker import Broker, MessageProxy
from dramatiq.brokers.redis import DEFAULT_DEAD_MESSAGE_TTL, RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.common import dq_name
from dramatiq.errors import QueueJoinTimeout, QueueNotFound
from dramatiq.message import Message

from tideover import clock
from tideover.attempt import note_of
from tideover.core.job import CRITICALITIES, lane
from tideover.core.pacing import begun, pace_of
from tideover.store.account import Ledger
from tideover.store.backlog import PAGE, Backlog
from tideover.store.breakers import Breakers
from tideover.store.facts import breaker_keys_of
from tideover.store.keys import Keys
from tideover.store.memory import open_memory
from tideover.store.registry import Registry

POLL_S = 0.01
BY_HAND = "by-hand"
"""The worker in whose name a test takes jobs out of a queue."""


class MemoryBroker(RedisBroker, StubBroker):
    """A StubBroker whose jobs are in a Redis of its own, in memory. `keep_in_memory` makes it of one."""

    queues: dict[str, Queue[bytes]]
    keys: Keys
    ledger: Ledger
    backlog: Backlog

    def declare_queue(self, queue_name: str) -> None:
        if queue_name not in self.queues:
            StubBroker.declare_queue(self, queue_name)
            self.show([queue_name, dq_name(queue_name)])

    def show(self, names: Iterable[str]) -> None:
        self.queues |= {name: QueueInMemory(self, name) for name in names}

    def get_declared_queues(self) -> set[str]:
        return set(self.queues) - self.delay_queues

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        self.lanes(message.queue_name)
        return RedisBroker.enqueue(self, message, delay=delay)

    def lanes(self, queue_name: str) -> list[str]:
        """The lists of a queue: its two lanes, of which a plain actor's queue has one."""
        if queue_name not in self.queues:
            raise QueueNotFound(queue_name)  # type: ignore[no-untyped-call]
        both = [queue_name, *(lane(queue_name, criticality) for criticality in CRITICALITIES)]
        return [name for name in dict.fromkeys(both) if name in self.queues]

    def join(  # type: ignore[override]  # as StubBroker's, whose `fail_fast` RedisBroker lacks
        self, queue_name: str, *, timeout: int | None = None, fail_fast: bool | None = None
    ) -> None:
        """Waits until no job of either lane is queued, delayed, running, or held with nothing to keep it from going on.

        Args:
          timeout: in ms; None: as long as it takes.
          fail_fast: raise what made a job a dead letter; None: as the broker was told. An expiry raises nothing.
        """
        lanes = self.lanes(queue_name)
        give_up_at = None if timeout is None else clock.monotonic() + timeout / 1000
        while self.is_busy(lanes) or self.is_draining(lanes) or self.is_busy(lanes):  # a job may move on while we look
            if give_up_at is not None and clock.monotonic() > give_up_at:
                raise QueueJoinTimeout(f"{queue_name} was busy for longer than {timeout} ms")  # type: ignore[no-untyped-call]
            time.sleep(POLL_S)
        letters = [message for name in lanes for message in self.dead_letters_by_queue[name]]
        if letters and (self.fail_fast_default if fail_fast is None else fail_fast):
            raise letters[0]._exception or Exception("a job failed")  # noqa: SLF001 - as in StubBroker.join

    def is_busy(self, lanes: Sequence[str]) -> bool:
        counts = self.ledger.read().queues
        return any(counts[name].queued or counts[name].running for name in lanes if name in counts)

    def is_draining(self, lanes: Sequence[str]) -> bool:
        """Whether a held job is about to be released: by a breaker that did not open yet, or that recovers."""
        from tideover.settings import settings

        waited_for = breaker_keys_of([group for name in lanes for group in self.backlog.groups(name)])
        breakers = Breakers(self.client, self.keys).read(sorted(waited_for)).values()
        now, policy = clock.now(), settings().drain.policy()
        paces = (pace_of(breaker, begun(now, policy), {}, now=now, policy=policy) for breaker in breakers)
        return any(settings().mode != "act" or pace.rate > 0 for pace in paces)

    def flush(self, queue_name: str) -> None:
        """Discards what waits in both lanes, delayed jobs included. What is held or running stays."""
        for name in self.lanes(queue_name):
            while self.take(name, PAGE) or self.take(dq_name(name), PAGE):
                pass

    def flush_all(self) -> None:
        """Begins anew, as a new process with an empty store: no job, held ones included, no breaker, no result, no account."""
        self.client.flushall()
        for letters in self.dead_letters_by_queue.values():
            letters.clear()

    def take(self, queue_name: str, n: int) -> list[bytes]:
        """Takes jobs out of a list by hand; in the account they are discarded."""
        jobs, _ = self.backlog.fetch(BY_HAND, queue_name, n)
        for job in jobs:
            job_id = Message.decode(job.body).message_id
            self.ledger.settle(BY_HAND, queue_name, job.redis_id, job_id, "discarded")
        Registry(self.client, self.keys).remove_worker(BY_HAND)
        return [job.body for job in jobs]


class QueueInMemory(Queue[bytes]):
    """One list of the store, as tests look at it: `broker.queues["default"].qsize()`, `.empty()`, `.get_nowait()`."""

    def __init__(self, broker: MemoryBroker, name: str) -> None:
        super().__init__()
        self.broker, self.name = broker, name

    def _qsize(self) -> int:
        return int(self.broker.client.llen(self.broker.keys.queue(self.name)))

    def _get(self) -> bytes:
        return self.broker.take(self.name, 1)[0]


class DeadLetters(Middleware):
    """Keeps what failed, with its exception, where a StubBroker keeps it."""

    def before_nack(self, broker: Broker, message: MessageProxy) -> None:
        if isinstance(broker, StubBroker) and note_of(message).end != "expired":
            vars(message)["clear_exception"] = lambda: None
            broker.dead_letters_by_queue[message.queue_name].append(message)


def keep_in_memory(broker: Broker) -> None:
    """Gives a StubBroker a store of its own, if fakeredis is installed; other brokers stay as they are."""
    if isinstance(broker, MemoryBroker) or not isinstance(broker, StubBroker) or (client := open_memory()) is None:
        return
    kind: Any = type(broker)
    made: Any = broker
    made.__class__ = MemoryBroker if kind is StubBroker else type(kind.__name__, (MemoryBroker, kind), {})
    made.client, made.namespace, made.broker_id = client, "dramatiq", str(uuid4())
    made.dead_message_ttl = DEFAULT_DEAD_MESSAGE_TTL
    made.keys = Keys(made.namespace)
    made.ledger, made.backlog = Ledger(client, made.keys), Backlog(client, made.keys)
    sent_before = [Message.decode(queue.get()) for queue in broker.queues.values() for _ in range(queue.qsize())]
    made.show(list(broker.queues))
    made.add_middleware(DeadLetters())
    for message in sent_before:
        broker.enqueue(message)
