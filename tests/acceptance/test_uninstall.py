# SPDX-License-Identifier: Apache-2.0
"""`tideover uninstall`: whatever place a job is in, a stock dramatiq worker runs it afterwards, and nothing of ours is left."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dramatiq
import pytest
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.message import Message

from tideover import AITask, Tideover, ai_task, clock, ops
from tideover.ops.uninstall import Removed, base_of, plan, rehomed, uninstall
from tideover.settings import forget, settings
from tideover.store.account import Ledger
from tideover.store.backlog import Backlog
from tideover.store.facts import HeldFacts, order_of
from tideover.store.keys import NAMESPACES, Keys
from tideover.store.registry import Registry

if TYPE_CHECKING:
    from tests.conftest import WaitUntil

TIDEOVER = str(Path(sys.executable).with_name("tideover"))
WITHIN_S = 60.0
LANES = ("default", "default.critical", "default.DQ", "default.critical.DQ")

SETTINGS = """
redis_url = "{url}"
namespace = "{namespace}"
[worker]
heartbeat_timeout_s = {heartbeat_timeout_s}
[routes.anthropic]
kind = "anthropic"
base_url = "http://127.0.0.1:9"
"""
TASKS = """
import threading
from tideover import ai_task

@ai_task(criticality="deferrable", min_backoff=3000)
def flaky(tag: str) -> None:
    raise ValueError("the first try fails")

@ai_task(criticality="critical", expires_in=None, min_backoff=3000)
def brittle(tag: str) -> None:
    raise ValueError("the first try fails")

@ai_task(criticality="deferrable")
def stuck(tag: str) -> None:
    threading.Event().wait()
"""
STOCK = """
import os
import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker

dramatiq.set_broker(RedisBroker(url=os.environ["SHOP_URL"], namespace=os.environ["SHOP"]))
book = redis.Redis.from_url(os.environ["SHOP_URL"])

def plain_actor(name):
    @dramatiq.actor(actor_name=name)
    def run(tag, *results):
        book.rpush(os.environ["SHOP"] + "-ran", tag)

for name in ("flaky", "brittle", "stuck", "tag", "reply"):
    plain_actor(name)
