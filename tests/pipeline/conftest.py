# SPDX-License-Identifier: Apache-2.0
"""A shop with real parts: broker on a real Valkey, worker in this process, and two fake providers that speak HTTP."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import dramatiq
import pytest
from dramatiq import broker as dramatiq_broker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.message import Message
from dramatiq.worker import Worker

import tideover
from tideover import AITask, Tideover, aclaude, ai_task, claude, clock, last_served, text_of
from tideover import settings as tideover_settings
from tideover.core.breaker import Breaker, together
from tideover.core.route import route_key
from tideover.ops import Operator
from tideover.ops.access import open_space
from tideover.store.account import Ledger
from tideover.store.backlog import Allowance, Backlog
from tideover.store.breakers import Breakers
from tideover.store.facts import HeldFacts
from tideover.store.keys import Keys
from tideover.store.registry import Registry
from tideover.store.stories import Line, Stories, told_by
from tideover.testing import Call, FakeProvider, Fault, Latency
from tideover.wait import held_facts, lanes_of
from tideover_worker import embedded
from tideover_worker.boot import Node

if TYPE_CHECKING:
    import redis
    from tests.conftest import WaitUntil

MODEL = "claude-opus-4-8"
FALLBACK_MODEL = "gpt-5.5"
PRIMARY_KEY = "sk-ant-the-primary-key"
FALLBACK_KEY = "sk-the-fallback-key"
WITHIN_S = 60.0
QUICK = {"max_retries": 2, "min_backoff": 10, "max_backoff": 50}
"""dramatiq's retries, so fast that a test sees them all."""

SETTINGS = """
redis_url = "{redis_url}"
namespace = "{namespace}"
mode = "{mode}"

[breaker]
probe_after_s = {probe_after_s}
probe_max_s = {probe_max_s}
settle_s = {settle_s}

[drain]
start_rate = {start_rate}
{drain_options}

[worker]
heartbeat_timeout_s = {heartbeat_timeout_s}
poll_s = 0.05
shutdown_grace_s = {shutdown_grace_s}

[routes.anthropic]
kind = "anthropic"
base_url = "{primary}"
timeout_s = {timeout_s}
{primary_options}

[routes.openai]
kind = "openai-compatible"
base_url = "{fallback}"
api_key_env = "OPENAI_API_KEY"
timeout_s = {timeout_s}
models = {{ "claude-opus-4-8" = "gpt-5.5" }}
{fallback_options}
{more}
"""
USUAL = {
    "mode": "act",
    "settle_s": 0.5,
    "start_rate": 20,
    "drain_options": "",
    "probe_after_s": 0.3,
    "probe_max_s": 0.5,
    "heartbeat_timeout_s": 20,
    "shutdown_grace_s": 5,
    "timeout_s": 10,
    "primary_options": "",
    "fallback_options": "",
    "more": "",
}

Job = Message[Any]


