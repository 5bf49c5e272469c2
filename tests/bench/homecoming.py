# SPDX-License-Identifier: Apache-2.0
"""How a real backlog comes home: worker processes, the real SDK, a fake provider with limits that it tells and a capacity that
it does not, and live traffic.

    python tests/bench/homecoming.py                 1,500 held jobs: some minutes
    python tests/bench/homecoming.py --held 5000     what the goals are set for: ten minutes
    python tests/bench/homecoming.py --held 800 --kill leader    (worker, redis): kill -9 when half of them are home
    python tests/bench/homecoming.py --json          the figures for programs

The provider fails until all jobs are held. Then its capacity grows from 6 to 45 calls a second within a minute, its limit is
30 (429 beyond, told in headers), and 18 live calls a second go on, 30 % critical. The optimum is the time in which limit and
capacity leave enough room beside the live calls, from the moment when the breaker recovers. The backlog is home when nothing is
held any more, live jobs that queued up behind it included. Every few seconds it is noted what `tideover drain status` says of
the end, and compared afterwards. Exit code 1: a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import redis

from tideover.errors import StoreUnavailable
from tideover.ops import drains, open_operator
from tideover.settings import settings
from tideover.store.account import Ledger
from tideover.store.breakers import Breakers
from tideover.store.keys import Keys
from tideover.store.registry import Registry
from tideover.testing import FakeProvider, Latency, Phase
from tideover_worker import embedded

NAMESPACE, MODEL = "home", "claude-opus-4-8"
KEY = f"anthropic/{MODEL}"
LIMIT, CAPACITY, RAMP_S = 30.0, (6.0, 45.0), 60.0
LIVE_PER_S, CRITICAL = 18.0, 0.3
WORKERS = 3
PATIENCE_S = 3600.0
GOALS = {"time / optimum": 1.10, "429s": 0, "calls per job": 1.02, "lost": 0, "end told wrong": 0.2, "goes on after s": 10}
GUESS_S, YOUNG_S = 5.0, 60.0
"""How often the end is noted, and how long a drain is too young for that."""
GOES_ON = 20
"""So many more are home: it goes on."""
TASKS = f"""
import os
import time

import redis
from tideover import aclaude, ai_task

store = redis.Redis.from_url(os.environ["TIDEOVER_REDIS_URL"])

async def ask(what):
    question = [{{"role": "user", "content": what}}]
    await aclaude().messages.create(model="{MODEL}", max_tokens=8, messages=question)

@ai_task(criticality="deferrable", models=["{MODEL}"])
async def held(n: int) -> None:
    await ask("held")
    store.incr("home:done")

@ai_task(criticality="deferrable", models=["{MODEL}"])
async def live(n: int) -> None:
    await ask("live")

@ai_task(criticality="critical", expires_in=None, models=["{MODEL}"])
async def reply(sent_at: float) -> None:
    await ask("reply")
    store.zadd("home:replies", {{f"{{sent_at}} {{time.time() - sent_at}}": sent_at}})
"""
SEND = """
import sys
import tasks
from tideover import send_many
print(len(send_many(tasks.held.message(n) for n in range(int(sys.argv[1]))).accepted))
"""
SETTINGS = """
redis_url = "{url}"
namespace = "home"
[breaker]
probe_after_s = 1
[routes.anthropic]
kind = "anthropic"
base_url = "{primary}"
"""


def optimum_s(held: int, began_s: float) -> float:
    """From `began_s` after the provider's return: the least time in which so many calls fit beside the live ones."""
    at, room = began_s, 0.0
    while room < held:
        capacity = CAPACITY[0] + (CAPACITY[1] - CAPACITY[0]) * min(1.0, at / RAMP_S)
        room += 0.1 * (min(LIMIT, capacity) - LIVE_PER_S)
        at += 0.1
    return at - began_s


def until(fact: Callable[[], Any], what: str, pause_s: float = 0.1) -> None:
    give_up_at, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not fact():
        if time.monotonic() > give_up_at:
            raise SystemExit(f"not within {PATIENCE_S:.0f} s: {what}")
        pause.wait(pause_s)


