# SPDX-License-Identifier: Apache-2.0
"""Runs jobs: coroutines of async tasks in flight on one loop without a thread each, functions in dramatiq's worker threads.

Both go through the same steps: gate, slot, before-hooks, function, after-hooks, acknowledgement.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import threading
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import ceil
from typing import Any

import dramatiq.worker
from dramatiq.broker import Broker, MessageProxy
from dramatiq.errors import RateLimitExceeded, Retry
from dramatiq.middleware import SkipMessage, TimeLimitExceeded
from dramatiq.worker import Worker, WorkerThread

from tideover import clock, events
from tideover.attempt import note_of, processing, time_limit_s
from tideover.core.admission import Expire, GiveBack, Hold
from tideover.errors import JobExpired
from tideover.gate import Gate, criticality_of, redis_id
from tideover.store.client import FAILED
from tideover.task import AITask
from tideover_worker import aborts
from tideover_worker.hooks import Hooks

HOOK_THREADS = 4
MOST_FRAMES = 6
POLL_S = 0.02
ASK_AGAIN_S = 0.2
RETRY_S = 0.25
"""How soon what Redis did not take is tried again. dramatiq waits 3 and 5 s, in the threads that every other job needs."""
PULSE_S = 0.25
"""How often the loop shows that it runs: what it does not get to is not the provider's delay."""
CANCEL_S = 5.0


class TakenOver(SkipMessage):
    """The job was given to another worker while this one was silent."""


class Slots:
    """Places for running jobs; a share of them deferrable ones never take. A job without one waits here, not in a thread."""

    def __init__(self, total: int, reserved: int) -> None:
        self.total, self.open_to_deferrable = total, max(1, total - reserved)
        self._lock = threading.Lock()
        self._running = self._deferrable = 0
        self._waiting: deque[MessageProxy] = deque()

    def take(self, message: MessageProxy, deferrable: bool) -> bool:
        """Whether the job has a place now; else it waits until `free` returns it."""
        with self._lock:
            if self._running >= self.total or (deferrable and self._deferrable >= self.open_to_deferrable):
                self._waiting.append(message) if deferrable else self._waiting.appendleft(message)
                return False
            self._running += 1
            self._deferrable += deferrable
            return True

    def free(self, deferrable: bool) -> MessageProxy | None:
        """Gives a place back; the job that may try again for it."""
        with self._lock:
            self._running -= 1
            self._deferrable -= deferrable
            return self._waiting.popleft() if self._waiting else None

    def empty(self) -> list[MessageProxy]:
        with self._lock:
            waiting, self._waiting = list(self._waiting), deque()
            return waiting


class Shared:
    """What the runners of one process share: the loop, the slots, the coroutines in flight."""

    def __init__(self, gate: Gate, worker: Worker) -> None:
        config = gate.health.settings.worker
        threads = worker.worker_threads
        self.gate, self.worker = gate, worker
        self.loop = asyncio.new_event_loop()
        self.pool = ThreadPoolExecutor(HOOK_THREADS, "tideover-hooks")
        self.coroutines = Slots(config.concurrency, ceil(config.concurrency * config.reserved_for_critical))
        self.threads = Slots(threads, ceil(threads * config.reserved_for_critical))
        self.in_flight: dict[asyncio.Task[Any], MessageProxy] = {}
        self.stopping = threading.Event()
        self._thread = threading.Thread(target=self._run_loop, daemon=True, name="tideover-loop")
        self._thread.start()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self._pulse()
        self.loop.run_forever()

    def _pulse(self) -> None:
        self.gate.health.pulse_at = clock.monotonic()
        self.loop.call_later(PULSE_S, self._pulse)

    def finish_in_flight(self, grace_s: float) -> None:
        """Waits for coroutines to end, then gives unfinished ones back, attempts unspent."""
        deadline = clock.monotonic() + grace_s
        while self.in_flight and clock.monotonic() < deadline:
            time.sleep(POLL_S)
        self.stopping.set()
        for task in list(self.in_flight):
            self.loop.call_soon_threadsafe(task.cancel)
        deadline = clock.monotonic() + CANCEL_S
        while self.in_flight and clock.monotonic() < deadline:
            time.sleep(POLL_S)
        for message in [*self.coroutines.empty(), *self.threads.empty()]:
            self.worker.consumers[message.queue_name].requeue_messages([message])

    def stop(self) -> None:
        """Ends the loop and closes what it used."""
        self.gate.leaving = True
        self.pool.shutdown()
        asyncio.run_coroutine_threadsafe(close_clients(), self.loop).result(timeout=CANCEL_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=CANCEL_S)
        self.loop.close()


