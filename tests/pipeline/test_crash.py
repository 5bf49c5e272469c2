# SPDX-License-Identifier: Apache-2.0
"""Redis dies, workers are stopped or killed: nothing is lost, and no attempt is spent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tideover import aclaude, ai_task, clock, text_of
from tideover.store.client import text
from tideover.testing import Fault, Latency
from tideover_worker import embedded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.pipeline.conftest import Shop

TASKS = """
from datetime import timedelta
from tideover import aclaude, ai_task, claude, text_of

def question(tag):
    message = {"role": "user", "content": tag}
    return {"model": "claude-opus-4-8", "max_tokens": 8, "messages": [message], "extra_headers": {"x-tideover-job": tag}}

@ai_task(criticality="deferrable", max_retries=2)
def summary(tag: str) -> str:
    return text_of(claude().messages.create(**question(tag)))

@ai_task(criticality="deferrable", max_retries=2)
async def asummary(tag: str) -> str:
    return text_of(await aclaude().messages.create(**question(tag)))
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Worker processes that a test started; what is still there afterwards is killed."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def start_worker(shop: Shop, processes: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """The stock `dramatiq` command, one process, with the shop's tasks."""
    (shop.folder / "crash_tasks.py").write_text(TASKS)
    command = [sys.executable, "-m", "dramatiq", "crash_tasks", "-p", "1", "-t", "4", "--path", str(shop.folder)]
    with (shop.folder / "worker.log").open("ab") as log:
        processes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
    shop.until(lambda: shop.registry.workers(), "the worker is up")
    return processes[-1]


def tag_of(job: Any) -> str:
    return str(job.args[0])


def kill_server(shop: Shop) -> None:
    """`kill -9`, and no answer any more."""
    pid = embedded.running(shop.folder / "valkey")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    shop.until(lambda: embedded.running(shop.folder / "valkey") is None, "the server is gone")


def restart_server(shop: Shop) -> None:
    embedded.start(shop.folder / "valkey")


@pytest.mark.usefixtures("swift_restarts")
@pytest.mark.parametrize("kind", ["summary", "asummary"])
def test_redis_killed_while_jobs_run(private_shop: Shop, kind: str) -> None:
    """Workers go on when it is back; every job ends, each was answered, and the sum is right."""
    shop = private_shop
    shop.primary.latency = Latency(base_s=0.05, per_output_token_s=0.0, jitter=0.0)
    shop.work()
    jobs = shop.send(getattr(shop, kind), 60, "job")
    shop.until(lambda: len(shop.primary.calls()) >= 3, "some are running")
    kill_server(shop)
    restart_server(shop)
    shop.until(lambda: shop.books() == {"accepted": 60, "succeeded": 60}, "all have ended well")
    assert {job.args[0] for job in jobs} == {call.job for call in shop.primary.calls() if call.outcome == "ok"}


@pytest.mark.usefixtures("swift_restarts")
def test_redis_killed_while_jobs_are_held(private_shop: Shop) -> None:
    """What was held is held when it is back, breakers are remembered, and the backlog drains."""
    shop = private_shop
    shop.work()
    shop.open_breaker()
    jobs = shop.send(shop.summary, 20, "job")
    shop.until_all("held", jobs)
    kill_server(shop)
    restart_server(shop)
    assert {"accepted": 23, "held": 23} == shop.books()
    assert not shop.is_up()
    shop.heal()
    shop.until(lambda: shop.books() == {"accepted": 23, "succeeded": 23}, "all have ended well")


@pytest.mark.usefixtures("swift_restarts")
def test_redis_killed_between_an_attempt_and_its_retry(private_shop: Shop) -> None:
    """A job that fails while Redis is gone is not lost with its retry: it runs again."""
    shop = private_shop
    sent = threading.Event()

    @ai_task(criticality="deferrable", **shop.quick)
    def shaky() -> None:
        shop.ran.append("shaky")
        if len(shop.ran) == 1:
            assert sent.wait(10)
            kill_server(shop)
            raise ValueError("not yet")

    shop.work()
    shaky.send()
    sent.set()
    shop.until(lambda: shop.ran and embedded.running(shop.folder / "valkey") is None, "it failed while Redis is gone")
    restart_server(shop)
    shop.until(lambda: shop.books() == {"accepted": 1, "succeeded": 1}, "it has run again")


