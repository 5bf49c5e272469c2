# SPDX-License-Identifier: Apache-2.0
"""One worker of several loses its network: its trouble stays its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest
import redis

from tideover.store.account import Ledger
from tideover.store.breakers import Breakers
from tideover.store.keys import Keys
from tideover.store.registry import Registry
from tideover.testing import FakeProvider, Latency

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import WaitUntil

NAMESPACE = "egress"
WELL, FIRST, JOBS = 2, 40, 280
NOWHERE = "http://127.0.0.1:9"
"""The discard port, where nobody listens."""
TASKS = """
from datetime import timedelta
from tideover import aclaude, ai_task, text_of

@ai_task(criticality="critical", reroute=["openai"], expires_in=timedelta(minutes=10), models=["claude-opus-4-8"])
async def reply(n: int) -> str:
    question = [{"role": "user", "content": "hello"}]
    return text_of(await aclaude().messages.create(model="claude-opus-4-8", max_tokens=8, messages=question))
"""
SEND = """
import sys, time
import tasks
for n in range(int(sys.argv[1])):
    tasks.reply.send(n)
    time.sleep(0.02)
"""
SETTINGS = """
redis_url = "{url}"
namespace = "egress"
[worker]
concurrency = 4
poll_s = 0.05
[routes.anthropic]
kind = "anthropic"
base_url = "{primary}"
[routes.openai]
kind = "openai-compatible"
base_url = "{fallback}"
api_key_env = "OPENAI_API_KEY"
models = {{ "claude-opus-4-8" = "gpt-5.5" }}
"""


class Firm:
    def __init__(self, folder: Path, url: str, primary: FakeProvider, fallback: FakeProvider) -> None:
        (folder / "tasks.py").write_text(TASKS)
        (folder / "send.py").write_text(SEND)
        (folder / "tideover.toml").write_text(SETTINGS.format(url=url, primary=primary.base_url, fallback=fallback.base_url))
        self.folder = folder
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("TIDEOVER_")}
        self.environ |= {"ANTHROPIC_API_KEY": "key", "OPENAI_API_KEY": "key"}

    def send(self, n: int) -> None:
        subprocess.run([sys.executable, "send.py", str(n)], cwd=self.folder, env=self.environ, check=True)

    def status(self) -> dict[str, object]:
        code = "from tideover_worker.cli import main; main()"
        command = [sys.executable, "-c", code, "status", "--json", "-n", NAMESPACE]
        said = subprocess.run(command, cwd=self.folder, env=self.environ, capture_output=True, text=True, check=False)
        found: dict[str, object] = json.loads(said.stdout)
        return found

    @contextmanager
    def worker(self, **more: str) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "dramatiq", "tasks", "--processes", "1", "--threads", "2"]
        with (self.folder / "worker.log").open("ab") as log:
            running = subprocess.Popen(command, cwd=self.folder, env=self.environ | more, stdout=log, stderr=log)
        try:
            yield running
        finally:
            running.send_signal(signal.SIGTERM)
            running.wait(60)


@pytest.mark.slow
def test_a_worker_without_network_reroutes_nobodys_jobs(
    tmp_path: Path, valkey_url: str, client: redis.Redis, wait_until: WaitUntil
) -> None:
    """The others serve every job over the primary; `status` names the one that stands apart."""
    swift = Latency(base_s=0.05, per_output_token_s=0.0)
    keys = Keys(NAMESPACE)
    ledger, registry = Ledger(client, keys), Registry(client, keys)
    with (
        FakeProvider("anthropic", latency=swift) as primary,
        FakeProvider("openai", dialect="openai-compatible", latency=swift) as fallback,
    ):
        firm = Firm(tmp_path, valkey_url, primary, fallback)
        cut_off = {"TIDEOVER_ROUTES__ANTHROPIC__BASE_URL": NOWHERE, "TIDEOVER_ROUTES__OPENAI__BASE_URL": NOWHERE}
        with ExitStack() as stack:
            for _ in range(WELL):
                stack.enter_context(firm.worker())
            firm.send(FIRST)
            wait_until(lambda: ledger.read().ends["succeeded"] == FIRST, within_s=60, description="they work well")
            with firm.worker(**cut_off):
                wait_until(lambda: len(registry.workers()) == WELL + 1, within_s=60, description="the last one works")
                firm.send(JOBS - FIRST)
                wait_until(lambda: ledger.read().ends["succeeded"] == JOBS, within_s=120, description="all are answered")
                apart = [facts["apart"] for facts in registry.workers().values() if facts["apart"]]
                assert [True] == ["anthropic/*" in each for each in apart]
                assert "alone finds" in json.dumps(firm.status())
    assert [] == fallback.calls()
    anthropic = Breakers(client, keys).read(["anthropic/*", "anthropic/claude-opus-4-8"]).values()
    assert [0, 0] == [breaker.generation for breaker in anthropic]
    assert JOBS == ledger.read().accepted
