# SPDX-License-Identifier: Apache-2.0
"""A desk with real parts: broker on a real Valkey, worker in this process, a provider that fails, and the command line."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import dramatiq
import pytest
import redis
from click.testing import CliRunner
from dramatiq import broker as dramatiq_broker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.message import Message
from dramatiq.worker import Worker

import tideover
from tideover import Tideover, ai_task, claude, clock, text_of
from tideover import settings as tideover_settings
from tideover.core.breaker import Transition
from tideover.providers import wire
from tideover.store.account import Ledger
from tideover.store.backlog import Backlog
from tideover.store.breakers import Batch, Breakers
from tideover.store.keys import Keys
from tideover.store.registry import Registry
from tideover.testing import FakeProvider, Latency
from tideover_worker.cli import main

if TYPE_CHECKING:
    from tests.conftest import WaitUntil

TIDEOVER = str(Path(sys.executable).parent / "tideover")
MODEL = "claude-opus-4-8"
PROMPT = "SECRET-PROMPT"
SOON = timedelta(milliseconds=200)
WITHIN_S = 60.0
SETTINGS = """
redis_url = "{url}"
namespace = "{namespace}"
[breaker]
probe_after_s = 0.2
probe_max_s = 0.4
settle_s = 0.1
[drain]
start_rate = 20
[worker]
poll_s = 0.05
heartbeat_timeout_s = 2
[routes.anthropic]
kind = "anthropic"
base_url = "{provider}"
"""

Job = Message[Any]


class Desk:
    """A broker with three tasks, a provider that fails when told to, and what the commands said."""

    def __init__(self, folder: Path, url: str, wait: WaitUntil) -> None:
        self.folder, self.url, self.wait, self.namespace = folder, url, wait, f"desk-{uuid4().hex[:8]}"
        self.provider = FakeProvider("anthropic", latency=Latency(base_s=0.002, per_output_token_s=0.0, jitter=0.0))
        self.provider.start()
        settings = SETTINGS.format(url=url, namespace=self.namespace, provider=self.provider.base_url)
        (folder / "tideover.toml").write_text(settings)
        self.broker = RedisBroker(url=url, namespace=self.namespace)
        self.broker.add_middleware(Tideover())
        dramatiq.set_broker(self.broker)
        self.keys, client = Keys(self.namespace), self.broker.client
        self.backlog, self.ledger, self.registry = (
            Backlog(client, self.keys),
            Ledger(client, self.keys),
            Registry(client, self.keys),
        )
        self.workers: list[Worker] = []
        self.defect, self.ran = False, list[str]()

        @ai_task(criticality="deferrable", models=[MODEL], max_retries=1, min_backoff=1, max_backoff=2)
        def answer(prompt: str) -> str:
            self.ran.append(prompt)
            question = {"role": "user", "content": prompt}
            text_of(claude().messages.create(model=MODEL, max_tokens=8, messages=[question]))
            if self.defect:
                raise ValueError("a defect")
            return f"answer {len(self.ran)}"

        @ai_task(criticality="deferrable", models=[MODEL])
        def other(prompt: str) -> str:
            return "other"

        @dramatiq.actor(max_retries=0)
        def plain(prompt: str) -> None:
            self.ran.append(prompt)
            if self.defect:
                raise ValueError("a defect")

        self.answer, self.other, self.plain = answer, other, plain

    def work(self) -> None:
        self.workers.append(Worker(self.broker, worker_threads=4, worker_timeout=100))
        self.workers[-1].start()

    def rest(self) -> None:
        while self.workers:
            self.workers.pop().stop(timeout=10_000)

    def close(self) -> None:
        self.provider.heal()
        self.rest()
        self.broker.close()
        self.broker.client.close()
        self.provider.stop()

    def until(self, fact: Callable[[], Any], description: str) -> Any:
        return self.wait(fact, within_s=WITHIN_S, description=description)

    def until_books(self, **expected: int) -> None:
        self.until(lambda: self.books() == expected, f"the account is {expected}")

    def books(self) -> dict[str, int]:
        account = self.ledger.read()
        places = {"queued": account.queued, "running": account.running, "held": account.held}
        every = {"accepted": account.accepted, **places, **account.ends, "missing": account.difference}
        return {name: n for name, n in every.items() if n}

    def late(self, n: int = 1, **options: Any) -> list[Job]:
        """Jobs that have expired in their queue; no worker is left."""
        jobs = [self.answer.send_with_options(args=(PROMPT,), expires_in=SOON, **options) for _ in range(n)]
        self.until(lambda: all(tideover.status(job).overdue for job in jobs), "they are overdue")
        self.work()
        self.until(lambda: {tideover.status(job).end for job in jobs} == {"expired"}, "they have expired")
        self.until(lambda: not self.ledger.read().running, "nothing runs")
        self.rest()
        return jobs

    def held(self, n: int, **options: Any) -> list[Job]:
        """Jobs that are held because the provider is down."""
        if not self.workers:
            self.provider.fail("529")
            breakers, key = Breakers(self.broker.client, self.keys), f"anthropic/{MODEL}"
            breakers.report(key, "p", Batch(era=0, runs=[("failed", 5)], why="529 overloaded_error"))
            down = Transition(to="open", why="529 overloaded_error")
            assert breakers.transition(key, breakers.read([key])[key], down, clock.now())
            self.work()
        jobs = [self.answer.send_with_options(args=(PROMPT,), **options) for _ in range(n)]
        self.until(lambda: {tideover.status(job).state for job in jobs} == {"held"}, "they are held")
        return jobs

    def unreadable(self, n: int) -> list[str]:
        """Jobs that need review, because nobody can read them; their ids."""
        made = [uuid4().hex for _ in range(n)]
        for redis_id in made:
            self.broker.client.hset(self.keys.msgs("default"), redis_id, b"\x80pickled")
            self.broker.client.rpush(self.keys.queue("default"), redis_id)
        self.until(lambda: all(self.explained(redis_id)["state"] == "held" for redis_id in made), "they are held")
        return made

    def explained(self, job_id: str) -> Any:
        return self.ask("explain", job_id, "--json").json

    def result(self, job: Job) -> Any:
        return tideover.wait_for_sync(job, timeout=timedelta(seconds=WITHIN_S), through_holds=True)

    def ask(self, *words: str) -> Answer:
        """What a command says within this process."""
        said = CliRunner().invoke(main, words, catch_exceptions=False)
        assert PROMPT not in said.output
        return Answer(said.exit_code, said.stdout, said.stderr)

    def explain(self, job: Job) -> Any:
        return self.explained(job.message_id)

    def on_terminal(self, *words: str, typed: str = "") -> tuple[int, str]:
        """What somebody sees who types the command, and then `typed`, at a terminal."""
        ours, theirs = pty.openpty()
        os.write(ours, typed.encode())
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TIDEOVER_")}
        environ |= {"TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}
        command = subprocess.Popen([TIDEOVER, *words], cwd=self.folder, env=environ, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        seen = b"".join(iter(lambda: read(ours), b""))
        os.close(ours)
        assert PROMPT.encode() not in seen
        return command.wait(WITHIN_S), seen.decode()


class Answer:
    """What a command said."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        assert 0 == self.code, self.err
        return json.loads(self.out)

    @property
    def ids(self) -> list[str]:
        header, *rows = [line.split("\t") for line in self.out.splitlines()]
        assert "id" == header[0]
        return [row[0] for row in rows]


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536)
    except OSError:  # the other side is closed
        return b""


@pytest.fixture
def desk(
    tmp_path: Path, client: redis.Redis, valkey_url: str, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Desk]:
    for name in [name for name in os.environ if name.startswith("TIDEOVER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key")
    monkeypatch.chdir(tmp_path)
    tideover_settings.forget()
    made = Desk(tmp_path, valkey_url, wait_until)
    yield made
    made.close()
    wire.close()
    dramatiq_broker.global_broker = None
    tideover_settings.forget()
