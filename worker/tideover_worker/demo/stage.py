# SPDX-License-Identifier: Apache-2.0
"""Everything that runs in a demo: a private Valkey, fake providers, worker processes, a producer. It starts and ends them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, astuple
from http.client import HTTPConnection
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import IO, Any, Self
from urllib.parse import urlsplit

from tideover import clock
from tideover.store.client import Client, connect
from tideover.store.keys import Keys
from tideover.store.registry import Registry
from tideover.testing.ledger import Call
from tideover_worker import embedded
from tideover_worker.demo.story import FALLBACK_MODELS, Story

PRIMARY, FALLBACK = "anthropic", "openai"
NAMESPACE = "dramatiq"
ANTHROPIC_KEY, OPENAI_KEY = "demo-anthropic", "demo-openai"
THREADS = 4
FALLBACK_TIMEOUT_S = 60.0
START_PATIENCE_S = 60.0
STOP_PATIENCE_S = 10.0
POLL_S = 0.05
LOG_TAIL_LINES = 15
STRANGERS = ("tideover_", "anthropic_", "openai_", "dramatiq_", "http_proxy", "https_proxy", "all_proxy")
"""Beginnings, in lower case, of variables that the demo's processes do not inherit: the user's own setup is not to be used."""


class Interrupted(BaseException):
    """The user, or the system, said stop; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        self.number = number


class DemoFailed(Exception):
    """A part of the demo died or did not start."""


