# SPDX-License-Identifier: Apache-2.0
"""`Tideover`: which hook of dramatiq calls what. No decision is made here.

Hooks raise only `TideoverError`s: dramatiq swallows any other exception of a hook.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import dramatiq
from dramatiq.broker import Broker, MessageProxy
from dramatiq.brokers.redis import RedisBroker
from dramatiq.common import dq_name
from dramatiq.message import Message
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from dramatiq.worker import ConsumerThread, Worker

from tideover import clock, events
from tideover.attempt import Attempt, current, note_of, processing
from tideover.errors import ConfigurationError, InvalidJob, StoreUnavailable, TideoverError
from tideover.gate import Gate, is_ours, redis_id
from tideover.store.account import Ledger
from tideover.store.client import FAILED, lazy_client, store_errors
from tideover.store.keys import Keys
from tideover.store.registry import Registry
from tideover.task import STAMP, AITask, check_arguments

if TYPE_CHECKING:
    from tideover_worker.boot import Node


class Tideover(dramatiq.Middleware):
    """Adds tideover to a dramatiq broker: `broker.add_middleware(Tideover())`, before tasks are declared."""

    def __init__(self) -> None:
        self.node: Node | None = None
        self.ledger: Ledger | None = None
        self._announced: set[str] = set()
        self._lock = threading.Lock()

    # producers

    def before_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        """Stamps a job at its first enqueue, and refuses one that would not come back as it was sent."""
        if not isinstance(broker, RedisBroker):
            return
        task = broker.actors.get(message.actor_name)
        if self.ledger is None:
            self.install(broker)
        if is_ours(message.options):
            return
        if isinstance(task, AITask):
            if task.actor_name not in self._announced:
                self.announce(broker, task)
            check_arguments(message)
            message.options[STAMP] = task.stamp(message, delay)
        else:
            message.options[STAMP] = {"sent_ms": clock.now_ms()}

    def install(self, broker: RedisBroker) -> None:
        """Puts accept and handover in the place of the broker's own enqueue script."""
        with self._lock:
            if self.ledger is None:
                ledger = Ledger(broker.client, Keys(broker.namespace))
                with store_errors("sending the first job"):
                    Registry(broker.client, ledger.keys).announce()
                accept: Any = lambda queue, new_id, body: self.enqueue(broker, ledger, queue, new_id, body)  # noqa: E731
                vars(broker)["do_enqueue"] = accept
                self.ledger = ledger

    def enqueue(self, broker: RedisBroker, ledger: Ledger, queue: str, new_id: str, body: bytes) -> None:
        """Accepts a new job, or hands a fetched one over to its successor."""
        old = handing_over.old
        with store_errors("sending a job"):
            if old is None:
                check_size(broker, body)
                ledger.accept(queue, new_id, body)
            else:
                ledger.hand_over(broker.broker_id, (old[0], redis_id(old[1])), (queue, new_id), body, old[1].message_id)

    def announce(self, broker: RedisBroker, task: AITask[Any, Any]) -> None:
        """Enters a task into the registry and checks its routes: once a process."""
        task.check_routes()
        keys = Keys(broker.namespace)
        with store_errors("sending the first job of a task"):
            Registry(broker.client, keys).enter_tasks({task.actor_name: task.facts()})
        self._announced.add(task.actor_name)

    # workers

    def before_worker_boot(self, broker: Broker, worker: Worker) -> None:
        """Puts gate, runner, drain, probe and housekeeping into a worker process. A fault here stops the process."""
        if not isinstance(broker, RedisBroker):
            events.holding_unavailable(type(broker).__name__)
            return
        try:
            from tideover_worker import boot

            if self.ledger is None:
                self.install(broker)
            wrap_enqueue(broker)
            self.node = boot.start(broker, worker)
        except TideoverError:
            raise
        except FAILED as error:
            raise ConfigurationError(f"the worker cannot use Redis: {type(error).__name__}: {error}") from error
        except Exception as error:
            raise ConfigurationError(f"tideover could not start in this worker: {error!r}") from error

    def before_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        if self.gate is not None:
            self.gate.closing = True

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        if self.node is not None:
            self.node.stop()

    def before_process_message(self, broker: Broker, message: MessageProxy) -> None:
        gate = self.gate
        job = None if gate is None else gate.job(message)
        if gate is None or job is None:
            current.set(None)
            return
        note = note_of(message)
        note.attempt = Attempt(job, gate.health, message, permit=note.permit)
        current.set(note.attempt)

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        note_of(message).end = "succeeded" if exception is None else "failed"
        current.set(None)

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        note = note_of(message)
        if note.attempt is not None and note.attempt.hold is not None:
            note.hold = note.attempt.hold
        elif note.end is None:
            note.end = "discarded"
        current.set(None)

    @property
    def gate(self) -> Gate | None:
        return None if self.node is None else self.node.gate


