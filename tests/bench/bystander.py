# SPDX-License-Identifier: Apache-2.0
"""What bystanders feel of another provider's outage: their latency while its flood of deferrable jobs is held, and without it.

    python tests/bench/bystander.py [pairs, 2 or more] [bystanders per round] [flood jobs per second]

Two workers on one private Valkey, each in a namespace of its own: one with the outage, one without. Bystanders are a plain
actor and an AI task on a healthy route, in the flood's own queue, sent one every 20 ms or so. A flood of 0 shows the noise.
Prints medians of the rounds, and the median of the paired ratios of the 95th percentiles, with quartiles.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker

from tideover import Tideover, aclaude, ai_task, ops, send_many
from tideover.settings import settings
from tideover_worker import embedded

SIDES = ("calm", "outage")
LATENCIES = ("plain actor: send to start", "AI task: send to start", "AI task: send to end, with its call")
MODEL, GAP_S, TICK_S, PATIENCE_S = "claude-opus-4-8", 0.02, 0.02, 60.0
PROVIDERS = [{"name": "primary"}, {"name": "healthy", "latency": {"base_s": 0.02, "per_output_token_s": 0, "jitter": 0}}]
TIDEOVER = [sys.executable, "-c", "from tideover_worker.cli import main; main()", "worker"]
new_broker: Any = RedisBroker


def connect() -> Any:
    return redis.Redis.from_url(os.environ["TIDEOVER_REDIS_URL"], socket_timeout=None)


def declare(side: str) -> tuple[Any, dict[str, Any]]:
    """The broker of a side and its tasks, for producer and worker alike. Bystanders tell their latencies."""
    broker, store = new_broker(url=os.environ["TIDEOVER_REDIS_URL"], namespace=side), connect()
    broker.add_middleware(Tideover())
    dramatiq.set_broker(broker)

    def tell(which: int, sent_at: float) -> None:
        store.rpush(f"{side}:latencies:{which}", time.monotonic() - sent_at)  # one clock for all processes of a machine

    async def ask() -> None:
        await aclaude().messages.create(model=MODEL, max_tokens=10, messages=[{"role": "user", "content": "One tag."}])

    def plain(sent_at: float) -> None:
        tell(0, sent_at)

    async def healthy(sent_at: float) -> None:
        tell(1, sent_at)
        await ask()
        tell(2, sent_at)

    async def flood(n: int) -> None:
        await ask()

    return broker, {
        "plain": dramatiq.actor(plain),
        "healthy": ai_task(criticality="deferrable", route="healthy", models=[MODEL])(healthy),
        "flood": ai_task(criticality="deferrable", models=[MODEL])(flood),
    }


def flood_for_ever(rate: int) -> None:
    """In a process of its own: floods for as many seconds as it is told, again and again."""
    store, (broker, tasks) = connect(), declare("outage")
    while True:
        seconds, sent, due = float(store.blpop(["flood:go"])[1]), 0, 0.0
        until = time.monotonic() + seconds
        while (began := time.monotonic()) < until:
            due += rate * TICK_S
            messages = [tasks["flood"].message(i) for i in range(sent, int(due))]
            sent += len(send_many(messages, broker=broker).accepted)
            threading.Event().wait(max(0.0, began + TICK_S - time.monotonic()))
        store.rpush("flood:done", sent)


def answer(store: Any, key: str) -> float:
    said = store.blpop([key], PATIENCE_S)
    if said is None:
        raise SystemExit(f"nothing came at {key} in {PATIENCE_S:.0f} s")
    return float(said[1])


def standing() -> ops.Standing:
    [found] = ops.status(ops.open_operator(settings(), ["outage"])).namespaces
    return found.standing


def start_outage(flood: Any) -> None:
    """Sends jobs to the provider that fails until its breaker is open, and all of them are held."""
    deadline, down, all_held = time.monotonic() + PATIENCE_S, False, False
    while not (down and all_held):
        assert time.monotonic() < deadline, f"there was no outage in {PATIENCE_S:.0f} s"
        if not down:
            flood.send(0)
        threading.Event().wait(0.05)
        now = standing()
        down, all_held = any(breaker.is_down for breaker in now.breakers), now.held == now.accepted


def measure(side: str, tasks: dict[str, Any], store: Any, n: int, rate: int) -> tuple[list[float], int]:
    """One round; the 95th percentiles of the latencies in ms, and how many jobs the flood had."""
    gaps = [random.uniform(0.5, 1.5) * GAP_S for _ in range(2 * n)]
    flooded = side == "outage" and rate > 0
    if flooded:
        store.rpush("flood:go", sum(gaps) + 1)
    for nth, gap in enumerate(gaps):
        threading.Event().wait(gap)
        tasks["plain" if nth % 2 else "healthy"].send(time.monotonic())
    took = [[answer(store, f"{side}:latencies:{which}") * 1000 for _ in range(n)] for which in range(len(LATENCIES))]
    held = int(answer(store, "flood:done")) if flooded else 0
    return [statistics.quantiles(one, n=20)[-1] for one in took], held


@contextmanager
def process(words: Sequence[str], folder: Path, *, tells: bool = False, **environ: str) -> Iterator[Any]:
    """A process in this folder, killed afterwards with whatever it started. `tells`: its output is read."""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), **environ}
    with (folder / "log").open("ab") as log:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE if tells else log, "stderr": log}
        running = subprocess.Popen(words, cwd=folder, env=environ, start_new_session=True, **pipes)
    try:
        yield running
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()


@contextmanager
def stage(rate: int) -> Iterator[Path]:
    """A private Valkey, two providers of which the primary fails, the settings for them, two workers and the flood's sender."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        stack.callback(embedded.stop, folder)
        os.environ["TIDEOVER_REDIS_URL"] = embedded.start(folder).url
        (folder / "providers.json").write_text(json.dumps({"providers": PROVIDERS}))
        words = [sys.executable, "-m", "tideover.testing.serve", "--config", "providers.json"]
        urls = json.loads(stack.enter_context(process(words, folder, tells=True)).stdout.readline())
        fail = urllib.request.Request(f"{urls['control_urls']['primary']}/__control", json.dumps({"fail": "529"}).encode())
        urllib.request.urlopen(fail).close()
        routes = [f'[routes.{name}]\nkind = "anthropic"\nbase_url = "{url}"\n' for name, url in urls["base_urls"].items()]
        (folder / "tideover.toml").write_text("\n".join(routes))
        os.environ["TIDEOVER_CONFIG"] = str(folder / "tideover.toml")
        for side in SIDES:
            stack.enter_context(process([*TIDEOVER, Path(__file__).stem, "--processes", "1"], folder, BYSTANDER_SIDE=side))
        if rate:
            stack.enter_context(process([sys.executable, __file__, "flood", str(rate)], folder))
        yield folder


