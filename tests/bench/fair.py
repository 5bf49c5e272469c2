# SPDX-License-Identifier: Apache-2.0
"""Fair weather: what a worker with tideover gets through, and the CPU that it takes, beside one of stock dramatiq.

    python tests/bench/fair.py [pairs, 2 or more] [jobs per round] [prefetch] [threads]

Prefetch 0 is dramatiq's default, twice the threads; up to 64 both take what is said. Each pair of rounds has new worker
processes on an empty private Valkey. All jobs of a round are enqueued while its worker's threads wait for the start; the first
and the last job say the time and the process' CPU time. Prints medians of the paired ratios, with quartiles.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from tideover import Tideover, ai_task
from tideover_worker import embedded

DRAMATIQ = [sys.executable, "-m", "dramatiq"]
TIDEOVER = [sys.executable, "-c", "from tideover_worker.cli import main; main()", "worker"]
SIDES = {"stock": DRAMATIQ, "dramatiq + Tideover()": DRAMATIQ, "tideover worker": TIDEOVER}
KINDS = {"plain actor": 1, "AI task with result": 2, "actor that waits 20 ms": 4}
"""Each with how much smaller its rounds are."""
PATIENCE_S = 60.0
CALL_S = 0.02
new_broker: Any = RedisBroker
new_backend: Any = RedisBackend
new_results: Any = Results
actor: Any = dramatiq.actor
"""What is not typed, or too finely for what is done here."""


def declare(side: str) -> tuple[Any, dict[str, Any]]:
    """The broker of a side and its tasks, for producer and worker alike."""
    url, namespace = os.environ["TIDEOVER_REDIS_URL"], side.replace(" ", "-").translate({ord(c): None for c in "+()"})
    broker = new_broker(url=url, namespace=namespace)
    broker.add_middleware(new_results(backend=new_backend(client=broker.client)))
    store = redis.Redis.from_url(url, socket_timeout=None)
    if side != "stock":
        broker.add_middleware(Tideover())
    dramatiq.set_broker(broker)

    def no_op(n: int) -> str:
        return "a tag"

    def call(n: int) -> None:
        threading.Event().wait(CALL_S)

    def stand_by() -> None:
        assert store.blpop([f"{namespace}:go"], PATIENCE_S) is not None

    def mark() -> None:
        store.rpush(f"{namespace}:marks", json.dumps([time.perf_counter(), time.process_time()]))

    actors: dict[str, Any] = {one.__name__: actor(one) for one in (stand_by, mark)}
    plain, ai, waits = KINDS
    actors[plain] = actor(lambda n: None, actor_name="plain")
    actors[waits] = actor(call)
    if side == "stock":
        actors[ai] = actor(no_op, store_results=True, result_ttl=86_400_000)
    else:
        actors[ai] = ai_task(criticality="deferrable")(no_op)
    return broker, actors


@dataclass(frozen=True)
class Side:
    """A producer of one side, and where its worker reports."""

    name: str
    broker: Any
    actors: dict[str, Any]
    store: Any
    threads: int

    def answer(self, key: str, log: Path) -> list[float]:
        if (answer := self.store.blpop([f"{self.broker.namespace}:{key}"], PATIENCE_S)) is None:
            raise SystemExit(f"the worker of {self.name} did not answer:\n{log.read_text()[-2000:]}")
        return list(json.loads(answer[1]))

    def measure(self, kind: str, jobs: int, log: Path) -> tuple[float, float]:
        """One round; jobs per second and microseconds of CPU per job."""
        for _ in range(self.threads):
            self.actors["stand_by"].send()
        self.actors["mark"].send()
        for i in range(jobs):
            self.actors[kind].send(i)
        self.actors["mark"].send()
        self.store.rpush(f"{self.broker.namespace}:go", *range(self.threads))
        (began, cpu_before), (ended, cpu_after) = (self.answer("marks", log) for _ in range(2))
        return jobs / (ended - began), (cpu_after - cpu_before) / jobs * 1e6


@contextmanager
def private_server() -> Iterator[Path]:
    """A Valkey of our own; its folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            os.environ["TIDEOVER_REDIS_URL"] = embedded.start(folder).url
            yield folder
        finally:
            embedded.stop(folder)


@contextmanager
def worker(side: str, folder: Path, threads: int, prefetch: int) -> Iterator[Path]:
    """A worker process of one side, booting; its log. It is killed afterwards, with whatever it started."""
    environ = {**os.environ, "FAIR_SIDE": side, "PYTHONPATH": str(Path(__file__).parent), "ANTHROPIC_API_KEY": "none"}
    if prefetch:
        environ["dramatiq_queue_prefetch"] = str(prefetch)
    words = [*SIDES[side], Path(__file__).stem, "--processes", "1", "--threads", str(threads)]
    path = folder / "worker.log"
    with path.open("wb") as log:
        process = subprocess.Popen(words, cwd=folder, env=environ, stdout=log, stderr=log, start_new_session=True)
    try:
        yield path
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


Rounds = dict[tuple[str, str], list[tuple[float, float]]]


def measure_pair(sides: list[Side], rounds: Rounds, folder: Path, jobs: int, prefetch: int) -> None:
    """A round of each side and kind, with new workers, warmed up."""
    sides[0].store.flushdb()
    with ExitStack() as stack:
        logs = {}
        for nth, side in enumerate(sides):
            own = folder / str(nth)
            own.mkdir(exist_ok=True)
            logs[side.name] = stack.enter_context(worker(side.name, own, side.threads, prefetch))
        for side in sides:
            for kind in KINDS:
                side.measure(kind, 100, logs[side.name])
        for kind, share in KINDS.items():
            for side in sides:
                rounds[kind, side.name].append(side.measure(kind, jobs // share, logs[side.name]))


def told(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:5.3f} ({low:.2f}-{high:.2f})"


def report(rounds: Rounds) -> None:
    stock, *others = SIDES
    for kind in KINDS:
        base = rounds[kind, stock]
        print(f"{kind}: stock {told_absolute(base)}")
        for side in others:
            pairs = list(zip(base, rounds[kind, side], strict=True))
            speed, cpu = told([b[0] / a[0] for a, b in pairs]), told([b[1] / a[1] for a, b in pairs])
            print(f"  {side:22} throughput x {speed}   CPU per job x {cpu}   {told_absolute(rounds[kind, side])}")


def told_absolute(rounds: list[tuple[float, float]]) -> str:
    speed, cpu = (statistics.median(one[i] for one in rounds) for i in (0, 1))
    return f"{speed:,.0f} jobs/s, {cpu:,.0f} µs CPU per job"


def main() -> None:
    pairs, jobs, prefetch, threads = (int(arg) for arg in (sys.argv[1:] + ["9", "2000", "0", "8"][len(sys.argv) - 1 :]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rounds: Rounds = defaultdict(list)
    with private_server() as folder:
        store = redis.Redis.from_url(os.environ["TIDEOVER_REDIS_URL"], socket_timeout=None)
        sides = [Side(name, *declare(name), store, threads) for name in SIDES]
        for nth in range(pairs):
            measure_pair(sides[::-1] if nth % 2 else sides, rounds, folder, jobs, prefetch)
    report(rounds)
    print(f"{pairs} paired rounds of {jobs:,} jobs, {threads} threads, prefetch {prefetch or 2 * threads}")
    print("load average", *(f"{load:.1f}" for load in os.getloadavg()))


if __name__ == "__main__":
    main()
elif "FAIR_SIDE" in os.environ:
    declare(os.environ["FAIR_SIDE"])
