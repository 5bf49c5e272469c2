# SPDX-License-Identifier: Apache-2.0
"""compose.yaml is one that Docker Compose understands, and its store keeps jobs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

COMPOSE = Path(__file__).parents[2] / "compose.yaml"


@pytest.fixture
def services() -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe").load(COMPOSE.read_text())["services"]
    return found


def test_it_follows_the_compose_specification() -> None:
    """By the schema that comes with check-jsonschema, so that no Docker is needed to know."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr


def test_its_store_throws_nothing_away(services: dict[str, Any]) -> None:
    """It evicts nothing, logs every write to a volume, and is reachable from this machine only."""
    valkey = services["valkey"]
    command = " ".join(valkey["command"])
    assert "--maxmemory-policy noeviction" in command
    assert "--appendonly yes" in command
    assert any(volume.endswith(":/data") for volume in valkey["volumes"])
    assert all(port.startswith("127.0.0.1:") for port in valkey["ports"])


def test_its_worker_is_given_time_to_finish(services: dict[str, Any]) -> None:
    """Compose kills it later than it gives up by itself."""
    from tideover.settings import WorkerSettings

    assert float(services["worker"]["stop_grace_period"].removesuffix("s")) > WorkerSettings().shutdown_grace_s
