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
from tideover.testing import Fault, Latency
from tideover_worker import embedded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.pipeline.conftest import Shop

TASKS = """
import faulthandler, signal; faulthandler.register(signal.SIGUSR1)
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
def swift_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """dramatiq waits seconds before it tries a lost connection again."""
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.1)
    monkeypatch.setattr("dramatiq.worker.POST_PROCESS_MESSAGE_RETRY_DELAY_SECS", 0.1)


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
    shop.until(lambda: shop.registry.workers(), "the worker is up", within_s=20)
    return processes[-1]


def kill_server(shop: Shop) -> None:
    """`kill -9`, and no answer any more."""
    pid = embedded.running(shop.folder / "valkey")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    shop.until(lambda: embedded.running(shop.folder / "valkey") is None, "the server is gone")


def restart_server(shop: Shop) -> None:
    embedded.start(shop.folder / "valkey")



import time
@pytest.mark.parametrize("i", range(12))
def test_z(shop, processes, i):
    shop.configure(shutdown_grace_s=0.2, timeout_s=60)
    shop.primary.fail(Fault.HANG)
    jobs = shop.send(shop.asummary, 3, "job")
    worker = start_worker(shop, processes)
    shop.until(lambda: len(shop.primary.calls()) == 3, "three calls are under way", within_s=20)
    pid = [f["pid"] for f in shop.registry.workers().values()][0]
    worker.terminate()
    try:
        worker.wait(timeout=3)
    except subprocess.TimeoutExpired:
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.3)
        os.kill(pid, signal.SIGUSR1)
        worker.wait(timeout=10)
        print((shop.folder / "worker.log").read_text()); print(shop.primary.calls())
        assert 0
    assert shop.books() == {"accepted":3,"queued":3}