"""


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Shop:
    """A namespace, two tasks of this process, and the folder of its commands and workers."""

    folder: Path
    url: str
    broker: RedisBroker
    wait: WaitUntil
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.namespace, self.client, self.keys = self.broker.namespace, self.broker.client, Keys(self.broker.namespace)
        self.ledger, self.backlog = Ledger(self.client, self.keys), Backlog(self.client, self.keys)
        self.registry = Registry(self.client, self.keys)
        self.tasks = {name: self.declare(name) for name in ("flaky", "stuck", "tag", "brittle", "reply")}

    def declare(self, name: str) -> AITask[Any, Any]:
        if name in ("brittle", "reply"):
            return ai_task(criticality="critical", expires_in=None, broker=self.broker, actor_name=name)(body_of_a_task)
        return ai_task(criticality="deferrable", broker=self.broker, actor_name=name)(body_of_a_task)

    def configure(self, heartbeat_timeout_s: float = 600) -> None:
        values = {"url": self.url, "namespace": self.namespace, "heartbeat_timeout_s": heartbeat_timeout_s}
        (self.folder / "tideover.toml").write_text(SETTINGS.format(**values))
        forget()

    # processes

    def command(self, *words: str) -> Answer:
        done = subprocess.run(
            [TIDEOVER, *words],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Answer(done.returncode, done.stdout, done.stderr)

    def environment(self) -> dict[str, str]:
        return {**os.environ, "ANTHROPIC_API_KEY": "none-is-called", "SHOP_URL": self.url, "SHOP": self.namespace}

    def start(self, module: str) -> subprocess.Popen[bytes]:
        """A worker of its own process group, by dramatiq's own command."""
        command = [sys.executable, "-m", "dramatiq", module, "-p", "1", "-t", "4"]
        with (self.folder / f"{module}.log").open("wb") as log:
            env = self.environment()
            process = subprocess.Popen(command, cwd=self.folder, env=env, stdout=log, stderr=log, start_new_session=True)
        self.running.append(process)
        return process

    def kill(self) -> None:
        while self.running:
            process = self.running.pop()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    # jobs

    def send(self, task: str, tag: str) -> None:
        self.tasks[task].send(tag)

    def send_pipeline(self, tag: str, follower: str) -> None:
        """A deferrable job, and a critical one that is to follow it."""
        steps = [self.tasks["tag"].message(tag), self.tasks["reply"].message(follower)]
        dramatiq.pipeline(steps, broker=self.broker).run()

    def hold(self, name: str, n: int = 1) -> None:
        """Holds the next jobs of a list."""
        jobs, _ = self.backlog.fetch("a-worker-that-ended", name, n)
        assert len(jobs) == n
        assert all(self.backlog.hold("a-worker-that-ended", name, [facts(name, job.redis_id) for job in jobs]))

    def ran(self) -> list[str]:
        return sorted(raw.decode() for raw in self.client.lrange(f"{self.namespace}-ran", 0, -1))

    def ours(self) -> list[str]:
        """Keys of tideover that are left in this namespace."""
        return [key.decode() for key in self.client.scan_iter(match=f"{self.namespace}:__tideover__:*")]

    def places(self) -> list[str]:
        """The tag of each job, once for each place that it is in; dead letters too."""
        held = [member for queue in ("default", "default.critical") for member in self.held(queue)]
        fetched = [key.decode() for key in self.client.scan_iter(match=f"{self.namespace}:__acks__.*")]
        taken = [(key.split(".", 2)[2], i) for key in fetched for i in self.client.smembers(key)]
        listed = [(name, i) for name in LANES for i in self.client.lrange(self.keys.queue(name), 0, -1)]
        bodies = [self.client.hget(self.keys.msgs(name), i) for name, i in (*held, *taken, *listed)]
        bodies += [body for name in LANES[:2] for body in self.client.hvals(self.keys.dead_msgs(name))]
        return sorted(Message.decode(body).args[0] for body in bodies)

    def held(self, queue: str) -> list[tuple[str, str]]:
        return [(queue, fact.redis_id) for fact in self.backlog.browse(self.backlog.groups(queue))]


def facts(name: str, redis_id: str) -> HeldFacts:
    now_ms = clock.now_ms()
    return HeldFacts(
        redis_id=redis_id,
        job_id=redis_id,
        task="tag",
        queue=name,
        criticality="deferrable",
        wait_key="anthropic/m",
        reason="outage",
        generation=1,
        held_ms=now_ms,
        sent_ms=now_ms,
        expires_ms=None,
        order=order_of(held_ms=now_ms, held_before_ms=0, expires_ms=None, max_wait_s=3600, nth=0),
    )


def body_of_a_task(tag: str, *results: None) -> None: ...


@pytest.fixture
def shop(
    tmp_path: Path, client: redis.Redis, keys: Keys, valkey_url: str, wait_until: WaitUntil, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shop]:
    (tmp_path / "tasks.py").write_text(TASKS)
    (tmp_path / "stock.py").write_text(STOCK)
    monkeypatch.setenv("TIDEOVER_CONFIG", str(tmp_path / "tideover.toml"))
    broker = RedisBroker(url=valkey_url, namespace=keys.namespace)
    broker.add_middleware(Tideover())
    made = Shop(tmp_path, valkey_url, broker, wait_until)
    made.configure()
    yield made
    made.kill()
    made.client.delete(f"{keys.namespace}-ran", "a result")
    broker.close()
    broker.client.close()
    forget()


def until(shop: Shop, fact: Any, description: str) -> None:
    shop.wait(fact, within_s=WITHIN_S, description=description)


