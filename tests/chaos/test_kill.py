# SPDX-License-Identifier: Apache-2.0
"""Workers die by `kill -9` while they hold and while they drain: nothing is lost, by the account and by the ledger."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tideover.settings import embedded_socket
from tideover.store.account import Account, Ledger
from tideover.store.client import connect
from tideover.store.keys import Keys
from tideover.testing import FakeProvider, Fault, Latency
from tideover_worker import embedded

HERE = Path(__file__).parent
KILLS = 20
JOBS = 400
SETTINGS = """
redis_url = "{url}"
[worker]
heartbeat_timeout_s = 2
[breaker]
probe_after_s = 1
probe_max_s = 2
settle_s = 2
[routes.anthropic]
kind = "anthropic"
base_url = "{primary}"
timeout_s = 5
[routes.openai]
kind = "openai-compatible"
base_url = "{fallback}"
models = {{ "claude-opus-4-8" = "gpt-5.5" }}
"""


class Fleet:
    """Two worker processes, one process each, so that a kill is a kill of the whole worker."""

    def __init__(self, folder: Path) -> None:
        self.log = (folder / "workers.log").open("ab")
        self.environ = os.environ | {"TIDEOVER_CONFIG": str(folder / "tideover.toml"), "ANTHROPIC_API_KEY": "key"}
        self.workers = [self.start() for _ in range(2)]

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dramatiq", "app", "-p", "1", "-t", "4", "--path", str(HERE)]
        return subprocess.Popen(command, env=self.environ, stdout=self.log, stderr=self.log, start_new_session=True)

    def send(self, n: int, prefix: str) -> set[str]:
        """Sends from a process of its own; the tags of the jobs."""
        command = [sys.executable, str(HERE / "send.py"), str(n), prefix]
        return set(subprocess.run(command, env=self.environ, check=True, capture_output=True, text=True).stdout.split())

    def kill_one(self, chance: random.Random) -> None:
        i = chance.randrange(len(self.workers))
        kill(self.workers[i])
        self.workers[i] = self.start()

    def stop(self) -> None:
        for worker in self.workers:
            kill(worker)
        self.log.close()


def kill(worker: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def pause(seconds: float) -> None:
    """A random instant is reached by waiting for it."""
    threading.Event().wait(seconds)


@pytest.mark.slow
@pytest.mark.timeout(170)
def test_twenty_kills_while_holding_and_draining_lose_nothing(tmp_path: Path) -> None:
    """Half of the kills hit while the provider is down and jobs are being held, half while the backlog drains."""
    chance = random.Random(os.environ.get("CHAOS_SEED", "tide"))
    server = embedded.start(tmp_path / "valkey")
    primary = FakeProvider("anthropic", latency=Latency(base_s=0.05))
    fallback = FakeProvider("openai", dialect="openai-compatible")
    try:
        with primary, fallback:
            config = SETTINGS.format(url=server.url, primary=primary.base_url, fallback=fallback.base_url)
            (tmp_path / "tideover.toml").write_text(config)
            tags = run(tmp_path, chance, primary)
        answered = {call.job for call in (*primary.calls(), *fallback.calls()) if call.outcome == "ok" and call.job}
        assert tags == answered
    finally:
        embedded.stop(tmp_path / "valkey")


def run(folder: Path, chance: random.Random, primary: FakeProvider) -> set[str]:
    client = connect(f"unix://{embedded_path(folder)}")
    ledger = Ledger(client, Keys("dramatiq"))
    fleet = Fleet(folder)
    try:
        tags = fleet.send(JOBS // 2, "a")
        primary.fail(Fault.OVERLOADED)
        tags |= fleet.send(JOBS - JOBS // 2, "b")
        for _ in range(KILLS // 2):
            pause(chance.uniform(0.3, 1.5))
            fleet.kill_one(chance)
            assert ledger.read().lost == 0
        assert ledger.read().held > 0
        primary.heal()
        for _ in range(KILLS - KILLS // 2):
            pause(chance.uniform(0.3, 1.5))
            fleet.kill_one(chance)
            assert ledger.read().lost == 0
        account = wait_for_end(ledger)
    finally:
        fleet.stop()
        client.close()
    assert (JOBS, JOBS, 0) == (account.accepted, account.ends["succeeded"], account.lost)
    return tags


def embedded_path(folder: Path) -> str:
    return str(embedded_socket((folder / "valkey").resolve()))


def wait_for_end(ledger: Ledger) -> Account:
    for _ in range(900):
        account = ledger.read()
        if account.queued == account.running == account.held == 0:
            return account
        pause(0.1)
    pytest.fail(f"the backlog did not come home: {account}")
