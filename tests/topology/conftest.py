# SPDX-License-Identifier: Apache-2.0
"""Servers of every kind, each a process of its own on TCP, and a shop that gets to them by its settings alone.

The server program is the one that `tideover_worker.embedded` finds. More are named by
`TOPOLOGY_SERVERS=redis-6.2=/path/to/redis-server,redis-7.0=/path`.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dramatiq
import pytest
import redis
from dramatiq import broker as dramatiq_broker
from dramatiq.message import Message
from dramatiq.worker import Worker

import tideover
from tideover import AITask, aclaude, ai_task, claude, ops, text_of
from tideover import settings as tideover_settings
from tideover.errors import StoreUnavailable
from tideover.store.account import Account, Ledger
from tideover.store.client import FAILED
from tideover.store.keys import Keys
from tideover.testing import FakeProvider, Fault, Latency
from tideover_worker import embedded

if TYPE_CHECKING:
    from tests.conftest import WaitUntil

MODEL = "claude-opus-4-8"
WITHIN_S = 60.0
PORTS = range(12_000, 20_000)
"""Below those that the kernel gives to clients; a cluster's bus is 10,000 above."""
BUS = 10_000
STARTS = 5
SLOTS = 16_384
JOBS = 12
PASSWORD = "pa ss/w@rd"

SETTINGS = """
redis_url = "{url}"
namespace = "{namespace}"
[breaker]
probe_after_s = 0.3
probe_max_s = 0.5
settle_s = 0.5
[drain]
start_rate = 50
[worker]
heartbeat_timeout_s = 5
poll_s = 0.05
shutdown_grace_s = 5
[routes.anthropic]
kind = "anthropic"
base_url = "{primary}"
timeout_s = 10
[routes.openai]
kind = "openai-compatible"
base_url = "{fallback}"
models = {{ "claude-opus-4-8" = "gpt-5.5" }}
"""