class HandingOver(threading.local):
    """The fetched message whose successor this thread is enqueueing, with the queue it was fetched from."""

    old: tuple[str, MessageProxy] | None = None


handing_over = HandingOver()


def wrap_enqueue(broker: RedisBroker) -> None:
    """Lets `enqueue` see which fetched message its new one succeeds, before dramatiq gives that a new Redis id."""
    plain = broker.enqueue

    def enqueue(message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        before = handing_over.old
        handing_over.old = predecessor(message)
        try:
            return plain(message, delay=delay)
        except TideoverError as error:
            follow_up_failed(error)
            raise
        finally:
            handing_over.old = before

    broker.enqueue = enqueue  # type: ignore[method-assign]


def follow_up_failed(error: TideoverError) -> None:
    """Keeps a job whose retry or next step could not be enqueued: dramatiq would swallow the error and acknowledge the job.

    While Redis is unavailable it goes back to its queue and runs again; what can never be enqueued makes it a dead letter.
    """
    message = processing.get()
    if message is None or not note_of(message).concluding:
        return
    if isinstance(error, StoreUnavailable):
        note_of(message).follow_up_failed = True
    else:
        message.fail()
        message.stuff_exception(error)


def predecessor(message: Message[Any]) -> tuple[str, MessageProxy] | None:
    """What `message` succeeds: itself while its delay was running, or the attempt that just failed; None: it is a new job.

    A job that enqueues its own message while it runs makes a new job; one that dramatiq enqueues after a failure is its retry.
    """
    old_id = message.options.get("redis_message_id")
    thread = threading.current_thread()
    if isinstance(thread, ConsumerThread):
        taken = getattr(thread.consumer, "taken", {}).get(old_id)
        return None if taken is None else (dq_name(message.queue_name), taken)
    ended = processing.get()
    if ended is None or not note_of(ended).concluding or ended.options.get("redis_message_id") != old_id:
        return None
    return ended.queue_name, ended


def check_size(broker: Broker, body: bytes) -> None:
    """Raises `InvalidJob` for an AI task's job that is too large to be held in Redis by the million."""
    from tideover.settings import settings

    most = settings().max_payload_bytes
    if len(body) > most and isinstance(broker.actors.get(Message.decode(body).actor_name), AITask):
        raise InvalidJob(
            f"the job has {len(body):,} bytes; max_payload_bytes is {most:,}. "
            "Send a reference (an id, an object's URL) instead of the content, or raise the setting"
        )


class SettingsBroker(RedisBroker):
    """dramatiq's RedisBroker on the Redis of the settings, which are read when it is first used, not at import."""

    def __init__(self) -> None:
        super().__init__(client=lazy_client(settings_url))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        built.discard(self)
        super().close()

    @property
    def namespace(self) -> str:
        from tideover.settings import settings

        return settings().namespace

    @namespace.setter
    def namespace(self, default: str) -> None:
        """dramatiq's constructor sets its default; ours comes from the settings."""


def settings_url() -> str:
    from tideover.settings import settings

    return settings().store_url()


def broker_from_settings() -> RedisBroker:
    """The broker of an application that set none."""
    broker = SettingsBroker()
    broker.add_middleware(Tideover())
    built.add(broker)
    return broker


built: WeakSet[SettingsBroker] = WeakSet()


def check_only_broker(broker: Broker) -> None:
    """Raises `ConfigurationError` when another broker was set after tasks were declared on one from the settings."""
    if any(other is not broker and other.actors for other in built):
        raise ConfigurationError(
            "set_broker was called after AI tasks had been declared on a broker built from the settings: they would send to "
            "one Redis and workers fetch from another. Call set_broker before the first task is declared"
        )


def ensure_results(broker: Broker) -> None:
    """Adds dramatiq's Results where it is absent: AI tasks store their results."""
    if isinstance(broker, RedisBroker) and not any(isinstance(m, Results) for m in broker.middleware):
        broker.add_middleware(Results(backend=RedisBackend(client=broker.client)))  # type: ignore[no-untyped-call]
