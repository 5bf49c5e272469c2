# SPDX-License-Identifier: Apache-2.0
"""How soon many processes agree: from a breaker's change in Redis until each of them reads it, and what an outcome costs Redis.

    python tests/bench/agree.py [processes]        64 by default, on one private Valkey; about a minute

Each process runs the thread that follows breakers in every worker. Lags are taken with the cores idle, with them saturated by
busy neighbours, after the connections that carry the news were killed, after the scripts were flushed, and with a Redis that
stands still for 200 ms every second. Exit code 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import redis
from rich.console import Console
from rich.table import Table

from tideover import clock
from tideover.core.breaker import Breaker, Transition
from tideover.core.outcome import OK
from tideover.health import Health
from tideover.settings import load
from tideover.store.breakers import Breakers
from tideover.store.client import connect
from tideover.store.keys import Keys
from tideover.store.registry import Registry
from tideover_worker import embedded

KEY, MODEL = "anthropic/m", "m"
NAMESPACE = "agree"
LAGS, READY = "lags", "ready"
ROUNDS = 20
OUTCOMES_PER_S, REPORTING_S = 50, 6.0
fork = multiprocessing.get_context("fork")


def health_of(url: str) -> Health:
    settings = load(environ={"TIDEOVER_REDIS_URL": url, "TIDEOVER_NAMESPACE": NAMESPACE}, start=Path("/"))
    client = connect(url)
    keys = Keys(NAMESPACE)
    return Health(settings, Breakers(client, keys), Registry(client, keys))


class Follower(Health):
    """Says of each change that it sees how long that took."""

    def look_out(self, told: redis.Redis) -> None:
        self.told, self.last = told, -1

    def see(self, fresh: Any) -> None:
        super().see(fresh)
        seen = fresh.get(KEY)
        if seen is not None and seen.era != self.last:
            self.last, now = seen.era, time.time()
            changed_at = self.told.get(f"at:{seen.era}")
            if changed_at is not None:
                self.told.rpush(LAGS, json.dumps([seen.era, now - float(changed_at)]))


def follow(url: str, reporting: Any) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    base = health_of(url)
    health = Follower(base.settings, base.breakers, base.registry)
    health.look_out(redis.Redis.from_url(url))
    health.start()
    health.told.incr(READY)
    while True:
        reporting.wait()
        until = time.monotonic() + REPORTING_S
        n = 0
        while time.monotonic() < until:
            health.end(health.begin("anthropic", MODEL, f"{os.getpid()} {n}"), OK)
            n += 1
            time.sleep(1 / OUTCOMES_PER_S)
        health.told.incrby("outcomes", n)
        while reporting.is_set():
            time.sleep(0.05)


def burn() -> None:
    while True:
        math.sqrt(2.0)


@contextmanager
def neighbours(n: int) -> Iterator[None]:
    """Processes that want all of a core."""
    busy: list[ForkProcess] = [fork.Process(target=burn, daemon=True) for _ in range(n)]
    for process in busy:
        process.start()
    try:
        yield
    finally:
        for process in busy:
            process.kill()


class Fleet:
    def __init__(self, url: str, processes: int) -> None:
        self.url, self.n = url, processes
        self.client: redis.Redis = redis.Redis.from_url(url)
        self.breakers = Breakers(connect(url), Keys(NAMESPACE))
        self.reporting = fork.Event()
        self.members = [fork.Process(target=follow, args=(url, self.reporting), daemon=True) for _ in range(processes)]

    def start(self) -> None:
        for member in self.members:
            member.start()
        self.until(lambda: int(self.client.get(READY) or 0) == self.n, "all follow", 120)

    def until(self, fact: Callable[[], bool], what: str, most_s: float) -> None:
        give_up = time.monotonic() + most_s
        while not fact():
            if time.monotonic() > give_up:
                raise SystemExit(f"after {most_s:.0f} s still not true: {what}")
            time.sleep(0.01)

    def change(self) -> None:
        """One change of the breaker, with the instant at which Redis had it."""
        seen = self.breakers.read([KEY])[KEY]
        change = Transition(to="open" if seen.state in ("closed", "recovering") else "recovering", why="")
        era = seen.era + 1
        self.client.set(f"at:{era}", time.time(), ex=60)
        assert self.breakers.transition(KEY, seen, change, clock.now())

    def lags(self, rounds: int, before_each: Callable[[], object] = lambda: None) -> list[float]:
        """Milliseconds until each process read each change."""
        self.client.delete(LAGS)
        for done in range(rounds):
            before_each()
            self.change()
            wanted = (done + 1) * self.n
            self.until(lambda wanted=wanted: self.client.llen(LAGS) >= wanted, "all have read it", 10)  # type: ignore[misc]
        return sorted(json.loads(raw)[1] * 1000 for raw in self.client.lrange(LAGS, 0, -1))

    def cost(self) -> tuple[float, int]:
        """Microseconds of Redis' CPU for an outcome, and how many there were."""
        self.until(lambda: self.breakers.read([KEY])[KEY] is not None, "it answers", 5)
        if self.breakers.read([KEY])[KEY].is_down:
            self.change()
        self.client.config_resetstat()
        self.reporting.set()
        self.until(lambda: int(self.client.get("outcomes") or 0) >= self.n * REPORTING_S * OUTCOMES_PER_S * 0.5, "reports", 60)
        time.sleep(1.0)
        stats = self.client.info("commandstats")
        self.reporting.clear()
        spent = sum(stats[name]["usec"] for name in stats if name in ("cmdstat_evalsha", "cmdstat_eval"))
        outcomes = int(self.client.get("outcomes") or 0)
        return spent / outcomes, outcomes

    def stop(self) -> None:
        for member in self.members:
            member.kill()


