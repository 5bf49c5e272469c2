# SPDX-License-Identifier: Apache-2.0
"""Brings the backlog home: releases held jobs at the pace of the breakers that they wait for, critical ones first."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from tideover import clock, events
from tideover.core.breaker import CLOSED, Breaker
from tideover.core.fairness import in_turns
from tideover.core.job import CRITICAL_SUFFIX
from tideover.core.route import Permit, above
from tideover.gate import Gate
from tideover.store.backlog import PAGE, Pace
from tideover.store.facts import TICKS, Group, HeldFacts, breaker_keys_of
from tideover.store.registry import Registry
from tideover.store.stories import Line, told_by
from tideover_worker.pacemaker import Pacemaker

EVERY_S = 0.1
BURST_S = 0.5
"""A release may catch up with at most so many seconds of its pace."""
PLAN_S = 1.0
"""How long a plan holds: a more urgent job that is held meanwhile waits so long for its turn at the most."""
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
    """The release of one namespace's backlog."""

    def __init__(self, gate: Gate, registry: Registry) -> None:
        self.gate, self.registry = gate, registry
        self.pacemaker = Pacemaker(gate.health.paces, gate.health.settings.drain.policy())
        self._moved_at: dict[str, float] = {}
        """When a job was last released for a breaker, or its backlog first seen (monotonic)."""
        self._capacity = (-CAPACITY_S, 0)
        self._groups: dict[str, tuple[float, list[Group]]] = {}
        self._gone: dict[str, Counter[str]] = defaultdict(Counter)
        """By queue: jobs released since its groups were read, for each breaker that they waited for."""
        self._plans: dict[tuple[str, str], Plan] = {}

    def turn(self) -> None:
        """One round over all queues of the namespace, those that this process never declared included."""
        health = self.gate.health
        queues = sorted(self.registry.queues(), key=lambda queue: (not queue.endswith(CRITICAL_SUFFIX), queue))
        held = {queue: groups for queue in queues if (groups := self.groups(queue))}
        jobs: Counter[str] = Counter()
        for group in chain.from_iterable(held.values()):
            jobs.update(dict.fromkeys(group.facet.breaker_keys, group.n))
        for queue in held:
            jobs -= self._gone[queue]
        self.pacemaker.expect(jobs, health.view)
        for queue, groups in held.items():
            for key in sorted(breaker_keys_of(groups)):
                self.release(queue, key, groups)
        self.settle(set(jobs))

    def groups(self, queue: str) -> list[Group]:
        """The groups of a queue as of a second ago at the most: reading thousands ten times a second would burden Redis."""
        read_at, groups = self._groups.get(queue, (-PLAN_S, []))
        if not groups or clock.monotonic() - read_at > PLAN_S:
            groups = self.gate.backlog.groups(queue) if self.gate.backlog.size(queue) else []
            self._gone[queue].clear()
            self._groups[queue] = (clock.monotonic(), groups)
        return groups

    def release(self, queue: str, key: str, groups: Sequence[Group]) -> None:
        """Releases what one breaker lets go of one queue. While tideover does not act, every job goes, whatever the breaker."""
        health = self.gate.health
        breaker, acting = health.view(key), health.mode == "act"
        per_s = self.pacemaker.rate(key, breaker if acting else CLOSED)
        if per_s <= 0:
            self._plans.pop((queue, key), None)
            return
        plan = self.plan(queue, key, groups)
        if not plan.members:
            return
        pace = Pace(
            key=key,
            generation=breaker.generation if acting else None,
            rate=per_s,
            burst=max(1.0, per_s * BURST_S),
            most_queued=self.capacity(),
        )
        released, looked_at = self.gate.backlog.release(queue, list(plan.members), Permit(key, breaker.generation), pace)
        for _ in range(looked_at):
            plan.members.popleft()
        if released:
            gone = Counter(chain.from_iterable(facts.breaker_keys for facts in released))
            self._gone[queue] += gone
            self.pacemaker.released(gone)
            self._moved_at[key] = self._moved_at[above(key)] = clock.monotonic()
            events.jobs_released(queue, len(released), self.gate.backlog.size(queue), key, per_s)
            self.gate.tell(*(line for facts in released for line in (*told_by(facts), released_line(facts, key, breaker))))

    def plan(self, queue: str, key: str, groups: Sequence[Group]) -> Plan:
        """Who goes next of those that this breaker frees: the most urgent, tenants in turn."""
        plan = self._plans.get((queue, key))
        if plan is None or plan.is_over():
            freed = [group for group in groups if key in group.facet.breaker_keys]
            heads = self.gate.backlog.heads(freed, max(1, PAGE // len(freed)))
            urgent_by = round((clock.now() + URGENT_S) * 1000) * TICKS
            turns = in_turns(heads, tenant=lambda m: m.group.facet.tenant, order=lambda m: m.order, urgent_by=urgent_by)
            plan = self._plans[queue, key] = Plan(clock.monotonic(), deque(member.raw for member in turns))
        return plan

    def capacity(self) -> int:
        """Jobs that the fleet can run at once: no more of them are queued."""
        read_at, found = self._capacity
        if clock.monotonic() - read_at > CAPACITY_S:
            found = sum(facts.get("concurrency", 0) for facts in self.registry.workers().values())
            self._capacity = (clock.monotonic(), found)
        return max(found, self.gate.health.settings.worker.concurrency)

    def settle(self, waited_for: set[str]) -> None:
        """Lets breakers that recover close once they have stood their time, and suspect ones that are calm.

        A backlog that nobody releases for long (its queue has no worker) keeps none of them from closing.
        """
        health, now = self.gate.health, clock.monotonic()
        waited_for = waited_for | {above(key) for key in waited_for}
        self._moved_at = {key: self._moved_at.get(key, now) for key in waited_for}
        for key, view in list(health.views.items()):
            if view.state in ("recovering", "suspect"):
                reading = health.breakers.report(key, health.process)
                waiting = key in waited_for and now - self._moved_at[key] < health.policy.settle_max_s
                change = health.reporter.judged(key, reading, waiting=waiting)
                if change is not None:
                    health.move(key, reading.breaker, change)


def released_line(facts: HeldFacts, key: str, breaker: Breaker) -> Line:
    now = clock.now()
    said = {"by": key, "generation": breaker.generation, "held_s": round(now - facts.held_ms / 1000, 1)}
    return Line(facts.job_id, now, "released", said)