@pytest.mark.parametrize("kind", ["summary", "asummary"])
def test_sigterm_gives_unfinished_work_back(shop: Shop, processes: list[subprocess.Popen[bytes]], kind: str) -> None:
    """A worker told to stop lets calls finish for the grace, gives the rest back, attempts unspent, and exits with 0."""
    if kind == "summary":
        shop.configure(shutdown_grace_s=0.2, timeout_s=1)
    else:
        shop.configure(shutdown_grace_s=0.2, timeout_s=60)
    shop.primary.fail(Fault.HANG)
    jobs = shop.send(getattr(shop, kind), 3, "job")
    worker = start_worker(shop, processes)
    shop.until(lambda: len(shop.primary.calls()) == 3, "three calls are under way")
    began = clock.monotonic()
    worker.terminate()
    assert 0 == worker.wait(timeout=15)
    assert clock.monotonic() - began < 8
    waiting = shop.books()
    given_back = waiting.get("queued", 0) + waiting.get("held", 0)
    assert {"accepted": 3, "given back": 3} == {"accepted": waiting["accepted"], "given back": given_back}, waiting
    bodies = [shop.body(job) for job in jobs]
    assert [{"redis_message_id", "tideover"}] * 3 == [set(body.options) for body in bodies if body is not None]


def test_jobs_given_back_run_elsewhere(shop: Shop, processes: list[subprocess.Popen[bytes]]) -> None:
    """The next worker takes at once what a stopped one gave back."""
    shop.configure(shutdown_grace_s=0.2, timeout_s=60)
    shop.primary.fail(Fault.HANG)
    jobs = shop.send(shop.asummary, 3, "job")
    worker = start_worker(shop, processes)
    shop.until(lambda: len(shop.primary.calls()) == 3, "three calls are under way")
    worker.terminate()
    worker.wait(timeout=15)
    shop.heal()
    shop.work()
    assert ["anthropic"] * 3 == [shop.result(job).partition(":")[0] for job in jobs]
    shop.until_over()
    assert {"accepted": 3, "succeeded": 3} == shop.books()


