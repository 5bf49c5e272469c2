# SPDX-License-Identifier: Apache-2.0
"""The real store and a model of it in plain Python walk side by side, through whatever steps Hypothesis thinks of.

The model is what the scripts mean: read it as their specification. After every step the account, and every key of the
namespace, must be what the model says. Each step may be repeated at once, as after a lost reply, and a worker that was
declared dead goes on acting on what it remembers.

Deterministic; to look further: `pytest tests/store/test_model.py --hypothesis-profile=explore --hypothesis-seed=7`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import redis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from tideover.core.breaker import TRANSITIONS, Breaker, Transition, generation_after
from tideover.core.job import ENDS, End
from tideover.core.route import Permit
from tideover.store.account import Account, Ledger, QueueCount
from tideover.store.backlog import Backlog, HeldFacts, HeldSet
from tideover.store.breakers import Breakers
from tideover.store.keys import Keys, wait_key_text

QUEUES = ("default", "default.critical")
LANES = (*QUEUES, "default.DQ")
WORKERS = ("w1", "w2")
BREAKER_KEYS = ("a/m", "b/m")
WAIT_KEYS = (("a/m",), ("b/m", "a/m"))
MAX_WAIT_S = 0.005
MOST_QUEUED = 6
AT_ONCE = 1e9
"""A rate that fills any bucket between two calls."""


def base(lane: str) -> str:
    return lane.removesuffix(".DQ")


class Model:
    """What Redis should hold after the same calls. Ids are unique; a place is a lane's list, a worker's acks or a held set."""

    def __init__(self) -> None:
        self.accepted = 0
        self.ends: Counter[End] = Counter()
        self.lists: dict[str, list[str]] = defaultdict(list)
        self.bodies: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.acks: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.held: dict[HeldSet, dict[str, int]] = defaultdict(dict)
        self.facts: dict[str, dict[str, HeldFacts]] = defaultdict(dict)
        self.permits: dict[str, dict[str, str]] = defaultdict(dict)
        self.places: dict[str, tuple[str, str]] = {}
        self.adopted: set[str] = set()
        self.dead: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.queues: set[str] = set()
        self.counters: Counter[str] = Counter()
        self.breakers: dict[str, Breaker] = defaultdict(Breaker)
        self.tokens: dict[str, float] = {}
        self.seen: set[str] = set()
        self.silent: set[str] = set()

    def accept(self, lane: str, new_id: str, body: bytes) -> None:
        if new_id not in self.bodies[lane]:
            self.bodies[lane][new_id] = body
            self.lists[lane].append(new_id)
            self.accepted += 1
            self.queues.add(base(lane))

    def put(self, lane: str, new_id: str, body: bytes) -> None:
        """What a producer without tideover does."""
        self.bodies[lane][new_id] = body
        self.lists[lane].append(new_id)

    def fetch(self, worker: str, lane: str, n: int) -> list[tuple[str, bytes, str | None]]:
        taken, self.lists[lane] = self.lists[lane][:n], self.lists[lane][n:]
        self.acks[worker, lane].update(taken)
        self.seen.add(worker)
        self.silent.discard(worker)
        if taken:
            self.queues.add(base(lane))
        return [(i, self.bodies[lane][i], self.permits[lane].get(i)) for i in taken]

    def adopt(self, ids: Iterable[str]) -> int:
        new = set(ids) - self.adopted
        self.adopted |= new
        self.accepted += len(new)
        return len(new)

    def forget(self, lane: str, ended: str, job: str) -> None:
        del self.bodies[lane][ended]
        self.permits[lane].pop(ended, None)
        self.adopted.discard(ended)
        self.places.pop(job, None)

    def settle(self, worker: str, lane: str, old: str, job: str, end: End) -> bool:
        if old not in self.acks[worker, lane]:
            return False
        self.acks[worker, lane].remove(old)
        if end in ("failed", "expired"):
            self.dead[base(lane)][old] = self.bodies[lane][old]
        self.forget(lane, old, job)
        self.ends[end] += 1
        return True

    def hand_over(self, worker: str, old: tuple[str, str], new: tuple[str, str], body: bytes, job: str) -> bool:
        if new[1] in self.bodies[new[0]]:
            return True
        if old[1] not in self.acks[worker, old[0]]:
            return False
        self.acks[worker, old[0]].remove(old[1])
        self.forget(*old, job)
        self.put(*new, body)
        self.queues.add(base(new[0]))
        self.places[job] = new
        return True

    def hold(self, worker: str, held: HeldSet, jobs: Sequence[HeldFacts]) -> list[bool]:
        ours = []
        for job in jobs:
            ours.append(job.redis_id in self.acks[worker, held.queue])
            if ours[-1]:
                self.acks[worker, held.queue].remove(job.redis_id)
                latest = job.held_ms + round(MAX_WAIT_S * 1000)
                self.held[held][job.redis_id] = latest if job.expires_ms is None else min(latest, job.expires_ms)
                self.facts[held.queue][job.redis_id] = job
                self.permits[held.queue].pop(job.redis_id, None)
                self.places[job.job_id] = (held.queue, job.redis_id)
                self.counters["holds"] += 1
        return ours

    def in_order(self, held: HeldSet) -> list[str]:
        return sorted(self.held[held], key=lambda i: (self.held[held][i], i))

    def unhold(self, held: HeldSet, ids: Sequence[str]) -> list[HeldFacts]:
        for i in ids:
            del self.held[held][i]
        return [self.facts[held.queue].pop(i) for i in ids]

    def release(
        self, held: HeldSet, key: str, generation: int | None, permit: str, *, rate: float, burst: float, most_queued: int
    ) -> tuple[list[HeldFacts], int]:
        breaker = self.breakers[key]
        if generation is not None and (generation != breaker.generation or breaker.state in ("open", "half-open")):
            return [], len(self.held[held])
        tokens = min(burst, 1 if key not in self.tokens else math.inf if rate else self.tokens[key])
        n = max(0, min(math.floor(tokens), most_queued - len(self.lists[held.queue])))
        gone = self.in_order(held)[:n]
        self.tokens[key] = tokens - len(gone)
        self.lists[held.queue] += gone
        self.permits[held.queue].update(dict.fromkeys(gone, permit))
        self.counters["releases"] += len(gone)
        return self.unhold(held, gone), len(self.held[held])

    def free(self, held: HeldSet, ids: Sequence[str], permit: str) -> list[HeldFacts]:
        """To the head of the queue, in the order given."""
        gone = [i for i in ids if i in self.held[held]]
        self.lists[held.queue][:0] = gone
        self.permits[held.queue].update(dict.fromkeys(gone, permit))
        self.counters["releases"] += len(gone)
        return self.unhold(held, gone)

    def expire(self, held: HeldSet, jobs: Sequence[HeldFacts]) -> list[str]:
        gone = [job for job in jobs if job.redis_id in self.held[held]]
        self.unhold(held, [job.redis_id for job in gone])
        for job in gone:
            self.dead[held.queue][job.redis_id] = self.bodies[held.queue][job.redis_id]
            self.forget(held.queue, job.redis_id, job.job_id)
            self.ends["expired"] += 1
        return [job.job_id for job in gone]

    def give_back(self, worker: str, lane: str, ids: Sequence[str]) -> int:
        """To the head of the queue, in the order given."""
        gone = [i for i in ids if i in self.acks[worker, lane]]
        self.acks[worker, lane].difference_update(gone)
        self.lists[lane][:0] = gone
        return len(gone)

    def recover(self, worker: str, lane: str) -> int:
        if worker in self.seen - self.silent:
            return -1
        return self.give_back(worker, lane, sorted(self.acks[worker, lane]))

    def transition(self, key: str, seen: Breaker, to: Any) -> bool:
        now = self.breakers[key]
        if (seen.state, seen.generation) != (now.state, now.generation):
            return False
        self.breakers[key] = replace(now, state=to, generation=generation_after(now, to))
        if to == "open" and now.state != "half-open":
            self.counters["openings"] += 1
        return True

    def fetched(self) -> list[tuple[str, str, str]]:
        return sorted((worker, lane, i) for (worker, lane), ids in self.acks.items() for i in ids)

    def account(self) -> Account:
        counts = {}
        for queue in self.queues:
            running, waiting = (sum(len(self.acks[w, lane]) for w in WORKERS) for lane in (queue, f"{queue}.DQ"))
            delayed = len(self.lists[f"{queue}.DQ"]) + waiting
            held = sum(len(ids) for where, ids in self.held.items() if where.queue == queue)
            queued = len(self.lists[queue]) + delayed
            counts[queue] = QueueCount(queued=queued, delayed=delayed, running=running, held=held)
        return Account(accepted=self.accepted, ends={end: self.ends[end] for end in ENDS}, queues=counts)

    def as_keys(self, k: Keys) -> dict[str, Any]:
        """Every key of the namespace with its content, as `snapshot` reads it."""
        content: dict[str, Any] = {
            k.account: {"accepted": self.accepted, **self.ends},
            k.counters: dict(self.counters),
            k.adopted: self.adopted,
            k.queues: self.queues,
            k.places: {job: f"{lane}\t{i}" for job, (lane, i) in self.places.items()},
            k.held_sets: {held.name for held, ids in self.held.items() if ids},
            k.heartbeats: self.seen,
        }
        for (worker, lane), ids in self.acks.items():
            content[k.acks(worker, lane)] = ids
        for held, scores in self.held.items():
            content[k.held(held.queue, held.wait_key)] = scores
        for lane in {*self.lists, *self.bodies, *self.facts, *self.permits, *self.dead}:
            content[k.queue(lane)] = self.lists[lane]
            content[k.msgs(lane)] = {i: body.decode() for i, body in self.bodies[lane].items()}
            content[k.facts(lane)] = {i: facts.encode() for i, facts in self.facts[lane].items()}
            content[k.permits(lane)] = self.permits[lane]
            content[k.dead(lane)] = set(self.dead[base(lane)])
            content[k.dead_msgs(lane)] = {i: body.decode() for i, body in self.dead[base(lane)].items()}
        for key, breaker in self.breakers.items():
            if breaker != Breaker():
                content[k.breaker(key)] = {"state": breaker.state, "generation": str(breaker.generation)}
        content |= {k.bucket(key): tokens for key, tokens in self.tokens.items()}
        content[k.account] = {name: str(n) for name, n in content[k.account].items() if n}
        content[k.counters] = {name: str(n) for name, n in content[k.counters].items() if n}
        return {key: value for key, value in content.items() if value or isinstance(value, float | int)}


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
        return {name: plain(name, value, k) for name, value in zip(names, pipe.execute(), strict=True)}


def plain(name: str, value: Any, k: Keys) -> Any:
    match value:
        case dict():
            found = {field.decode(): content.decode() for field, content in value.items()}
            if name.startswith(k.bucket("")):
                return float(found["tokens"])
            return {f: found[f] for f in ("state", "generation")} if name.startswith(k.breaker("")) else found
        case set():
            return {member.decode() for member in value}
        case [[_, float()], *_] | [(_, float()), *_]:
            scores = {member.decode(): int(score) for member, score in value}
            return set(scores) if name == k.heartbeats or name.endswith(".XQ") else scores
        case _:
            return [item.decode() for item in value]


class StoreAndModel(RuleBasedStateMachine):
    namespaces = count(1)

    def __init__(self, client: redis.Redis) -> None:
        super().__init__()
        self.client = client
        self.keys = Keys(f"model-{next(self.namespaces)}")
        self.ledger, self.backlog = Ledger(client, self.keys), Backlog(client, self.keys)
        self.breakers = Breakers(client, self.keys)
        self.model = Model()
        self.numbers = count(1)
        self.jobs: dict[str, str] = {}
        self.foreign: set[str] = set()
        self.aware: set[tuple[str, str, str]] = set()
        self.remembered: list[tuple[str, str, str]] = []

    def teardown(self) -> None:
        self.client.flushdb()

    def new(self, job: str | None = None) -> tuple[str, bytes]:
        number = next(self.numbers)
        made = f"r{number:04}"
        self.jobs[made] = job or f"job-{number:04}"
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

    @initialize(
        lane=st.sampled_from(QUEUES), wait_key=st.sampled_from(WAIT_KEYS), held=st.integers(0, 4), taken=st.integers(0, 3)
    )
    def begin_in_the_middle(self, lane: str, wait_key: tuple[str, ...], held: int, taken: int) -> None:
        """Some jobs are held and some are fetched already."""
        for _ in range(held + taken + 1):
            self.accept(lane, again=False)
        if held + taken > 0:
            self.take("w1", lane, held + taken)
        if held > 0:
            ids = [i for _, _, i in self.in_hand()[:held]]
            facts = [self.facts(i, lane, wait_key, 1, n if n % 2 else None) for n, i in enumerate(ids)]
            self.model.hold("w1", HeldSet(lane, wait_key_text(wait_key)), facts)
            self.backlog.hold("w1", lane, wait_key, facts, MAX_WAIT_S)

    # producers

    @precondition(lambda self: sum(map(len, self.model.lists.values())) < MOST_QUEUED)
    @rule(lane=st.sampled_from(LANES), again=st.booleans())
    def accept(self, lane: str, again: bool) -> None:
        new_id, body = self.new()
        for _ in range(1 + again):
            self.ledger.accept(lane, new_id, body)
            self.model.accept(lane, new_id, body)

    @precondition(lambda self: sum(map(len, self.model.lists.values())) < MOST_QUEUED)
    @rule(lane=st.sampled_from(QUEUES))
    def put_without_tideover(self, lane: str) -> None:
        new_id, body = self.new()
        self.foreign.add(new_id)
        self.client.hset(self.keys.msgs(lane), new_id, body)
        self.client.rpush(self.keys.queue(lane), new_id)
        self.model.put(lane, new_id, body)

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
        assert self.model.fetch(worker, lane, n) == [(job.redis_id, job.body, job.permit) for job in jobs]
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
        call = (worker, lane, old, self.jobs[old], end)
        for _ in range(1 + again):
            assert self.model.settle(*call) == self.ledger.settle(*call)

    @precondition(lambda self: self.in_hand())
    @rule(data=st.data(), delayed=st.booleans(), late=st.booleans(), again=st.booleans())
    def hand_over(self, data: st.DataObject, delayed: bool, late: bool, again: bool) -> None:
        worker, lane, old = self.pick(data, late)
        new_id, body = self.new(self.jobs[old])
        new_lane = f"{lane}.DQ" if delayed and not lane.endswith(".DQ") else base(lane)
        for _ in range(1 + again):
            call = (worker, (lane, old), (new_lane, new_id), body, self.jobs[old])
            assert self.model.hand_over(*call) == self.ledger.hand_over(*call)

    @precondition(lambda self: any(not lane.endswith(".DQ") for _, lane, _ in self.in_hand()))
    @rule(
        data=st.data(),
        wait_key=st.sampled_from(WAIT_KEYS),
        held_ms=st.integers(1, 5),
        expires_ms=st.none() | st.integers(1, 9),
        late=st.booleans(),
        again=st.booleans(),
    )
    def hold(
        self, data: st.DataObject, wait_key: tuple[str, ...], held_ms: int, expires_ms: int | None, late: bool, again: bool
    ) -> None:
        candidates = [entry for entry in (self.remembered if late else self.in_hand()) if not entry[1].endswith(".DQ")]
        worker, lane, _ = data.draw(st.sampled_from(candidates), label="whose")
        same = sorted({i for w, at, i in candidates if (w, at) == (worker, lane)})
        ids = data.draw(st.lists(st.sampled_from(same), min_size=1, max_size=3, unique=True), label="jobs")
        facts = [self.facts(i, lane, wait_key, held_ms, expires_ms) for i in ids]
        held = HeldSet(lane, wait_key_text(wait_key))
        for _ in range(1 + again):
            assert self.model.hold(worker, held, facts) == self.backlog.hold(worker, lane, wait_key, facts, MAX_WAIT_S)

    def facts(self, i: str, lane: str, wait_key: tuple[str, ...], held_ms: int, expires_ms: int | None) -> HeldFacts:
        return HeldFacts(
            redis_id=i, job_id=self.jobs[i], task="t", queue=lane, criticality="deferrable", wait_key=wait_key_text(wait_key),
            reason="outage", generation=1, held_ms=held_ms, sent_ms=0, expires_ms=expires_ms,
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
            assert self.model.transition(key, seen, to) == self.breakers.transition(key, seen, Transition(to, "why"))

    # held jobs

    def draw_held(self, data: st.DataObject) -> HeldSet:
        used = sorted((held for held, ids in self.model.held.items() if ids), key=lambda held: held.name)
        return data.draw(st.sampled_from(used), label="held set")

    @precondition(lambda self: any(self.model.held.values()))
    @rule(
        data=st.data(),
        behind=st.sampled_from((0, 0, 1, None)),
        rate=st.sampled_from((0.0, AT_ONCE)),
        burst=st.sampled_from((0.5, 1.0, 2.5)),
        most_queued=st.sampled_from((0, 2, 100)),
        again=st.booleans(),
    )
    def release(
        self, data: st.DataObject, behind: int | None, rate: float, burst: float, most_queued: int, again: bool
    ) -> None:
        held = self.draw_held(data)
        key = data.draw(st.sampled_from(held.breaker_keys), label="breaker")
        now = self.model.breakers[key].generation
        generation = None if behind is None else now - behind
        permit = str(Permit(key, now))
        for _ in range(1 + again):
            pace: Any = {"rate": rate, "burst": burst, "most_queued": most_queued}
            expected = self.model.release(held, key, generation, permit, **pace)
            assert expected == self.backlog.release(held, key, generation, permit, **pace)

    @precondition(lambda self: any(self.model.held.values()))
    @rule(data=st.data(), again=st.booleans())
    def free(self, data: st.DataObject, again: bool) -> None:
        held = self.draw_held(data)
        strangers = ["nobody", *(i for _, _, i in self.remembered[-2:])]
        choice = st.lists(st.sampled_from([*self.model.held[held], *strangers]), min_size=1, unique=True)
        ids = data.draw(choice, label="jobs")
        for _ in range(1 + again):
            assert self.model.free(held, ids, "*@0") == self.backlog.free(held, ids, "*@0")

    @precondition(lambda self: any(self.model.held.values()))
    @rule(data=st.data(), now_ms=st.integers(1, 10), again=st.booleans())
    def expire(self, data: st.DataObject, now_ms: int, again: bool) -> None:
        held = self.draw_held(data)
        due = list(self.backlog.due(held, now_ms))
        late = [i for i in self.model.in_order(held) if self.model.held[held][i] <= now_ms]
        assert late == [fact.redis_id for fact in due]
        past = [fact for fact in due if fact.expires_ms is not None and fact.expires_ms <= now_ms]
        for _ in range(1 + again if past else 0):
            assert self.model.expire(held, past) == self.backlog.expire(held, past)

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
        real = snapshot(self.client, self.keys)
        assert self.model.as_keys(self.keys) == real
        self.one_place_each(real)

    def one_place_each(self, real: dict[str, Any]) -> None:
        """Counted in Redis, not in the model: each body has its id in exactly one place, and each id its body."""
        for lane in (*QUEUES, *(f"{queue}.DQ" for queue in QUEUES)):
            places = [real.get(self.keys.queue(lane), []), *(real.get(self.keys.acks(w, lane), ()) for w in WORKERS)]
            places += [real.get(self.keys.held(lane, wait_key_text(wait_key)), ()) for wait_key in WAIT_KEYS]
            ids = sorted(i for place in places for i in place)
            assert sorted(real.get(self.keys.msgs(lane), {})) == ids


def test_the_store_does_what_the_model_says(client: redis.Redis) -> None:
    """In thousands of random steps no job is lost, doubled or misplaced, whoever dies, repeats itself or comes late."""
    run_state_machine_as_test(lambda: StoreAndModel(client), settings=settings(stateful_step_count=40))