def stand_still(client: redis.Redis, over: threading.Event) -> None:
    while not over.wait(0.8):
        client.execute_command("CLIENT", "PAUSE", 200, "ALL")


def p(values: list[float], q: float) -> float:
    return values[min(len(values) - 1, math.ceil(q * len(values)) - 1)]


def measure(fleet: Fleet) -> list[tuple[str, list[float], float]]:
    found = [("idle cores", fleet.lags(ROUNDS), 50.0)]
    with neighbours(2 * (os.cpu_count() or 2)):
        found.append(("saturated cores", fleet.lags(ROUNDS), 50.0))
    killed = fleet.lags(3, lambda: fleet.client.execute_command("CLIENT", "KILL", "TYPE", "pubsub"))
    found.append(("news connections killed", killed, 1500.0))
    found.append(("scripts flushed", fleet.lags(5, fleet.client.script_flush), 50.0))
    over = threading.Event()
    pausing = threading.Thread(target=stand_still, args=(redis.Redis.from_url(fleet.url), over))
    pausing.start()
    found.append(("Redis stands still, 200 ms a second", fleet.lags(ROUNDS), 400.0))
    over.set()
    pausing.join()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("processes", nargs="?", type=int, default=64)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = embedded.start(Path(folder))
        fleet = Fleet(server.url, asked.processes)
        try:
            fleet.start()
            found, (cost, outcomes) = measure(fleet), fleet.cost()
        finally:
            fleet.stop()
            embedded.stop(Path(folder))
    table = Table("from the change to its reader, ms", "p50", "p99", "longest", "goal, p99", box=None, header_style="bold")
    for name, lags, goal in found:
        table.add_row(name, f"{p(lags, 0.5):.1f}", f"{p(lags, 0.99):.1f}", f"{lags[-1]:.1f}", f"{goal:.0f}")
    Console(width=110).print(table)
    print(f"{asked.processes} processes; {outcomes:,} outcomes cost Redis {cost:.1f} µs of script time each (goal 20)")
    views = {KEY: Breaker()}
    started = time.perf_counter()
    for _ in range(1_000_000):
        views.get(KEY)
    print(f"reading a breaker: {(time.perf_counter() - started) * 1000:.0f} ns (goal 1,000)")
    return 0 if cost <= 20 and all(p(lags, 0.99) <= goal for _, lags, goal in found) else 1


if __name__ == "__main__":
    sys.exit(main())
