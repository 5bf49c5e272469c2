# SPDX-License-Identifier: Apache-2.0
"""The real store and a model of it in plain Python walk side by side, through whatever steps Hypothesis thinks of.

The model is what the scripts mean: read it as their specification. After every step the account, and every key of the
namespace, must be what the model says. Each step may be repeated at once, as after a lost reply, and a worker that was
declared dead goes on acting on what it remembers.

Deterministic; to look further: `pytest tests/store/test_model.py --hypothesis-profile=explore --hypothesis-seed=7`.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
import redis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from tideover import clock
from tideover.core.breaker import TRANSITIONS, Breaker, Transition, moved
from tideover.core.job import ENDS, End
from tideover.core.route import Mark, Permit
from tideover.store.account import Acceptance, Account, Ledger, NewJob, QueueCount, Room
from tideover.store.backlog import MOST_GROUPS, Allowance, Backlog, Released
from tideover.store.breakers import Breakers
from tideover.store.facts import HEAD, TICKS, Facet, Group, HeldFacts, encoded, order_of, packed_id
from tideover.store.keys import Keys, wait_key_text
from tideover.store.letters import Letters
from tideover.store.registry import Registry

if TYPE_CHECKING:
    from tests.conftest import KeyTable

QUEUES = ("default", "default.critical")
LANES = (*QUEUES, "default.DQ")
WORKERS = ("w1", "w2")
BREAKER_KEYS = ("a/m", "b/m")
WAIT_KEYS = (("a/m",), ("b/m", "a/m"), ())
LABELS = ("", "x", "y")
ROOMS = (Room(), Room(), Room(jobs=4), Room(jobs_per_tenant=1), Room(jobs=7, jobs_per_tenant=2))
MAX_WAIT_S = 0.005
MOST_QUEUED = 6
FEW_GROUPS = 3
STEPS = 40
AT_ONCE = 1e9
"""A rate that fills any bucket between two calls."""
FAR_MS = 2**44
"""A hold that began so late has lasted no time yet, by any clock: so the model knows for how long."""
BY_HAND = Permit("*", 0)


def base(lane: str) -> str:
    return lane.removesuffix(".DQ")


def entered(facets: Iterable[Facet], known: dict[bytes, Facet], most: int) -> dict[Facet, Facet]:
    """The facet under which each one's jobs are held: another where there are too many groups, or one has its id."""
    asked = {facet: facet for facet in facets}
    while True:
        there, refused = dict(known), set()
        for facet in dict.fromkeys(asked.values()):
            new = encoded(facet)[0] not in there
            there.setdefault(encoded(facet)[0], facet)
            if there[encoded(facet)[0]] != facet or (new and len(there) > most):
                refused.add(facet)
        if not refused:
            return asked
        most *= 2
        asked = {facet: now.bucketed() if now in refused else now for facet, now in asked.items()}


