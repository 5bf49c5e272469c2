# SPDX-License-Identifier: Apache-2.0
"""The faults of a run: planned from a seed before it starts, so that a seed is a plan; then done to the stage, one by one.

A fault that lasts has two acts, a beginning and an end, so that others may fall between. Each writes its window into the
ledger when it is over.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import redis
from tests.chaos.stage import WORKERS, Stage

from tideover.testing import Fault

Victim = Literal["worker", "redis", "provider", "clock"]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a fault befalls, how often it comes before every kind has come, and how long it lasts (least, most; seconds)."""

    victim: Victim
    often: int
    lasts_s: tuple[float, float] = (0.0, 0.0)


KINDS = {
    "kill-worker": Kind("worker", 4, (0.1, 0.8)),
    "stop-worker": Kind("worker", 2, (3.5, 5.0)),  # for longer than the heartbeat
    "deploy-worker": Kind("worker", 1),
    "kill-redis": Kind("redis", 3, (0.1, 0.8)),
    "restart-redis": Kind("redis", 1, (0.1, 0.8)),
    "slow-redis": Kind("redis", 2, (0.3, 1.0)),
    "kill-clients": Kind("redis", 2),
    "flush-scripts": Kind("redis", 1),
    "flap": Kind("provider", 4, (0.5, 3.0)),
    "jump-clock": Kind("clock", 2, (1.0, 4.0)),  # and back
    "set-clock": Kind("clock", 1),  # for good
}
THERE_ARE: dict[Victim, int] = {"worker": WORKERS, "redis": 1, "provider": 2, "clock": WORKERS}
FLAPS = (Fault.OVERLOADED, Fault.UNAVAILABLE, Fault.HANG, Fault.RESET, Fault.RATE_LIMITED, Fault.EDGE_HTML)
JUMPS_S = (-3600.0, -20.0, 3.0, 20.0, 600.0, 3600.0)
FIRST_S = 0.3
GAPS_S = (0.2, 1.0)


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault: from when until when, in seconds after the start of the run, and on which of its kind of victim."""

    kind: str
    from_s: float
    until_s: float
    on: int
    flap: Fault
    jump_s: float


def plan(seed: int, seconds: float, only: Collection[str] = tuple(KINDS)) -> list[Planned]:
    """The faults of so many seconds. Who suffers already is left alone until that is over."""
    chance = random.Random(f"faults {seed}")
    now, planned = FIRST_S, list[Planned]()
    busy: dict[tuple[Victim, int], float] = {}
    for name in deals(chance, [name for name in KINDS if name in only]):
        now += chance.uniform(*GAPS_S)
        if now > seconds:
            return planned
        kind = KINDS[name]
        on, until = chance.randrange(THERE_ARE[kind.victim]), min(now + chance.uniform(*kind.lasts_s), seconds)
        fault = Planned(name, now, until, on, chance.choice(FLAPS), chance.choice(JUMPS_S))
        if busy.get((kind.victim, on), 0.0) <= now:
            busy[kind.victim, on] = until
            planned.append(fault)
    raise AssertionError("deals without end")


def deals(chance: random.Random, names: list[str]) -> Iterator[str]:
    """Kinds without end, each pack of them shuffled."""
    often = [KINDS[name].often for name in names]
    while True:
        yield from chance.sample(names, sum(often), counts=often)


class Chaos:
    """Does a plan to a stage."""

    def __init__(self, stage: Stage, planned: list[Planned]) -> None:
        self.stage = stage
        begins = [(fault.from_s, self.begin, fault) for fault in planned]
        ends = [(fault.until_s, self.end, fault) for fault in planned]
        self.acts: list[tuple[float, Callable[[Planned], None], Planned]] = sorted([*begins, *ends], key=lambda act: act[0])
        self.began: dict[Planned, float] = {}
        self.unwritten: dict[Planned, bool] = {}
        """Whether Redis had answered what it had not written when it was killed."""
        self.clocks_s: dict[int, float] = {}
        """Clocks that were set for good."""

    def go_on(self, elapsed_s: float) -> bool:
        """Does what is due by now; whether something is left to do."""
        while self.acts and self.acts[0][0] <= elapsed_s:
            _, act, fault = self.acts.pop(0)
            act(fault)
        return bool(self.acts)

    def begin(self, fault: Planned) -> None:
        self.began[fault] = time.monotonic()
        stage = self.stage
        match fault.kind:
            case "kill-worker":
                slot = stage.slots[fault.on]
                slot.kill()
                self.note(fault, worker=slot.name)
            case "stop-worker":
                stage.slots[fault.on].signal(signal.SIGSTOP)
            case "deploy-worker":
                stage.slots[fault.on].retire()
            case "kill-redis":
                self.unwritten[fault] = stage.valkey.owes()
                stage.valkey.signal(signal.SIGKILL)
            case "restart-redis":
                stage.valkey.signal(signal.SIGTERM)
            case "slow-redis":
                stage.valkey.signal(signal.SIGSTOP)
            case "kill-clients":
                self.tell_redis("CLIENT", "KILL", "TYPE", "pubsub")
                self.tell_redis("CLIENT", "KILL", "TYPE", "normal")
            case "flush-scripts":
                self.tell_redis("SCRIPT", "FLUSH")
            case "flap":
                stage.providers[fault.on].fail(fault.flap)
            case "jump-clock" | "set-clock":
                stage.slots[fault.on].clock.write_text(str(fault.jump_s))

    def end(self, fault: Planned) -> None:
        stage = self.stage
        match fault.kind:
            case "kill-worker":
                stage.slots[fault.on].start()
            case "stop-worker":
                stage.slots[fault.on].signal(signal.SIGCONT)
                self.note(fault, worker=stage.slots[fault.on].name)
            case "deploy-worker":
                stage.slots[fault.on].start()
                self.note(fault)
            case "kill-redis" | "restart-redis":
                stage.valkey.start()
                self.note(fault, unwritten=self.unwritten.get(fault, False))
            case "slow-redis":
                stage.valkey.signal(signal.SIGCONT)
                self.note(fault)
            case "flap":
                stage.providers[fault.on].heal()
                self.note(fault, how=fault.flap)
            case "jump-clock":
                stage.slots[fault.on].clock.write_text(str(self.clocks_s.get(fault.on, 0.0)))
                self.note(fault, how=fault.jump_s)
            case "set-clock":
                self.clocks_s[fault.on] = fault.jump_s
                self.note(fault, how=fault.jump_s)
            case _:
                self.note(fault)

    def tell_redis(self, *command: str) -> None:
        with contextlib.suppress(redis.RedisError):  # it may be down, and CLIENT KILL kills the one who says it, too
            self.stage.valkey.client.execute_command(*command)  # type: ignore[no-untyped-call]

    def note(self, fault: Planned, **facts: object) -> None:
        """The fault's window, from before its beginning to after its end."""
        self.stage.note("fault", at=self.began[fault], until=time.monotonic(), kind=fault.kind, **facts)