class Shop:
    """Broker, providers, worker and the questions that tests ask of them.

    `ran` notes each run of a function of the standard tasks (`summary`, `asummary`, `reply`, `areply`), by tag.
    """

    model, fallback_model = MODEL, FALLBACK_MODEL
    primary_key, fallback_key = PRIMARY_KEY, FALLBACK_KEY
    quick = QUICK
    within_s = WITHIN_S

    def __init__(self, folder: Path, redis_url: str, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.redis_url, self.wait, self.monkeypatch = folder, redis_url, wait_until, monkeypatch
        self.namespace = f"shop-{uuid4().hex[:8]}"
        swift = Latency(base_s=0.002, per_output_token_s=0.0, jitter=0.0)
        self.primary = FakeProvider("anthropic", api_key=PRIMARY_KEY, latency=swift)
        self.fallback = FakeProvider("openai", dialect="openai-compatible", api_key=FALLBACK_KEY, latency=swift)
        self.ran: list[str] = []
        self.workers: list[Worker] = []
        self.brokers: list[RedisBroker] = []
        self.primary.start()
        self.fallback.start()
        self.configure()
        self.broker = self.new_broker()
        self.keys = Keys(self.namespace)
        client = self.broker.client
        self.backlog, self.ledger = Backlog(client, self.keys), Ledger(client, self.keys)
        self.breakers, self.registry = Breakers(client, self.keys), Registry(client, self.keys)
        self.declare()

    # What stands in it

    def configure(self, **changes: Any) -> None:
        """Writes tideover.toml with these changes to the usual settings; every process of the test reads it."""
        values = {
            **USUAL,
            "redis_url": self.redis_url,
            "namespace": self.namespace,
            "primary": self.primary.base_url,
            "fallback": self.fallback.base_url,
            **changes,
        }
        path = self.folder / "tideover.toml"
        path.write_text(SETTINGS.format(**values))
        self.monkeypatch.setenv("TIDEOVER_CONFIG", str(path))
        self.monkeypatch.setenv("ANTHROPIC_API_KEY", PRIMARY_KEY)
        self.monkeypatch.setenv("OPENAI_API_KEY", FALLBACK_KEY)
        tideover_settings.forget()

    def new_broker(self, *, with_tideover: bool = True) -> RedisBroker:
        """A broker of the shop's namespace; the first with tideover is dramatiq's global one."""
        broker = RedisBroker(url=self.redis_url, namespace=self.namespace)
        if with_tideover:
            broker.add_middleware(Tideover())
        if not self.brokers:
            dramatiq.set_broker(broker)
        self.brokers.append(broker)
        return broker

    def declare(self) -> None:
        """The standard tasks: deferrable and critical, as function and as coroutine. Each makes one tagged call."""

        @ai_task(criticality="deferrable", **QUICK)
        def summary(tag: str) -> str:
            self.ran.append(tag)
            return text_of(claude().messages.create(**self.question(tag)))

        @ai_task(criticality="deferrable", **QUICK)
        async def asummary(tag: str) -> str:
            self.ran.append(tag)
            return text_of(await aclaude().messages.create(**self.question(tag)))

        @ai_task(criticality="critical", expires_in=timedelta(minutes=5), reroute=["openai"], **QUICK)
        def reply(tag: str) -> str:
            self.ran.append(tag)
            text_of(claude().messages.create(**self.question(tag)))
            return served_by()

        @ai_task(criticality="critical", expires_in=timedelta(minutes=5), reroute=["openai"], **QUICK)
        async def areply(tag: str) -> str:
            self.ran.append(tag)
            text_of(await aclaude().messages.create(**self.question(tag)))
            return served_by()

        self.summary, self.asummary, self.reply, self.areply = summary, asummary, reply, areply

    def question(self, tag: str, **more: Any) -> dict[str, Any]:
        """The arguments of a call whose row in the providers' ledgers carries the tag."""
        asked = {"model": MODEL, "max_tokens": 8, "messages": [{"role": "user", "content": f"about {tag}"}]}
        return {**asked, "extra_headers": {"x-tideover-job": tag}, **more}

    def work(self, *, threads: int = 4, **options: Any) -> Worker:
        """Starts the worker, in this process. Tasks are declared before."""
        worker = Worker(self.broker, worker_threads=threads, worker_timeout=100, **options)
        worker.start()
        self.workers.append(worker)
        return worker

    def stop_working(self) -> None:
        while self.workers:
            self.workers.pop().stop(timeout=10_000)

    def close(self) -> None:
        self.primary.heal()
        self.fallback.heal()
        self.stop_working()
        for broker in self.brokers:
            broker.close()
            broker.client.connection_pool.disconnect()  # the broker's client was given it, so its own `close` would not
        self.primary.stop()
        self.fallback.stop()

    # What happens in it

    def open_breaker(self, fault: Fault = Fault.OVERLOADED, **how: Any) -> list[Job]:
        """The primary fails until told otherwise, and its breaker is open; the three jobs that paid for it are held."""
        self.primary.fail(fault, **how)
        canaries = self.send(self.summary, 3, "canary")
        self.until_open()
        self.until_all("held", canaries)
        return canaries

    def until_open(self) -> None:
        """Waits until the primary's breaker is open, and the worker of this process has heard of it."""
        self.until(lambda: self.breaker().generation and self.seen().generation, "the breaker of the primary opens")

    def heal(self) -> None:
        self.primary.heal()
        self.fallback.heal()

    @staticmethod
    def send(task: AITask[Any, Any], n: int, prefix: str) -> list[Job]:
        return [task.send(f"{prefix}{i}") for i in range(n)]

    # What can be asked

    def until(self, fact: Callable[[], Any], description: str, within_s: float = WITHIN_S) -> Any:
        return self.wait(fact, within_s=within_s, description=description)

    def until_all(self, state: str, jobs: Sequence[Job]) -> None:
        """Waits until each of these jobs is queued, running, held or ended."""
        self.until(lambda: {tideover.status(job).state for job in jobs} == {state}, f"{len(jobs)} jobs are {state}")

    def until_over(self) -> None:
        """Waits until no job is queued, running or held."""

        def over() -> bool:
            account = self.ledger.read()
            return account.queued == account.running == account.held == 0

        self.until(over, "every job has ended")

    def result(self, job: Job) -> Any:
        """The result of a job, through all holds."""
        return tideover.wait_for_sync(job, timeout=timedelta(seconds=WITHIN_S), through_holds=True)

    def books(self) -> dict[str, int]:
        """The account without its zeros; `missing` is what the sum lacks, and is there only when it is wrong."""
        account = self.ledger.read()
        places = {"queued": account.queued, "running": account.running, "held": account.held}
        every = {"accepted": account.accepted, **places, **account.ends, "missing": account.difference}
        return {name: n for name, n in every.items() if n}

    def breaker(self, route: str = "anthropic", model: str = MODEL) -> Breaker:
        """The breaker as all processes share it, with the one of its route above it."""
        keys = f"{route}/{model}", route_key(route)
        read = self.breakers.read(keys)
        return together(read[keys[0]], read[keys[1]], clock.now())

    def seen(self, route: str = "anthropic", model: str = MODEL) -> Breaker:
        """The breaker as the worker of this process sees it."""
        return self.node.gate.health.view(f"{route}/{model}")

    @property
    def node(self) -> Node:
        """tideover in the worker of this process."""
        node = next(m.node for m in self.broker.middleware if isinstance(m, Tideover))
        assert node is not None
        return node

    def is_up(self, route: str = "anthropic") -> bool:
        return self.breaker(route).state in ("closed", "recovering")

    def facts(self, job: Job) -> HeldFacts:
        """Why a job is held."""
        held = held_facts(self.backlog, job)
        assert held is not None, f"{job} is not held"
        return held

    def facts_if_held(self, job: Job) -> HeldFacts | None:
        return held_facts(self.backlog, job)

    @contextmanager
    def operator(self) -> Iterator[Operator]:
        """Who looks after it, with the settings of now."""
        with closing(self.new_broker(with_tideover=False)) as broker:
            yield Operator(broker.client, tideover_settings.settings(), (open_space(broker.client, self.namespace),))

    def pace(self) -> Allowance:
        """An allowance that lets everything go, whatever the breaker."""
        key = f"anthropic/{MODEL}"
        return Allowance(key=key, generation=None, rate=1000.0, burst=1000.0, calls_each=1.0, most_queued=1000)

    def story(self, job: Job) -> list[Line]:
        """What is written down, and what the facts of a held job tell."""
        held = held_facts(self.backlog, job)
        return [*Stories(self.broker.client, self.keys).of(job.message_id), *(told_by(held) if held else [])]

    def events(self, job: Job) -> list[str]:
        return [line.event for line in self.story(job)]

    def generations(self, job: Job) -> list[int]:
        """The breaker generations in which it was held, in order."""
        return [line.facts["generation"] for line in self.story(job) if line.event == "held"]

    def calls(self, tag: str, provider: FakeProvider | None = None) -> list[Call]:
        """The calls of one tag at a provider, the primary unless said."""
        return [call for call in (provider or self.primary).calls() if call.job == tag]

    def body(self, job: Job) -> Job | None:
        """A job that is alive, as it waits in Redis."""
        place = self.backlog.place(job.message_id, lanes_of(job))
        raw = None if place is None else self.broker.client.hget(self.keys.msgs(place[0]), place[1])
        return None if raw is None else Message.decode(raw)


def served_by() -> str:
    served = last_served()
    assert served is not None
    return served.route


def close_clients() -> None:
    """Parts with the SDK clients of this process's threads, which outlive the settings that they were made from."""
    if "tideover.providers.wire" in sys.modules:
        from tideover.providers import wire

        wire.close()


@pytest.fixture
def swift_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """dramatiq waits seconds before it tries again what Redis did not take."""
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.1)
    monkeypatch.setattr("dramatiq.worker.POST_PROCESS_MESSAGE_RETRY_DELAY_SECS", 0.1)