class Model:
    """What Redis should hold after the same calls. A place is a lane's list, a worker's acks or what is held."""

    def __init__(self, most_groups: int) -> None:
        self.most_groups = most_groups
        self.accepted = 0
        self.ends: Counter[End] = Counter()
        self.tenants: Counter[str] = Counter()
        self.once: dict[str, str] = {}
        self.lists: dict[str, list[str]] = defaultdict(list)
        self.bodies: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.acks: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.held: dict[str, dict[str, tuple[Facet, HeldFacts]]] = defaultdict(dict)
        self.marks: dict[str, dict[str, Mark]] = defaultdict(dict)
        self.places: dict[str, tuple[str, str]] = {}
        self.adopted: set[str] = set()
        self.dead: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.queues: set[str] = set()
        self.counters: Counter[str] = Counter()
        self.breakers: dict[str, Breaker] = defaultdict(Breaker)
        self.tokens: dict[str, float] = {}
        self.seen: set[str] = set()
        self.silent: set[str] = set()

    # producers

    def accept(self, lane: str, jobs: Sequence[NewJob], room: Room) -> list[Acceptance]:
        return [self.accept_one(lane, job, room) for job in jobs]

    def accept_one(self, lane: str, job: NewJob, room: Room) -> Acceptance:
        known = self.bodies[lane].get(job.redis_id)
        if known == job.body:
            return Acceptance("accepted")
        key, digest = job.once
        if key in self.once:
            return Acceptance("duplicate", *self.once[key].split("\t"))
        if known is not None:
            return Acceptance("taken")
        if room.jobs is not None and self.accepted - self.ends.total() >= room.jobs:
            return Acceptance("full")
        if job.tenant and room.jobs_per_tenant is not None and self.tenants[job.tenant] >= room.jobs_per_tenant:
            return Acceptance("tenant_full")
        self.put(lane, job.redis_id, job.body)
        self.enter(lane, job.tenant)
        if key:
            self.once[key] = f"{lane}\t{digest}"
        return Acceptance("accepted")

    def put(self, lane: str, new_id: str, body: bytes) -> None:
        """What a producer without tideover does."""
        self.bodies[lane][new_id] = body
        self.lists[lane].append(new_id)

    def enter(self, lane: str, tenant: str) -> None:
        self.accepted += 1
        self.queues.add(base(lane))
        self.tenants[tenant] += 1 if tenant else 0

    def restore(self, queue: str, dead: str, body: bytes, tenant: str) -> bool:
        if self.bodies[queue].get(dead) == body:
            return True
        if dead in self.bodies[queue] or dead not in self.dead[queue]:
            return False
        del self.dead[queue][dead]
        self.put(queue, dead, body)
        self.enter(queue, tenant)
        self.counters["restored"] += 1
        return True

    # workers

    def fetch(self, worker: str, lane: str, n: int) -> list[tuple[str, bytes, Mark]]:
        taken, self.lists[lane] = self.lists[lane][:n], self.lists[lane][n:]
        self.acks[worker, lane].update(taken)
        self.seen.add(worker)
        self.silent.discard(worker)
        if taken:
            self.queues.add(base(lane))
        return [(i, self.bodies[lane][i], self.mark(lane, i)) for i in taken]

    def mark(self, lane: str, redis_id: str) -> Mark:
        return self.marks[lane].get(redis_id, Mark())

    def adopt(self, ids: Iterable[str]) -> int:
        new = set(ids) - self.adopted
        self.adopted |= new
        self.accepted += len(new)
        return len(new)

    def forget(self, lane: str, ended: str, job: str) -> None:
        del self.bodies[lane][ended]
        self.marks[lane].pop(ended, None)
        self.adopted.discard(ended)
        self.places.pop(job, None)

    def settle(self, worker: str, lane: str, old: str, job: str, end: End, tenant: str) -> bool:
        if old not in self.acks[worker, lane]:
            return False
        self.acks[worker, lane].remove(old)
        if end in ("failed", "expired", "discarded"):
            self.dead[base(lane)][old] = self.bodies[lane][old]
        self.forget(lane, old, job)
        self.ends[end] += 1
        self.tenants[tenant] -= 1 if tenant else 0
        return True

    def hand_over(self, worker: str, old: tuple[str, str], new: tuple[str, str], body: bytes, job: str) -> bool:
        if old[1] not in self.acks[worker, old[0]]:
            return False
        self.acks[worker, old[0]].remove(old[1])
        mark = self.marks[old[0]].get(old[1])
        self.forget(*old, job)
        self.put(*new, body)
        self.queues.add(base(new[0]))
        if mark is not None:
            self.marks[new[0]][new[1]] = replace(mark, permit=None, begun_by="")
        if new[1] != job:
            self.places[job] = new
        return True

    def begin(self, worker: str, lane: str, redis_id: str, mark: Mark) -> None:
        if redis_id in self.acks[worker, lane]:
            self.marks[lane][redis_id] = mark

    def hold(self, worker: str, queue: str, jobs: Sequence[HeldFacts]) -> list[bool]:
        facets = entered((job.facet for job in jobs), {g.id: g.facet for g in self.groups(queue)}, self.most_groups)
        ours = []
        for job in jobs:
            ours.append(job.redis_id in self.acks[worker, queue])
            if ours[-1]:
                self.acks[worker, queue].remove(job.redis_id)
                self.held[queue][job.redis_id] = (facets[job.facet], job)
                self.marks[queue].pop(job.redis_id, None)
                self.counters["holds"] += 1
                if job.job_id != job.redis_id:
                    self.places[job.job_id] = (queue, job.redis_id)
        return ours

    def give_back(self, worker: str, lane: str, ids: Sequence[str]) -> int:
        """To the head of the queue, in the order given."""
        gone = [i for i in ids if i in self.acks[worker, lane]]
        self.acks[worker, lane].difference_update(gone)
        self.lists[lane][:0] = gone
        return len(gone)

    def recover(self, worker: str, lane: str) -> int:
        if worker in self.seen - self.silent:
            return -1
        for i in self.acks[worker, lane]:
            mark = self.mark(lane, i)
            if mark.deaths == 0 or mark.begun_by == worker:
                self.marks[lane][i] = replace(mark, deaths=mark.deaths + 1, begun_by="")
        return self.give_back(worker, lane, sorted(self.acks[worker, lane]))

    # held jobs

    def groups(self, queue: str) -> set[Group]:
        numbers = Counter(facet for facet, _ in self.held[queue].values())
        return {Group(queue, encoded(facet)[0], facet, n) for facet, n in numbers.items()}

    def members(self, queue: str) -> dict[bytes, HeldFacts]:
        """In the order in which they go."""
        members = {facts.packed(facet)[0]: facts for facet, facts in self.held[queue].values()}
        return {raw: members[raw] for raw in sorted(members, key=lambda raw: (members[raw].order, raw[HEAD:]))}

    def release(self, queue: str, members: Sequence[bytes], permit: Permit, pace: Allowance | None) -> Released:
        room: float = math.inf
        crowded = False
        if pace is not None:
            breaker = self.breakers[pace.key]
            if pace.generation is not None and (pace.generation != breaker.generation or not self.lets_go(breaker)):
                return Released([], 0, crowded=False)
            tokens = math.inf if pace.rate and pace.key in self.tokens else max(-10 * pace.rate, self.tokens.get(pace.key, 1.0))
            tokens = min(pace.burst, tokens)
            usable = tokens + pace.borrow
            may_go = 0 if usable < min(pace.calls_each, pace.burst) else max(1, math.floor(usable / pace.calls_each))
            room = min(may_go, pace.most_queued - len(self.lists[queue]))
            crowded = room < may_go
        held, gone, looked_at = self.members(queue), [], 0
        for raw in members:
            if len(gone) >= room:
                break
            looked_at += 1
            if raw in held:
                gone.append(held.pop(raw))
        for facts in gone:
            del self.held[queue][facts.redis_id]
            holds, deaths = (0, 0) if pace is None else (facts.holds, facts.deaths)
            self.marks[queue][facts.redis_id] = Mark(permit, holds, facts.held_before_ms, deaths)
        ids = [facts.redis_id for facts in gone]
        self.lists[queue] = [*ids, *self.lists[queue]] if pace is None else [*self.lists[queue], *ids]
        self.counters["releases"] += len(gone)
        if pace is not None and gone:
            self.tokens[pace.key] = tokens - pace.calls_each * len(gone)
        return Released(gone, looked_at, crowded)

    @staticmethod
    def lets_go(breaker: Breaker) -> bool:
        return breaker.state not in ("open", "half-open")

    def expire(self, queue: str, jobs: Sequence[HeldFacts], end: End) -> list[bool]:
        ended = []
        for job in jobs:
            ended.append(job.redis_id in self.held[queue])
            if ended[-1]:
                del self.held[queue][job.redis_id]
                self.dead[queue][job.redis_id] = self.bodies[queue][job.redis_id]
                self.forget(queue, job.redis_id, job.job_id)
                self.ends[end] += 1
                self.tenants[job.tenant] -= 1 if job.tenant else 0
        return ended

    def transition(self, key: str, seen: Breaker, to: Any) -> bool:
        now = self.breakers[key]
        if (seen.state, seen.generation, seen.era) != (now.state, now.generation, now.era):
            return False
        self.breakers[key] = moved(now, Transition(to=to, why="why"), clock.now())
        if to == "open" and now.state != "half-open":
            self.counters["openings"] += 1
        return True

    # what can be read

    def fetched(self) -> list[tuple[str, str, str]]:
        return sorted((worker, lane, i) for (worker, lane), ids in self.acks.items() for i in ids)

    def account(self) -> Account:
        counts = {}
        for queue in self.queues:
            running, waiting = (sum(len(self.acks[w, lane]) for w in WORKERS) for lane in (queue, f"{queue}.DQ"))
            delayed = len(self.lists[f"{queue}.DQ"]) + waiting
            queued = len(self.lists[queue]) + delayed
            counts[queue] = QueueCount(queued=queued, delayed=delayed, running=running, held=len(self.held[queue]))
        return Account(accepted=self.accepted, ends={end: self.ends[end] for end in ENDS}, queues=counts)

    def as_keys(self, k: Keys) -> dict[str, Any]:
        """Every key of the namespace with its content, as `snapshot` reads it."""
        content: dict[str, Any] = {
            k.account: {name: n for name, n in {"accepted": self.accepted, **self.ends}.items() if n},
            k.counters: {name: n for name, n in self.counters.items() if n},
            k.tenants: {tenant: n for tenant, n in self.tenants.items() if n},
            k.once("today"): self.once,
            k.adopted: self.adopted,
            k.queues: self.queues,
            k.places: {job: f"{lane}\t{i}" for job, (lane, i) in self.places.items()},
            k.heartbeats: self.seen,
        }
        for (worker, lane), ids in self.acks.items():
            content[k.acks(worker, lane)] = ids
        for lane in {*self.lists, *self.bodies, *self.held, *self.marks, *self.dead}:
            content[k.queue(lane)] = self.lists[lane]
            content[k.msgs(lane)] = self.bodies[lane]
            content[k.marks(lane)] = {i: str(mark) for i, mark in self.marks[lane].items()}
            content[k.dead(lane)] = set(self.dead[base(lane)])
            content[k.dead_msgs(lane)] = self.dead[base(lane)]
            content |= self.index(k, lane)
        for key, breaker in self.breakers.items():
            if breaker != Breaker():
                content[k.breaker(key)] = {"state": breaker.state, "generation": breaker.generation}
        content[k.breakers] = {key for key, breaker in self.breakers.items() if breaker != Breaker()}
        content |= {k.bucket(key): tokens for key, tokens in self.tokens.items()}
        return {key: binary(value) for key, value in content.items() if value or isinstance(value, float | int)}

    def index(self, k: Keys, queue: str) -> dict[str, Any]:
        held = self.held[queue].values()
        return {
            k.held(queue): dict.fromkeys(self.members(queue), 0.0),
            k.facts(queue): {packed_id(facts.redis_id): facts.packed(facet)[1] for facet, facts in held},
            k.groups(queue): {group.id: group.facet.encode() for group in self.groups(queue)},
            k.counts(queue): {group.id: group.n for group in self.groups(queue)},
        }