def report(rounds: dict[str, list[list[float]]]) -> None:
    for which, name in enumerate(LATENCIES):
        calm, outage = ([one[which] for one in rounds[side]] for side in SIDES)
        low, middle, high = statistics.quantiles([b / a for a, b in zip(calm, outage, strict=True)], n=4, method="inclusive")
        absolute = f"p95 {statistics.median(calm):.1f} ms calm, {statistics.median(outage):.1f} ms in the flood"
        print(f"{name:36} x {middle:5.3f} ({low:.2f}-{high:.2f})   {absolute}")


def main() -> None:
    pairs, n, rate = (int(arg) for arg in (sys.argv[1:] + ["9", "200", "200"][len(sys.argv) - 1 :]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rounds: dict[str, list[list[float]]] = defaultdict(list)
    flooded = 0
    with stage(rate):
        store, tasks = connect(), {side: declare(side)[1] for side in SIDES}
        start_outage(tasks["outage"]["flood"])
        for nth in range(-1, pairs):  # the first is to warm up
            for side in SIDES[:: -1 if nth % 2 else 1]:
                p95s, jobs = measure(side, tasks[side], store, n, rate)
                flooded += jobs
                rounds[side] += [p95s] if nth >= 0 else []
        now = standing()
    report(rounds)
    print(f"{pairs} paired rounds of {n} bystanders of each kind; in the flood {flooded:,}, held {now.held:,}, lost {now.lost}")
    print("load average", *(f"{load:.1f}" for load in os.getloadavg()))


if __name__ != "__main__":
    declare(os.environ["BYSTANDER_SIDE"])
elif sys.argv[1:2] == ["flood"]:
    flood_for_ever(int(sys.argv[2]))
else:
    main()