@contextmanager
def worker(folder: Path, environ: dict[str, str]) -> Iterator[None]:
    command = [sys.executable, "-m", "dramatiq", "tasks", "--processes", "1", "--threads", "2"]
    with (folder / "worker.log").open("ab") as log:
        running = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log)
    try:
        yield
    finally:
        running.terminate()
        running.wait(90)


def live_traffic(folder: Path, stop: threading.Event) -> Counter[str]:
    """Calls at random instants, from this process; how many of each kind."""
    sys.path.insert(0, str(folder))
    import tasks  # type: ignore[import-not-found]

    luck, sent = random.Random(1), Counter[str]()
    due = time.monotonic()
    while not stop.is_set():
        due += luck.expovariate(LIVE_PER_S)
        stop.wait(max(0.0, due - time.monotonic()))
        kind = "reply" if luck.random() < CRITICAL else "live"
        with suppress(StoreUnavailable):  # while it is killed
            getattr(tasks, kind).send(time.time() if kind == "reply" else sent[kind])
            sent[kind] += 1
    return sent


class Guesses:
    """What an operator is told of the end, as unix times: when it was told, and the range."""

    def __init__(self) -> None:
        self.told: list[tuple[float, float, float]] = []
        self.operator, self.asked_at = open_operator(settings(), [NAMESPACE]), 0.0

    def note(self) -> None:
        if time.monotonic() - self.asked_at < GUESS_S:
            return
        self.asked_at = time.monotonic()
        with suppress(StoreUnavailable):  # while it is killed
            found = drains(self.operator)
            for one in found.drains:
                if one.soonest_at is not None and one.latest_at is not None:
                    self.told.append((found.asked_at, one.soonest_at, one.latest_at))

    def wrong(self, began_at: float, ended_at: float) -> float:
        """The share of those after the first minute that the end was outside."""
        right = [soonest <= ended_at <= latest for at, soonest, latest in self.told if at > began_at + YOUNG_S]
        return 1 - sum(right) / max(1, len(right))


def measured(held: int, kill: str | None) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="homecoming-")))
        server = embedded.start(folder / "valkey")
        stack.callback(embedded.stop, folder / "valkey")
        store = stack.enter_context(redis.Redis.from_url(server.url))
        provider = stack.enter_context(FakeProvider("anthropic", latency=Latency(base_s=1.0, per_output_token_s=0.0)))
        (folder / "tasks.py").write_text(TASKS)
        (folder / "send.py").write_text(SEND)
        (folder / "tideover.toml").write_text(SETTINGS.format(url=server.url, primary=provider.base_url))
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TIDEOVER_")}
        environ |= {"ANTHROPIC_API_KEY": "key", "TIDEOVER_REDIS_URL": server.url}
        environ |= {"TIDEOVER_CONFIG": str(folder / "tideover.toml")}
        provider.fail("529")
        for _ in range(WORKERS):
            stack.enter_context(worker(folder, environ))
        subprocess.run([sys.executable, "send.py", str(held)], cwd=folder, env=environ, check=True, stdout=subprocess.DEVNULL)
        return come_home(held, kill, store, provider, folder, environ)


def killed(whom: str, store: redis.Redis, folder: Path) -> float:
    """Kills it, and returns how long it takes until the backlog comes home again."""
    registry = Registry(store, Keys(NAMESPACE))
    leader = registry.leader("drain")
    pids = {worker: facts["pid"] for worker, facts in registry.workers().items()}
    if whom == "redis":
        pid = embedded.running(folder / "valkey")
        assert pid is not None
    else:
        pid = pids[leader] if whom == "leader" else next(pid for worker, pid in pids.items() if worker != leader)
    began, before = time.monotonic(), int(store.get("home:done") or 0)
    os.kill(pid, signal.SIGKILL)
    if whom == "redis":
        until(lambda: embedded.running(folder / "valkey") is None, "the server is gone", 0.01)
        embedded.start(folder / "valkey")
    until(lambda: int(store.get("home:done") or 0) >= before + GOES_ON, "it goes on", 0.01)
    return time.monotonic() - began


