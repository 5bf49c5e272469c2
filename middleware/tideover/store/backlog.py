# SPDX-License-Identifier: Apache-2.0
"""Fetch, hold, release, expire and give back: moves of ids. A job's body stays in dramatiq's hash all the while."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any, Literal, NamedTuple

from tideover.core.route import Mark, Permit, above
from tideover.store.client import Client, starting, text
from tideover.store.facts import FIXED, GROUP, HEAD, Facet, Group, HeldFacts, Member, encoded, packed_id, text_id
from tideover.store.keys import DELAYED_SUFFIX, Keys, queue_of
from tideover.store.scripts import Scripts, apart
from tideover.store.walk import AT_ONCE, MOST_READ, Place, Walk, bounds

PAGE = 500
HELD_AT_ONCE = 64
"""Jobs that one script holds. With fewer each would cost more; with more Redis would wait longer for the first of them, and one
that rewrites its log would copy so many pages that it stood still for 10 ms."""
MOST_GROUPS = 5000
"""Groups of a queue; beyond that tenants and tags share some."""

HEX = re.compile(r"[0-9a-f]{6,}")
GLOB = re.compile(rb"([*?\[\]\\^-])")

Whereabouts = Literal["queued", "running", "held"]


class Fetched(NamedTuple):
    redis_id: str
    body: bytes
    mark: Mark


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """How much one release may let go: `rate` calls/s of the breaker `key` while it is in `generation` (None: any).

    `calls_each`: calls that a job makes over it; `most_queued`: jobs that may wait for a worker; `borrow`: calls that it may
    take from what is to come, as live critical ones do.
    """

    key: str
    generation: int | None
    rate: float
    burst: float
    calls_each: float
    most_queued: int
    borrow: float = 0.0


class Released(NamedTuple):
    """What a release came to. `looked_at`: of the members; the others had no room. `crowded`: the pace would have let more go
    than the workers have room for."""

    jobs: list[HeldFacts]
    looked_at: int
    crowded: bool


def to_hold(queue: str, jobs: Sequence[HeldFacts], facets: Sequence[Facet], most_groups: int) -> list[Any]:
    """The arguments of the script that holds."""
    groups = list(dict.fromkeys(facets))
    moved = [part for job in jobs if job.job_id != job.redis_id for part in (job.job_id, job.redis_id)]
    args: list[Any] = [
        queue,
        most_groups,
        len(groups),
        len(jobs),
        len(moved),
        *(part for facet in groups for part in encoded(facet)),
    ]
    for job, facet in zip(jobs, facets, strict=True):
        args += job.redis_id, *job.packed(facet)
    waiting = [job for job in jobs if job.reason == "coalesced"]  # with who runs for them
    return args + moved + [part for job in waiting for part in (job.twin, packed_id(job.redis_id), job.detail, job.redis_id)]


class Backlog:
    """The moves of one namespace."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self.client, self.keys, self.scripts = client, keys, Scripts(client)
        self._facets: dict[bytes, Facet] = {}

    # a worker's moves

    def fetch(self, worker: str, queue: str, n: int) -> tuple[list[Fetched], list[str]]:
        """Up to `n` jobs for a worker, and the ids of such whose body is gone."""
        k = self.keys
        keys = [k.queue(queue), k.msgs(queue), k.acks(worker, queue), k.heartbeats, k.marks(queue), k.queues]
        sizes, whole, marks = self.scripts.run("fetch-6", keys, [min(n, PAGE), worker, queue_of(queue)])
        said = apart(sizes, whole)
        ids, bodies = said[: len(said) // 2], said[len(said) // 2 :]
        marked = {int(i): Mark.parse(text(mark)) for i, mark in zip(marks[::2], marks[1::2], strict=True)}
        jobs, missing = [], []
        for i, (redis_id, body) in enumerate(zip(map(text, ids), bodies, strict=True)):
            if body is None:
                missing.append(redis_id)
            else:
                jobs.append(Fetched(redis_id, body, marked.get(i, NO_MARK)))
        if missing:
            self.client.srem(k.acks(worker, queue), *missing)
            self.client.hdel(k.marks(queue), *missing)
        return jobs, missing

    def hold(self, worker: str, queue: str, jobs: Iterable[HeldFacts]) -> list[bool]:
        """Holds fetched jobs; for each, whether it was still this worker's. While Redis holds some, the next are asked for."""
        k = self.keys
        keys = [k.acks(worker, queue), k.held(queue), k.facts(queue), k.marks(queue), k.groups(queue), k.counts(queue)]
        keys += [k.places, k.counters, k.leaders(queue), k.waiters(queue)]
        parts: list[list[HeldFacts]] = []

        def requests() -> Iterator[list[Any]]:
            todo = iter(jobs)
            while part := list(islice(todo, HELD_AT_ONCE)):
                parts.append(part)
                yield to_hold(queue, part, [job.facet for job in part], MOST_GROUPS)

        held: list[bool] = []
        for nth, answer in enumerate(self.scripts.run_each("hold-10", keys, requests())):
            gone = set(self._share(queue, keys, parts[nth], answer) if answer and answer[0] == b"refused" else answer)
            held += [i not in gone for i in range(len(parts[nth]))]
        return held

    def _share(self, queue: str, keys: Sequence[str], jobs: Sequence[HeldFacts], answer: Any) -> Sequence[int]:
        """Holds jobs of which Redis refused groups: in groups of several tenants. The numbers of those that are gone."""
        most, facets = MOST_GROUPS, [job.facet for job in jobs]
        while answer and answer[0] == b"refused":
            groups = list(dict.fromkeys(facets))
            refused = {groups[int(i)] for i in answer[1:]}
            most *= 2  # for the groups that are shared
            facets = [facet.bucketed() if facet in refused else facet for facet in facets]
            answer = self.scripts.run("hold-10", keys, to_hold(queue, jobs, facets, most))
        return [int(i) for i in answer]

    def begin(self, worker: str, queue: str, redis_id: str, mark: Mark) -> None:
        """Notes that a worker is about to run a job that was aboard when another worker died."""
        self.scripts.run("begin-2", [self.keys.acks(worker, queue), self.keys.marks(queue)], [redis_id, str(mark)])

    def has(self, worker: str, queue: str, redis_id: str) -> bool:
        """Whether a worker has this job: it may have been given back while the worker was silent."""
        return bool(self.client.sismember(self.keys.acks(worker, queue), redis_id))

    def give_back(self, worker: str, queue: str, redis_ids: Sequence[str]) -> int:
        """Puts fetched jobs back at the head of their queue."""
        k = self.keys
        return int(self.scripts.run("requeue-3", [k.acks(worker, queue), k.queue(queue), k.msgs(queue)], redis_ids))

    def reclaim(self, worker: str, queue: str, known: Iterable[str]) -> int:
        """Puts back what this worker fetched without knowing it."""
        k = self.keys
        return int(self.scripts.run("reclaim-3", [k.acks(worker, queue), k.queue(queue), k.msgs(queue)], list(known)))

    # moves of the fleet

    def recover(self, worker: str, queue: str, dead_after_s: float) -> int:
        """Puts back what a dead worker had fetched; -1 when it lives."""
        k = self.keys
        keys = [k.heartbeats, k.acks(worker, queue), k.queue(queue), k.msgs(queue), k.marks(queue)]
        return int(self.scripts.run("recover-5", keys, [worker, int(dead_after_s * 1000)]))

    def release(self, queue: str, members: Sequence[bytes], permit: Permit, allowance: Allowance | None = None) -> Released:
        """Releases held jobs in this order, as far as is allowed; without an allowance all, at once, to the queue's head."""
        k = self.keys
        keys = [k.held(queue), k.facts(queue), k.groups(queue), k.counts(queue), k.queue(queue), k.marks(queue)]
        keys += [k.msgs(queue), k.counters, k.breaker(permit.key), k.breaker(above(permit.key)), k.bucket(permit.key)]
        if allowance is None:
            args: list[Any] = [str(permit), "", "", "", "", "", ""]
        else:
            generation, key = "" if allowance.generation is None else allowance.generation, allowance.key
            keys[8:] = [k.breaker(key), k.breaker(above(key)), k.bucket(key)]
            args = [str(permit), generation, allowance.rate, allowance.burst, allowance.calls_each, allowance.most_queued]
            args.append(allowance.borrow)
        asked = members[:PAGE]
        self._learn(queue, {member[:GROUP] for member in asked})  # before, because a group goes with its last job
        looked_at, crowded, *raws = self.scripts.run("release-11", keys, [*args, *asked])
        jobs = self._decoded(queue, [(raw[2 : 2 + size], raw[2 + size :]) for raw in raws if (size := length(raw))])
        return Released(jobs, looked_at, bool(crowded))

    def expire(
        self, queue: str, jobs: Sequence[HeldFacts], end: Literal["expired", "discarded", "succeeded"] = "expired"
    ) -> list[bool]:
        """Ends held jobs, which become dead letters; for each, whether it was still held."""
        if len(jobs) > AT_ONCE:
            parts = [jobs[start : start + AT_ONCE] for start in range(0, len(jobs), AT_ONCE)]
            return [ended for part in parts for ended in self.expire(queue, part, end)]
        k = self.keys
        keys = [k.held(queue), k.facts(queue), k.groups(queue), k.counts(queue), k.msgs(queue), k.account]
        keys += [k.adopted, k.places, k.dead(queue), k.dead_msgs(queue), k.tenants]
        members = self.members(queue, [job.redis_id for job in jobs])
        args: list[Any] = [end]
        for job in jobs:
            args += [members.get(job.redis_id, b"-"), job.redis_id, job.job_id, job.tenant]
        return [bool(code) for code in self.scripts.run("expire-11", keys, args)]

    def sweep(self, queue: str, lifetime_ms: int) -> int:
        """Forgets dead letters of a queue that are older than their lifetime; at most a page of them."""
        return int(self.scripts.run("sweep-2", [self.keys.dead(queue), self.keys.dead_msgs(queue)], [lifetime_ms, PAGE]))

    # what is held

    def groups(self, queue: str) -> list[Group]:
        """The groups of a queue's held jobs, each with its number."""
        counts = {bytes(group): int(n) for group, n in self.client.hgetall(self.keys.counts(queue)).items()}
        self._learn(queue, counts)
        return [Group(queue, group, self._facets[group], n) for group, n in counts.items() if group in self._facets and n > 0]

    def heads(self, groups: Sequence[Group], limit: int, *, after: bytes = b"", until: int | None = None) -> list[Member]:
        """The first `limit` jobs of each group of one queue, after a place (order and id) and up to an order; unsorted."""
        bound = b"" if until is None else until.to_bytes(HEAD - GROUP)
        by_id = {group.id: group for group in groups}
        at_once = max(1, min(AT_ONCE, MOST_READ // max(1, limit)))
        found: list[Member] = []
        for start in range(0, len(groups), at_once):
            asked = [group.id for group in groups[start : start + at_once]]
            raws = self.scripts.run("heads-1", [self.keys.held(groups[0].queue)], [limit, after, bound, *asked])
            found += [Member(by_id[bytes(raw[:GROUP])], bytes(raw)) for raw in raws]
        return found

    def walk(self, groups: Sequence[Group], first: int, *, after: bytes = b"", until: int | None = None) -> Iterator[Member]:
        """The jobs of these groups of one queue, in order, after a place and up to an order; about `first` are wanted."""
        held, asked = self.keys.held(groups[0].queue) if groups else "", max(1, min(first, MOST_READ // max(1, len(groups))))

        def read(places: Sequence[Place]) -> Sequence[Member]:
            with self.client.pipeline(transaction=False) as pipe:
                for group, place, n in places:
                    pipe.zrangebylex(held, *bounds(group, place, until), 0, n)
                found = zip(places, pipe.execute(), strict=True)
                return [Member(group, bytes(raw)) for (group, *_), raws in found for raw in raws]

        return iter(Walk(groups, self.heads(groups, asked, after=after, until=until), asked, read))

    def page(self, groups: Sequence[Group], limit: int, *, after: bytes = b"", until: int | None = None) -> list[Member]:
        """The first `limit` jobs of all these groups of one queue, in order."""
        return list(islice(self.walk(groups, limit, after=after, until=until), limit))

    def browse(self, groups: Sequence[Group], *, after: bytes = b"", until: int | None = None) -> Iterator[HeldFacts]:
        """All jobs of these groups of one queue, in order, page by page; one that leaves meanwhile may be skipped."""
        walk = self.walk(groups, PAGE, after=after, until=until)
        while page := list(islice(walk, PAGE)):
            yield from self.facts_of(page)

    def facts_at(self, members: Sequence[Member]) -> list[HeldFacts | None]:
        """The facts of jobs of one queue, in this order; None for one that is not held there any more."""
        if not members:
            return []
        queue = members[0].group.queue
        raws = self.client.hmget(self.keys.facts(queue), [member.raw[HEAD:] for member in members])
        return [
            HeldFacts.decode(queue, member.raw[HEAD:], bytes(raw), member.group.facet)
            if raw and bytes(raw[:HEAD]) == member.raw[:HEAD]
            else None
            for member, raw in zip(members, raws, strict=True)
        ]

    def facts_of(self, members: Sequence[Member]) -> list[HeldFacts]:
        """The facts of jobs of one queue; of those that are still held."""
        return [facts for facts in self.facts_at(members) if facts is not None]

    def facts(self, queue: str, packed: Sequence[bytes]) -> list[HeldFacts]:
        found = self.client.hmget(self.keys.facts(queue), packed) if packed else []
        return self._decoded(queue, [(id_, bytes(raw)) for id_, raw in zip(packed, found, strict=True) if raw])

    def members(self, queue: str, redis_ids: Sequence[str]) -> dict[str, bytes]:
        """Redis id → member of the index, of those that are held."""
        packed = [packed_id(redis_id) for redis_id in redis_ids]
        found = self.client.hmget(self.keys.facts(queue), packed) if packed else []
        return {i: bytes(raw[:HEAD]) + p for i, p, raw in zip(redis_ids, packed, found, strict=True) if raw}

    def incomplete(self, members: Sequence[Member]) -> tuple[list[str], list[str]]:
        """Redis ids of held jobs of one queue that lack their facts, and of those that lack their body.

        What lacks something is looked for in the index once more: a job that left meanwhile lacks nothing.
        """
        if not members:
            return [], []
        k, queue, ids = self.keys, members[0].group.queue, [text_id(member.raw[HEAD:]) for member in members]
        with self.client.pipeline(transaction=False) as pipe:
            for member, redis_id in zip(members, ids, strict=True):
                pipe.hexists(k.facts(queue), member.raw[HEAD:])
                pipe.hexists(k.msgs(queue), redis_id)
            there = pipe.execute()
            for member in members:
                pipe.zscore(k.held(queue), member.raw)
            found = list(zip(ids, there[::2], there[1::2], pipe.execute(), strict=True))
        without_facts = [redis_id for redis_id, facts, _, score in found if score is not None and not facts]
        return without_facts, [redis_id for redis_id, _, body, score in found if score is not None and not body]

    def size(self, queue: str) -> int:
        return int(self.client.zcard(self.keys.held(queue)))

    def ahead(self, facts: HeldFacts, groups: Sequence[Group]) -> int:
        """How many held jobs of these groups of its queue go before this one."""
        place, n = facts.place, 0
        for start in range(0, len(groups), AT_ONCE):
            asked = [group.id for group in groups[start : start + AT_ONCE]]
            n += int(self.scripts.run("ahead-1", [self.keys.held(facts.queue)], [place, *asked]))
        return n

    # where a job is

    def place(self, job_id: str, queues: Iterable[str]) -> tuple[str, str] | None:
        """List and Redis id of a live job that was sent to one of these queues; None when it is not alive."""
        noted = self.client.hget(self.keys.places, job_id)
        if noted:
            at_queue, at_id = text(noted).split("\t", 1)
            return at_queue, at_id
        lanes = [lane for queue in queues for lane in (queue, queue + DELAYED_SUFFIX)]
        with self.client.pipeline(transaction=False) as pipe:
            for lane in lanes:
                pipe.hexists(self.keys.msgs(lane), job_id)
            return next(((lane, job_id) for lane, there in zip(lanes, pipe.execute(), strict=True) if there), None)

    def is_running(self, queue: str, redis_id: str) -> bool:
        """Whether a worker has fetched this job."""
        workers = [text(w) for w in self.client.zrange(self.keys.heartbeats, 0, -1)]
        with self.client.pipeline(transaction=False) as pipe:
            for worker in workers:
                pipe.sismember(self.keys.acks(worker, queue), redis_id)
            return any(pipe.execute())

    def whereabouts(self, queue: str, redis_id: str) -> tuple[Whereabouts | None, HeldFacts | None]:
        """Where this job is, and its facts while it is held. None: in no place, or on its way from one to the next."""
        for facts in self.facts(queue, [packed_id(redis_id)]):
            if self.client.zscore(self.keys.held(queue), self.members(queue, [redis_id]).get(redis_id, b"")) is not None:
                return "held", facts
        if self.client.lpos(self.keys.queue(queue), redis_id) is not None:
            return "queued", None
        return ("running" if self.is_running(queue, redis_id) else None), None

    def jobs_like(self, prefix: str, queues: Iterable[str]) -> set[str]:
        """Ids of held jobs, and of jobs with another Redis id, that begin so."""
        found = {text(job_id) for job_id, _ in self.client.hscan_iter(self.keys.places, match=starting(prefix), count=PAGE)}
        digits = prefix.replace("-", "")
        whole_bytes = digits[: len(digits) // 2 * 2]
        starts = [prefix.encode(), *([bytes.fromhex(whole_bytes)] if HEX.fullmatch(whole_bytes) else [])]
        for queue, start in product(queues, starts):
            held = self.client.hscan_iter(self.keys.facts(queue), match=GLOB.sub(rb"\\\1", start) + b"*", count=PAGE)
            ids = (text_id(bytes(packed)) for packed, raw in held if b'"job_id"' not in raw[FIXED:])
            found |= {job_id for job_id in ids if job_id.startswith(prefix)}
        return found

    def fetched(self, worker: str, queues: Sequence[str]) -> int:
        """How many jobs of these queues a worker has fetched."""
        with self.client.pipeline(transaction=False) as pipe:
            for queue in queues:
                pipe.scard(self.keys.acks(worker, queue))
            return sum(pipe.execute())

    def _learn(self, queue: str, groups: Iterable[bytes]) -> None:
        """Facets of groups never seen: the id of a group is made of its facet, so what was learned stays true."""
        new = [group for group in groups if group not in self._facets]
        if new:
            if len(self._facets) > 4 * MOST_GROUPS:
                self._facets.clear()
                new = list(groups)
            found = self.client.hmget(self.keys.groups(queue), new)
            self._facets.update({g: Facet.decode(bytes(raw)) for g, raw in zip(new, found, strict=True) if raw})

    def _decoded(self, queue: str, packed: Sequence[tuple[bytes, bytes]]) -> list[HeldFacts]:
        self._learn(queue, {raw[:GROUP] for _, raw in packed})
        facets = ((id_, raw, self._facets.get(raw[:GROUP], UNKNOWN)) for id_, raw in packed)
        return [HeldFacts.decode(queue, id_, raw, facet) for id_, raw, facet in facets]


NO_MARK = Mark()
UNKNOWN = Facet("", "(unknown)", "deferrable", "review")


def length(raw: bytes) -> int:
    return int.from_bytes(raw[:2])