class Interruption:
    """Remembers a signal instead of raising in the middle of something, so that nothing is started and then forgotten."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._said = Event()

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._hear)

    def sleep(self, seconds: float) -> None:
        """Sleeps, at most until a signal comes; raises `Interrupted` if one came."""
        self._said.wait(seconds)
        if self.number is not None:
            raise Interrupted(self.number)

    def _hear(self, number: int, _frame: object) -> None:
        self.number = number
        self._said.set()


class Child:
    """One process of the demo, with its log."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name, self.log = name, log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if name != "workers" else file,
                stderr=file,
                env=environment,
                cwd=log.parent,
                start_new_session=True,
                text=True,
            )

    def first_line(self, interruption: Interruption) -> str:
        """What it says when it is ready."""
        said: IO[str] | None = self.process.stdout
        assert said is not None
        deadline = clock.monotonic() + START_PATIENCE_S
        while not select.select([said], [], [], 0)[0]:
            if clock.monotonic() > deadline:
                raise DemoFailed(f"{self.name} did not start within {START_PATIENCE_S:.0f} s. {self.tail()}")
            interruption.sleep(POLL_S)
        line = said.readline()
        if not line:
            raise DemoFailed(f"{self.name} ended with exit code {self.process.wait()}. {self.tail()}")
        return line

    def check(self, *, may_end: bool = False) -> None:
        """Raises `DemoFailed` when it has died; `may_end`: an exit code 0 is in order."""
        code = self.process.poll()
        if code is not None and not (may_end and code == 0):
            raise DemoFailed(f"{self.name} ended unexpectedly with exit code {code}. {self.tail()}")

    def tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"The end of {self.log.name}:", *(f"  {line}" for line in lines)])

    def stop(self) -> None:
        """Ends it in good order, and whatever of its process group is left then by force."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_PATIENCE_S)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


class Stage:
    """The running demo, as a context manager; nothing of it runs after its exit."""

    client: Client
    control_urls: dict[str, str]

    def __init__(self, folder: Path, story: Story, processes: int, interruption: Interruption) -> None:
        self.folder, self.story, self.processes, self.interruption = folder, story, processes, interruption
        self.keys = Keys(NAMESPACE)
        self._exit = ExitStack()
        self._children: dict[str, Child] = {}

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._exit.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._exit.close()

    def begin(self) -> None:
        """The first second of the story: the provider's phases and the arrivals start together."""
        self.ask(
            PRIMARY, "POST", "/__control", {"play": [{**vars(phase), "mix": dict(phase.mix)} for phase in self.story.phases]}
        )
        said = self._children["producer"].process.stdin
        assert said is not None
        said.write("go\n")
        said.flush()

    def check(self) -> None:
        """Raises `DemoFailed` when a process has died."""
        for name, child in self._children.items():
            child.check(may_end=name == "producer")

    @property
    def all_sent(self) -> bool:
        return self._children["producer"].process.poll() == 0

    def keep_ledger(self, provider: str) -> list[Call]:
        """The provider's whole ledger, which is also written to the directory of the run, a call a line."""
        calls = self.calls(provider)
        lines = "".join(f"{json.dumps(asdict(call))}\n" for call in calls)
        (self.folder / f"ledger-{provider}.jsonl").write_text(lines, encoding="utf-8")
        return calls

    def calls(self, provider: str, since: int = 0) -> list[Call]:
        """The provider's ledger after call number `since`."""
        return [Call(**row) for row in self.ask(provider, "GET", f"/__ledger?since={since}")]

    def ask(self, provider: str, method: str, path: str, order: object = None) -> Any:
        """One request to a fake provider's own port."""
        connection = HTTPConnection(urlsplit(self.control_urls[provider]).netloc, timeout=START_PATIENCE_S)
        try:
            connection.request(method, path, None if order is None else json.dumps(order))
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise DemoFailed(f"the fake provider {provider} refused {method} {path}: {body.decode()}")
        return json.loads(body)

    def _build(self) -> None:
        self._exit.callback(embedded.stop, self.folder / ".tideover")
        self.client = connect(embedded.start(self.folder / ".tideover").url)
        self._exit.callback(self.client.close)
        providers = self._start("providers", "-m", "tideover.testing.serve", "--config", self._write_providers())
        urls = json.loads(providers.first_line(self.interruption))
        self.control_urls = urls["control_urls"]
        self._write_settings(urls["base_urls"])
        self._start("workers", "-m", "dramatiq", "tideover_worker.demo.tasks", "-p", str(self.processes), "-t", str(THREADS))
        plan = json.dumps([astuple(job) for job in self.story.jobs])
        (self.folder / "plan.json").write_text(plan, encoding="utf-8")
        self._start("producer", "-m", "tideover_worker.demo.producer", "plan.json").first_line(self.interruption)
        self._wait_for("the workers", lambda: len(Registry(self.client, self.keys).workers()) >= self.processes)

    def _start(self, name: str, *arguments: str) -> Child:
        child = self._children[name] = Child(name, arguments, self.folder / f"{name}.log", self.environment())
        self._exit.callback(child.stop)
        return child

    def _wait_for(self, what: str, there: Callable[[], bool]) -> None:
        deadline = clock.monotonic() + START_PATIENCE_S
        while not there():
            self.check()
            if clock.monotonic() > deadline:
                raise DemoFailed(f"{what} did not start within {START_PATIENCE_S:.0f} s. {self._children['workers'].tail()}")
            self.interruption.sleep(POLL_S)

    def environment(self) -> dict[str, str]:
        """The variables of the demo's processes: this process's own, without what would lead them elsewhere."""
        inherited = {name: value for name, value in os.environ.items() if not name.lower().startswith(STRANGERS)}
        ours = {
            "TIDEOVER_CONFIG": str(self.folder / "tideover.toml"),
            "ANTHROPIC_API_KEY": ANTHROPIC_KEY,
            "DEMO_OPENAI_KEY": OPENAI_KEY,
        }
        return {**inherited, **ours}

    def _write_providers(self) -> str:
        path, latency = self.folder / "providers.json", asdict(self.story.latency)
        common = {"latency": latency, "speed": self.story.latency_speed, "seed": self.story.seed}
        first = {"name": PRIMARY, "dialect": "anthropic", "api_key": ANTHROPIC_KEY, **common}
        second = {"name": FALLBACK, "dialect": "openai-compatible", "api_key": OPENAI_KEY, **common}
        path.write_text(json.dumps({"providers": [first, second]}), encoding="utf-8")
        return path.name

    def _write_settings(self, base_urls: Mapping[str, str]) -> None:
        models = ", ".join(f'"{asked}" = "{name}"' for asked, name in FALLBACK_MODELS.items())
        (self.folder / "tideover.toml").write_text(
            f"""# written by `tideover demo`; the keys are those of its fake providers
redis_url = "embedded"

[drain]
double_s = 2

[routes.{PRIMARY}]
kind = "anthropic"
base_url = "{base_urls[PRIMARY]}"
timeout_s = {self.story.timeout_s}

[routes.{FALLBACK}]
kind = "openai-compatible"
base_url = "{base_urls[FALLBACK]}"
api_key_env = "DEMO_OPENAI_KEY"
timeout_s = {FALLBACK_TIMEOUT_S}
models = {{ {models} }}
""",
            encoding="utf-8",
        )
