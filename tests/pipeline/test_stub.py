# SPDX-License-Identifier: Apache-2.0
"""Users' unit tests: on dramatiq's StubBroker jobs are held, rerouted and drained as on Redis, in memory, without a server."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dramatiq
import pytest
from dramatiq import broker as dramatiq_broker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import QueueJoinTimeout, QueueNotFound
from dramatiq.message import Message
from dramatiq.results import ResultFailure
from dramatiq.worker import Worker

import tideover
from tideover import InvalidJob, JobExpired, NotYet, Tideover, aclaude, ai_task, claude, last_served, send_many, text_of
from tideover import settings as tideover_settings
from tideover.testing import FakeProvider, Fault, Latency
from tideover.testing.books import account

if TYPE_CHECKING:
    from tests.conftest import WaitUntil

    from tideover.health import Health

MODEL = "claude-opus-4-8"
KEY = f"anthropic/{MODEL}"
SOON = timedelta(seconds=60)
WITHIN_MS = 60_000
QUICK: Any = {"max_retries": 2, "min_backoff": 300, "max_backoff": 300, "models": [MODEL]}
PAGE = (Path(__file__).parents[2] / "docs" / "testing.md").read_text(encoding="utf-8")

SETTINGS = {
    "BREAKER__PROBE_AFTER_S": "0.1",
    "BREAKER__PROBE_MAX_S": "0.2",
    "DRAIN__START_RATE": "50",
    "WORKER__POLL_S": "0.02",
    "MAX_PAYLOAD_BYTES": "2000",
    "ROUTES__ANTHROPIC__KIND": "anthropic",
    "ROUTES__OPENAI__KIND": "openai-compatible",
    "ROUTES__OPENAI__MODELS": f'{{"{MODEL}": "gpt-5.5"}}',
}


class Desk:
    """A StubBroker with two providers; `ran` notes each run of a function, by tag."""

    def __init__(self, broker: StubBroker, wait: WaitUntil) -> None:
        swift = Latency(base_s=0.002, per_output_token_s=0.0, jitter=0.0)
        self.anthropic = FakeProvider("anthropic", latency=swift)
        self.openai = FakeProvider("openai", dialect="openai-compatible", latency=swift)
        self.broker, self.wait = broker, wait
        self.ran: list[str] = []
        self.workers: list[Worker] = []

        @ai_task(criticality="deferrable", **QUICK)
        def tag(name: str) -> str:
            return self.ask(name)

        @ai_task(criticality="deferrable", **QUICK)
        async def atag(name: str) -> str:
            self.ran.append(name)
            return text_of(await aclaude().messages.create(**question(name)))

        @ai_task(criticality="critical", reroute=["openai"], expires_in=timedelta(minutes=5), **QUICK)
        def reply(name: str) -> str:
            self.ask(name)
            served = last_served()
            return "" if served is None else served.route

        self.tag, self.atag, self.reply = tag, atag, reply

    def ask(self, name: str) -> str:
        self.ran.append(name)
        return text_of(claude().messages.create(**question(name)))

    def work(self, **options: Any) -> Worker:
        worker = Worker(self.broker, worker_timeout=100, **{"worker_threads": 4, **options})
        worker.start()
        self.workers.append(worker)
        return worker

    def stop_working(self) -> None:
        while self.workers:
            self.workers.pop().stop()

    def join(self, **options: Any) -> None:
        self.broker.join("default", timeout=WITHIN_MS, **options)

    def outage(self) -> Message[str]:
        """The provider is down, and its breaker open; the job that paid for it is held."""
        self.anthropic.fail(Fault.OVERLOADED)
        canary = self.tag.send("canary")
        self.wait(lambda: self.health().view(KEY).generation, within_s=60, description="its breaker opens")
        self.join()
        return canary

    def health(self) -> Health:
        node = next(m.node for m in self.broker.middleware if isinstance(m, Tideover))
        assert node is not None
        return node.gate.health

    def result(self, job: Message[Any]) -> Any:
        return tideover.wait_for_sync(job, timeout=SOON, through_holds=True)


def question(name: str) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 8, "messages": [{"role": "user", "content": f"about {name}"}]}


def books() -> dict[str, int]:
    """The account without its zeros; `missing` is there only when the sum is wrong."""
    now = account()
    every = {"accepted": now.accepted, "queued": now.queued, "running": now.running, "held": now.held, **now.ends}
    return {name: n for name, n in {**every, "missing": now.difference}.items() if n}


@pytest.fixture
def stub() -> Iterator[StubBroker]:
    """As a user's conftest.py makes it."""
    broker = StubBroker()
    broker.add_middleware(Tideover())
    dramatiq.set_broker(broker)
    yield broker
    broker.close()
    dramatiq_broker.global_broker = None


