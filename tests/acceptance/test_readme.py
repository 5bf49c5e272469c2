# SPDX-License-Identifier: Apache-2.0
"""What the README says is true: its code runs and type-checks, its settings load, its commands exist, its table holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from tideover.core import admission
from tideover.settings import load
from tideover.store.account import Ledger
from tideover.store.keys import Keys

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TIDEOVER = Path(sys.executable).with_name("tideover")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with the README's code and settings."""
    code, web = blocks("python")
    (tmp_path / "shop.py").write_text(code, encoding="utf-8")
    (tmp_path / "web.py").write_text(web, encoding="utf-8")
    (tmp_path / "tideover.toml").write_text(blocks("toml")[0], encoding="utf-8")
    return tmp_path


def test_the_code_sends_two_jobs(shop: Path, valkey_url: str, client: redis.Redis) -> None:
    """Run as a program, the first block enqueues one critical and one deferrable job."""
    environ = {"PATH": os.environ["PATH"], "TIDEOVER_REDIS_URL": valkey_url}
    subprocess.run([sys.executable, "shop.py"], cwd=shop, env=environ, check=True, timeout=60)
    account = Ledger(client, Keys("dramatiq")).read()
    assert (2, 1, 1) == (account.accepted, account.queues["default"].queued, account.queues["default.critical"].queued)


def test_the_code_passes_mypy_strict(shop: Path) -> None:
    """A reader who copies it gets no type error. By our own settings, so that what `make types` has read is known already."""
    ours = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", "--strict", *ours, "shop.py", "web.py"]
    done = subprocess.run(command, cwd=shop, capture_output=True, text=True, timeout=110, check=False)
    assert (0, "Success: no issues found in 2 source files\n") == (done.returncode, done.stdout)


def test_the_settings_load(shop: Path) -> None:
    """The file in the README is a valid one."""
    settings = load(environ={}, start=shop)
    assert ["anthropic", "openai"] == list(settings.routes)


def test_the_decision_table_is_the_one_of_admission() -> None:
    """README and code show the same table."""
    rows = [line for line in (admission.__doc__ or "").splitlines() if line.startswith("|")]
    assert "\n".join(rows) in README


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"^\$ tideover (\w+)", README, flags=re.MULTILINE)) | {"bypass", "config"})
)
def test_each_command_has_help(command: str) -> None:
    """Each command that the README names exists and shows examples."""
    done = subprocess.run([TIDEOVER, command, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "tideover" in done.stdout


def test_the_readme_keeps_its_promise_of_brevity() -> None:
    """At most 150 lines, and the first code by line 20."""
    lines = README.splitlines()
    assert len(lines) <= 150
    assert lines.index("```python") < 20


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    """Each relative link names a file or folder of the repository."""
    assert (ROOT / target).exists()


def test_the_settings_page_is_current() -> None:
    """docs/settings.md is what docs/generate_settings.py would write."""
    page = ROOT / "docs" / "settings.md"
    code = "import sys; sys.path.insert(0, 'docs'); import generate_settings; sys.stdout.write(generate_settings.page())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert page.read_text(encoding="utf-8") == done.stdout
