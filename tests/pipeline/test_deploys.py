# SPDX-License-Identifier: Apache-2.0
"""Rolling deploys: stock dramatiq beside tideover on the same lists, and tideover's schemas beside each other."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from dramatiq.message import Message

from tideover import clock, ops
from tideover.errors import CapacityReached, ConfigurationError
from tideover.ops.standing import standing
from tideover.ops.verdict import verdict
from tideover.settings import settings
from tideover.store.orphans import Orphans
from tideover.store.registry import Registry
from tideover_worker.strangers import Watch

if TYPE_CHECKING:
    import redis
    from tests.pipeline.conftest import Shop

WITHIN_S = 60.0

STOCK = """
import os
import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker

broker = RedisBroker(url=os.environ["SHOP_URL"], namespace=os.environ["SHOP"])
dramatiq.set_broker(broker)
book = redis.Redis.from_url(os.environ["SHOP_URL"])

backoff_ms = int(os.environ.get("BACKOFF_MS", "10"))

@dramatiq.actor(max_retries=3, min_backoff=backoff_ms, max_backoff=backoff_ms)
def summary(tag):
    book.rpush("ran", tag)
    if tag == "fails once" and book.incr("tries") == 1:
        raise ValueError("the first try fails")

@dramatiq.actor(queue_name=os.environ.get("REPLIES", "default"))
def reply(tag):
    book.rpush("ran", tag)

@dramatiq.actor(queue_name="old")
def waits(tag):
    book.rpush("ran", tag)
    book.blpop("go on", timeout=60)
"""


class StockWorkers:
    """Processes of dramatiq's own command, of an application that knows nothing of tideover."""

    def __init__(self, shop: Shop) -> None:
        self.shop, self.running = shop, []  # type: tuple[Shop, list[subprocess.Popen[bytes]]]
        (shop.folder / "stock.py").write_text(STOCK)

    def start(self, *queues: str, **env: str) -> None:
        command = [sys.executable, "-m", "dramatiq", "stock", "-p", "1", "-t", "2", "--queues", *(queues or ("default",))]
        environ = {**os.environ, "SHOP_URL": self.shop.redis_url, "SHOP": self.shop.namespace, **env}
        with (self.shop.folder / "stock.log").open("ab") as log:
            self.running.append(
                subprocess.Popen(command, cwd=self.shop.folder, env=environ, stdout=log, stderr=log, start_new_session=True)
            )

    def stop(self) -> None:
        """As a deploy stops them."""
        while self.running:
            process = self.running.pop()
            process.terminate()
            process.wait(30)

    def kill(self) -> None:
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def ran(self) -> list[str]:
        return [raw.decode() for raw in self.shop.broker.client.lrange("ran", 0, -1)]


@pytest.fixture
def stock(shop: Shop) -> Iterator[StockWorkers]:
    made = StockWorkers(shop)
    yield made
    made.kill()
    shop.broker.client.delete("ran", "tries", "go on")


def is_empty(shop: Shop, queue: str) -> bool:
    """Whether nothing of this queue is left in Redis, acknowledgements included."""
    client, names = shop.broker.client, (queue, f"{queue}.DQ")
    fetched = client.scan_iter(match=f"{shop.namespace}:__acks__.*")
    return not client.exists(*map(shop.keys.queue, names), *map(shop.keys.msgs, names)) and not list(fetched)


def send_waiting(shop: Shop, tag: str) -> None:
    """Sends a job of a queue that only the stock application has."""
    shop.broker.enqueue(Message(queue_name="old", actor_name="waits", args=(tag,), kwargs={}, options={}))


def told(shop: Shop) -> tuple[Any, Any]:
    """How things stand, and what the operator is told first."""
    operator = ops.open_operator(settings(), [shop.namespace])
    try:
        found = standing(operator.spaces[0], operator.settings, operator.now())
    finally:
        operator.close()
    return found, verdict(found)