@pytest.fixture
def desk(stub: StubBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil) -> Iterator[Desk]:
    for logger in logging.Logger.manager.loggerDict.values():
        monkeypatch.setattr(logger, "disabled", False, raising=False)
    monkeypatch.chdir(tmp_path)
    made = Desk(stub, wait_until)
    with made.anthropic, made.openai:
        urls = {"ROUTES__ANTHROPIC__BASE_URL": made.anthropic.base_url, "ROUTES__OPENAI__BASE_URL": made.openai.base_url}
        for name, value in (SETTINGS | urls).items():
            monkeypatch.setenv(f"TIDEOVER_{name}", value)
        tideover_settings.forget()
        yield made
        made.anthropic.heal()
        made.stop_working()
    tideover_settings.forget()


# sending


def test_sending_checks_and_stamps_as_on_redis(desk: Desk) -> None:
    """What production would refuse, a unit test sees refused; what is sent is accepted, with its stamp, in its lane."""
    for arguments in ((("a", 1),), ("x" * 2000,)):
        with pytest.raises(InvalidJob):
            desk.tag.send(*arguments)  # type: ignore[arg-type]
    desk.tag.send("a")
    job = desk.reply.send("b")
    assert ("default.critical", "critical") == (job.queue_name, job.options["tideover"]["criticality"])
    assert 300_000 == job.options["tideover"]["expires_ms"] - int(job.options["tideover"]["sent_ms"])
    assert {"accepted": 2, "queued": 2} == books()
    assert "queued" == tideover.status(job).state


def test_what_was_sent_can_be_looked_at(desk: Desk) -> None:
    """Without a worker, a test of code that sends finds its jobs where a StubBroker has them."""
    desk.tag.send("a")
    desk.tag.send("b")
    desk.tag.send_with_options(args=("later",), delay=60_000)
    queue = desk.broker.queues["default"]
    assert (2, False, 1) == (queue.qsize(), queue.empty(), desk.broker.queues["default.DQ"].qsize())
    assert ("a",) == Message.decode(queue.get_nowait()).args
    assert (1, 0) == (queue.qsize(), desk.broker.queues["default.critical"].qsize())
    assert {"accepted": 3, "queued": 2, "discarded": 1} == books()


def test_sending_many_and_sending_once(desk: Desk) -> None:
    """The rest of the sender's interface works, too."""
    sent = send_many(desk.tag.message_with_options(args=("a",), idempotency_key=key) for key in ("k1", "k2", "k1"))
    assert (2, 1, 0) == (len(sent.accepted), len(sent.duplicate), len(sent.rejected))
    assert {"accepted": 2, "queued": 2} == books()


def test_a_queue_that_nobody_declared(desk: Desk) -> None:
    """Is an error, as on a stock StubBroker."""
    message = desk.tag.message("a").copy(queue_name="elsewhere")
    with pytest.raises(QueueNotFound):
        desk.broker.enqueue(message)
    with pytest.raises(QueueNotFound):
        desk.broker.join("elsewhere")


# an outage


@pytest.mark.parametrize("kind", ["tag", "atag"])
def test_an_outage_holds_and_afterwards_all_come_home(desk: Desk, kind: str) -> None:
    """`join` returns while jobs are held; each says why; no retry is spent; healed, they end well, and nothing is lost."""
    worker = desk.work()
    desk.anthropic.fail(Fault.OVERLOADED)
    jobs = [getattr(desk, kind).send(f"job{n}") for n in range(5)]
    desk.join()
    worker.join()
    states = [tideover.status(job) for job in jobs]
    assert {("held", (KEY,))} == {(state.state, state.waits_for) for state in states}
    assert {"accepted": 5, "held": 5} == books()
    assert [] == desk.broker.dead_letters
    desk.anthropic.heal()
    assert ["anthropic: The tide"] * 5 == [desk.result(job)[:19] for job in jobs]
    desk.join()
    assert {"accepted": 5, "succeeded": 5} == books()
    assert {"ended"} == {tideover.status(job).state for job in jobs}


