# SPDX-License-Identifier: Apache-2.0
"""A critical job does not wait behind a deferrable backlog, in fair weather either."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tideover.store.account import Ledger
from tideover.store.keys import Keys

TASKS = """
import asyncio, time
from tideover import ai_task

@ai_task(criticality="deferrable")
def deferrable_function(n: int) -> None: time.sleep(0.05)

@ai_task(criticality="deferrable")
async def deferrable_coroutine(n: int) -> None: await asyncio.sleep(0.05)

@ai_task(criticality="critical", expires_in=None)
def critical_function(sent_at: float) -> float: return time.time() - sent_at

@ai_task(criticality="critical", expires_in=None)
async def critical_coroutine(sent_at: float) -> float: return time.time() - sent_at
"""
SEND = """
import sys, time
from datetime import timedelta
import tasks
from tideover import wait_for_sync

if sys.argv[1] == "deferrable":
    for n in range(2000):
        getattr(tasks, sys.argv[2]).send(n)
else:
    for task in (tasks.critical_function, tasks.critical_coroutine):
        task.send(0.0)  # a process pays for settings and connection once, at its first send
    for n in range(10):
        for task in (tasks.critical_function, tasks.critical_coroutine):
            print(wait_for_sync(task.send(time.time()), timeout=timedelta(seconds=60)))
"""


@pytest.fixture
def shop(tmp_path: Path, valkey_url: str) -> tuple[Path, dict[str, str]]:
    """A folder with tasks and settings, and the environment to run them in."""
    (tmp_path / "tasks.py").write_text(TASKS)
    (tmp_path / "send.py").write_text(SEND)
    (tmp_path / "tideover.toml").write_text(f'redis_url = "{valkey_url}"')
    return tmp_path, os.environ | {"ANTHROPIC_API_KEY": "none-is-called"}


@pytest.fixture
def worker(shop: tuple[Path, dict[str, str]]) -> Iterator[subprocess.Popen[bytes]]:
    """One worker process of eight threads, not started before the backlog is there."""
    folder, environ = shop
    with (folder / "worker.log").open("wb") as log:
        command = [sys.executable, "-m", "dramatiq", "tasks", "-p", "1", "-t", "8"]
        with subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log, start_new_session=True) as process:
            yield process
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("backlog", ["deferrable_function", "deferrable_coroutine"])
def test_a_critical_job_starts_within_a_second_of_its_send(
    backlog: str, shop: tuple[Path, dict[str, str]], client: redis.Redis, request: pytest.FixtureRequest
) -> None:
    """2,000 deferrable jobs of 50 ms wait, and the worker is busy with them."""
    folder, environ = shop
    subprocess.run([sys.executable, "send.py", "deferrable", backlog], cwd=folder, env=environ, check=True)
    request.getfixturevalue("worker")
    ledger, give_up_at = Ledger(client, Keys("dramatiq")), time.monotonic() + 60
    while ledger.read().ends["succeeded"] < 20:
        assert time.monotonic() < give_up_at, (folder / "worker.log").read_text()
    done = subprocess.run(
        [sys.executable, "send.py", "critical"], cwd=folder, env=environ, check=True, capture_output=True, text=True
    )
    waited_s = [float(line) for line in done.stdout.split()]
    assert len(waited_s) == 20
    assert max(waited_s) <= 1.0
