# SPDX-License-Identifier: Apache-2.0
"""The store of one namespace, with short ways to bring jobs into each place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import redis

from tideover.core.breaker import Breaker, State, Transition
from tideover.core.job import End
from tideover.store.account import Ledger
from tideover.store.backlog import Backlog, HeldFacts, HeldSet
from tideover.store.breakers import Breakers
from tideover.store.keys import Keys
from tideover.store.registry import Registry
from tideover.store.stories import Stories

QUEUE, WORKER, BREAKER_KEY = "default", "w1", "a/m"


@dataclass(frozen=True)
class House:
    """All ports on one client, and jobs `r0`, `r1`... with the ids `job-r0`, `job-r1`..."""

    client: redis.Redis
    keys: Keys

    held = HeldSet(QUEUE, BREAKER_KEY)

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.client, self.keys)

    @cached_property
    def backlog(self) -> Backlog:
        return Backlog(self.client, self.keys)

    @cached_property
    def breakers(self) -> Breakers:
        return Breakers(self.client, self.keys)

    @cached_property
    def registry(self) -> Registry:
        return Registry(self.client, self.keys)

    @cached_property
    def stories(self) -> Stories:
        return Stories(self.client, self.keys)

    def accepted(self, n: int, queue: str = QUEUE) -> list[str]:
        ids = [f"r{i}" for i in range(n)]
        for i in ids:
            self.ledger.accept(queue, i, f"body of {i}".encode())
        return ids

    def fetched(self, n: int, worker: str = WORKER) -> list[str]:
        """n new jobs, in a worker's hands."""
        ids = self.accepted(n)
        jobs, _ = self.backlog.fetch(worker, QUEUE, n)
        assert ids == [job.redis_id for job in jobs]
        return ids

    def facts(self, redis_id: str, **more: Any) -> HeldFacts:
        plain: dict[str, Any] = {
            "redis_id": redis_id, "job_id": f"job-{redis_id}", "task": "t", "queue": QUEUE, "criticality": "deferrable",
            "wait_key": BREAKER_KEY, "reason": "outage", "generation": 1, "held_ms": 1000, "sent_ms": 900, "expires_ms": None,
        }  # fmt: skip
        return HeldFacts(**{**plain, **more})

    def hold(self, ids: list[str], worker: str = WORKER, **more: Any) -> list[bool]:
        return self.backlog.hold(worker, QUEUE, (BREAKER_KEY,), [self.facts(i, **more) for i in ids], 60.0)

    def holding(self, n: int, **more: Any) -> list[str]:
        """n new jobs, held."""
        ids = self.fetched(n)
        assert [True] * n == self.hold(ids, **more)
        return ids

    def settle(self, redis_id: str, end: End = "succeeded", worker: str = WORKER) -> bool:
        return self.ledger.settle(worker, QUEUE, redis_id, f"job-{redis_id}", end)

    def release(self, generation: int | None = None, permit: str = "a/m@0", **pace: Any) -> list[str]:
        pace = {"rate": 1000.0, "burst": 500.0, "most_queued": 1000, **pace}
        released, _ = self.backlog.release(self.held, BREAKER_KEY, generation, permit, **pace)
        return [fact.redis_id for fact in released]

    def move(self, *states: State) -> Breaker:
        """Walks the breaker through these states."""
        for state in states:
            seen = self.breaker()
            assert self.breakers.transition(BREAKER_KEY, seen, Transition(state, "why"))
        return self.breaker()

    def breaker(self) -> Breaker:
        return self.breakers.read([BREAKER_KEY])[BREAKER_KEY]

    def queued(self, queue: str = QUEUE) -> list[str]:
        return [i.decode() for i in self.client.lrange(self.keys.queue(queue), 0, -1)]

    def bodies(self) -> set[str]:
        return {i.decode() for i in self.client.hkeys(self.keys.msgs(QUEUE))}


@pytest.fixture
def house(client: redis.Redis, keys: Keys) -> House:
    return House(client, keys)
