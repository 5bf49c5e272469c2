# SPDX-License-Identifier: Apache-2.0
"""What a run happens on: a private Valkey, workers, two fake providers and a sender, each of which can be made to suffer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from tests.chaos.ledger import VARIABLE, note

from tideover.testing import FakeProvider, Latency
from tideover_worker.embedded import find_server

ROOT = Path(__file__).parents[2]
WORKERS = 3
BOOT_S = 60.0
POLL_S = 0.02
SETTINGS = """
redis_url = "{url}"
[worker]
heartbeat_timeout_s = 3
[breaker]
probe_after_s = 0.3
probe_max_s = 1
settle_s = 0.5
[drain]
start_rate = 50
max_rate = 500
[routes.anthropic]
kind = "anthropic"
base_url = "{primary}"
timeout_s = 3
[routes.openai]
kind = "openai-compatible"
base_url = "{fallback}"
timeout_s = 3
models = {{ "claude-opus-4-8" = "gpt-5.5" }}
"""


def until(fact: Callable[[], object], what: str, within_s: float) -> None:
    """Waits for a fact."""
    give_up_at, pause = time.monotonic() + within_s, threading.Event()
    while not fact():
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"after {within_s:.0f} s still not true: {what}")
        pause.wait(POLL_S)


class Valkey:
    """A server with an append-only file, which it finds again after whatever happened to it."""

    def __init__(self, folder: Path, fsync: str) -> None:
        self.folder, self.fsync = folder, fsync
        self.socket = Path(tempfile.mkdtemp(prefix="chaos-")) / "valkey.sock"  # a socket's path must be short
        self.url = f"unix://{self.socket}"
        self.client = redis.Redis(unix_socket_path=str(self.socket), socket_timeout=2, retry=Retry(NoBackoff(), 0))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def lives(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Returns when it answers, its file loaded."""
        if self.lives:
            return
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": self.fsync,
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        command = [str(find_server()), *(word for name, value in options.items() for word in (f"--{name}", value))]
        with (self.folder / "valkey.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        until(self.answers, "Valkey answers", BOOT_S)

    def answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False

    def owes(self) -> bool:
        """Whether it may have answered what it has not yet written: with `everysec` it does while an fsync is slow."""
        try:
            says: dict[str, int] = self.client.info("persistence")
        except redis.RedisError:
            return False
        return self.fsync != "always" and bool(says["aof_pending_bio_fsync"] or says["aof_buffer_length"])

    def signal(self, number: signal.Signals) -> None:
        """SIGTERM ends it in good order; both ends are waited for."""
        if self.process is not None and self.lives:
            self.process.send_signal(number)
            if number in (signal.SIGKILL, signal.SIGTERM):
                self.process.wait()

    def close(self) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        self.client.close()
        self.socket.unlink(missing_ok=True)
        self.socket.parent.rmdir()


class Slot:
    """A place for one worker: the stock `dramatiq` command with one worker process, started again whenever it was ended."""

    def __init__(self, number: int, folder: Path, environ: dict[str, str], log: IO[bytes]) -> None:
        self.number, self.environ, self.log = number, environ, log
        self.clock = folder / f"clock-{number}"
        self.starts = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.leaving: list[subprocess.Popen[bytes]] = []

    @property
    def name(self) -> str:
        """Of the worker that is in it, in the ledger."""
        return f"w{self.number}.{self.starts}"

    def start(self) -> None:
        """Also in the place of one that died by itself; of one that lives, no second."""
        if self.process is not None and self.process.poll() is None:
            return
        self.starts += 1
        command = [sys.executable, "-m", "dramatiq", "tests.chaos.app", "-p", "1", "-t", "4"]
        environ = self.environ | {"CHAOS_WORKER": self.name, "CHAOS_CLOCK": str(self.clock)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def signal(self, number: signal.Signals) -> None:
        """To the whole command, the dramatiq master included."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def retire(self) -> None:
        """As a deployment does: SIGTERM to the master, which ends its worker in its own time."""
        if self.process is not None:
            self.process.terminate()
            self.leaving.append(self.process)
            self.process = None

    def replace_dead(self) -> str | None:
        """Starts another worker in the place of one that died by itself, whose name it returns; as a supervisor does."""
        if self.process is None or self.process.poll() is None:
            return None
        dead = self.name
        self.start()
        return dead

    def close(self) -> None:
        self.kill()
        for process in self.leaving:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Stage:
    """All of it, for one run."""

    def __init__(self, folder: Path, *, stock: bool, fsync: str) -> None:
        (folder / "shaky").mkdir(parents=True)
        self.folder, self.stock, self.ledger = folder, stock, folder / "ledger.jsonl"
        self.log = (folder / "workers.log").open("ab")
        self.valkey = Valkey(folder, fsync)
        latency = Latency(base_s=0.03)
        self.providers = (
            FakeProvider("anthropic", latency=latency),
            FakeProvider("openai", dialect="openai-compatible", latency=latency),
        )
        self.valkey.start()
        for provider in self.providers:
            provider.start()
        self.slots = [Slot(n, folder, self.environ(), self.log) for n in range(WORKERS)]
        self.sender: subprocess.Popen[bytes] | None = None

    def environ(self) -> dict[str, str]:
        primary, fallback = (provider.base_url for provider in self.providers)
        config = self.folder / "tideover.toml"
        config.write_text(SETTINGS.format(url=self.valkey.url, primary=primary, fallback=fallback))
        path = [str(ROOT), str(Path(__file__).parent / "clock"), os.environ.get("PYTHONPATH", "")]
        environ = os.environ | {
            VARIABLE: str(self.ledger),
            "CHAOS_REDIS_URL": self.valkey.url,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "TIDEOVER_CONFIG": str(config),
            "ANTHROPIC_API_KEY": "key",
        }
        return environ | {"CHAOS_STOCK": "1", "ANTHROPIC_BASE_URL": primary} if self.stock else environ

    def note(self, what: str, **facts: object) -> None:
        note(what, path=self.ledger, **facts)

    def send(self, seed: int, jobs: int, seconds: float) -> None:
        command = [sys.executable, "-m", "tests.chaos.send", str(seed), str(jobs), str(seconds)]
        self.sender = subprocess.Popen(
            command, cwd=ROOT, env=self.environ(), stdin=subprocess.PIPE, stdout=self.log, stderr=self.log
        )

    def ask_for_results(self) -> None:
        """Lets the sender note what became of its jobs' results, and waits for it."""
        assert self.sender is not None
        self.sender.communicate(b"results\n", timeout=BOOT_S)
        if self.sender.returncode:
            raise RuntimeError(f"the sender failed; see {self.log.name}")

    def supervise(self) -> None:
        """Replaces workers that died by themselves: one that boots while Redis is away does."""
        for slot in self.slots:
            if (dead := slot.replace_dead()) is not None:
                self.note("died", worker=dead)

    def calm(self) -> None:
        """Everything is well from now on."""
        self.valkey.signal(signal.SIGCONT)
        self.valkey.start()
        for provider in self.providers:
            provider.heal()
        for slot in self.slots:
            slot.signal(signal.SIGCONT)
            slot.start()

    def close(self) -> None:
        for slot in self.slots:
            slot.close()
        if self.sender is not None and self.sender.poll() is None:
            self.sender.kill()
            self.sender.communicate()
        for provider in self.providers:
            provider.stop()
        self.valkey.close()
        self.log.close()
