# SPDX-License-Identifier: Apache-2.0
"""Brings the backlog home: releases held jobs at the pace of the breakers that they wait for, critical ones first."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from tideover import clock, events
from tideover.core.breaker import CLOSED, Breaker
from tideover.core.fairness import in_turns
from tideover.core.job import CRITICAL_SUFFIX
from tideover.core.policy import PacePolicy
from tideover.core.route import Permit, above
from tideover.gate import Gate
from tideover.plan import MOST_TURN_S
from tideover.store.backlog import PAGE, Allowance
from tideover.store.facts import GROUP, HEAD, TICKS, Group, HeldFacts, Member, breaker_keys_of
from tideover.store.registry import Registry
from tideover.store.stories import Line, told_by
from tideover_worker.chore import Lease
from tideover_worker.pacemaker import Pacemaker

EVERY_S = 0.1
"""How often the leader takes a turn; the others release as well, as often all together."""
BURST_S = 0.5
"""A release may catch up with at most so many seconds of its pace."""
PLAN_S = 1.0
"""How long a plan holds: a more urgent job that is held meanwhile waits so long for its turn at the most."""
REFUSED_S = 5.0
"""A live call that got no turn so lately means that the pace is still needed."""
URGENT_S = 60.0
CAPACITY_S = 1.0
"""How long the number of jobs that the fleet can run is good for."""


@dataclass(slots=True)
class Plan:
    """Members of one queue's held set, in the order in which they shall go."""

    made_at: float
    members: deque[bytes] = field(default_factory=deque)

    def is_over(self) -> bool:
        return not self.members or clock.monotonic() - self.made_at > PLAN_S


