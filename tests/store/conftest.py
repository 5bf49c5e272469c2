# SPDX-License-Identifier: Apache-2.0
"""The store of one namespace, with short ways to bring jobs into each place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import redis

from tideover import clock
from tideover.core.breaker import Breaker, State, Transition
from tideover.core.job import End
from tideover.core.route import Permit
from tideover.store.account import Acceptance, Ledger, NewJob, Room
from tideover.store.backlog import Allowance, Backlog
from tideover.store.breakers import Breakers
from tideover.store.facts import Group, HeldFacts, Member, encoded, order_of
from tideover.store.keys import Keys
from tideover.store.letters import Letters
from tideover.store.registry import Registry
from tideover.store.stories import Stories

QUEUE, WORKER, BREAKER_KEY = "default", "w1", "a/m"
ANY_ROOM = Room()
BY_HAND = Permit("*", 0)
MAX_WAIT_S = 60.0
DIGESTS = 97


@dataclass(frozen=True)
class House:
    """All ports on one client, and jobs `r0`, `r1`..."""

    client: redis.Redis
    keys: Keys

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.client, self.keys)

    @cached_property
    def backlog(self) -> Backlog:
        return Backlog(self.client, self.keys)

    @cached_property
    def letters(self) -> Letters:
        return Letters(self.client, self.keys)

    @cached_property
    def breakers(self) -> Breakers:
        return Breakers(self.client, self.keys)

    @cached_property
    def registry(self) -> Registry:
        return Registry(self.client, self.keys)

    @cached_property
    def stories(self) -> Stories:
        return Stories(self.client, self.keys)

    def accept(
        self, *redis_ids: str, queue: str = QUEUE, room: Room = ANY_ROOM, tenant: str = "", once: tuple[str, str] = ("", "")
    ) -> list[Acceptance]:
        jobs = [NewJob(redis_id=i, body=f"body of {i}".encode(), tenant=tenant, once=once) for i in redis_ids]
        return self.ledger.accept(queue, jobs, room)

    def accepted(self, n: int, queue: str = QUEUE) -> list[str]:
        ids = [f"r{i}" for i in range(n)]
        assert [Acceptance("accepted")] * n == self.accept(*ids, queue=queue)
        return ids

    def put(self, redis_id: str, queue: str = QUEUE) -> None:
        """What a producer without tideover does."""
        self.client.hset(self.keys.msgs(queue), redis_id, f"body of {redis_id}")
        self.client.rpush(self.keys.queue(queue), redis_id)

    def fetched(self, n: int, worker: str = WORKER) -> list[str]:
        """n new jobs, in a worker's hands."""
        ids = self.accepted(n)
        jobs, _ = self.backlog.fetch(worker, QUEUE, n)
        assert ids == [job.redis_id for job in jobs]
        return ids

    def facts(self, redis_id: str, **more: Any) -> HeldFacts:
        plain: dict[str, Any] = {
            "redis_id": redis_id, "job_id": redis_id, "task": "t", "queue": QUEUE, "criticality": "deferrable",
            "wait_key": BREAKER_KEY, "reason": "outage", "generation": 1, "held_ms": 1000, "sent_ms": 900, "expires_ms": None,
            "held_before_ms": 0,
        }  # fmt: skip
        told = {**plain, **more}
        age = {name: told[name] for name in ("held_ms", "held_before_ms", "expires_ms")}
        return HeldFacts(**{"order": order_of(**age, max_wait_s=MAX_WAIT_S, nth=0), **told})

    def hold(self, ids: Sequence[str], worker: str = WORKER, queue: str = QUEUE, **more: Any) -> list[bool]:
        return self.backlog.hold(worker, queue, [self.facts(i, queue=queue, **more) for i in ids])

    def holding(self, n: int, **more: Any) -> list[str]:
        """n new jobs, held."""
        ids = self.fetched(n)
        assert [True] * n == self.hold(ids, **more)
        return ids

    def settle(self, redis_id: str, end: End = "succeeded", worker: str = WORKER, queue: str = QUEUE, **more: str) -> bool:
        return self.ledger.settle(worker, queue, redis_id, redis_id, end, **more)

    def groups(self, queue: str = QUEUE) -> list[Group]:
        return self.backlog.groups(queue)

    def held(self, queue: str = QUEUE) -> list[str]:
        """Who is held, in the order in which they go."""
        return [facts.redis_id for facts in self.backlog.browse(self.groups(queue))]

    def dead(self, queue: str = QUEUE) -> dict[str, bytes]:
        """Dead letters and their bodies, the first to end first."""
        return {letter.redis_id: letter.body for page in self.letters.pages(queue) for letter in page}

    def plan(self) -> list[Member]:
        """Who goes next."""
        return self.backlog.page(self.groups(), 500)

    def members(self, *redis_ids: str, queue: str = QUEUE) -> list[bytes]:
        return list(self.backlog.members(queue, redis_ids).values())

    def release(self, generation: int | None = None, permit: str = "a/m@0", **pace: Any) -> list[str]:
        """Releases at a pace, the most urgent first."""
        plain = {"key": BREAKER_KEY, "generation": generation, "rate": 1000.0, "burst": 500.0, "calls_each": 1.0}
        plain["most_queued"] = 1000
        members = [member.raw for member in self.plan()]
        released = self.backlog.release(QUEUE, members, Permit.parse(permit), Allowance(**{**plain, **pace})).jobs
        return [fact.redis_id for fact in released]

    def release_by_hand(self, *redis_ids: str, queue: str = QUEUE) -> list[str]:
        """Releases these at once."""
        released = self.backlog.release(queue, self.members(*redis_ids, queue=queue), BY_HAND).jobs
        return [fact.redis_id for fact in released]

    def mark(self, redis_id: str, queue: str = QUEUE) -> str | None:
        raw = self.client.hget(self.keys.marks(queue), redis_id)
        return None if raw is None else raw.decode()

    def move(self, *states: State) -> Breaker:
        """Walks the breaker through these states."""
        for state in states:
            seen = self.breaker()
            assert self.breakers.transition(BREAKER_KEY, seen, Transition(to=state, why="why"), clock.now())
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


class PoorHash:
    """Stands for `blake2b`, with so few digests that they collide."""

    def __init__(self, data: bytes, *, digest_size: int) -> None:
        self.made = bytes([sum(data) % DIGESTS]).rjust(digest_size, b"\0")

    def digest(self) -> bytes:
        return self.made


@pytest.fixture
def few_group_ids(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Groups of different facets often have one id, which takes luck otherwise: it has 48 bits."""
    monkeypatch.setattr("tideover.store.facts.blake2b", PoorHash)
    encoded.cache_clear()
    yield
    encoded.cache_clear()