def test_jobs_are_held_before_they_run(desk: Desk) -> None:
    """While the breaker is open nothing starts, and waiting says why."""
    desk.work()
    desk.outage()
    desk.ran.clear()
    job = desk.tag.send("late")
    desk.join()
    with pytest.raises(NotYet) as caught:
        tideover.wait_for_sync(job, timeout=SOON)
    assert (job.message_id, "outage") == (caught.value.job_id, caught.value.reason)
    assert [] == desk.ran


def test_a_critical_job_is_rerouted(desk: Desk) -> None:
    """At once, to the route that its task allows; `join` of the queue waits for this lane, too."""
    desk.work()
    desk.outage()
    job = desk.reply.send("urgent")
    desk.join()
    assert "openai" == job.get_result()
    assert ["gpt-5.5"] == [call.model for call in desk.openai.calls()]


def test_the_backlog_goes_in_order(desk: Desk) -> None:
    """The earliest deadline first; of those without one, the one that was held first."""
    desk.work(worker_threads=1)
    desk.outage()
    desk.ran.clear()
    expiries = {"in an hour": timedelta(hours=1), "in a minute": timedelta(minutes=1), "never": None}
    jobs = [desk.tag.send_with_options(args=(name,), expires_in=expires_in) for name, expires_in in expiries.items()]
    desk.join()
    desk.anthropic.heal()
    for job in jobs:
        desk.result(job)
    assert ["in a minute", "in an hour", "canary", "never"] == desk.ran


def test_jobs_that_share_a_key_are_answered_by_one_run(desk: Desk) -> None:
    """As on Redis."""
    desk.work()
    desk.outage()
    jobs = [desk.tag.send_with_options(args=(f"shared{n}",), key="k") for n in range(4)]
    desk.broker.join("default", timeout=WITHIN_MS)
    assert {"held"} == {tideover.status(job).state for job in jobs}
    desk.anthropic.heal()
    for job in jobs:
        assert tideover.wait_for_sync(job, timeout=SOON, through_holds=True)
    assert 1 == len([name for name in desk.ran if name.startswith("shared")])


def test_a_held_job_expires(desk: Desk, wait_until: WaitUntil) -> None:
    """Housekeeping ends it; whoever waits is told, and `join` raises nothing: it is no failure of the code under test."""
    desk.work()
    desk.outage()
    job = desk.tag.send_with_options(args=("late",), expires_in=timedelta(milliseconds=50))
    wait_until(lambda: tideover.status(job).end == "expired", within_s=60, description="the held job expires")
    with pytest.raises(JobExpired):
        tideover.wait_for_sync(job, timeout=SOON)
    desk.join()
    assert {"accepted": 2, "held": 1, "expired": 1} == books()


def test_a_throttled_provider_is_waited_for(desk: Desk) -> None:
    """A 429 is no outage: the job is held for the pace, and `join` does not wait out the quiet."""
    desk.work()
    desk.anthropic.fail(Fault.RATE_LIMITED, retry_after_s=300)
    job = desk.tag.send("a")
    desk.join()
    assert ("held", "pace") == (tideover.status(job).state, tideover.status(job).reason)


# what a StubBroker is used for


def fails(desk: Desk) -> Callable[[], Message[Any]]:
    @ai_task(criticality="deferrable", **QUICK)
    def buggy() -> None:
        desk.ran.append("buggy")
        raise ValueError("a bug")

    return buggy.send


def test_a_bug_shows_in_the_join(desk: Desk) -> None:
    """After the retries, with the exception itself; or, if one asks for that, in the dead letters and the result only."""
    send = fails(desk)
    worker = desk.work()
    job = send()
    with pytest.raises(ValueError, match="a bug"):
        desk.join()
    worker.join()
    desk.join(fail_fast=False)
    assert ["buggy"] * 3 == desk.ran
    assert [job.message_id] == [letter.message_id for letter in desk.broker.dead_letters]
    with pytest.raises(ResultFailure):
        job.get_result()
    assert {"accepted": 1, "failed": 1} == books()


def test_plain_actors_go_on_as_they_were(desk: Desk) -> None:
    """Retries, delays and pipelines of jobs that call no model."""
    seen: list[int] = []

    @dramatiq.actor(max_retries=2, min_backoff=300, max_backoff=300)
    def double(number: int) -> int:
        seen.append(number)
        if len(seen) == 1:
            raise ValueError("once")
        return 2 * number

    desk.work()
    (double.message(1) | double.message_with_options(args=(), delay=20)).run()
    desk.join()
    assert [1, 1, 2] == seen
    assert {"accepted": 2, "succeeded": 2} == books()


