# SPDX-License-Identifier: Apache-2.0
"""What an application pays for `import tideover` and a send: no SDK, nothing of the operators' or the workers', little time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import redis

SEND = """
import json, sys
from datetime import timedelta
import tideover

@tideover.ai_task(criticality="deferrable")
def tag(ticket_id): ...

@tideover.ai_task(criticality="critical", expires_in=timedelta(minutes=1))
async def draft(ticket_id): ...

{then}
print(json.dumps(sorted(sys.modules)))
"""
BUDGET_MS = 100
"""For `import tideover`, on top of dramatiq and redis."""
HEAVY = (
    "anthropic",
    "httpx2",
    "openai",
    "rich",
    "click",
    "tideover.ops",
    "tideover.providers",
    "tideover.testing",
    "tideover_worker",
)

LONE_IMPORT = """
import time
import dramatiq, dramatiq.brokers.redis, dramatiq.results.backends, redis
began = time.process_time()
import {module}
print((time.process_time() - began) * 1000)
"""


def run(program: str, folder: Path) -> str:
    """The output of a program of its own, without anything that our environment would add to it."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert 0 == done.returncode, done.stderr
    return done.stdout


def loaded(program: str, folder: Path) -> set[str]:
    """Those of the heavy packages that the program has imported."""
    modules = json.loads(run(program, folder).splitlines()[-1])
    return {heavy for heavy in HEAVY for module in modules if module == heavy or module.startswith(f"{heavy}.")}


def test_sending_loads_no_sdk_and_no_server_code(tmp_path: Path, valkey_url: str, client: redis.Redis) -> None:
    """A web process that only sends jobs stays as small as it was."""
    (tmp_path / "tideover.toml").write_text(f'redis_url = "{valkey_url}"\nnamespace = "imports"\n')
    program = SEND.format(then="tag.send(81)\ndraft.send(82)")
    assert set() == loaded(program, tmp_path)
    assert b"2" == client.hget("imports:__tideover__:account", "accepted")


def test_declaring_tasks_needs_no_settings(tmp_path: Path) -> None:
    """A module of tasks can be imported where there is no Redis: in tests, in a build, in a shell."""
    assert set() == loaded(SEND.format(then=""), tmp_path)


def test_sending_without_a_url_says_what_to_do(tmp_path: Path) -> None:
    """A missing secret must not give each process a queue of its own."""
    told = run(SEND.format(then="try: tag.send(81)\nexcept tideover.ConfigurationError as error: print(error)"), tmp_path)
    assert "Set TIDEOVER_REDIS_URL" in told


def test_the_public_names_are_all_there(tmp_path: Path) -> None:
    """`from tideover import *` works, and each name has a docstring."""
    program = "import tideover\nfor name in tideover.__all__: assert getattr(tideover, name).__doc__, name"
    run(program, tmp_path)


def test_importing_is_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Within a budget over dramatiq and redis, which the application loads anyway: the best of five processes."""
    cost_ms = min(float(run(LONE_IMPORT.format(module="tideover"), tmp_path)) for _ in range(5))
    with capsys.disabled():
        print(f"\nimport tideover: {cost_ms:.0f} ms over dramatiq and redis (budget {BUDGET_MS} ms)")
    assert cost_ms <= BUDGET_MS