@pytest.mark.slow
def test_a_stock_worker_runs_every_job(shop: Shop) -> None:
    """Held, critical, waiting for a retry, and fetched by a worker that was killed: all of them, once each."""
    shop.configure(heartbeat_timeout_s=2)
    shop.start("tasks")
    until(shop, lambda: shop.registry.workers(), "the worker is there")
    for task in ("flaky", "brittle", "stuck"):
        shop.send(task, task)
    until(shop, lambda: waits_for_retries(shop), "two jobs wait for their retry, one is stuck")
    shop.kill()
    for task in ("tag", "reply"):
        for state in ("held", "queued"):
            shop.send(task, f"{task} {state}")
            if state == "held":
                shop.hold("default.critical" if task == "reply" else "default")
    shop.send_pipeline("first step", "next step")
    operator = ops.open_operator(settings())
    until(shop, lambda: not plan(operator).workers, "its heartbeat is old")
    operator.close()
    planned = shop.command("uninstall", "--dry-run", "--json").json["plan"]
    assert (planned["held"], planned["fetched"] > 0) == (2, True)
    done = shop.command("uninstall", "--yes", "--json")
    assert (done.code, done.err) == (0, "")
    counts = {name: done.json["removed"][name] for name in ("recovered", "put_back", "merged", "rewritten", "unreadable")}
    assert counts == {"recovered": planned["fetched"], "put_back": 2, "merged": 3, "rewritten": 1, "unreadable": 0}
    assert (shop.ours(), shop.client.smembers(NAMESPACES)) == ([], set())
    shop.start("stock")
    jobs = ["flaky", "brittle", "stuck", "tag held", "tag queued", "reply held", "reply queued", "first step", "next step"]
    until(shop, lambda: shop.ran() == sorted(jobs), "all have run")
    until(shop, lambda: shop.places() == [], "and were acknowledged")
    assert not any(shop.client.exists(shop.keys.msgs(name)) for name in LANES)


def waits_for_retries(shop: Shop) -> bool:
    """The worker has the delayed jobs in its memory, as dramatiq does, and one job runs."""
    account = shop.ledger.read()
    delayed = [shop.client.hlen(shop.keys.msgs(name)) for name in ("default.DQ", "default.critical.DQ")]
    return (delayed, account.running) == ([1, 1], 1) and not any(shop.client.llen(shop.keys.queue(name)) for name in LANES)


def fill(shop: Shop) -> list[str]:
    """Jobs in every place of every lane; their tags."""
    for i in range(7):
        for task, name in (("tag", "default"), ("reply", "default.critical")):
            shop.send(task, f"{task} dead {i}")
            shop.backlog.fetch("killed", name, 1)
            shop.send(task, f"{task} held {i}")
            shop.hold(name)
            shop.send(task, f"{task} buried {i}")
            [buried], _ = shop.backlog.fetch("killed", name, 1)
            assert shop.ledger.settle("killed", name, buried.redis_id, buried.redis_id, "failed")
            shop.tasks[task].send_with_options(args=(f"{task} delayed {i}",), delay=60_000)
    for i in range(7):
        for task in ("tag", "reply"):
            shop.send(task, f"{task} queued {i}")
        shop.send_pipeline(f"tag first {i}", f"reply next {i}")
    shop.client.zadd(shop.keys.heartbeats, {"killed": 1})
    return shop.places()


class Killed(BaseException):
    """Stands for a kill between two scripts."""


