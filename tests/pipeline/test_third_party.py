# SPDX-License-Identifier: Apache-2.0
"""Middlewares of other people, in worker processes of the dramatiq command: dramatiq-abort, and Sentry's integration."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import dramatiq_abort
import pytest
from dramatiq.results import ResultFailure
from dramatiq_abort.backends import RedisBackend as AbortBackend

import tideover
from tideover import ai_task
from tideover.testing import Fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dramatiq.message import Message
    from tests.pipeline.conftest import Shop

PATIENCE = timedelta(seconds=20)
THEIRS = """
import asyncio, json, time
from pathlib import Path

FOLDER = Path(__file__).parent
{first}
import dramatiq
from dramatiq.brokers.redis import RedisBroker
from tideover import Tideover, aclaude, ai_task, claude, text_of

broker = RedisBroker(url="{url}", namespace="{namespace}")
broker.add_middleware(Tideover())
{then}
dramatiq.set_broker(broker)

def question(tag):
    message = {{"role": "user", "content": tag}}
    return {{"model": "claude-opus-4-8", "max_tokens": 8, "messages": [message], "extra_headers": {{"x-tideover-job": tag}}}}

@ai_task(criticality="deferrable", max_retries=2)
def summary(tag: str) -> str:
    return text_of(claude().messages.create(**question(tag)))

@ai_task(criticality="deferrable", max_retries=2)
async def asummary(tag: str) -> str:
    return text_of(await aclaude().messages.create(**question(tag)))

@ai_task(criticality="deferrable", max_retries=0)
def slow(steps: int) -> None:
    (FOLDER / "began").touch()
    for _ in range(steps):
        time.sleep(0.02)

@ai_task(criticality="deferrable", max_retries=0)
async def aslow(steps: int) -> None:
    (FOLDER / "began").touch()
    for _ in range(steps):
        await asyncio.sleep(0.02)

@ai_task(criticality="deferrable", max_retries=0)
def buggy() -> None:
    raise ValueError("a bug")
