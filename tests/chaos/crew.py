# SPDX-License-Identifier: Apache-2.0
"""A worker process and a producer that do one thing at a time, so that their steps come in the same order each time.

All of it is the real thing: dramatiq's consumer threads, our gate, runner, drain and housekeeping, redis-py on a real server.
Only the order is ours: one thread goes on at a time, a chore takes its turn when it is told to, and time passes as it is said.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from importlib.metadata import Distribution
from queue import Empty
from typing import Any
from unittest.mock import patch

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.message import Message
from dramatiq.worker import ConsumerThread, Worker
from tests.chaos.steps import Diary, Tap, tapped_client

from tideover import Tideover, ai_task, settings
from tideover.attempt import current, processing
from tideover.core.breaker import State, Transition
from tideover.core.outcome import OK, of_response
from tideover.core.route import breaker_key, split_key
from tideover.errors import JobNotFound, StoreUnavailable
from tideover.gate import redis_id
from tideover.health import MOST_PROBES, Health
from tideover.ops import acts
from tideover.ops.access import Operator, open_space
from tideover.plan import Probe, Try, plan
from tideover.store.account import Ledger
from tideover.store.client import FAILED, text
from tideover.store.keys import Keys
from tideover.store.registry import Registry
from tideover_worker import pacemaker, run
from tideover_worker.boot import Node
from tideover_worker.chore import Chore, Lease
from tideover_worker.drain import Drain

MODEL = "claude-opus-4-8"
LANES = ("default.critical.DQ", "default.critical", "default.DQ", "default")
LATER_S = 7200.0
PATIENCE_S = 20.0
ROUNDS = 12
TURNS = 5
"""How often it is tried again what Redis did not take. It is never gone for longer."""
OUTAGE = of_response(529, {}, None)

SETTINGS = """
redis_url = "unix:///nowhere"
[breaker]
settle_s = 0
[drain]
start_rate = 10000
max_rate = 10000
[worker]
poll_s = 0.01
[routes.anthropic]
kind = "anthropic"
[routes.openai]
kind = "openai-compatible"
base_url = "http://127.0.0.1:9"
models = { "claude-opus-4-8" = "gpt-5.5" }
"""


class Stepped(ConsumerThread):
    """dramatiq's consumer thread, which goes once around its loop and waits for its next turn."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def handle_delayed_messages(self) -> None:
        super().handle_delayed_messages()
        self.done.release()
        self.go.acquire()

    def turn(self) -> None:
        if self.is_alive():
            self.go.release()
        else:
            self.start()
        assert self.done.acquire(timeout=PATIENCE_S), f"the consumer of {self.queue_name} does not come round"

    def stop(self) -> None:
        super().stop()
        self.go.release()

    @property
    def has_some(self) -> bool:
        """Whether it has a message in hand."""
        return bool(getattr(self.consumer, "_ready", ())) or not self.delay_queue.empty()


def stay_out(chore: Chore) -> None:
    """Instead of `Chore.start`: its thread ends before its first turn."""
    chore._stop.set()
    chore._thread.start()


@contextmanager
def swiftly() -> Iterator[None]:
    """Nothing waits before it tries again what Redis did not take; a turn of the drain looks at a pace once, however long it
    takes; nobody reads the log, and no version is read from disk."""
    logging.disable(logging.CRITICAL)
    try:
        with (
            patch.object(run, "RETRY_S", 0.001),
            patch.object(run, "ASK_AGAIN_S", 0.001),
            patch.object(pacemaker, "EVERY_S", 60.0),
            patch.object(Distribution, "version", "0"),
        ):
            yield
    finally:
        logging.disable(logging.NOTSET)