class Drain:
    """The release of one namespace's backlog: one process leads, all release."""

    def __init__(self, gate: Gate, registry: Registry, lease: Lease) -> None:
        self.gate, self.registry, self.lease = gate, registry, lease
        self.pacemaker = Pacemaker(gate.health.paces, self.policy_of, self.most_in_flight)
        self._moved: dict[str, tuple[float, float]] = {}
        """Jobs released for a breaker so far, and since when they are so many (monotonic)."""
        self._fleet: tuple[float, list[Mapping[str, Any]]] = (-CAPACITY_S, [])
        self._turned_at = self._tended_at = 0.0
        self._chosen: dict[str, list[bytes]] = {}
        """By queue: held jobs that were to be answered by another one, which has ended without an answer."""
        self._groups: dict[str, tuple[float, list[Group]]] = {}
        self._gone: dict[str, Counter[str]] = defaultdict(Counter)
        """By queue: jobs released since its groups were read, for each breaker that they waited for."""
        self._plans: dict[tuple[str, str], Plan] = {}

    def turn(self) -> None:
        """One round over all queues of the namespace, those that this process never declared included."""
        leads, health = self.lease.hold(), self.gate.health
        if not leads and clock.monotonic() - self._turned_at < EVERY_S * len(self.fleet()):
            return
        self.pacemaker.leads, self._turned_at = leads, clock.monotonic()
        queues = sorted(self.registry.queues(), key=lambda queue: (not queue.endswith(CRITICAL_SUFFIX), queue))
        held = {queue: groups for queue in queues if (groups := self.groups(queue))}
        jobs: Counter[str] = Counter()
        for group in chain.from_iterable(held.values()):
            jobs.update(dict.fromkeys(group.facet.breaker_keys, group.n))
        for queue in held:
            jobs -= self._gone[queue]
        self.pacemaker.expect(jobs, health.view)
        for key in sorted(breaker_keys_of(list(chain.from_iterable(held.values())))):
            self.release_all(key, held)
        if leads:
            self.tend(queues)
            for key in [key for key in health.views if not key.endswith("/*") and health.view(key).state == "recovering"]:
                self.pacemaker.pace(key, health.view(key))  # also where nothing is held: live calls go by it
            self.settle(set(jobs))

    def groups(self, queue: str) -> list[Group]:
        """The groups of a queue as of a second ago at the most: reading thousands ten times a second would burden Redis."""
        read_at, groups = self._groups.get(queue, (-PLAN_S, []))
        if not groups or clock.monotonic() - read_at > PLAN_S:
            groups = self.gate.backlog.groups(queue) if self.gate.backlog.size(queue) else []
            self._gone[queue].clear()
            self._groups[queue] = (clock.monotonic(), groups)
        return groups

    def release_all(self, key: str, held: Mapping[str, Sequence[Group]]) -> None:
        """Releases what one breaker lets go: of critical lanes first, then of the queue whose next job is the most urgent.

        While tideover does not act, every job goes, whatever the breaker.
        """
        breaker, acting = self.gate.health.view(key), self.gate.health.mode == "act"
        calls_per_s = self.pacemaker.rate(key, breaker if acting else CLOSED)
        if calls_per_s <= 0:
            self._plans = {(queue, other): plan for (queue, other), plan in self._plans.items() if other != key}
            return
        plans = {queue: self.plan(queue, key, groups) for queue, groups in held.items()}
        going = [queue for queue, plan in plans.items() if plan.members]
        for queue in sorted(going, key=lambda name: (not name.endswith(CRITICAL_SUFFIX), plans[name].members[0][GROUP:HEAD])):
            self.release(queue, key, plans[queue], calls_per_s)

    def release(self, queue: str, key: str, plan: Plan, calls_per_s: float) -> None:
        """Releases who goes next, as far as the pace and the workers have room."""
        health = self.gate.health
        breaker, acting = health.view(key), health.mode == "act"
        each = self.pacemaker.pace(key, breaker)[1].calls_each if acting else 1.0
        allowance = Allowance(
            key=key,
            generation=breaker.generation if acting else None,
            rate=calls_per_s,
            burst=max(1.0, calls_per_s * BURST_S),
            calls_each=each,
            most_queued=self.room(queue),
            borrow=calls_per_s * MOST_TURN_S if queue.endswith(CRITICAL_SUFFIX) else 0.0,
        )
        released, looked_at, crowded = self.gate.backlog.release(
            queue, list(plan.members), Permit(key, breaker.generation), allowance
        )
        for _ in range(looked_at):
            plan.members.popleft()
        if crowded:
            self.pacemaker.crowded(key)
        if released:
            self._gone[queue] += Counter(chain.from_iterable(facts.breaker_keys for facts in released))
            health.reporter.released(key, len(released))
            events.jobs_released(queue, len(released), self.gate.backlog.size(queue), key, calls_per_s / each)
            self.gate.tell(*(line for facts in released for line in (*told_by(facts), released_line(facts, key, breaker))))

    def plan(self, queue: str, key: str, groups: Sequence[Group]) -> Plan:
        """Who goes next of those that this breaker frees: the most urgent, tenants in turn."""
        plan = self._plans.get((queue, key))
        if plan is None or plan.is_over():
            acting = self.gate.health.mode == "act"
            freed = [g for g in groups if key in g.facet.breaker_keys and not (acting and g.facet.reason == "coalesced")]
            pacer = self.pacemaker.pace(key, self.gate.health.view(key))[1]
            heads = self.in_time(freed, pacer.answer_s if pacer.answers else 0.0) if freed else []
            by_id = {group.id: group for group in groups if key in group.facet.breaker_keys}
            heads += [Member(by_id[raw[:GROUP]], raw) for raw in self._chosen.get(queue, ()) if raw[:GROUP] in by_id]
            turns = in_turns(
                heads,
                tenant=lambda m: m.group.facet.tenant,
                order=lambda m: m.order,
                urgent_by=order_at(clock.now() + URGENT_S),
                weights=self.gate.health.settings.drain.weights,
            )
            plan = self._plans[queue, key] = Plan(clock.monotonic(), deque(member.raw for member in turns))
        return plan

    def in_time(self, groups: Sequence[Group], answer_s: float) -> list[Member]:
        """The first jobs of these groups; those that would have no answer before their expiry only if there are no others.

        Of jobs that take equally long as many as possible are in time if the late ones give way (Moore 1968).
        """
        backlog, most = self.gate.backlog, max(1, PAGE // len(groups))
        late_ms = round((clock.now() + answer_s) * 1000)
        heads = backlog.heads(groups, most)
        near = [member for member in heads if member.order <= late_ms * TICKS]
        expiries = (facts and facts.expires_ms for facts in backlog.facts_at(near))
        late = [member for member, ms in zip(near, expiries, strict=True) if ms is not None and ms <= late_ms]
        if not late or self.gate.health.mode != "act":
            return heads
        beyond = backlog.heads(groups, most, after=order_at(late_ms / 1000).to_bytes(HEAD - GROUP))
        known = {member.raw for member in late}
        found = {member.raw: member for member in [*heads, *beyond] if member.raw not in known}
        return list(found.values()) or late

    def fleet(self) -> list[Mapping[str, Any]]:
        """The workers."""
        read_at, found = self._fleet
        if clock.monotonic() - read_at > CAPACITY_S:
            found = list(self.registry.workers().values())
            self._fleet = (clock.monotonic(), found)
        return found

    def room(self, queue: str) -> int:
        """Jobs of a queue that its workers can run at once; no more than that are queued."""
        return sum(facts.get("concurrency", 0) for facts in self.fleet() if queue in facts.get("queues", [queue]))

    def policy_of(self, key: str) -> PacePolicy:
        """What the settings say of the pace of a breaker: for all routes, and for its own."""
        settings = self.gate.health.settings
        policy, route = settings.drain.policy(), settings.routes.get(key.partition("/")[0])
        if route is None:
            return policy
        per_minute = route.max_requests_per_minute
        rate = least(policy.max_rate, None if per_minute is None else per_minute / 60)
        return replace(
            policy,
            start_rate=policy.start_rate if rate is None else min(policy.start_rate, rate),
            max_rate=rate,
            max_tokens_per_minute=least(policy.max_tokens_per_minute, route.max_tokens_per_minute),
        )

    def most_in_flight(self, key: str) -> float:
        """Calls over a breaker's route that the settings allow at one time, of all processes."""
        route = self.gate.health.settings.routes.get(key.partition("/")[0])
        most = None if route is None else route.max_in_flight
        return math.inf if most is None else most * max(1, len(self.fleet()))

    def tend(self, queues: Iterable[str]) -> None:
        """Finds those whose answer will not come, about once a second."""
        if clock.monotonic() - self._tended_at > PLAN_S:
            self._chosen = {queue: members for queue in queues if (members := self.gate.twins.chosen(queue))}
            self._tended_at = clock.monotonic()

    def settle(self, waited_for: set[str]) -> None:
        """Lets breakers that recover close once they have stood their time, and suspect ones that are calm.

        Not while the pace keeps somebody waiting: a backlog, unless nobody releases it (no worker on its queue), or live calls,
        for a while; a pace that cannot grow any more would keep them waiting for ever.
        """
        health, now = self.gate.health, clock.monotonic()
        waited_for = waited_for | {above(key) for key in waited_for}
        for key, n in {key: self.moved(key) for key in waited_for}.items():
            if self._moved.get(key, (0.0, -1.0))[1] != n:
                self._moved[key] = (now, n)
        self._moved = {key: moved for key, moved in self._moved.items() if key in waited_for}
        for key, view in list(health.views.items()):
            if view.state in ("recovering", "suspect"):
                reading = health.breakers.report(key, health.process)
                waiting = key in waited_for and now - self._moved[key][0] < health.policy.settle_max_s
                refused = clock.now() - self.pacemaker.refused_at.get(key, 0.0) < REFUSED_S
                waiting = waiting or (refused and clock.now() - view.since < health.policy.settle_max_s)
                change = health.reporter.judged(key, reading, waiting=waiting)
                if change is not None:
                    health.move(key, reading.breaker, change)

    def moved(self, key: str) -> float:
        """Jobs that were released so far for a breaker, or for those of all models of its route."""
        told = self.pacemaker.released
        return sum(n for other, n in told.items() if above(other) == key) if key == above(key) else told.get(key, 0.0)


def least(*caps: float | None) -> float | None:
    """The lowest of those that there are."""
    return min((cap for cap in caps if cap is not None), default=None)


def order_at(unix_s: float) -> int:
    """The order of what goes at an instant."""
    return round(unix_s * 1000) * TICKS


def released_line(facts: HeldFacts, key: str, breaker: Breaker) -> Line:
    now = clock.now()
    said = {"by": key, "generation": breaker.generation, "held_s": round(now - facts.held_ms / 1000, 1)}
    return Line(facts.job_id, now, "released", said)