"""


class Theirs:
    """A worker process with somebody else's middleware, and the tasks as this process sends to them."""

    def __init__(self, shop: Shop, first: str, then: str) -> None:
        self.shop, self.log = shop, shop.folder / "worker.log"
        code = THEIRS.format(url=shop.redis_url, namespace=shop.namespace, first=first, then=then)
        (shop.folder / "their_tasks.py").write_text(code)
        command = [sys.executable, "-m", "dramatiq", "their_tasks", "-p", "1", "-t", "4", "--path", str(shop.folder)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

        @ai_task(criticality="deferrable")
        def slow(steps: int) -> None: ...

        @ai_task(criticality="deferrable")
        async def aslow(steps: int) -> None: ...

        @ai_task(criticality="deferrable")
        def buggy() -> None: ...

        self.slow, self.aslow, self.buggy = slow, aslow, buggy

    def open_breaker(self) -> list[Message[Any]]:
        """As the shop's, which looks into a worker of this process."""
        self.shop.result(self.shop.asummary.send("first"))  # so that the models of both tasks are known
        self.shop.primary.fail(Fault.OVERLOADED)
        canaries = self.shop.send(self.shop.summary, 3, "canary")
        self.shop.until(lambda: self.shop.breaker().generation, "the breaker opens")
        self.shop.until_all("held", canaries)
        return canaries

    def stop(self) -> str:
        """Ends the process; its log."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=30)
        return self.log.read_text()


@pytest.fixture
def start_theirs(shop: Shop) -> Iterator[Callable[..., Theirs]]:
    """Starts a worker process with code that goes before the import of dramatiq, and code that knows the broker."""
    started: list[Theirs] = []

    def start(first: str = "", then: str = "") -> Theirs:
        started.append(Theirs(shop, first, then))
        shop.until(shop.registry.workers, "the worker is up", within_s=30)
        return started[-1]

    yield start
    for theirs in started:
        if theirs.process.poll() is None:
            os.killpg(theirs.process.pid, signal.SIGKILL)
            theirs.process.wait()
    for key in shop.broker.client.scan_iter("dramatiq:aborts:*"):
        shop.broker.client.delete(key)


ABORT = """
from dramatiq_abort import Abortable
from dramatiq_abort.backends import RedisBackend
broker.add_middleware(Abortable(backend=RedisBackend(client=broker.client)))
"""
COROUTINE = pytest.param(True, id="coroutine")


def abort(shop: Shop, job: Message[Any]) -> None:
    """As an application that sends asks for it."""
    backend = AbortBackend(client=shop.broker.client)
    dramatiq_abort.abort(job.message_id, dramatiq_abort.Abortable(backend=backend))


@pytest.mark.parametrize("asynchronous", [pytest.param(False, id="function"), COROUTINE])
def test_a_held_job_can_be_aborted(shop: Shop, start_theirs: Callable[..., Theirs], asynchronous: bool) -> None:
    """With dramatiq-abort: when it is released it is discarded, without another call; the others run."""
    canaries = start_theirs(then=ABORT).open_breaker()
    jobs = shop.send(shop.asummary if asynchronous else shop.summary, 2, "job")
    shop.until_all("held", jobs)
    calls = [len(shop.calls(job.args[0])) for job in jobs]
    abort(shop, jobs[0])
    shop.heal()
    shop.until_all("ended", [*canaries, *jobs])
    shop.until_over()
    assert {"accepted": 6, "succeeded": 5, "discarded": 1} == shop.books()
    assert [calls[0], calls[1] + 1] == [len(shop.calls(job.args[0])) for job in jobs]


@pytest.mark.parametrize("asynchronous", [pytest.param(False, id="function"), COROUTINE])
def test_a_running_job_can_be_aborted(shop: Shop, start_theirs: Callable[..., Theirs], asynchronous: bool) -> None:
    """With dramatiq-abort: it fails as stock dramatiq lets it fail, in an outage, too; it is not held."""
    theirs = start_theirs(then=ABORT)
    theirs.open_breaker()
    job = theirs.aslow.send(150) if asynchronous else theirs.slow.send(1000)
    shop.until((shop.folder / "began").exists, "it runs")
    abort(shop, job)
    shop.until_all("ended", [job])
    assert {"accepted": 5, "succeeded": 1, "held": 3, "failed": 1} == shop.books()
    with pytest.raises(ResultFailure, match="Abort"):
        tideover.wait_for_sync(job, timeout=PATIENCE)


SENTRY = """
import sentry_sdk
from sentry_sdk.integrations.dramatiq import DramatiqIntegration

def keep(event, hint):
    errors = [error["type"] for error in event.get("exception", {}).get("values", [])]
    with (FOLDER / "sentry.jsonl").open("a") as file:
        print(json.dumps([event.get("transaction"), errors]), file=file)

sentry_sdk.init(dsn="http://key@127.0.0.1:9/1", integrations=[DramatiqIntegration()], before_send=keep, traces_sample_rate=1.0)
"""


def sentry_heard(shop: Shop) -> list[list[Any]]:
    """The events that would have gone to Sentry: where they came from, and which errors they carry."""
    file = shop.folder / "sentry.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_sentry_hears_of_bugs_and_not_of_holds(shop: Shop, start_theirs: Callable[..., Theirs]) -> None:
    """In an outage with many held jobs, the only event is that of a job with a bug; nothing of dramatiq's is critical."""
    theirs = start_theirs(first=SENTRY)
    canaries = theirs.open_breaker()
    held = [*shop.send(shop.summary, 10, "function"), *shop.send(shop.asummary, 10, "coroutine")]
    shop.until_all("held", held)
    theirs.buggy.send()
    shop.until(lambda: shop.books().get("failed"), "the bug is found")
    shop.heal()
    shop.until_all("ended", [*canaries, *held])
    log = theirs.stop()
    assert {"accepted": 25, "succeeded": 24, "failed": 1} == shop.books()
    assert [["buggy", ["ValueError"]]] == [event for event in sentry_heard(shop) if not event[0].startswith("chat ")]
    assert "CRITICAL" not in log
    assert "of task buggy failed: ValueError" in log


def test_sentry_hears_nothing_of_probes(shop: Shop, start_theirs: Callable[..., Theirs]) -> None:
    """However long the outage: neither the calls that failed nor the probes make events."""
    theirs = start_theirs(first=SENTRY)
    canaries = theirs.open_breaker()
    shop.until(lambda: len([call for call in shop.primary.calls() if not call.job]) >= 3, "it was probed three times")
    shop.heal()
    shop.until_all("ended", canaries)
    theirs.stop()
    assert [] == sentry_heard(shop)
