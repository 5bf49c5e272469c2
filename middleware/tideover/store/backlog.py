# SPDX-License-Identifier: Apache-2.0
"""Fetch, hold, release, expire and give back: moves of ids. A job's body stays in dramatiq's hash all the while."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tideover.core.admission import Reason
from tideover.core.job import Criticality
from tideover.store.client import Client, Scripts, starting, text
from tideover.store.keys import Keys, queue_of, wait_key_text

PAGE = 500

Whereabouts = Literal["queued", "running", "held"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldFacts:
    """What is known of a held job without reading its body. Instants in unix milliseconds."""

    redis_id: str
    job_id: str
    task: str
    queue: str
    criticality: Criticality
    wait_key: str
    reason: Reason
    generation: int
    held_ms: int
    sent_ms: int
    expires_ms: int | None
    detail: str = ""

    def encode(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def decode(cls, raw: Any) -> HeldFacts:
        return cls(**json.loads(raw))

    @property
    def breaker_keys(self) -> tuple[str, ...]:
        return tuple(self.wait_key.split("|"))


@dataclass(frozen=True, slots=True)
class Fetched:
    redis_id: str
    body: bytes
    permit: str | None


@dataclass(frozen=True, slots=True)
class HeldSet:
    """The jobs of one queue that wait for the same breakers."""

    queue: str
    wait_key: str

    @property
    def name(self) -> str:
        return f"{self.queue}\t{self.wait_key}"

    @property
    def breaker_keys(self) -> tuple[str, ...]:
        return tuple(self.wait_key.split("|"))


class Backlog:
    """The moves of one namespace."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self.client, self.keys, self.scripts = client, keys, Scripts(client)

    def fetch(self, worker: str, queue: str, n: int) -> tuple[list[Fetched], list[str]]:
        """Up to `n` jobs for a worker, and the ids of such whose body is gone."""
        k = self.keys
        keys = [k.queue(queue), k.msgs(queue), k.acks(worker, queue), k.heartbeats, k.permits(queue), k.queues]
        ids, bodies, permits = self.scripts.run("fetch-6", keys, [min(n, PAGE), worker, queue_of(queue)])
        jobs, missing = [], []
        for redis_id, body, permit in zip(ids, bodies, permits, strict=True):
            if body is None:
                missing.append(text(redis_id))
            else:
                jobs.append(Fetched(text(redis_id), body, text(permit) if permit else None))
        if missing:
            self.client.srem(k.acks(worker, queue), *missing)
        return jobs, missing

    def hold(
        self, worker: str, queue: str, wait_key: Sequence[str], jobs: Sequence[HeldFacts], max_wait_s: float
    ) -> list[bool]:
        """Holds fetched jobs; for each, whether it was still this worker's."""
        k, held = self.keys, HeldSet(queue, wait_key_text(wait_key))
        keys = [
            k.acks(worker, queue),
            k.facts(queue),
            k.permits(queue),
            k.held(queue, held.wait_key),
            k.held_sets,
            k.places,
        ]
        args: list[Any] = [queue, held.name]
        for job in jobs:
            latest = job.held_ms + int(max_wait_s * 1000)
            by_ms = latest if job.expires_ms is None else min(job.expires_ms, latest)
            args += [job.redis_id, job.job_id, by_ms, job.encode()]
        return [bool(code) for code in self.scripts.run("hold-7", [*keys, k.counters], args)]

    def held_sets(self) -> list[HeldSet]:
        return sorted(
            (HeldSet(*text(entry).split("\t", 1)) for entry in self.client.smembers(self.keys.held_sets)),
            key=lambda s: s.name,
        )

    def release(
        self,
        held: HeldSet,
        key: str,
        generation: int | None,
        permit: str,
        *,
        rate: float,
        burst: float,
        most_queued: int,
    ) -> tuple[list[HeldFacts], int]:
        """Releases what the pace of breaker `key` allows while it is in `generation` (None: any). Who, and how many wait."""
        k, q = self.keys, held.queue
        keys = [
            k.held(q, held.wait_key),
            k.facts(q),
            k.queue(q),
            k.permits(q),
            k.held_sets,
            k.breaker(key),
            k.bucket(key),
        ]
        args = [held.name, "" if generation is None else generation, permit, rate, burst, most_queued]
        released, left = self.scripts.run("release-9", [*keys, k.counters, k.msgs(q)], args)
        return [HeldFacts.decode(raw) for raw in released if raw], int(left)

    def free(self, held: HeldSet, redis_ids: Sequence[str], permit: str) -> list[HeldFacts]:
        """Releases chosen jobs at once."""
        k, q = self.keys, held.queue
        keys = [k.held(q, held.wait_key), k.facts(q), k.queue(q), k.permits(q), k.held_sets, k.counters, k.msgs(q)]
        return [HeldFacts.decode(raw) for raw in self.scripts.run("free-7", keys, [held.name, permit, *redis_ids]) if raw]

    def expire(self, held: HeldSet, jobs: Sequence[HeldFacts]) -> list[str]:
        """Ends held jobs that are past their expiry; the ids of those that were still held."""
        k, q = self.keys, held.queue
        keys = [
            k.held(q, held.wait_key),
            k.facts(q),
            k.msgs(q),
            k.account,
            k.adopted,
            k.places,
            k.dead(q),
            k.dead_msgs(q),
            k.held_sets,
        ]
        args = [held.name, *(part for job in jobs for part in (job.redis_id, job.job_id))]
        return [text(job_id) for job_id in self.scripts.run("expire-9", keys, args)]

    def give_back(self, worker: str, queue: str, redis_ids: Sequence[str]) -> int:
        """Puts fetched jobs back at the head of their queue."""
        k = self.keys
        return int(self.scripts.run("requeue-3", [k.acks(worker, queue), k.queue(queue), k.msgs(queue)], redis_ids))

    def reclaim(self, worker: str, queue: str, known: Iterable[str]) -> int:
        """Puts back what this worker fetched without knowing it."""
        k = self.keys
        return int(self.scripts.run("reclaim-3", [k.acks(worker, queue), k.queue(queue), k.msgs(queue)], list(known)))

    def recover(self, worker: str, queue: str, dead_after_s: float) -> int:
        """Puts back what a dead worker had fetched; -1 when it lives."""
        k = self.keys
        keys = [k.heartbeats, k.acks(worker, queue), k.queue(queue), k.msgs(queue)]
        return int(self.scripts.run("recover-4", keys, [worker, int(dead_after_s * 1000)]))

    def sweep(self, queue: str, lifetime_ms: int) -> int:
        """Forgets dead letters of a queue that are older than their lifetime; at most a page of them."""
        return int(self.scripts.run("sweep-2", [self.keys.dead(queue), self.keys.dead_msgs(queue)], [lifetime_ms, PAGE]))

    def due(self, held: HeldSet, now_ms: int) -> Iterator[HeldFacts]:
        """Held jobs whose order says that they should have gone by now, earliest first, page by page."""
        key, start = self.keys.held(held.queue, held.wait_key), 0
        while ids := self.client.zrangebyscore(key, "-inf", now_ms, start=start, num=PAGE):
            yield from self.facts(held.queue, [text(i) for i in ids])
            start += len(ids)

    def facts(self, queue: str, redis_ids: Sequence[str]) -> list[HeldFacts]:
        if not redis_ids:
            return []
        return [HeldFacts.decode(raw) for raw in self.client.hmget(self.keys.facts(queue), redis_ids) if raw]

    def browse(self, held: HeldSet) -> Iterator[HeldFacts]:
        """All jobs of a held set, earliest first, page by page; one that leaves meanwhile may be skipped."""
        for _, facts in self.ordered(held):
            yield facts

    def ordered(self, held: HeldSet) -> Iterator[tuple[int, HeldFacts]]:
        """As `browse`, each with the unix ms that it is ordered by."""
        key, start = self.keys.held(held.queue, held.wait_key), 0
        while page := self.client.zrange(key, start, start + PAGE - 1, withscores=True):
            by_ms = {text(redis_id): int(score) for redis_id, score in page}
            for facts in self.facts(held.queue, list(by_ms)):
                yield by_ms[facts.redis_id], facts
            start += len(page)

    def size(self, held: HeldSet) -> int:
        return int(self.client.zcard(self.keys.held(held.queue, held.wait_key)))

    def ahead(self, held: HeldSet, redis_id: str) -> int | None:
        """How many jobs of its held set go before this one; None: it is not in it."""
        rank = self.client.zrank(self.keys.held(held.queue, held.wait_key), redis_id)
        return None if rank is None else int(rank)

    def place(self, job_id: str, redis_id: str | None = None, queue: str | None = None) -> tuple[str, str] | None:
        """Queue and Redis id of a live job: as last noted, or as its sender knows them; None when it is not alive."""
        noted = self.client.hget(self.keys.places, job_id)
        if noted:
            at_queue, at_id = text(noted).split("\t", 1)
            return at_queue, at_id
        if redis_id is not None and queue is not None and self.client.hexists(self.keys.msgs(queue), redis_id):
            return queue, redis_id
        return None

    def is_running(self, queue: str, redis_id: str) -> bool:
        """Whether a worker has fetched this job."""
        workers = [text(w) for w in self.client.zrange(self.keys.heartbeats, 0, -1)]
        with self.client.pipeline(transaction=False) as pipe:
            for worker in workers:
                pipe.sismember(self.keys.acks(worker, queue), redis_id)
            return any(pipe.execute())

    def whereabouts(self, queue: str, redis_id: str) -> tuple[Whereabouts | None, HeldFacts | None]:
        """Where this job is, and its facts while it is held. None: in no place, or on its way from one to the next."""
        for facts in self.facts(queue, [redis_id]):
            if self.ahead(HeldSet(queue, facts.wait_key), redis_id) is not None:
                return "held", facts
        if self.client.lpos(self.keys.queue(queue), redis_id) is not None:
            return "queued", None
        return ("running" if self.is_running(queue, redis_id) else None), None

    def jobs_like(self, prefix: str) -> set[str]:
        """Ids of live jobs, once held or retried, that begin so."""
        return {text(job_id) for job_id, _ in self.client.hscan_iter(self.keys.places, match=starting(prefix), count=PAGE)}

    def fetched(self, worker: str, queues: Sequence[str]) -> int:
        """How many jobs of these queues a worker has fetched."""
        with self.client.pipeline(transaction=False) as pipe:
            for queue in queues:
                pipe.scard(self.keys.acks(worker, queue))
            return sum(pipe.execute())