@pytest.fixture
def shop(
    tmp_path: Path, client: redis.Redis, valkey_url: str, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shop]:
    """A shop of this test's own, on the shared server."""
    for logger in logging.Logger.manager.loggerDict.values():
        monkeypatch.setattr(logger, "disabled", False, raising=False)  # import-linter, run in this process, disables them all
    made = Shop(tmp_path, valkey_url, wait_until, monkeypatch)
    yield made
    made.close()
    close_clients()
    dramatiq_broker.global_broker = None
    tideover_settings.forget()


@pytest.fixture
def private_shop(tmp_path: Path, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """A shop on a server of its own, which the test may kill: `embedded.start(shop.folder / "valkey")` starts it again."""
    server = embedded.start(tmp_path / "valkey")
    made = Shop(tmp_path, server.url, wait_until, monkeypatch)
    yield made
    embedded.start(tmp_path / "valkey")
    made.close()
    close_clients()
    dramatiq_broker.global_broker = None
    tideover_settings.forget()
    embedded.stop(tmp_path / "valkey")


@pytest.fixture
def operator(shop: Shop) -> Iterator[Operator]:
    with shop.operator() as made:
        yield made


class Serving:
    """Servers that answer every POST with the same bytes, and what they were asked: path, headers and body."""

    def __init__(self) -> None:
        self.servers: list[ThreadingHTTPServer] = []
        self.seen: list[tuple[str, dict[str, str], bytes]] = []

    def __call__(self, headers: dict[str, str], body: bytes, again: bytes = b"", status: int = 200) -> str:
        """Starts one: its URL. After the body it sends `again`, as long as the client stays."""
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = self.rfile.read(int(self.headers["content-length"]))
                seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}, asked))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
                pause = threading.Event()
                with suppress(OSError):
                    while again:
                        self.wfile.write(again)
                        pause.wait(0.02)

            def log_message(self, *args: object) -> None:
                pass

        self.servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=self.servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.servers[-1].server_port}"


@pytest.fixture
def serving() -> Iterator[Serving]:
    started = Serving()
    yield started
    for server in started.servers:
        server.shutdown()
        server.server_close()