Job = Message[Any]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`program`: each server program to test; an empty one is the default."""
    if "program" in metafunc.fixturenames:
        named = os.environ.get("TOPOLOGY_SERVERS", "")
        found = {"default": "", **dict(entry.split("=", 1) for entry in named.split(",") if entry)}
        metafunc.parametrize("program", list(found.values()), ids=list(found))


class Node:
    """One server process: Redis, Valkey or a Sentinel."""

    def __init__(self, folder: Path, program: str, options: Sequence[str], sentinel: str | None = None) -> None:
        folder.mkdir(parents=True)
        self.folder, self.program = folder, program or str(embedded.find_server())
        self.options, self.sentinel = list(options), sentinel
        self.process: subprocess.Popen[bytes] | None = None
        for _ in range(STARTS):  # somebody may take the port before the server does
            self.port = free_port()
            if self.start():
                return
        pytest.fail(f"the server does not start: {(folder / 'log').read_text()[-500:]}")

    def start(self) -> bool:
        """Whether it answers."""
        with (self.folder / "log").open("ab") as log:
            command = [self.program, *self.arguments()]
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)
        while self.process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(64):
                    return True
        return False

    def arguments(self) -> list[str]:
        if self.sentinel is not None:
            (self.folder / "sentinel.conf").write_text(f"port {self.port}\n{self.sentinel}")
            return ["sentinel.conf", "--sentinel"]
        durable = ["--appendonly", "yes", "--save", "", "--maxmemory-policy", "noeviction", "--repl-diskless-sync-delay", "0"]
        return ["--port", str(self.port), "--bind", "127.0.0.1", *durable, *self.options]

    def ask(self, *command: Any) -> Any:
        """The answer to one command, as the default user."""
        with redis.Redis(port=self.port, socket_timeout=10) as client:
            return client.execute_command(*command)

    @property
    def replicated(self) -> int:
        """The offset of the stream of writes up to which this server is."""
        info = self.ask("INFO", "replication")
        return int(info["master_repl_offset"] if info["role"] == "master" else info["slave_repl_offset"])

    def follows(self, master: Node) -> bool:
        """Whether it has all that its master had when this was asked."""
        info = self.ask("INFO", "replication")
        return info.get("master_link_status") == "up" and self.replicated >= master.replicated

    def kill(self) -> None:
        """`kill -9`."""
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    while True:
        port = random.SystemRandom().choice(PORTS)
        with suppress(OSError), socket.socket() as one, socket.socket() as bus:
            one.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + BUS))
            return port


class Rack:
    """Starts servers for one test, and ends them with it."""

    def __init__(self, folder: Path, wait: WaitUntil) -> None:
        self.folder, self.wait = folder, wait
        self.nodes: list[Node] = []
        self.tried = 0

    def node(self, *options: str, program: str = "", sentinel: str | None = None) -> Node:
        self.tried += 1
        self.nodes.append(Node(self.folder / f"node{self.tried}", program, options, sentinel))
        return self.nodes[-1]

    def cluster(self, *, size: int = 3, program: str = "") -> list[Node]:
        """Masters that share the slots."""
        nodes = [self.node("--cluster-enabled", "yes", "--cluster-node-timeout", "1500", program=program) for _ in range(size)]
        for i, node in enumerate(nodes):
            first, last = -(-SLOTS * i // size), -(-SLOTS * (i + 1) // size) - 1
            node.ask("CLUSTER", "ADDSLOTS", *range(first, last + 1))
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            node.ask("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)

        def agreed() -> bool:
            said = [node.ask("CLUSTER", "INFO") for node in nodes]
            return all(b"cluster_state:ok" in info and b"cluster_size:%d" % size in info for info in said)

        self.wait(agreed, within_s=WITHIN_S, description="the cluster agrees")
        return nodes

    def cluster_replica(self, master: Node) -> Node:
        """A replica of one master of a cluster, which may take its place."""
        node = self.node("--cluster-enabled", "yes", "--cluster-node-timeout", "1500", program=master.program)
        node.ask("CLUSTER", "MEET", "127.0.0.1", master.port)
        master_id = master.ask("CLUSTER", "MYID")

        def adopted() -> bool:
            with suppress(redis.ResponseError):  # it does not know that master yet
                return bool(node.ask("CLUSTER", "REPLICATE", master_id))
            return False

        self.wait(adopted, within_s=WITHIN_S, description="the node is a replica")

        def known() -> bool:
            met = b"cluster_known_nodes:%d" % len(self.nodes) in node.ask("CLUSTER", "INFO")
            return met and all(one.ask("CLUSTER", "REPLICAS", master_id) for one in self.nodes) and node.follows(master)

        self.wait(known, within_s=WITHIN_S, description="all know the replica, and it has caught up")
        return node

    def replica(self, master: Node) -> Node:
        """A server that has everything that its master has."""
        node = self.node("--replicaof", "127.0.0.1", str(master.port), program=master.program)
        self.wait(lambda: node.follows(master), within_s=WITHIN_S, description="the replica has caught up")
        return node

    free_port = staticmethod(free_port)

    def close(self) -> None:
        for node in self.nodes:
            node.kill()


@pytest.fixture
def swift_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    """dramatiq waits seconds before it tries again what Redis did not take, and a gate before it looks what else it has."""
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0.1)
    monkeypatch.setattr("dramatiq.worker.POST_PROCESS_MESSAGE_RETRY_DELAY_SECS", 0.1)
    monkeypatch.setattr("tideover.consumer.RECLAIM_S", 1.0)


@pytest.fixture
def rack(tmp_path: Path, wait_until: WaitUntil) -> Iterator[Rack]:
    made = Rack(tmp_path / "servers", wait_until)
    yield made
    made.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, wait_until: WaitUntil) -> Iterator[list[Node]]:
    """Three masters, for the tests of a file that change little."""
    made = Rack(tmp_path_factory.mktemp("cluster") / "servers", wait_until)
    try:
        yield made.cluster()
    finally:
        made.close()


class Shop:
    """A broker built from the settings, a worker in this process, and two providers."""

    def __init__(self, folder: Path, url: str, namespace: str, wait: WaitUntil, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url, self.wait = url, wait
        self.keys = Keys(namespace)
        swift = Latency(base_s=0.002, per_output_token_s=0.0, jitter=0.0)
        self.primary = FakeProvider("anthropic", latency=swift)
        self.fallback = FakeProvider("openai", dialect="openai-compatible", latency=swift)
        self.primary.start()
        self.fallback.start()
        values = {"primary": self.primary.base_url, "fallback": self.fallback.base_url}
        (folder / "tideover.toml").write_text(SETTINGS.format(url=url, namespace=namespace, **values))
        monkeypatch.setenv("TIDEOVER_CONFIG", str(folder / "tideover.toml"))
        monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-topology")
        tideover_settings.forget()
        dramatiq_broker.global_broker = None
        self.worker: Worker | None = None
        self.declare()
        self.broker: Any = dramatiq.get_broker()
        self.ledger = Ledger(self.broker.client, self.keys)

    def declare(self) -> None:
        @ai_task(criticality="deferrable", max_retries=3)
        async def summary(tag: str) -> str:
            return text_of(await aclaude().messages.create(**question(tag)))

        @ai_task(criticality="deferrable", max_retries=3)
        def report(tag: str) -> str:
            return text_of(claude().messages.create(**question(tag)))

        @ai_task(criticality="critical", expires_in=timedelta(minutes=5), reroute=["openai"], max_retries=3)
        async def reply(tag: str) -> str:
            return text_of(await aclaude().messages.create(**question(tag)))

        self.summary, self.report, self.reply = summary, report, reply

    def work(self) -> None:
        self.worker = Worker(self.broker, worker_threads=4, worker_timeout=100)
        self.worker.start()

    def close(self) -> None:
        self.primary.heal()
        if self.worker is not None:
            self.worker.stop(timeout=10_000)
            self.worker = None
        self.broker.close()
        self.broker.client.close()
        self.primary.stop()
        self.fallback.stop()
        dramatiq_broker.global_broker = None
        tideover_settings.forget()
        close_sdk_clients()

    def send(self, n: int, prefix: str) -> list[Job]:
        """Deferrable jobs, coroutines and functions in turn."""
        return [(self.summary, self.report)[i % 2].send(f"{prefix}{i}") for i in range(n)]

    def until(self, fact: Callable[[], Any], description: str) -> Any:
        """Waits for a fact; while Redis cannot be asked it is not true yet."""

        def asked() -> Any:
            with suppress(*FAILED):
                return fact()

        return self.wait(asked, within_s=WITHIN_S, description=description)

    def until_held(self, n: int) -> None:
        self.until(lambda: self.ledger.read().held >= n, f"{n} jobs are held")

    def until_over(self) -> Account:
        """The account once no job is queued, running or held."""

        def over() -> Account | None:
            account = self.ledger.read()
            return account if account.queued == account.running == account.held == 0 else None

        return self.until(over, "every job has ended")

    def answered(self) -> set[str]:
        """The tags that a provider answered."""
        calls = (*self.primary.calls(), *self.fallback.calls())
        return {call.job for call in calls if call.outcome == "ok" and call.job}

    @staticmethod
    def try_to_send(task: AITask[Any, Any], tag: str) -> bool:
        """Whether it was accepted."""
        try:
            task.send(tag)
        except StoreUnavailable:
            return False
        return True

    def accepted_at(self, server: Node) -> int:
        """Jobs accepted, as this very server has it."""
        with redis.Redis(port=server.port, socket_timeout=10) as client:
            return Ledger(client, self.keys).read().accepted

    def result(self, job: Job) -> Any:
        return tideover.wait_for_sync(job, timeout=timedelta(seconds=WITHIN_S), through_holds=True)

    def tell_the_story(self) -> None:
        """Calm, outage, operator, recovery: what must be the same wherever the jobs are kept."""
        self.work()
        calm = [*self.send(2, "calm"), self.reply.send("calm-reply")]
        assert all(self.result(job) for job in calm)

        self.primary.fail(Fault.OVERLOADED)
        held = self.send(JOBS, "held")
        self.until_held(JOBS)
        assert self.result(self.reply.send("rerouted"))
        self.operate(held)

        self.primary.heal()
        account = self.until_over()
        n = len(calm) + JOBS + 1
        assert (n, n, 0) == (account.accepted, account.ends["succeeded"], account.difference)
        assert {"ended"} == {tideover.status(job).state for job in (*calm, *held)}
        assert {job.args[0] for job in (*calm, *held)} | {"rerouted"} == self.answered()

    def operate(self, held: Sequence[Job]) -> None:
        """What an operator asks and does while the provider is down."""
        with closing(ops.open_operator(tideover_settings.settings(), [self.keys.namespace])) as operator:
            (status,) = ops.status(operator).namespaces
            assert (JOBS, 0, 1) == (status.standing.held, status.standing.lost, len(status.standing.workers))
            assert JOBS == ops.backlog(operator).matching
            assert "held" == ops.explain(operator, held[0].message_id).state
            chosen = ops.choose_jobs(operator, [held[0].message_id])
            assert 1 == len(ops.release(operator, chosen, who="t", why="to see", force=True).jobs)
        self.until_held(JOBS)


def question(tag: str) -> dict[str, Any]:
    asked = {"model": MODEL, "max_tokens": 8, "messages": [{"role": "user", "content": f"about {tag}"}]}
    return {**asked, "extra_headers": {"x-tideover-job": tag}}


def close_sdk_clients() -> None:
    """They outlive the settings that they were made from."""
    if "tideover.providers.wire" in sys.modules:
        from tideover.providers import wire

        wire.close()


@pytest.fixture
def open_shop(tmp_path: Path, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Shop]]:
    """Opens a shop on the Redis of a URL."""
    for logger in logging.Logger.manager.loggerDict.values():
        monkeypatch.setattr(logger, "disabled", False, raising=False)  # import-linter, run in this process, disables them all
    opened: list[Shop] = []

    def open_one(url: str, namespace: str = "shop") -> Shop:
        opened.append(Shop(tmp_path, url, namespace, wait_until, monkeypatch))
        return opened[-1]

    yield open_one
    for shop in opened:
        shop.close()