def binary(value: Any) -> Any:
    """As Redis returns it."""
    match value:
        case dict():
            return {binary(field): binary(content) for field, content in value.items()}
        case set():
            return {binary(member) for member in value}
        case list():
            return [binary(item) for item in value]
        case str() | int():
            return str(value).encode()
        case _:
            return value


def snapshot(client: redis.Redis, k: Keys) -> dict[str, Any]:
    """Every key of the namespace with its content; of instants, which the model cannot know, only that they are there."""
    names = sorted(key.decode() for key in client.keys(f"{k.namespace}:*"))
    reads = {
        b"list": lambda pipe, key: pipe.lrange(key, 0, -1),
        b"set": lambda pipe, key: pipe.smembers(key),
        b"hash": lambda pipe, key: pipe.hgetall(key),
        b"zset": lambda pipe, key: pipe.zrange(key, 0, -1, withscores=True),
    }
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.type(name)
        for name, kind in zip(names, pipe.execute(), strict=True):
            reads[kind](pipe, name)
        read = {name: plain(name, value, k) for name, value in zip(names, pipe.execute(), strict=True)}
    return {re.sub(r"(?<=:once:)\d{8}$", "today", name): value for name, value in read.items()}


def plain(name: str, value: Any, k: Keys) -> Any:
    match value:
        case dict() if name.startswith(k.bucket("")):
            return float(value[b"tokens"])
        case dict() if name.startswith(k.breaker("")):
            return {b"state": value.get(b"state", b"closed"), b"generation": value.get(b"generation", b"0")}
        case [[_, float()], *_] | [(_, float()), *_]:
            scores = {bytes(member): score for member, score in value}
            return set(scores) if name == k.heartbeats or name.endswith(".XQ") else scores
        case _:
            return value