def killed_after(n: int) -> Any:
    """A listener that kills at the n-th step."""
    left = [n]

    def tell(done: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    return tell


def test_killed_at_every_step_it_goes_on_where_it_was(shop: Shop) -> None:
    """After each kill every job is in one place, with its body; in the end all are where stock dramatiq looks, in order."""
    tags = fill(shop)
    assert len(tags) == 7 * 11
    operator = ops.open_operator(settings())
    done: Removed | None = None
    for kill_at in range(1, 200):
        try:
            done = uninstall(operator, force=False, tell=killed_after(kill_at), at_once=2)
        except Killed:
            assert shop.places() == tags
        else:
            break
    operator.close()
    assert done is not None
    assert (shop.places(), shop.ours(), shop.client.smembers(NAMESPACES)) == (tags, [], set())
    check_order(shop)
    for name in ("default.critical", "default.critical.DQ"):
        left = (shop.keys.queue(name), shop.keys.msgs(name), shop.keys.dead(name), shop.keys.dead_msgs(name))
        assert shop.client.exists(*left) == 0
    for name in ("default", "default.DQ"):
        bodies = map(Message.decode, shop.client.hvals(shop.keys.msgs(name)))
        assert {message.queue_name for message in bodies} == {name}


def check_order(shop: Shop) -> None:
    """Critical ones first; what was queued and what was held keep their order."""
    ids = shop.client.lrange(shop.keys.queue("default"), 0, -1)
    messages = [Message.decode(shop.client.hget(shop.keys.msgs("default"), i)) for i in ids]
    order = [message.args[0].rpartition(" ") for message in messages]
    assert order[0][0].startswith("reply")
    assert order[-1][0] == "tag held"
    for kind in ("reply queued", "reply held", "tag queued", "tag held", "tag first"):
        assert [i for what, _, i in order if what == kind] == [str(i) for i in range(7)]
    last_reply = max(at for at, (what, _, _) in enumerate(order) if what.startswith("reply"))
    assert last_reply < min(at for at, (what, _, _) in enumerate(order) if what == "tag queued")
    followers = [message.options["pipe_target"]["queue_name"] for message in messages if "pipe_target" in message.options]
    assert followers == ["default"] * 7


def test_a_dry_run_changes_nothing(shop: Shop) -> None:
    """It says what there is to do, also while workers are alive, and names them."""
    tags, before = fill(shop), snapshot(shop)
    shop.registry.beat("w")
    shop.registry.enter_worker("w", {"host": "vm", "pid": 7})
    said = shop.command("uninstall", "--dry-run")
    header, row = (line.split("\t") for line in said.out.splitlines())
    told = dict(zip(header, row, strict=True))
    assert (said.code, "pid 7 on vm" in said.err, told["workers"]) == (0, True, "1")
    assert (told["fetched"], told["held"], told["critical"]) == ("14", "14", "21")
    shop.registry.remove_worker("w")
    assert (shop.places(), snapshot(shop)) == (tags, before)


def snapshot(shop: Shop) -> dict[bytes, bytes]:
    return {key: shop.client.dump(key) for key in shop.client.scan_iter(match=f"{shop.namespace}:*") if b"acks" not in key}


def test_it_asks(shop: Shop) -> None:
    """On a terminal; where nobody can be asked it wants --yes."""
    fill(shop)
    alone = shop.command("uninstall")
    assert (alone.code, "--yes" in alone.err) == (4, True)
    code, seen = on_terminal(shop, "n\n")
    assert (code, f"Take tideover out of namespace {shop.namespace}? Jobs to move: 14 held, 21 in critical" in seen) == (
        4,
        True,
    )
    assert shop.backlog.size("default") == 7
    code, seen = on_terminal(shop, "y\n")
    assert (code, "100%" in seen, "put back: 14" in seen) == (0, True, True)
    assert shop.ours() == []


def on_terminal(shop: Shop, typed: str) -> tuple[int, str]:
    """What somebody sees who runs it at a terminal, and types an answer."""
    ours, theirs = pty.openpty()
    os.write(ours, typed.encode())
    env = {**shop.environment(), "TERM": "xterm"}
    with subprocess.Popen(
        [TIDEOVER, "uninstall"], cwd=shop.folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs
    ) as asked:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # the other side is closed
            while chunk := os.read(ours, 65_536):
                seen += chunk
        os.close(ours)
    return asked.returncode, seen.decode()


def test_force_takes_the_jobs_of_workers_that_are_gone(shop: Shop) -> None:
    """Right after a kill the heartbeat is fresh; who knows better may say so."""
    shop.send("tag", "fetched")
    shop.registry.enter_worker("w", {"host": "vm", "pid": 7})
    shop.backlog.fetch("w", "default", 1)
    refused = shop.command("uninstall", "--yes")
    assert (refused.code, "workers with tideover are alive: pid 7 on vm" in refused.err) == (4, True)
    done = shop.command("uninstall", "--yes", "--force", "--json").json["removed"]
    assert (done["recovered"], shop.client.llen(shop.keys.queue("default"))) == (1, 1)
    assert shop.client.zscore(shop.keys.heartbeats, "w") is None


def test_a_stranger_s_job_and_heartbeat_stay(shop: Shop) -> None:
    """A stock worker may be at work already: what it has fetched is its own."""
    shop.send("tag", "fetched")
    shop.broker._dispatch("fetch")("default", 1)
    assert shop.command("uninstall", "--yes", "--json").json["removed"]["recovered"] == 0
    assert shop.client.scard(shop.keys.acks(shop.broker.broker_id, "default")) == 1
    assert shop.client.zscore(shop.keys.heartbeats, shop.broker.broker_id)


def test_what_is_not_ours_stays(shop: Shop) -> None:
    """An actor's own queue may have such a name, and a body may be in another encoding: they stay, and the latter is told."""

    @dramatiq.actor(broker=shop.broker, queue_name="own.critical")
    def own(tag: str) -> None: ...

    own.send("mine")
    shop.client.hset(shop.keys.msgs("default.critical"), "pickled", b"\x80\x04")
    shop.client.rpush(shop.keys.queue("default.critical"), "pickled")
    shop.send("reply", "reply")
    shop.client.set("a result", "42")
    done = shop.command("uninstall", "--yes")
    assert (done.code, 'declare_queue("default.critical")' in done.err) == (1, True)
    assert [b"pickled"] == shop.client.lrange(shop.keys.queue("default.critical"), 0, -1)
    assert (1, 1) == (shop.client.llen(shop.keys.queue("own.critical")), shop.client.llen(shop.keys.queue("default")))
    assert b"42" == shop.client.get("a result")
    assert shop.ours() == []


def test_jobs_that_are_held_meanwhile_are_not_deleted(shop: Shop) -> None:
    """A worker that goes on holding makes it stop, before a key is deleted that a job depends on."""
    for i in range(20):
        shop.send("tag", str(i))
    shop.hold("default")
    operator = ops.open_operator(settings())

    def hold_another(_: int) -> None:
        if shop.client.llen(shop.keys.queue("default")):
            shop.hold("default")

    with pytest.raises(ops.Refused, match="at work"):
        uninstall(operator, force=False, tell=hold_another)
    assert len(shop.places()) == 20
    assert shop.backlog.size("default") > 0
    assert plan(operator).namespace == shop.namespace
    operator.close()


def test_what_is_to_follow_a_job_finds_its_queue() -> None:
    """Next steps and callbacks of groups, nested as dramatiq nests them, by what their stamp or the list of tasks says."""

    def message(queue: str, actor: str, **options: Any) -> dict[str, Any]:
        fields = Message(queue_name=queue, actor_name=actor, args=(), kwargs={}, options=options).asdict()
        return {**fields, "message_id": actor, "message_timestamp": 1}

    last, plain = message("a.critical", "last"), message("own.critical", "plain")
    first = message("b", "first", pipe_target=message("a.critical", "next", pipe_target=last))
    stamped = message("a.critical", "done", tideover={"criticality": "critical"})
    first["options"]["group_completion_callbacks"] = [stamped, plain]
    moved = rehomed(first, frozenset({"next", "last"}))
    step, callbacks = moved["options"]["pipe_target"], moved["options"]["group_completion_callbacks"]
    assert (moved["queue_name"], step["queue_name"], step["options"]["pipe_target"]["queue_name"]) == ("b", "a", "a")
    assert [callback["queue_name"] for callback in callbacks] == ["a", "own.critical"]


@pytest.mark.parametrize(
    ("name", "base"), [("a.critical", "a"), ("a.critical.DQ", "a.DQ"), ("a", "a"), ("a.DQ", "a.DQ"), ("critical", "critical")]
)
def test_the_base_of_a_list(name: str, base: str) -> None:
    """As dramatiq names the lists of a queue."""
    assert base == base_of(name)