def test_an_idle_worker_stops_at_once(shop: Shop, processes: list[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, and it exits with 0 and is off the list of workers."""
    worker = start_worker(shop, processes)
    worker.terminate()
    assert 0 == worker.wait(timeout=10)
    assert ({}, {}) == (shop.registry.workers(), shop.registry.heartbeats())


def test_a_killed_worker_s_jobs_run_elsewhere(shop: Shop, processes: list[subprocess.Popen[bytes]]) -> None:
    """`kill -9` in the middle of calls: another worker has the jobs as soon as the dead one's heartbeat is old."""
    shop.configure(timeout_s=60, heartbeat_timeout_s=2)
    shop.primary.fail(Fault.HANG)
    jobs = shop.send(shop.asummary, 3, "job")
    worker = start_worker(shop, processes)
    shop.until(lambda: len(shop.primary.calls()) == 3, "three calls are under way")
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    shop.heal()
    shop.work()
    assert ["anthropic"] * 3 == [shop.result(job).partition(":")[0] for job in jobs]
    shop.until_over()
    assert {"accepted": 3, "succeeded": 3} == shop.books()
    assert 3 == shop.registry.counters()["recovered"]


def test_a_stopped_worker_leaves_no_thread(shop: Shop) -> None:
    """After `Worker.stop` nothing of tideover runs any more in this process."""
    before = set(threading.enumerate())
    shop.work()
    shop.result(shop.asummary.send("a"))
    shop.result(shop.summary.send("s"))
    shop.stop_working()

    def left() -> list[str]:
        return sorted(thread.name for thread in set(threading.enumerate()) - before)

    shop.until(lambda: not left(), f"no thread is left, not {left()}", within_s=3)


def test_stopping_in_this_process_gives_coroutines_back(shop: Shop) -> None:
    """`Worker.stop` cancels what does not end within the grace; the job is queued, and its function saw the cancellation."""
    shop.configure(shutdown_grace_s=0.1)
    seen: list[str] = []

    @ai_task(criticality="deferrable", **shop.quick)
    async def endless(tag: str) -> None:
        seen.append("started")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    shop.work()
    job = endless.send("x")
    shop.until(lambda: seen, "it runs")
    shop.stop_working()
    assert ["started", "cancelled"] == seen
    assert {"accepted": 1, "queued": 1} == shop.books()
    body = shop.body(job)
    assert body is not None
    assert {"redis_message_id", "tideover"} == set(body.options)


def test_calls_finish_within_the_grace(shop: Shop) -> None:
    """What ends within the grace ends well: its result is stored."""
    began: list[str] = []

    @ai_task(criticality="deferrable")
    async def short(tag: str) -> str:
        began.append(tag)
        return text_of(await aclaude().messages.create(**shop.question(tag)))

    shop.primary.latency = Latency(base_s=0.3, per_output_token_s=0.0, jitter=0.0)
    shop.work()
    job = short.send("x")
    shop.until(lambda: shop.calls("x"), "its call is under way")
    shop.stop_working()
    assert {"accepted": 1, "succeeded": 1} == shop.books()
    assert "anthropic" == shop.result(job).partition(":")[0]


def test_the_dramatiq_command_runs_a_whole_outage(shop: Shop, processes: list[subprocess.Popen[bytes]]) -> None:
    """The stock command holds, probes and drains by itself."""
    shop.primary.fail(Fault.OVERLOADED)
    jobs: list[Any] = [*shop.send(shop.summary, 3, "s"), *shop.send(shop.asummary, 3, "a")]
    start_worker(shop, processes)
    shop.until(lambda: shop.breaker().generation, "the breaker opens")
    shop.until_all("held", jobs)
    shop.heal()
    ask: Callable[[Any], str] = lambda job: str(shop.result(job)).partition(":")[0]  # noqa: E731
    assert ["anthropic"] * 6 == [ask(job) for job in jobs]


def drain_under_way(shop: Shop, processes: list[subprocess.Popen[bytes]], started: int) -> list[Any]:
    """Forty jobs that come home at eight a second, with that many worker processes; returns when some are home."""
    shop.configure(start_rate=4, drain_options="max_rate = 8", heartbeat_timeout_s=2)
    shop.primary.fail(Fault.OVERLOADED)
    jobs = shop.send(shop.asummary, 40, "job")
    for _ in range(started):
        start_worker(shop, processes)
    shop.until(lambda: len(shop.registry.workers()) == started, "they are up")
    shop.until_all("held", jobs)
    shop.heal()
    shop.until(lambda: shop.books().get("succeeded", 0) >= 8, "some are home")
    return jobs


def leader(shop: Shop) -> str:
    """The worker that computes the paces."""
    return text(shop.broker.client.get(shop.keys.lease("drain")) or b"")


def test_the_drain_goes_on_when_its_leader_is_killed(shop: Shop, processes: list[subprocess.Popen[bytes]]) -> None:
    """Another one leads, and everything comes home: what the dead one had fetched, too."""
    jobs = drain_under_way(shop, processes, 3)
    first = leader(shop)
    pids = {worker: facts["pid"] for worker, facts in shop.registry.workers().items()}
    os.kill(pids[first], signal.SIGKILL)
    shop.until(lambda: leader(shop) not in ("", first), "another one leads")
    shop.until(lambda: shop.books() == {"accepted": 40, "succeeded": 40}, "all have ended well")
    assert {tag_of(job) for job in jobs} == {call.job for call in shop.primary.calls() if call.outcome == "ok" and call.job}


def test_without_a_leader_the_others_bring_the_backlog_home(shop: Shop, processes: list[subprocess.Popen[bytes]]) -> None:
    """Nobody computes the pace, so it falls to the floor; nothing stops."""
    jobs = drain_under_way(shop, processes, 2)
    shop.broker.client.set(shop.keys.lease("drain"), "nobody", ex=600)
    shop.until(lambda: shop.books() == {"accepted": 40, "succeeded": 40}, "all have ended well")
    assert "nobody" == leader(shop)
    shop.broker.client.delete(shop.keys.lease("drain"))
    assert 40 == len(jobs)


@pytest.mark.usefixtures("swift_restarts")
def test_the_drain_goes_on_when_redis_is_killed(private_shop: Shop, processes: list[subprocess.Popen[bytes]]) -> None:
    """In the middle of it: nothing is lost, and the pace is remembered."""
    shop = private_shop
    drain_under_way(shop, processes, 2)
    kill_server(shop)
    restart_server(shop)
    shop.until(lambda: shop.books() == {"accepted": 40, "succeeded": 40}, "all have ended well")
