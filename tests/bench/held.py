# SPDX-License-Identifier: Apache-2.0
"""A million held jobs: memory, speed of holding, and how fast operators get answers.

    python tests/bench/held.py [jobs] [tenants]
    TIDEOVER_REDIS_URL=redis://localhost:6399/0 python tests/bench/held.py   an empty Redis of yours instead of a private Valkey

Holds the jobs as a worker does: fetched by its consumer, held by its gate while a breaker is open. Then asks as operators do.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from rich.progress import track

from tideover import Tideover, ai_task, ops, send_many
from tideover.consumer import GatedConsumer
from tideover.core.breaker import Transition
from tideover.gate import Gate
from tideover.health import Health
from tideover.settings import settings
from tideover.store.account import Ledger
from tideover.store.backlog import Backlog
from tideover.store.breakers import Breakers
from tideover.store.keys import Keys
from tideover.store.registry import Registry
from tideover.store.stories import Stories
from tideover_worker import embedded

MODEL, KEY, QUEUE, PREFETCH = "claude-opus-4-8", "anthropic/claude-opus-4-8", "default", 256
TASKS, QUESTIONS, FETCHES = 5, 40, 20


def declare(broker: RedisBroker) -> list[Any]:
    def work(n: int) -> None: ...

    return [
        ai_task(criticality="deferrable", models=[MODEL], broker=broker, actor_name=f"shop.tasks.task_{i}")(work)
        for i in range(TASKS)
    ]


def fill(broker: RedisBroker, tasks: list[Any], jobs: int, tenants: int) -> float:
    """Sends the jobs; seconds."""
    tags = ("", "vip")
    messages = (
        tasks[i % TASKS].message_with_options(args=(i,), tenant=f"t{i // TASKS % tenants}", tag=tags[i % 7 == 0])
        for i in range(jobs)
    )
    began = time.perf_counter()
    sent = send_many(track(messages, "sending", total=jobs, disable=not sys.stderr.isatty()), broker=broker)
    assert (jobs, 0) == (len(sent.accepted), len(sent.rejected)), sent.rejected[:1]
    return time.perf_counter() - began


def fetch_us(broker: RedisBroker, keys: Keys) -> float:
    """What a fetch alone takes of Redis' time, per job, in µs."""
    backlog, fetched = Backlog(broker.client, keys), []
    broker.client.config_resetstat()
    for _ in range(FETCHES):
        fetched += [job.redis_id for job in backlog.fetch("another", QUEUE, PREFETCH)[0]]
    took = broker.client.info("commandstats")["cmdstat_evalsha"]["usec"]
    backlog.give_back("another", QUEUE, fetched[: FETCHES * PREFETCH])
    return took / len(fetched)


def hold_all(broker: RedisBroker, keys: Keys, jobs: int) -> float:
    """Fetches and holds all; seconds."""
    health = Health(settings(), Breakers(broker.client, keys), Registry(broker.client, keys))
    health.move(KEY, health.view(KEY), Transition(to="open", why="for the measurement"))
    stores = Ledger(broker.client, keys), Backlog(broker.client, keys), Stories(broker.client, keys)
    consumer = GatedConsumer(Gate(broker, broker.broker_id, health, *stores), QUEUE, PREFETCH, 0.001)
    began = time.perf_counter()
    for _ in track(range(0, jobs, PREFETCH), "holding", disable=not sys.stderr.isatty()):
        assert next(consumer) is None
    while stores[1].size(QUEUE) < jobs:
        assert next(consumer) is None
    return time.perf_counter() - began


def p95_ms(ask: Callable[[], object]) -> tuple[float, float]:
    """Median and 95th percentile of a question, in ms."""
    took = []
    for _ in range(QUESTIONS):
        began = time.perf_counter()
        ask()
        took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took), statistics.quantiles(took, n=20)[-1]


def measure(broker: RedisBroker, jobs: int, tenants: int) -> None:
    client, keys = broker.client, Keys(broker.namespace)
    tasks = declare(broker)
    server = client.info("server")
    version = server.get("valkey_version", server["redis_version"])
    print(f"{jobs:,} jobs, {tenants:,} tenants, Redis or Valkey {version}")
    print(f"send_many      {jobs / fill(broker, tasks, jobs, tenants):12,.0f} jobs/s")
    fetch = fetch_us(broker, keys)
    before = client.info("memory")["used_memory"]
    client.config_resetstat()
    client.config_set("slowlog-log-slower-than", 10_000)
    client.slowlog_reset()
    print(f"fetch and hold {jobs / hold_all(broker, keys, jobs):12,.0f} jobs/s in one process")
    scripts = client.info("commandstats")["cmdstat_evalsha"]["usec"]
    print(f"Redis' time    {scripts / jobs - fetch:12.1f} µs per held job, and {fetch:.1f} µs for its fetch")
    print(f"memory         {(client.info('memory')['used_memory'] - before) / jobs:12.0f} bytes more per job than queued")
    operator = ops.open_operator(settings(), [broker.namespace])
    one = {"tenant": "t3"}
    questions: dict[str, Callable[[], object]] = {
        "status": lambda: ops.status(operator),
        "a page of 50": lambda: ops.backlog(operator),
        "  of a task": lambda: ops.backlog(operator, ops.Filter(task="shop.tasks.task_1")),
        "  of a tenant": lambda: ops.backlog(operator, ops.Filter(**one)),
        "  of a tenant's task": lambda: ops.backlog(operator, ops.Filter(task="shop.tasks.task_1", **one)),
    }
    for name, ask in questions.items():
        middle, high = p95_ms(ask)
        print(f"{name:21}  median {middle:6.1f} ms, p95 {high:6.1f} ms")
    slow = [(entry["duration"] / 1000, entry["command"][:60]) for entry in client.slowlog_get(10)]
    print(f"commands over 10 ms: {slow or 'none'}")


def main() -> None:
    jobs, tenants = (int(arg) for arg in (sys.argv[1:] + ["1000000", "500"][len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as folder:
        mine = "TIDEOVER_REDIS_URL" not in os.environ
        if mine:
            os.environ["TIDEOVER_REDIS_URL"] = embedded.start(Path(folder)).url
        os.environ["TIDEOVER_NAMESPACE"] = "bench"
        try:
            broker = RedisBroker(url=os.environ["TIDEOVER_REDIS_URL"], namespace="bench")
            assert not broker.client.keys("bench:*"), "namespace bench of this Redis is not empty"
            broker.add_middleware(Tideover())
            dramatiq.set_broker(broker)
            measure(broker, jobs, tenants)
        finally:
            if mine:
                embedded.stop(Path(folder))


if __name__ == "__main__":
    main()