def test_a_stock_worker_runs_jobs_of_our_producers(shop: Shop, stock: StockWorkers) -> None:
    """Those of the base lane, a retry included: the Redis id is the job's id, and it acknowledges by that."""
    jobs = [shop.summary.send(tag) for tag in ("a", "b", "fails once")]
    ids = shop.broker.client.lrange(shop.keys.queue("default"), 0, -1)
    assert [job.message_id for job in jobs] == [i.decode() for i in ids]
    stock.start()
    shop.until(lambda: sorted(stock.ran()) == ["a", "b", "fails once", "fails once"], "it has run them", WITHIN_S)
    shop.until(lambda: is_empty(shop, "default"), "and acknowledged them", WITHIN_S)


def test_a_stock_worker_leaves_the_critical_lane_alone(shop: Shop, stock: StockWorkers) -> None:
    """Its jobs wait for a worker with tideover, or for a stock worker that knows the lane as a queue."""
    shop.reply.send("critical")
    shop.summary.send("deferrable")
    stock.start()
    shop.until(lambda: stock.ran() == ["deferrable"] and is_empty(shop, "default"), "it has run what it sees", WITHIN_S)
    assert shop.broker.client.llen(shop.keys.queue("default.critical")) == 1
    stock.start("default.critical", REPLIES="default.critical")
    shop.until(lambda: stock.ran() == ["deferrable", "critical"], "the other one has run it", WITHIN_S)
    shop.until(lambda: is_empty(shop, "default.critical"), "and acknowledged it", WITHIN_S)


def test_a_stock_worker_s_retry_is_ours_to_run(shop: Shop, stock: StockWorkers) -> None:
    """A job that failed in an old worker, which then died, goes on in a new one as one job: accepted once, ended once."""
    shop.configure(heartbeat_timeout_s=2)
    job = shop.summary.send("fails once")
    stock.start(BACKOFF_MS="10000")
    client, keys = shop.broker.client, shop.keys
    retry = lambda: client.hlen(keys.msgs("default.DQ")) == 1 and not client.exists(keys.msgs("default"))  # noqa: E731
    shop.until(retry, "its first try has failed", WITHIN_S)
    stock.kill()
    assert shop.ledger.read().difference == 0
    shop.work()
    assert shop.until(lambda: shop.books().get("succeeded"), "it has run", WITHIN_S) == 1
    assert (shop.books(), stock.ran()) == ({"accepted": 1, "succeeded": 1}, ["fails once"])
    assert shop.result(job) is not None


def test_a_stock_worker_is_noticed(shop: Shop, stock: StockWorkers, caplog: pytest.LogCaptureFixture) -> None:
    """Once it is logged; `status` warns and names it; what it ends is counted as such, and is no loss."""
    caplog.set_level(logging.WARNING, "tideover")
    shop.work()
    for i in range(2):
        send_waiting(shop, f"job {i}")
    stock.start("old")
    shop.until(lambda: "worker_without_tideover" in caplog.text, "it is noticed", WITHIN_S)
    found, said = told(shop)
    [worker] = shop.registry.strangers()
    assert (found.strangers, said.level) == ((worker,), "mixed")
    assert said.sentence.startswith("MIXED: 1 worker without tideover")
    shop.broker.client.rpush("go on", "1", "2")
    shop.until(lambda: shop.books() == {"accepted": 2, "elsewhere": 2}, "what it ended is counted", WITHIN_S)
    assert caplog.text.count("worker_without_tideover") == 1
    assert told(shop)[0].lost == 0


def test_after_the_deploy_a_loss_is_a_loss_again(shop: Shop, stock: StockWorkers) -> None:
    """The last old worker is gone: its doing stays counted, status still remembers it, and after an hour forgets."""
    shop.configure(heartbeat_timeout_s=2)
    shop.work()
    send_waiting(shop, "job")
    stock.start("old")
    shop.until(lambda: shop.registry.strangers(), "it is noticed", WITHIN_S)
    shop.broker.client.rpush("go on", "1")
    shop.until(lambda: shop.books() == {"accepted": 1, "elsewhere": 1}, "what it ended is counted", WITHIN_S)
    stock.stop()
    shop.until(lambda: told(shop)[1].level == "ok", "nobody is about without tideover", WITHIN_S)
    assert any("1 job ended outside the account" in remark for remark in told(shop)[1].remarks)
    assert 0 < shop.broker.client.ttl(shop.keys.strangers) <= 3600
    shop.broker.client.delete(shop.keys.strangers)
    shop.stop_working()
    shop.summary.send("lost")
    shop.broker.client.lpop(shop.keys.queue("default"))
    found, said = told(shop)
    assert (found.lost, said.level) == (1, "lost")