@dataclass
class Crew:
    """One worker process, with a producer in it; the providers `down` do not answer. `admin` looks around uncounted."""

    url: str
    admin: redis.Redis
    namespace: str
    worker_id: str
    diary: Diary
    tap: Tap
    repeats: int = 0
    down: set[str] = field(default_factory=set)
    stopped: bool = False

    def __post_init__(self) -> None:
        self.keys = Keys(self.namespace)
        self.client = tapped_client(self.url, self.tap, self.repeats)
        self.broker = self.broker_on(self.client)
        self.broker.broker_id = self.worker_id
        self.tideover = Tideover()
        self.broker.add_middleware(self.tideover)
        self.worker = Worker(self.broker, worker_threads=2, worker_timeout=10)
        self.declare()

    def broker_on(self, client: redis.Redis) -> RedisBroker:
        made: Any = RedisBroker
        broker: RedisBroker = made(client=client, namespace=self.namespace, maintenance_chance=0, dead_message_ttl=0)
        return broker

    @cached_property
    def stranger(self) -> RedisBroker:
        """dramatiq's own broker, on the same namespace. Its commands are not repeated: they were not made for that."""
        return self.broker_on(tapped_client(self.url, self.tap, 0))

    def declare(self) -> None:
        often: dict[str, Any] = {"broker": self.broker, "max_retries": 1, "min_backoff": 0, "max_backoff": 0}

        @ai_task(criticality="deferrable", **often)
        def summary(tag: str) -> str:
            return self.function(tag)

        @ai_task(criticality="deferrable", **often)
        async def asummary(tag: str) -> str:
            return self.function(tag)

        @ai_task(criticality="critical", expires_in=timedelta(days=1), reroute=["openai"], **often)
        def reply(tag: str) -> str:
            return self.function(tag)

        def plain(tag: str) -> None:
            self.function(tag)

        self.summary, self.asummary, self.reply = summary, asummary, reply
        self.plain: dramatiq.Actor[..., Any] = dramatiq.actor(plain, **often)

    # what runs

    def function(self, tag: str) -> str:
        """The body of each task. Tags say what comes of it: `fails...` always fails, `flaky...` at its first attempt."""
        message = processing.get()
        assert message is not None
        self.diary.note("began", tag, redis_id(message))
        if tag.startswith("fails") or (tag.startswith("flaky") and message.options.get("retries", 0) == 0):
            self.diary.note("failed", tag)
            raise ValueError(tag)
        if current.get() is not None:
            self.ask()
        self.diary.note("answered", tag)
        return tag

    def ask(self) -> None:
        """One model call, as the carrier makes it. The providers are here: no network, and nobody waits."""
        from tideover.providers.wire import Tried

        attempt = current.get()
        assert attempt is not None
        with closing(plan(attempt, MODEL)) as steps:
            said: Any = None
            while True:
                try:
                    step = steps.send(said)
                except StopIteration as done:
                    if done.value.error is not None:
                        raise done.value.error from None
                    return
                said = None
                if isinstance(step, Try):
                    said = Tried(step.route, *((OUTAGE, None, RuntimeError()) if step.route in self.down else (OK,)))
                elif isinstance(step, Probe):
                    said = step.route in self.down
                    if said:
                        self.fail(breaker_key(step.route, step.model), OUTAGE.why)

    # a worker's turns

    def boot(self) -> None:
        """What dramatiq and `Tideover` do when a worker starts, without the threads that would act by themselves."""
        with patch.object(Chore, "start", stay_out), patch.object(Health, "start", Health.refresh):
            self.broker.emit_before("worker_boot", self.worker)
        self.runner = run.Runner(
            self.node.shared,
            broker=self.broker,
            consumers=self.worker.consumers,
            work_queue=self.worker.work_queue,
            worker_timeout=10,
        )
        self.node.gate.doubted_at = -LATER_S  # it has been up, and heard of, for long

    @property
    def node(self) -> Node:
        assert self.tideover.node is not None
        return self.tideover.node

    @property
    def health(self) -> Health:
        return self.node.gate.health

    def surely(self, turn: Callable[[], object]) -> None:
        """A turn of a loop that goes on when Redis is back: its next turn comes."""
        for _ in range(TURNS):
            with suppress(*FAILED):
                turn()
                return

    def of_name(self, name: str) -> Chore:
        return next(chore for chore in self.node.chores if chore.name == name)

    def chore(self, name: str) -> None:
        """A chore's turn, if its lease may be had; then it gives it up."""
        chore = self.of_name(name)
        self.surely(lambda: (chore.lease is None or not chore.alone or chore.lease.hold()) and chore.turn())
        chore._give_up()

    def keep_house(self, ahead_s: float = 0.0) -> None:
        """Housekeeping's turn, as of later, whoever has its lease."""
        beat = Registry.beat
        with patch.object(Registry, "beat", lambda registry, worker: beat(registry, worker) + ahead_s):
            self.surely(self.of_name("housekeeping").turn)

    def drain(self) -> None:
        """The drain's turn, whoever has its lease; a second has passed since the last one, and its bucket has a token again."""
        threading.Event().wait(0.002)
        lease = Lease(self.broker.client, self.node.registry.keys.lease("drain"), 60.0, "whoever")
        self.surely(Drain(self.node.gate, self.node.registry, lease).turn)
        self.surely(lease.give_up)

    def follow(self) -> None:
        """What the thread of `Health` does: it tells what calls came to, and hears what others told."""
        self.surely(self.health.flush)
        self.surely(self.health.refresh)

    def probe(self) -> None:
        """What the prober does once a provider answers."""
        for key in sorted(self.health.views):
            self.move(key, "open", "half-open")
            self.move(key, "half-open", "recovering")
        self.follow()

    def move(self, key: str, seen: State, to: State) -> None:
        view = self.health.views[key]
        if view.state == seen:
            self.surely(lambda: self.health.move(key, view, Transition(to=to, why="probes")))

    def fail(self, key: str, why: str) -> None:
        """What calls of many jobs that all fail do to a breaker."""
        for n in range(MOST_PROBES):
            self.health.end(self.health.begin(*split_key(key), f"{n}"), replace(OUTAGE, why=why))
        self.health.flush()

    def consume(self, lane: str) -> None:
        """One turn of a lane's consumer."""
        if lane not in self.worker.consumers:
            self.worker.consumers[lane] = Stepped(
                broker=self.broker, queue_name=lane, prefetch=16, work_queue=self.worker.work_queue, worker_timeout=10
            )
        thread = self.worker.consumers[lane]
        assert isinstance(thread, Stepped)
        thread.turn()

    def process(self) -> None:
        """Lets the runner do all that was fetched."""
        with suppress(Empty):
            while True:
                message = self.worker.work_queue.get_nowait().message
                try:
                    self.runner.process_message(message)
                    self.await_coroutine()
                except Exception as error:  # a worker's thread does not outlive what leaves this
                    self.diary.note("thread died", repr(error))
                self.diary.note("parted", *message.args)

    def await_coroutine(self) -> None:
        for _ in range(int(PATIENCE_S * 2000)):
            if self.node.shared.coroutines._running == 0:
                return
            threading.Event().wait(0.0005)
        raise AssertionError("a coroutine does not end")

    def work(self, *lanes: str) -> None:
        """Fetches and runs until these lanes, else all of them, have nothing more."""
        while busy := self.busy(lanes or LANES):
            for lane in busy:
                self.consume(lane)
                self.process()

    def busy(self, lanes: Sequence[str]) -> list[str]:
        """The lanes that have something, in Redis or in hand."""
        with self.admin.pipeline(transaction=False) as pipe:
            for lane in lanes:
                pipe.llen(self.keys.queue(lane))
            return [lane for lane, n in zip(lanes, pipe.execute(), strict=True) if n or self.has_some(lane)]

    def has_some(self, lane: str) -> bool:
        return bool(getattr(self.worker.consumers.get(lane), "has_some", False))

    # producers and operators

    def send(self, task: dramatiq.Actor[Any, Any], tag: str, **options: Any) -> None:
        """Sends a job. One that has an idempotency key is sent again when Redis does not answer; another is in doubt."""
        self.diary.note("sending", tag)
        for _ in range(TURNS if "idempotency_key" in options else 1):
            with suppress(StoreUnavailable):
                self.diary.note("sent", tag, task.send_with_options(args=(tag,), **options).message_id)
                return

    def send_as_stranger(self, tag: str, task: str = "summary", delay: int | None = None) -> None:
        """Sends a job as a producer without tideover does."""
        self.diary.note("sending", tag)
        message: Message[Any] = Message(queue_name="default", actor_name=task, args=(tag,), kwargs={}, options={})
        with suppress(*FAILED):
            self.stranger.enqueue(message, delay=delay)
            self.diary.note("sent", tag, message.message_id)

    def release_by_hand(self) -> None:
        """`tideover release --all --force`, and again if Redis did not answer."""
        operator = Operator(self.client, settings.settings(), (open_space(self.client, self.namespace),))
        for _ in range(TURNS):
            with suppress(StoreUnavailable, JobNotFound):
                acts.release(operator, acts.choose(operator), who="we", why=None, force=True)
                return

    # the end

    def run_out(self, *workers: str) -> None:
        """The time of these workers runs out, of all others if none is named. One without a sign of life has none to lose."""
        every = map(text, self.admin.zrange(self.keys.heartbeats, 0, -1))
        for worker in workers or [worker for worker in every if worker != self.worker_id]:
            self.admin.zadd(self.keys.heartbeats, {worker: 1}, xx=True)

    def finish(self) -> None:
        """Every provider answers and time passes, until nothing is left to do; or it is clear that something is stuck."""
        self.down.clear()
        with patch("dramatiq.worker.current_millis", lambda: 2**52):
            for _ in range(ROUNDS):
                account = Ledger(self.admin, self.keys).read()
                if account.queued == account.running == account.held == 0:
                    return
                self.run_out()
                self.keep_house(LATER_S)
                self.reclaim()
                self.probe()
                self.drain()
                self.work()

    def reclaim(self) -> None:
        """Ten seconds pass, and each consumer looks for what it has fetched without knowing."""
        for lane, thread in self.worker.consumers.items():
            if self.admin.scard(self.keys.acks(self.worker_id, lane)):
                vars(thread.consumer)["_reclaim_at"] = 0.0
                self.consume(lane)
                self.process()

    def stop(self) -> None:
        self.stopped = True
        self.worker.stop(timeout=int(PATIENCE_S * 1000))

    def close(self) -> None:
        if self.tideover.node is not None and not self.stopped:
            self.stop()
        self.client.close()
        self.stranger.client.close()