class StoreAndModel(RuleBasedStateMachine):
    namespaces = count(1)

    def __init__(self, client: redis.Redis, table: KeyTable, most_groups: int) -> None:
        super().__init__()
        self.client, self.table = client, table
        self.keys = Keys(f"model-{next(self.namespaces)}")
        self.ledger, self.breakers = Ledger(client, self.keys), Breakers(client, self.keys)
        self.registry = Registry(client, self.keys)
        self.one_backlog, self.letters = Backlog(client, self.keys), Letters(client, self.keys)
        self.model = Model(most_groups)
        self.numbers = count(1)
        self.jobs: dict[str, str] = {}
        self.tenants: dict[str, str] = {}
        self.foreign: set[str] = set()
        self.aware: set[tuple[str, str, str]] = set()
        self.remembered: list[tuple[str, str, str]] = []
        self.left: list[bytes] = []

    @property
    def backlog(self) -> Backlog:
        return self.one_backlog

    def teardown(self) -> None:
        self.client.flushdb()

    def new(self, *, job: str | None = None, tenant: str = "") -> tuple[str, bytes]:
        """The Redis id of a new job, of any form, and its body."""
        n = next(self.numbers)
        made = (f"r{n:04}", str(UUID(int=n << 100 | n)), f"r{n:04} in 16 byte")[n % 3]
        self.jobs[made], self.tenants[made] = job or made, tenant
        return made, f"body of {made}".encode()

    def in_hand(self) -> list[tuple[str, str, str]]:
        """What workers have fetched and know that they have."""
        return [entry for entry in self.model.fetched() if entry in self.aware]

    def pick(self, data: st.DataObject, late: bool) -> tuple[str, str, str]:
        return data.draw(st.sampled_from(self.remembered if late and self.remembered else self.in_hand()), label="job")

    def adopt_order(self, lane: str, n: int) -> None:
        """Takes the order of the first n of a lane from Redis, where it is not promised."""
        real = [i.decode() for i in self.client.lrange(self.keys.queue(lane), 0, -1)]
        assert sorted(self.model.lists[lane][:n]) == sorted(real[:n])
        assert self.model.lists[lane][n:] == real[n:]
        self.model.lists[lane] = real

    @initialize(data=st.data(), lane=st.sampled_from(QUEUES), held=st.integers(0, 5), taken=st.integers(0, 3))
    def begin_in_the_middle(self, data: st.DataObject, lane: str, held: int, taken: int) -> None:
        """Some jobs are held and some are fetched already."""
        for _ in range(held + taken + 1):
            self.enqueue(lane, [data.draw(st.sampled_from(LABELS), label="tenant")])
        if held + taken > 0:
            self.take("w1", lane, held + taken)
        if held > 0:
            facts = [self.facts(data, i, lane) for _, _, i in self.in_hand()[:held]]
            assert self.model.hold("w1", lane, facts) == self.backlog.hold("w1", lane, facts)

    # producers

    @precondition(lambda self: sum(map(len, self.model.lists.values())) < MOST_QUEUED)
    @rule(
        lane=st.sampled_from(LANES),
        tenants=st.lists(st.sampled_from(LABELS), min_size=1, max_size=2),
        once=st.sampled_from(("", "", "key", "other key")),
        room=st.sampled_from(ROOMS),
        again=st.booleans(),
    )
    def accept(self, lane: str, tenants: list[str], once: str, room: Room, again: bool) -> None:
        self.enqueue(lane, tenants, once, room, times=1 + again)

    def enqueue(self, lane: str, tenants: Sequence[str], once: str = "", room: Room = ROOMS[0], times: int = 1) -> None:
        made = [(self.new(tenant=tenant), tenant) for tenant in tenants]
        pair = (once, f"digest of {made[0][0]}") if once else ("", "")
        jobs = [NewJob(redis_id=i, body=body, tenant=tenant, once=pair) for (i, body), tenant in made]
        for _ in range(times):
            assert self.model.accept(lane, jobs, room) == self.ledger.accept(lane, jobs, room)

    @precondition(lambda self: sum(map(len, self.model.lists.values())) < MOST_QUEUED and any(self.model.bodies.values()))
    @rule(data=st.data(), room=st.sampled_from(ROOMS))
    def enqueue_twice(self, data: st.DataObject, room: Room) -> None:
        """A job sends its own message once more, changed: it becomes a second job under a Redis id of its own."""
        lane = data.draw(st.sampled_from(sorted(lane for lane, bodies in self.model.bodies.items() if bodies)), label="lane")
        old = data.draw(st.sampled_from(sorted(set(self.model.bodies[lane]) - self.foreign) or [None]), label="job")
        if old is None:
            return
        job = NewJob(redis_id=old, body=b"another body", tenant=self.tenants[old])
        assert [Acceptance("taken")] == self.model.accept(lane, [job], room) == self.ledger.accept(lane, [job], room)
        new_id, body = self.new(job=self.jobs[old], tenant=self.tenants[old])
        job = NewJob(redis_id=new_id, body=body, tenant=self.tenants[old])
        assert self.model.accept(lane, [job], room) == self.ledger.accept(lane, [job], room)

    @precondition(lambda self: sum(map(len, self.model.lists.values())) < MOST_QUEUED)
    @rule(lane=st.sampled_from(QUEUES))
    def put_without_tideover(self, lane: str) -> None:
        new_id, body = self.new(job=f"job-{next(self.numbers)}")
        self.foreign.add(new_id)
        self.client.hset(self.keys.msgs(lane), new_id, body)
        self.client.rpush(self.keys.queue(lane), new_id)
        self.model.put(lane, new_id, body)

    @precondition(lambda self: any(self.model.dead.values()))
    @rule(data=st.data(), again=st.booleans())
    def restore(self, data: st.DataObject, again: bool) -> None:
        queue = data.draw(st.sampled_from(sorted(queue for queue, ids in self.model.dead.items() if ids)), label="queue")
        dead = data.draw(st.sampled_from(sorted(self.model.dead[queue])), label="dead letter")
        self.foreign.discard(dead)
        for _ in range(1 + again):
            body, tenant = b"restored", self.tenants[dead]
            assert self.model.restore(queue, dead, body, tenant) == self.letters.restore(queue, dead, dead, body, tenant)

    # workers

    @precondition(lambda self: any(self.model.lists.values()))
    @rule(data=st.data(), worker=st.sampled_from(WORKERS), n=st.integers(1, 4), loses_reply=st.booleans(), again=st.booleans())
    def fetch(self, data: st.DataObject, worker: str, n: int, loses_reply: bool, again: bool) -> None:
        lane = data.draw(st.sampled_from(sorted(lane for lane, ids in self.model.lists.items() if ids)), label="lane")
        strangers = self.take(worker, lane, n, loses_reply)
        for _ in range(1 + again if strangers else 0):
            assert self.model.adopt(strangers) == self.ledger.adopt(worker, lane, strangers)

    def take(self, worker: str, lane: str, n: int, loses_reply: bool = False) -> list[str]:
        """Fetches; the ids of those that a producer without tideover sent."""
        jobs, missing = self.backlog.fetch(worker, lane, n)
        assert self.model.fetch(worker, lane, n) == [(job.redis_id, job.body, job.mark) for job in jobs]
        assert [] == missing
        fetched = [(worker, lane, job.redis_id) for job in jobs]
        self.aware.difference_update(fetched)
        if loses_reply:
            return []
        self.aware.update(fetched)
        self.remembered += fetched
        return [job.redis_id for job in jobs if job.redis_id in self.foreign]

    @precondition(lambda self: self.in_hand())
    @rule(data=st.data(), end=st.sampled_from(ENDS), late=st.booleans(), again=st.booleans())
    def settle(self, data: st.DataObject, end: End, late: bool, again: bool) -> None:
        worker, lane, old = self.pick(data, late)
        call = (worker, lane, old, self.jobs[old], end, self.tenants[old])
        for _ in range(1 + again):
            assert self.model.settle(*call) == self.ledger.settle(*call)

    @precondition(lambda self: self.in_hand())
    @rule(data=st.data())
    def acknowledge_without_tideover(self, data: st.DataObject) -> None:
        """A worker of stock dramatiq ends a job in its way, and somebody counts it. It does not clean up after us."""
        worker, lane, old = self.pick(data, late=False)
        self.client.srem(self.keys.acks(worker, lane), old)
        self.client.hdel(self.keys.msgs(lane), old)
        self.model.acks[worker, lane].remove(old)
        del self.model.bodies[lane][old]
        known = self.model.ends["elsewhere"]
        assert not self.registry.end_elsewhere(known + 1, 1)
        assert self.registry.end_elsewhere(known, 1)
        self.model.ends["elsewhere"] += 1

    @precondition(lambda self: self.in_hand())
    @rule(data=st.data(), delayed=st.booleans(), renamed=st.booleans(), late=st.booleans(), again=st.booleans())
    def hand_over(self, data: st.DataObject, delayed: bool, renamed: bool, late: bool, again: bool) -> None:
        """To a retry, which keeps its id; one of an older tideover has a new one."""
        worker, lane, old = self.pick(data, late)
        new_id = self.new(job=self.jobs[old], tenant=self.tenants[old])[0] if renamed else old
        new_lane = f"{lane}.DQ" if delayed and not lane.endswith(".DQ") else base(lane)
        for _ in range(1 + again):
            call = (worker, (lane, old), (new_lane, new_id), b"a later body", self.jobs[old])
            done = self.model.hand_over(*call)
            assert done == self.ledger.hand_over(*call)
            self.foreign.difference_update([old, new_id] if done else [])

    @precondition(lambda self: self.in_hand())
    @rule(data=st.data(), late=st.booleans(), again=st.booleans())
    def begin(self, data: st.DataObject, late: bool, again: bool) -> None:
        worker, lane, old = self.pick(data, late)
        mark = replace(self.model.mark(lane, old), begun_by=worker)
        for _ in range(1 + again):
            self.model.begin(worker, lane, old, mark)
            self.backlog.begin(worker, lane, old, mark)

    @precondition(lambda self: any(not lane.endswith(".DQ") for _, lane, _ in self.in_hand()))
    @rule(data=st.data(), late=st.booleans(), again=st.booleans())
    def hold(self, data: st.DataObject, late: bool, again: bool) -> None:
        candidates = [entry for entry in (self.remembered if late else self.in_hand()) if not entry[1].endswith(".DQ")]
        worker, lane, _ = data.draw(st.sampled_from(candidates), label="whose")
        same = sorted({i for w, at, i in candidates if (w, at) == (worker, lane)})
        ids = data.draw(st.lists(st.sampled_from(same), min_size=1, max_size=4, unique=True), label="jobs")
        facts = [self.facts(data, i, lane) for i in ids]
        for _ in range(1 + again):
            assert self.model.hold(worker, lane, facts) == self.backlog.hold(worker, lane, facts)

    def facts(self, data: st.DataObject, i: str, lane: str) -> HeldFacts:
        wait_key, tag, held_ms, expires_ms, nth, before_ms, detail = data.draw(FACTS, label=f"facts of {i}")
        age: Any = {"held_ms": held_ms, "held_before_ms": 0, "expires_ms": expires_ms}
        return HeldFacts(
            redis_id=i, job_id=self.jobs[i], task="t", queue=lane, criticality="deferrable", wait_key=wait_key_text(wait_key),
            reason="outage" if wait_key else "review", generation=nth, held_ms=FAR_MS, sent_ms=0, expires_ms=expires_ms,
            order=order_of(**age, max_wait_s=MAX_WAIT_S, nth=nth), tenant=self.tenants[i], tag=tag, detail=detail,
            holds=self.model.mark(lane, i).holds + 1, held_before_ms=self.model.mark(lane, i).held_ms + before_ms,
            deaths=self.model.mark(lane, i).deaths,
        )  # fmt: skip

    @precondition(lambda self: self.in_hand())
    @rule(data=st.data(), late=st.booleans(), again=st.booleans())
    def give_back(self, data: st.DataObject, late: bool, again: bool) -> None:
        worker, lane, first = self.pick(data, late)
        ids = sorted({first, *(i for w, at, i in self.in_hand() if (w, at) == (worker, lane))})
        for _ in range(1 + again):
            assert self.model.give_back(worker, lane, ids) == self.backlog.give_back(worker, lane, ids)

    @precondition(lambda self: self.model.fetched())
    @rule(data=st.data(), again=st.booleans())
    def reclaim(self, data: st.DataObject, again: bool) -> None:
        """A consumer that was rebuilt knows what it has; the rest are answers that it never got."""
        worker, lane, _ = data.draw(st.sampled_from(self.model.fetched()), label="whose")
        known = {i for w, at, i in self.in_hand() if (w, at) == (worker, lane)}
        for _ in range(1 + again):
            n = self.model.give_back(worker, lane, sorted(self.model.acks[worker, lane] - known))
            assert n == self.backlog.reclaim(worker, lane, known)
            self.adopt_order(lane, n)

    # the passage of time

    @precondition(lambda self: {worker for worker, _, _ in self.model.fetched()} - self.model.silent)
    @rule(worker=st.sampled_from(WORKERS))
    def fall_silent(self, worker: str) -> None:
        """No sign of life for fifty years. It may come back, and acts on what it remembers."""
        if worker in self.model.seen:
            self.client.zadd(self.keys.heartbeats, {worker: 1})
            self.model.silent.add(worker)

    @precondition(lambda self: self.in_hand())
    @rule(data=st.data(), had_begun=st.booleans())
    def die(self, data: st.DataObject, had_begun: bool) -> None:
        """Of one of its jobs, perhaps; another worker finds out, and gives all of them back."""
        worker, _, _ = data.draw(st.sampled_from(self.in_hand()), label="whose")
        for _, lane, i in [entry for entry in self.in_hand() if entry[0] == worker and had_begun]:
            mark = replace(self.model.mark(lane, i), begun_by=worker)
            self.model.begin(worker, lane, i, mark)
            self.backlog.begin(worker, lane, i, mark)
        self.fall_silent(worker)
        for lane in LANES:
            n = self.model.recover(worker, lane)
            assert n == self.backlog.recover(worker, lane, 60.0)
            self.adopt_order(lane, n)

    @precondition(lambda self: self.model.fetched())
    @rule(data=st.data(), again=st.booleans())
    def recover(self, data: st.DataObject, again: bool) -> None:
        worker, lane, _ = data.draw(st.sampled_from(self.model.fetched()), label="whose")
        for _ in range(1 + again):
            n = self.model.recover(worker, lane)
            assert n == self.backlog.recover(worker, lane, 60.0)
            self.adopt_order(lane, max(0, n))

    @precondition(lambda self: any(self.model.held.values()))
    @rule(data=st.data(), key=st.sampled_from(BREAKER_KEYS), stale=st.booleans(), again=st.booleans())
    def move_breaker(self, data: st.DataObject, key: str, stale: bool, again: bool) -> None:
        seen = self.model.breakers[key]
        if stale:
            seen = replace(seen, generation=seen.generation + 7)
        to = data.draw(st.sampled_from(sorted(TRANSITIONS[seen.state])), label="to")
        for _ in range(1 + again):
            assert self.model.transition(key, seen, to) == self.breakers.transition(
                key, seen, Transition(to=to, why="why"), 0.0
            )

    # held jobs

    def draw_queue(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(queue for queue, held in self.model.held.items() if held)), label="queue")

    @precondition(lambda self: any(self.model.held.values()))
    @rule(
        data=st.data(),
        key=st.sampled_from(BREAKER_KEYS),
        behind=st.sampled_from((0, 0, 1, None)),
        rate=st.sampled_from((AT_ONCE, AT_ONCE, 0.0)),
        burst=st.sampled_from((2.5, 1.0, 0.5)),
        calls_each=st.sampled_from((1.0, 2.0)),
        borrow=st.sampled_from((0.0, 0.0, 3.0)),
        most_queued=st.sampled_from((100, 100, 2, 0)),
        again=st.booleans(),
    )
    def release(
        self,
        data: st.DataObject,
        key: str,
        behind: int | None,
        rate: float,
        burst: float,
        calls_each: float,
        borrow: float,
        most_queued: int,
        again: bool,
    ) -> None:
        """A plan of those that a breaker frees, in which some may have left since."""
        queue, now = self.draw_queue(data), self.model.breakers[key].generation
        pace = Allowance(
            key=key,
            generation=None if behind is None else now - behind,
            rate=rate,
            burst=burst,
            calls_each=calls_each,
            borrow=borrow,
            most_queued=most_queued,
        )
        freed = [group for group in self.backlog.groups(queue) if key in group.facet.breaker_keys]
        plan = [*self.left[-2:], *(member.raw for member in self.backlog.page(freed, 9))]
        for _ in range(1 + again):
            self.released(queue, plan, Permit(key, now), pace)

    @precondition(lambda self: any(self.model.held.values()))
    @rule(data=st.data(), again=st.booleans())
    def release_by_hand(self, data: st.DataObject, again: bool) -> None:
        queue = self.draw_queue(data)
        choice = st.lists(st.sampled_from([*self.model.members(queue), *self.left[-2:], b"nobody"]), min_size=1, unique=True)
        members = data.draw(choice, label="jobs")
        for _ in range(1 + again):
            self.released(queue, members, BY_HAND, None)

    def released(self, queue: str, members: list[bytes], permit: Permit, pace: Allowance | None) -> None:
        before = list(self.model.members(queue))
        assert self.model.release(queue, members, permit, pace) == self.backlog.release(queue, members, permit, pace)
        self.left += [raw for raw in before if raw not in self.model.members(queue)]

    @precondition(lambda self: any(self.model.held.values()))
    @rule(data=st.data(), now_ms=st.integers(1, 10), end=st.sampled_from(("expired", "discarded")), again=st.booleans())
    def expire(self, data: st.DataObject, now_ms: int, end: Any, again: bool) -> None:
        queue = self.draw_queue(data)
        until = now_ms * TICKS + TICKS - 1
        due = list(self.backlog.browse(self.backlog.groups(queue), until=until))
        assert [facts for facts in self.model.members(queue).values() if facts.order <= until] == due
        past = [facts for facts in due if facts.expires_ms is not None and facts.expires_ms <= now_ms]
        for _ in range(1 + again if past else 0):
            assert self.model.expire(queue, past, end) == self.backlog.expire(queue, past, end)

    @precondition(lambda self: any(self.model.held.values()))
    @rule(data=st.data(), limit=st.integers(1, 4))
    def look(self, data: st.DataObject, limit: int) -> None:
        """What an operator sees: pages of some groups, and what is before one job."""
        queue = self.draw_queue(data)
        held, groups = self.model.members(queue), self.backlog.groups(queue)
        shown = data.draw(st.lists(st.sampled_from(sorted(g.id for g in groups)), unique=True, min_size=1), label="groups")
        chosen = [group for group in groups if group.id in shown]
        rows = [raw for raw in held if raw[:6] in shown]
        start = data.draw(st.sampled_from(rows), label="after")
        later = rows[rows.index(start) + 1 :]
        assert later[:limit] == [member.raw for member in self.backlog.page(chosen, limit, after=start[6:])]
        assert rows[:limit] == [member.raw for member in self.backlog.page(chosen, limit)]
        assert rows.index(start) == self.backlog.ahead(held[start], chosen)
        facts = held[start]
        assert ("held", facts) == self.backlog.whereabouts(queue, facts.redis_id)
        if facts.job_id in {*self.model.places, facts.redis_id}:
            place = self.model.places.get(facts.job_id, (queue, facts.redis_id))
            assert place == self.backlog.place(facts.job_id, QUEUES)

    # what always holds

    @invariant()
    def conservation(self) -> None:
        """The account is the model's, nothing is lost, and what is short of the sum are the strangers' jobs, one for one."""
        account = self.ledger.read()
        assert self.model.account() == account
        assert 0 == account.lost
        unadopted = (i for ids in self.model.bodies.values() for i in ids if i in self.foreign - self.model.adopted)
        assert len(self.foreign & set(unadopted)) == account.not_adopted + self.out_of_sight()

    def out_of_sight(self) -> int:
        """Jobs in queues that nobody with tideover has ever used."""
        return sum(len(ids) for lane, ids in self.model.lists.items() if base(lane) not in self.model.queues)

    @invariant()
    def every_key(self) -> None:
        """Redis holds what the model says and nothing else."""
        real, expected = snapshot(self.client, self.keys), self.model.as_keys(self.keys)
        names = sorted({*real, *expected})
        assert {} == {name: (expected.get(name), real.get(name)) for name in names if expected.get(name) != real.get(name)}
        assert [] == [name for name in real if self.table.row_of(name, self.keys.namespace) is None]
        self.one_place_each(real)
        self.one_index(real)

    def one_place_each(self, real: dict[str, Any]) -> None:
        """Counted in Redis, not in the model: each body has its id in exactly one place, and each id its body."""
        for lane in (*QUEUES, *(f"{queue}.DQ" for queue in QUEUES)):
            places = [real.get(self.keys.queue(lane), []), *(real.get(self.keys.acks(w, lane), ()) for w in WORKERS)]
            ids = [packed_id(i.decode()) for place in places for i in place]
            ids += [raw[HEAD:] for raw in real.get(self.keys.held(lane), ())]
            assert sorted(packed_id(i.decode()) for i in real.get(self.keys.msgs(lane), {})) == sorted(ids)

    def one_index(self, real: dict[str, Any]) -> None:
        """Counted in Redis, too: index, facts, groups and their numbers speak of the same jobs."""
        for queue in QUEUES:
            held, facts = real.get(self.keys.held(queue), {}), real.get(self.keys.facts(queue), {})
            groups, counts = real.get(self.keys.groups(queue), {}), real.get(self.keys.counts(queue), {})
            assert {raw[HEAD:]: raw[:HEAD] for raw in held} == {i: raw[:HEAD] for i, raw in facts.items()}
            assert set(groups) == set(counts)
            assert Counter(raw[:6] for raw in held) == Counter({group: int(n) for group, n in counts.items()})

    @invariant()
    def what_is_shown(self) -> None:
        """Groups with their numbers, and all jobs in order."""
        for queue in QUEUES:
            if self.model.held[queue]:
                groups = self.backlog.groups(queue)
                assert self.model.groups(queue) == set(groups)
                assert list(self.model.members(queue).values()) == list(self.backlog.browse(groups))