def come_home(
    held: int, kill: str | None, store: redis.Redis, provider: FakeProvider, folder: Path, environ: dict[str, str]
) -> dict[str, Any]:
    keys = Keys(NAMESPACE)
    ledger, breakers = Ledger(store, keys), Breakers(store, keys)
    until(lambda: breakers.read([KEY])[KEY].is_down and ledger.read().held == held, "all are held")
    before, returned_at = len(provider.calls()), time.monotonic()
    limits: dict[str, Any] = {"p_error": 0.0, "mix": {}, "limit_per_s": LIMIT, "retry_after_s": 1.0}
    provider.play([
        Phase("ramp", RAMP_S, capacity_per_s=CAPACITY, **limits),
        Phase("well", math.inf, capacity_per_s=CAPACITY[1], **limits),
    ])  # fmt: skip
    os.environ |= environ
    stop, sent, guesses = threading.Event(), Counter[str](), Guesses()
    traffic = threading.Thread(target=lambda: sent.update(live_traffic(folder, stop)))
    traffic.start()
    until(lambda: not breakers.read([KEY])[KEY].is_down, "the breaker recovers", 0.01)
    recovered_at = time.monotonic()
    recovered_unix = time.time()
    extra: dict[str, float] = {}
    if kill is not None:
        until(lambda: int(store.get("home:done") or 0) >= held // 2, "half of them are home")
        extra["goes on after s"] = killed(kill, store, folder)

    def is_home() -> bool:
        guesses.note()
        return int(store.get("home:done") or 0) >= held and ledger.read().held == 0

    until(is_home, "the backlog is home")
    ended_unix = time.time()
    took_s = time.monotonic() - recovered_at
    stop.set()
    traffic.join()
    until(lambda: (account := ledger.read()).queued == account.running == account.held == 0, "the live jobs are done, too")
    outcomes = Counter(call.outcome for call in provider.calls()[before:])
    replies = sorted(float(raw.split()[1]) for raw in store.zrangebyscore("home:replies", recovered_unix, "+inf"))
    jobs = held + sent.total()
    least_s = optimum_s(held, recovered_at - returned_at)
    return {
        "held": held,
        "live": dict(sent),
        "took_s": took_s,
        "optimum_s": least_s,
        "recovered_after_s": recovered_at - returned_at,
        "outcomes": dict(outcomes),
        "openings": breakers.read([KEY])[KEY].generation,
        "reply_p50_s": replies[len(replies) // 2],
        "reply_p99_s": replies[math.ceil(0.99 * len(replies)) - 1],
        "goals": {
            "time / optimum": took_s / least_s,
            "429s": outcomes["rate_limited"],
            "calls per job": outcomes.total() / jobs,
            "lost": ledger.read().lost,
            "end told wrong": guesses.wrong(recovered_unix, ended_unix),
            **extra,
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held", type=int, default=1500, help="jobs that come home")
    parser.add_argument("--kill", choices=["leader", "worker", "redis"], help="kill -9 on the way")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    asked = parser.parse_args()
    found = measured(asked.held, asked.kill)
    if asked.json:
        print(json.dumps({"schema": 1, **found}))
    else:
        live, took = sum(found["live"].values()), f"home in {found['took_s']:.0f} s; optimum {found['optimum_s']:.0f} s"
        print(f"{found['held']:,} held jobs beside {live:,} live ones: {took}")
        print(f"calls: {found['outcomes']}; critical p50 {found['reply_p50_s']:.1f} s, p99 {found['reply_p99_s']:.1f} s")
        for what, ours in found["goals"].items():
            print(f"{'✓' if ours <= GOALS[what] else '✗'} {what}: {ours:.3g} (goal {GOALS[what]})")
    return 0 if all(ours <= GOALS[what] for what, ours in found["goals"].items()) else 1


if __name__ == "__main__":
    sys.exit(main())