class Runner(WorkerThread):
    """dramatiq's worker thread: runs functions itself, hands coroutines to the loop and goes on."""

    def __init__(self, shared: Shared, **parts: Any) -> None:
        super().__init__(**parts)
        self.shared, self.gate = shared, shared.gate

    def process_message(self, message: MessageProxy | None) -> None:
        """And the jobs that it kept waiting. Each in a context of its own: what it or a hook sets, the next does not see."""
        while message is not None:
            message = contextvars.copy_context().run(self.process, message)

    def process(self, message: MessageProxy) -> MessageProxy | None:
        """Runs a function to its end, lets a coroutine begin. Returns a job that may now try for the place that it had."""
        if self.gate.closing:
            self.consumers[message.queue_name].requeue_messages([message])
            self.work_queue.task_done()
            return None
        task = self.broker.actors.get(message.actor_name)
        coroutine = task.coroutine if isinstance(task, AITask) else None
        deferrable = isinstance(task, AITask) and criticality_of(message, task) == "deferrable"
        slots = self.shared.threads if coroutine is None else self.shared.coroutines
        if not slots.take(message, deferrable):
            return None
        processing.set(message)
        if not self.still_has(message, waiting=True):  # asked last, because it may have waited long for its place
            self.gate.forget(message)
            self.work_queue.task_done()
        elif self.stopped_at_the_gate(message):
            self.finish(message)
        elif coroutine is None:
            self.run_function(message)
        elif self.start_coroutine(message, coroutine, slots, deferrable):
            return None
        return slots.free(deferrable)

    def still_has(self, message: MessageProxy, *, waiting: bool) -> bool:
        """Whether the job is still this worker's. `waiting`: for Redis to answer; else it is taken for ours until it does."""
        while True:
            try:
                return self.gate.still_has(message)
            except FAILED as error:
                if not waiting or self.gate.closing:
                    return True
                events.store_unavailable("asking whether a job is still this worker's", type(error).__name__)
                time.sleep(ASK_AGAIN_S)

    def stopped_at_the_gate(self, message: MessageProxy) -> bool:
        """The gate for prefetched messages, before any hook; what it stops is marked and only needs to be finished."""
        verdict = self.gate.verdict(message)
        match verdict:
            case Hold():
                note_of(message).hold = verdict
            case GiveBack():
                note_of(message).give_back = True
            case Expire():
                self.mark_expired(message)
            case None:
                self.note_begin(message)
                return False
        return True

    def note_begin(self, message: MessageProxy) -> None:
        """Writes down that a job begins that was aboard when a worker died: if this one dies, too, it may be the job."""
        mark = note_of(message).mark
        if mark.deaths:
            begun = replace(mark, begun_by=self.gate.worker)
            try:
                self.gate.backlog.begin(self.gate.worker, message.queue_name, redis_id(message), begun)
            except FAILED as error:
                events.store_unavailable("noting that a job begins", type(error).__name__)

    def mark_expired(self, message: MessageProxy) -> None:
        note_of(message).end = "expired"
        message.fail()
        message.stuff_exception(JobExpired(message.message_id))

    def run_function(self, message: MessageProxy) -> None:
        """One attempt in this thread."""
        hooks = Hooks(self.gate, bound=True)
        try:
            hooks.before(message)
            result = None if message.failed else self.broker.get_actor(message.actor_name)(*message.args, **message.kwargs)
        except BaseException as error:  # noqa: BLE001 - dramatiq's interrupts are BaseExceptions, and each is a way to end
            self.conclude(hooks, message, error)
        else:
            self.succeed(hooks, message, result)
        self.finish(message)

    def succeed(self, hooks: Hooks, message: MessageProxy, result: Any) -> None:
        """The after-hooks of an attempt that succeeded; if the job is another worker's by now, the next steps are, too."""
        try:
            self.stand_down_unless_ours(message, waiting=False)
        except TakenOver as error:
            self.conclude(hooks, message, error)
        else:
            hooks.after("process_message", message, result=result)

    def stand_down_unless_ours(self, message: MessageProxy, *, waiting: bool = True) -> None:
        """Raises `TakenOver` when the job is another worker's by now."""
        if not self.still_has(message, waiting=waiting):
            note_of(message).taken_over = True
            message.options["store_results"] = False
            events.job_taken_over(message.message_id, message.actor_name)
            raise TakenOver

    def start_coroutine(self, message: MessageProxy, function: Any, slots: Slots, deferrable: bool) -> bool:
        """One attempt on the loop, in a context of its own. False: it has ended already."""
        context = contextvars.copy_context()
        abortee = aborts.Abortee(self.shared.loop)
        hooks = Hooks(self.gate, bound=False, abortee=abortee)
        try:
            context.run(hooks.before, message)
        except BaseException as error:  # noqa: BLE001 - as above
            context.run(self.conclude, hooks, message, error)
            self.finish(message)
            return False
        limit_s = time_limit_s(self.broker, message)

        async def attempt() -> Any:
            try:
                async with limited(message, limit_s) as limit:
                    if not self.gate.surely_has(message):  # the loop, or all of us, stood still since the gate was passed
                        await asyncio.to_thread(self.stand_down_unless_ours, message)
                    return await function(*message.args, **message.kwargs)
            except TimeoutError:
                if limit.expired():
                    raise TimeLimitExceeded from None
                raise

        def begin() -> None:
            task = self.shared.loop.create_task(attempt(), context=context)
            self.shared.in_flight[task] = message
            abortee.task = task
            if abortee.aborted:
                task.cancel()
            task.add_done_callback(lambda task: self.shared.pool.submit(ended, task))

        def ended(task: asyncio.Task[Any]) -> None:
            try:
                context.run(self.end_coroutine, hooks, message, task)
            finally:
                self.shared.in_flight.pop(task, None)
                self.process_message(slots.free(deferrable))

        self.shared.loop.call_soon_threadsafe(begin)
        return True

    def end_coroutine(self, hooks: Hooks, message: MessageProxy, task: asyncio.Task[Any]) -> None:
        if task.cancelled() and self.shared.stopping.is_set():
            self.consumers[message.queue_name].requeue_messages([message])
            self.work_queue.task_done()
            return
        cut = aborts.aborted() if hooks.abortee is not None and hooks.abortee.aborted else asyncio.CancelledError()
        error = cut if task.cancelled() else task.exception()
        if error is None:
            self.succeed(hooks, message, task.result())
        else:
            self.conclude(hooks, message, error)
        self.finish(message)

    def conclude(self, hooks: Hooks, message: MessageProxy, error: BaseException) -> None:
        """The after-hooks of an attempt that raised. The log names the job and the place, never arguments or messages."""
        if isinstance(error, JobExpired):
            self.mark_expired(message)
            hooks.after("skip_message", message)
            return
        if isinstance(error, SkipMessage):
            if message.failed:
                message.stuff_exception(error)
            hooks.after("skip_message", message)
            return
        message.stuff_exception(error)
        task = self.broker.actors.get(message.actor_name)
        throws = message.options.get("throws") or (task.options.get("throws") if task else None)
        if not isinstance(error, Retry | RateLimitExceeded) and not (throws and isinstance(error, throws)):
            level = logging.WARNING if is_watched_by_sentry(self.broker) else logging.ERROR
            self.logger.log(level, "Job %s of task %s failed: %s", message.message_id, message.actor_name, told(error))
        hooks.after("process_message", message, exception=error)

    def finish(self, message: MessageProxy) -> None:
        """Acknowledges: the end, the hold or the dead letter."""
        try:
            self.consumers[message.queue_name].post_process_message(message)
        finally:
            self.work_queue.task_done()
            message.clear_exception()

    def join(self, timeout: float | None = None) -> None:
        started = clock.monotonic()
        super().join(timeout)
        if not self.shared.stopping.is_set():
            left_s = None if timeout is None else max(0.0, timeout - (clock.monotonic() - started))
            grace_s = self.gate.health.settings.worker.shutdown_grace_s
            self.shared.finish_in_flight(grace_s if left_s is None else min(grace_s, left_s))


