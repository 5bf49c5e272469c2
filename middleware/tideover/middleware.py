# SPDX-License-Identifier: Apache-2.0
"""`Tideover`: which hook of dramatiq calls what. No decision is made here.

Hooks raise only `TideoverError`s: dramatiq swallows any other exception of a hook.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import dramatiq
from dramatiq.broker import Broker, MessageProxy
from dramatiq.brokers.redis import RedisBroker
from dramatiq.common import dq_name
from dramatiq.message import Message
from dramatiq.middleware import GroupCallbacks
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from dramatiq.worker import ConsumerThread, Worker

from tideover import clock, events
from tideover.arguments import check_arguments, check_follow_ups
from tideover.attempt import Attempt, current, note_of, processing, time_limit_of, time_limit_s
from tideover.errors import ConfigurationError, StoreUnavailable, TideoverError
from tideover.gate import Gate, is_ours, redis_id
from tideover.sending import Sender, senders, sending
from tideover.stamp import STAMP, sent_ms
from tideover.store.account import Ledger
from tideover.store.client import FAILED, FULL, lazy_client, store_errors
from tideover.store.keys import SCHEMA, Keys
from tideover.store.registry import Registry
from tideover.stub import keep_in_memory
from tideover.task import AITask

if TYPE_CHECKING:
    from tideover_worker.boot import Node


FOLLOW_S = 60.0


class Tideover(dramatiq.Middleware):
    """Adds tideover to a dramatiq broker: `broker.add_middleware(Tideover())`, before tasks are declared."""

    def __init__(self) -> None:
        self.node: Node | None = None
        self.ledger: Ledger | None = None
        self._announced: set[str] = set()
        self._follow_at = 0.0
        self._lock = threading.Lock()

    def before_declare_actor(self, broker: Broker, actor: dramatiq.Actor[Any, Any]) -> None:
        keep_in_memory(broker)

    def after_declare_actor(self, broker: Broker, actor: dramatiq.Actor[Any, Any]) -> None:
        """In producers and workers: no group can run before its actors are declared."""
        keep_in_memory(broker)  # its actors may have been declared before this middleware was added
        if isinstance(broker, RedisBroker):
            keep_barriers(broker)

    # producers

    def before_enqueue(self, broker: Broker, message: Message[Any], delay: int | None) -> None:
        """Stamps a job at its first enqueue, and refuses one that would not come back as it was sent."""
        if not isinstance(broker, RedisBroker):
            return
        task = broker.actors.get(message.actor_name)
        if self.ledger is None:
            self.install(broker)
        if delay is not None:
            message.options["eta"] += clock.skew_ms()  # in Redis' time; our consumer tells dramatiq its machine's
        if is_ours(message.options):
            keep_id(message)
            if handing_over.old is None:  # sent anew by hand: it needs room as at first, and its key tells that it was sent
                sending.message = message
            return
        check_follow_ups(message, lambda name: isinstance(broker.actors.get(name), AITask))
        message.options["redis_message_id"] = message.message_id
        sending.message = message
        if isinstance(task, AITask):
            if task.actor_name not in self._announced:
                self.announce(broker, task)
            check_arguments(message)
            if clock.monotonic() >= self._follow_at:
                self.follow_clock(broker)
            message.options[STAMP] = task.stamp(message, delay)
        else:
            message.options[STAMP] = {"sent_ms": sent_ms()}

    def install(self, broker: RedisBroker) -> None:
        """Puts accept and handover in the place of the broker's own enqueue script."""
        with self._lock:
            if self.ledger is None:
                ledger = Ledger(broker.client, Keys(broker.namespace))
                with (
                    store_errors("sending the first job", accepts="nothing"),
                    suppress(FULL),
                ):  # the send is refused then
                    stored = Registry(broker.client, ledger.keys).announce()
                    if stored > SCHEMA:
                        events.schema_differs(broker.namespace, stored, SCHEMA)
                accept: Any = lambda queue, new_id, body: self.enqueue(broker, ledger, queue, new_id, body)  # noqa: E731
                vars(broker)["do_enqueue"] = accept
                senders[broker] = Sender(broker, ledger)
                self.ledger = ledger

    def follow_clock(self, broker: RedisBroker) -> None:
        """Now and then goes by Redis' clock anew: expiries are instants, which workers compare with it."""
        asked_at = clock.monotonic()
        self._follow_at = asked_at + FOLLOW_S
        with suppress(*FAILED):  # then sending says what is wrong
            clock.follow(Registry(broker.client, Keys(broker.namespace)).now(), asked_at)

    def enqueue(self, broker: RedisBroker, ledger: Ledger, queue: str, new_id: str, body: bytes) -> None:
        """Accepts a new job, or hands a fetched one over to its successor."""
        old = handing_over.old
        with store_errors("sending a job"):
            if old is None:
                senders[broker].accept(queue, new_id, body, follows=followed())
            else:
                move = broker.broker_id, (old[0], redis_id(old[1])), (queue, new_id), body, old[1].message_id
                ledger.hand_over(*move)
                note_of(old[1]).handed_over = True

    def announce(self, broker: RedisBroker, task: AITask[Any, Any]) -> None:
        """Enters a task into the registry and checks its routes: once a process."""
        task.check_routes()
        keys = Keys(broker.namespace)
        with store_errors("sending the first job of a task", accepts="nothing"):
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
            if self.node is None:  # tests start one worker after the other on one broker
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
        note.attempt = Attempt(job, gate.health, message, permit=note.mark.permit)
        if (timer := time_limit_of(broker)) is not None:
            note.attempt.limit(time_limit_s(broker, message), lambda: timer.after_skip_message(broker, message))
        current.set(note.attempt)

    def after_process_message(
        self, broker: Broker, message: MessageProxy, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        note = note_of(message)
        note.end, note.result = ("succeeded", result) if exception is None else ("failed", None)
        if note.end == "succeeded" and note.attempt is not None and note.attempt.degraded == "expired":
            note.end = "expired"
        current.set(None)

    def after_skip_message(self, broker: Broker, message: MessageProxy) -> None:
        note = note_of(message)
        if note.attempt is not None and note.attempt.hold is not None:
            note.hold = note.attempt.hold
        elif note.attempt is not None and note.attempt.give_back:
            note.give_back = True
        elif note.end is None and not note.give_back:
            note.end = "discarded"
        current.set(None)

    @property
    def gate(self) -> Gate | None:
        return None if self.node is None else self.node.gate


BARRIER_TTL_MS = 30 * 86_400_000
"""The least time that the barrier of a group lives. dramatiq's 24 hours begin anew whenever a member ends, but a hold may last
longer, over a weekend or until somebody has looked; and a barrier that is gone counts as reached, for each later member."""


def keep_barriers(broker: Broker) -> None:
    """Lets the barriers of groups outlive holds, those of a `GroupCallbacks` that is added later, too.

    Who asked for a shorter `barrier_ttl` gets the longer one all the same: with the shorter one, a group whose members were
    held would complete too early, and once for each of them. A group takes about 230 bytes of Redis for that time.
    """

    def lengthen() -> None:
        for middleware in broker.middleware:
            if isinstance(middleware, GroupCallbacks):
                middleware.barrier_ttl = max(middleware.barrier_ttl, BARRIER_TTL_MS)

    def add_middleware(middleware: dramatiq.Middleware, **where: Any) -> None:
        plain(middleware, **where)
        lengthen()

    lengthen()
    if "add_middleware" not in vars(broker):
        plain = broker.add_middleware
        vars(broker)["add_middleware"] = add_middleware


class HandingOver(threading.local):
    """The fetched message whose successor this thread is enqueueing, with the queue it was fetched from."""

    old: tuple[str, MessageProxy] | None = None


handing_over = HandingOver()


def followed() -> str | None:
    """What the message that this thread enqueues is the next step of: a group, or a job that has just ended; None: of nothing.

    A group's callbacks follow the group, whichever of its members was the last.
    """
    ended = processing.get()
    if ended is None or not note_of(ended).concluding:
        return None
    callbacks, sent = ended.options.get("group_completion_callbacks") or (), sending.message
    if sent is not None and any(callback.get("message_id") == sent.message_id for callback in callbacks):
        return str(ended.options.get("group_completion_uuid"))
    return redis_id(ended)


def keep_id(message: Message[Any]) -> None:
    """Lets a job keep its Redis id from attempt to attempt; within one list its successor needs another."""
    if handing_over.old is not None and handing_over.old[0] != message.queue_name:
        message.options["redis_message_id"] = redis_id(handing_over.old[1])


def wrap_enqueue(broker: RedisBroker) -> None:
    """Lets `enqueue` see which fetched message its new one succeeds, before dramatiq gives that a new Redis id."""
    plain = broker.enqueue

    def enqueue(message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        before = handing_over.old
        handing_over.old = predecessor(message)
        if handing_over.old is not None:
            message = as_it_was_sent(message, note_of(handing_over.old[1]).body)
        elif followed() is not None and not is_ours(message.options):
            message = message.copy(message_timestamp=clock.now_ms())  # else its age would count what others were held before it
        try:
            return plain(message, delay=delay)
        except TideoverError as error:
            follow_up_failed(error)
            raise
        finally:
            handing_over.old = before

    broker.enqueue = enqueue  # type: ignore[method-assign]


def as_it_was_sent(message: Message[Any], body: bytes) -> Message[Any]:
    """A successor with the arguments of what was fetched: an attempt may have changed them in memory."""
    if not body:
        return message
    sent = Message.decode(body)
    return message.copy(args=sent.args, kwargs=sent.kwargs)


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
    keep_in_memory(broker)
    if isinstance(broker, RedisBroker) and not any(isinstance(m, Results) for m in broker.middleware):
        broker.add_middleware(Results(backend=RedisBackend(client=broker.client)))  # type: ignore[no-untyped-call]