def test_a_tenant_gets_the_places_back_of_jobs_that_ended_elsewhere(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """When the last stock worker has left; jobs that are queued, held or run keep theirs, and so does another tenant."""
    caplog.set_level(logging.INFO)
    shop.configure(more="[capacity]\nmax_jobs_per_tenant = 4")
    watch, stranger = Watch(shop.registry, shop.ledger, 0.0), shop.new_broker(with_tideover=False)
    for i in range(4):
        shop.summary.send_with_options(args=(f"job{i}",), tenant="acme")
    shop.summary.send_with_options(args=("other",), tenant="other")
    with pytest.raises(CapacityReached):
        shop.summary.send_with_options(args=("more",), tenant="acme")
    for raw in stranger.do_fetch("default", 3)[:2]:
        watch.look(["default"], clock.now())
        stranger.do_ack("default", Message.decode(raw).options["redis_message_id"])
    watch.look(["default"], clock.now())
    assert {"acme": 4, "other": 1} == tenants(shop)  # it has a job still
    shop.backlog.recover(stranger.broker_id, "default", 0.0)
    shop.until(lambda: watch.look(["default"], clock.now()) or tenants(shop) == {"acme": 2, "other": 1}, "they are given back")
    shop.summary.send_with_options(args=("more",), tenant="acme")
    assert {"accepted": 6, "queued": 4, "elsewhere": 2} == shop.books()
    watch.look(["default"], clock.now())
    assert 1 == caplog.text.count("orphans_forgotten")


def tenants(shop: Shop) -> dict[str, int]:
    return Orphans(shop.broker.client, shop.keys).tenants()


def test_missing_jobs_are_no_false_alarm_while_a_stranger_is_about(shop: Shop) -> None:
    """Before the housekeeping has counted them, or where no worker with tideover runs yet."""
    stranger = shop.new_broker(with_tideover=False)
    for _ in range(3):
        shop.summary.send("job")
    bodies = stranger.do_fetch("default", 2)
    shop.broker.client.lpop(shop.keys.queue("default"))
    found, said = told(shop)
    assert (found.lost, found.unaccounted, found.strangers) == (0, 1, (stranger.broker_id,))
    assert (said.level, "1 job missing from the sum" in said.sentence) == ("mixed", True)
    assert len(bodies) == 2


def test_producers_and_our_own_workers_are_no_strangers(shop: Shop) -> None:
    """A producer leaves a heartbeat but fetches nothing; ours that was declared dead, and wakes, is known."""
    producer = shop.new_broker(with_tideover=False)
    producer.enqueue(shop.summary.message("from a stock producer"))
    shop.summary.send("ours")
    watch = Watch(shop.registry, shop.ledger, 2.0)
    shop.registry.enter_worker("w", {})
    watch.look(["default"], clock.now())
    shop.registry.remove_worker("w")
    shop.backlog.fetch("w", "default", 1)
    watch.look(["default"], clock.now())
    assert {producer.broker_id, "w"} == set(shop.registry.heartbeats())
    assert {} == shop.registry.strangers()


def test_two_processes_count_once_what_ended_elsewhere(shop: Shop) -> None:
    """For a moment two may have the lease; the number that was read is the fence."""
    for _ in range(3):
        shop.summary.send("job")
    shop.broker.client.lpop(shop.keys.queue("default"), 2)
    account = shop.ledger.read()
    assert [True, False] == [shop.registry.end_elsewhere(account.ends["elsewhere"], account.lost) for _ in range(2)]
    assert {"accepted": 3, "queued": 1, "elsewhere": 2} == shop.books()


def test_a_dead_stock_worker_s_heartbeat_is_left_to_dramatiq(shop: Shop) -> None:
    """It may have jobs of queues that tideover never heard of: its own kind finds them by its heartbeat."""
    stranger = shop.new_broker(with_tideover=False)
    stranger.enqueue(Message(queue_name="elsewhere", actor_name="x", args=(), kwargs={}, options={}))
    shop.summary.send("known")
    assert [1, 1] == [len(stranger.do_fetch(queue, 1)) for queue in ("elsewhere", "default")]
    shop.broker.client.zadd(shop.keys.heartbeats, {stranger.broker_id: (clock.now() - 60) * 1000})
    shop.work()
    shop.until(lambda: shop.calls("known"), "what it had of a known queue runs")
    assert shop.registry.heartbeats()[stranger.broker_id]
    shop.broker.client.zadd(shop.keys.heartbeats, {stranger.broker_id: (clock.now() - 3700) * 1000})
    shop.until(lambda: stranger.broker_id not in shop.registry.heartbeats(), "after an hour it is forgotten")


# schemas


@pytest.mark.parametrize("stored", [0, 1, 2])
def test_neighbours_run_together(shop: Shop, stored: int) -> None:
    """A process of schema 1 sends and works where 0, 1 or 2 is stored."""
    shop.registry.announce(schema=stored)
    shop.registry.enter_worker("of that schema", {"schema": stored})
    shop.work()
    assert shop.result(shop.reply.send("job")) == "anthropic"
    assert shop.broker.client.get(shop.keys.schema) == str(stored).encode()


@pytest.mark.parametrize(("ours", "stored", "remedy"), [(1, 3, "Upgrade this process"), (3, 1, "Deploy a version of schema 2")])
def test_others_refuse(shop: Shop, ours: int, stored: int, remedy: str) -> None:
    """Two apart, one would not understand what the other writes; the message says what to do."""
    shop.registry.announce(schema=stored)
    with pytest.raises(ConfigurationError, match=remedy):
        shop.registry.announce(schema=ours)


def test_a_process_that_is_too_old_neither_sends_nor_works(shop: Shop) -> None:
    """Nothing is accepted, and the worker does not start."""
    shop.registry.announce(schema=3)
    with pytest.raises(ConfigurationError, match="schema 3, and this process has schema 1"):
        shop.summary.send("job")
    with pytest.raises(ConfigurationError, match="schema 3"):
        shop.work()
    assert {} == shop.books()


def test_an_older_process_is_told_once(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """Newer ones are at work already: it runs, and says so when it starts."""
    caplog.set_level(logging.WARNING, "tideover")
    shop.registry.announce(schema=2)
    shop.summary.send("job")
    shop.work()
    shop.until_over()
    assert caplog.text.count("schema_differs") == 1


def test_the_number_rises_with_the_last_old_worker(shop: Shop) -> None:
    """While a worker of the older schema is there the number stays, so that what it cannot read is not written yet."""
    shop.registry.announce(schema=0)
    shop.registry.enter_worker("old", {"schema": 0})
    assert shop.registry.raise_schema(schema=1) is False
    shop.registry.remove_worker("old")
    shop.work()
    shop.until(lambda: shop.broker.client.get(shop.keys.schema) == b"1", "the worker raises it")


def test_the_number_rises_by_one_and_never_falls(client: redis.Redis, shop: Shop) -> None:
    """Whoever comes late changes nothing."""
    newer, older = Registry(client, shop.keys), Registry(client, shop.keys)
    assert (newer.announce(schema=1), newer.raise_schema(schema=2), older.raise_schema(schema=1)) == (1, True, False)
    assert (newer.raise_schema(schema=2), newer.raise_schema(schema=4)) == (False, False)
    assert older.announce(schema=1) == 2
    assert newer.announce(schema=3) == 2