FACTS = st.tuples(
    st.sampled_from(WAIT_KEYS),
    st.sampled_from(LABELS),
    st.integers(1, 5),
    st.none() | st.integers(1, 9),
    st.integers(0, 3),
    st.sampled_from((0, 70)),
    st.sampled_from(("", "529 overloaded_error")),
)


class StoreOfManyProcesses(StoreAndModel):
    """Each call is another process's. One that had learned a group's facet would take a later group with its id for it."""

    @property
    def backlog(self) -> Backlog:
        return Backlog(self.client, self.keys)


def test_the_store_does_what_the_model_says(client: redis.Redis, key_table: KeyTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """In thousands of random steps no job is lost, doubled or misplaced, whoever dies, repeats itself or comes late."""
    monkeypatch.setattr("tideover.store.backlog.MOST_GROUPS", FEW_GROUPS)
    for module in ("backlog", "walk"):  # so that pages end where they do only with thousands of jobs
        monkeypatch.setattr(f"tideover.store.{module}.AT_ONCE", 2)
        monkeypatch.setattr(f"tideover.store.{module}.MOST_READ", 4)
    walk(lambda: StoreAndModel(client, key_table, FEW_GROUPS))


def test_and_so_it_does_when_groups_share_an_id(client: redis.Redis, key_table: KeyTable, few_group_ids: None) -> None:
    """A digest that tells few facets apart mixes no groups."""
    walk(lambda: StoreOfManyProcesses(client, key_table, MOST_GROUPS))


def walk(machine: Callable[[], StoreAndModel]) -> None:
    some = settings(stateful_step_count=STEPS, max_examples=settings.default.max_examples // 3)
    run_state_machine_as_test(machine, settings=some)