def told(error: BaseException) -> str:
    """What an attempt raised and where, without the error's message: it may quote a prompt, as a validation error does."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in reversed(frames)]
    return " < ".join([type(error).__qualname__, *places[:MOST_FRAMES]])


def is_watched_by_sentry(broker: Broker) -> bool:
    """Whether Sentry's integration tells of a job that fails: it makes an event of each error that is logged, too."""
    return any(type(middleware).__name__ == "SentryMiddleware" for middleware in broker.middleware)


async def close_clients() -> None:
    """Closes the SDK's clients, if a job of this process ever used one."""
    if "tideover.providers.wire" in sys.modules:
        from tideover.providers import wire

        await wire.aclose()
        wire.close()


def limited(message: MessageProxy, limit_s: float | None) -> asyncio.Timeout:
    """What cuts a coroutine at its time limit, which its calls know."""
    cut, attempt = asyncio.timeout(limit_s), note_of(message).attempt

    def disarm() -> None:
        if not cut.expired():
            cut.reschedule(None)

    if attempt is not None:
        attempt.limit(limit_s, disarm)
    return cut


def install(worker: Worker, gate: Gate) -> Shared:
    """Makes a dramatiq worker use our runners."""
    delays = {"POST_PROCESS_MESSAGE_RETRY_DELAY_SECS": RETRY_S, "CONSUMER_RESTART_DELAY_SECS": RETRY_S}
    vars(dramatiq.worker).update(delays)
    shared = Shared(gate, worker)

    def add_worker() -> None:
        runner = Runner(
            shared,
            broker=worker.broker,
            consumers=worker.consumers,
            work_queue=worker.work_queue,
            worker_timeout=worker.worker_timeout,
        )
        runner.start()
        worker.workers.append(runner)

    vars(worker)["_add_worker"] = add_worker
    return shared