def test_a_join_has_a_timeout(desk: Desk) -> None:
    """Nobody works, so the job stays."""
    desk.tag.send("a")
    with pytest.raises(QueueJoinTimeout):
        desk.broker.join("default", timeout=50)


def test_flushing_a_queue_discards_what_waits(desk: Desk) -> None:
    """In both lanes, and the delayed; the account knows."""
    desk.tag.send("a")
    desk.reply.send("b")
    desk.tag.send_with_options(args=("later",), delay=60_000)
    desk.broker.flush("default")
    assert {"accepted": 3, "discarded": 3} == books()


def test_flushing_all_begins_anew(desk: Desk) -> None:
    """One broker serves all tests of a program: no held job, no open breaker and no dead letter passes from test to test."""
    send = fails(desk)
    desk.work()
    desk.outage()
    send()
    desk.join(fail_fast=False)
    desk.stop_working()
    desk.broker.flush_all()
    assert ({}, []) == (books(), desk.broker.dead_letters)
    desk.anthropic.heal()
    desk.work()
    job = desk.tag.send("a")
    desk.join()
    assert "ended" == tideover.status(job).state
    assert {"accepted": 1, "succeeded": 1} == books()


def test_a_worker_after_the_other_on_one_broker(desk: Desk) -> None:
    """As a fixture starts one for each test; no layer upon layer of ours grows on the broker."""
    methods = []
    for n in range(3):
        desk.work()
        job = desk.tag.send(f"{n}")
        desk.join()
        assert "ended" == tideover.status(job).state
        desk.stop_working()
        methods.append(desk.broker.enqueue)
    assert methods[0] is methods[1] is methods[2]
    assert {"accepted": 3, "succeeded": 3} == books()


# how it is done


def test_a_stub_broker_has_what_a_redis_broker_has(stub: StubBroker) -> None:
    """All that dramatiq's constructor sets, but for its own scripts and the maintenance that they do."""
    dramatiq.actor(lambda: None, actor_name="t")
    missing = set(vars(RedisBroker())) - set(vars(stub))
    assert {"scripts", "maintenance_chance", "heartbeat_timeout"} == missing


def test_actors_that_were_there_before(stub: StubBroker) -> None:
    """A broker whose middleware comes after its actors, and their first messages, is served, too; a subclass stays one."""

    class Mine(StubBroker):
        pass

    mine = Mine()
    dramatiq.actor(lambda: None, actor_name="t", broker=mine).send_with_options(delay=60_000)
    mine.add_middleware(Tideover())
    dramatiq.actor(lambda: None, actor_name="u", broker=mine, queue_name="other").send()
    assert isinstance(mine, Mine)
    assert {"default", "other"} == mine.get_declared_queues()
    assert (1, 1) == (mine.queues["default.DQ"].qsize(), mine.queues["other"].qsize())
    assert (2, 2, 0) == (account(mine).accepted, account(mine).queued, account(mine).difference)


def test_without_a_store_in_memory_it_says_so(
    stub: StubBroker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Jobs run as dramatiq would run them; nothing is held, and each who asks learns why."""
    monkeypatch.setitem(sys.modules, "fakeredis", None)
    ran: list[str] = []
    actor = dramatiq.actor(lambda: ran.append("t"), actor_name="t")
    worker = Worker(stub, worker_timeout=100)
    worker.start()
    job = actor.send()
    stub.join("default")
    worker.stop()
    assert (["t"], StubBroker) == (ran, type(stub))
    assert "holding_unavailable" in caplog.text
    assert "on its StubBroker with tideover[testing]" in caplog.text
    for question in (lambda: tideover.status(job), account):
        with pytest.raises(tideover.ConfigurationError, match=r"pip install 'tideover\[testing\]'"):
            question()


def test_on_other_brokers_nothing_is_held(caplog: pytest.LogCaptureFixture) -> None:
    """RabbitMQ, SQS and the like: the log says so."""
    elsewhere = dramatiq_broker.Broker(middleware=[Tideover()])
    elsewhere.emit_before("worker_boot", Worker(elsewhere))
    assert "holding_unavailable" in caplog.text


# what the docs say


def test_the_examples_of_the_docs_pass(tmp_path: Path) -> None:
    """A reader who copies docs/testing.md has two green tests."""
    names = ("desk.py", "conftest.py", "test_desk.py")
    for name, code in zip(names, re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL), strict=True):
        (tmp_path / name).write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False)
    assert 0 == done.returncode, done.stdout
    assert "2 passed" in done.stdout
