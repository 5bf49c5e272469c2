# SPDX-License-Identifier: Apache-2.0
"""Brings the backlog home: releases held jobs at the pace of the breakers that they wait for, critical ones first."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tideover import clock, events
from tideover.core.breaker import Breaker
from tideover.core.fairness import in_turns
from tideover.core.job import CRITICAL_SUFFIX
from tideover.core.pacing import rate
from tideover.core.route import Permit
from tideover.gate import Gate
from tideover.store.backlog import PAGE, Pace
from tideover.store.facts import TICKS, Group, HeldFacts, breaker_keys_of
from tideover.store.registry import Registry
from tideover.store.stories import Line, told_by

EVERY_S = 0.1
BURST_S = 0.5
"""A release may catch up with at most so many seconds of its pace."""
PLAN_S = 1.0
"""How long a plan holds: a more urgent job that is held meanwhile waits so long for its turn at the most."""
URGENT_S = 60.0


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
        self._groups: dict[str, tuple[float, list[Group]]] = {}
        self._plans: dict[tuple[str, str], Plan] = {}

    def turn(self) -> None:
        """One round over all queues of the namespace, those that this process never declared included."""
        waited_for: set[str] = set()
        for queue in sorted(self.registry.queues(), key=lambda queue: (not queue.endswith(CRITICAL_SUFFIX), queue)):
            groups = self.groups(queue)
            keys = breaker_keys_of(groups)
            waited_for |= keys
            for key in sorted(keys):
                self.release(queue, key, groups)
        settle(self.gate, waited_for)

    def groups(self, queue: str) -> list[Group]:
        """The groups of a queue as of a second ago at the most: reading thousands ten times a second would burden Redis."""
        read_at, groups = self._groups.get(queue, (-PLAN_S, []))
        if not groups or clock.monotonic() - read_at > PLAN_S:
            groups = self.gate.backlog.groups(queue) if self.gate.backlog.size(queue) else []
            self._groups[queue] = (clock.monotonic(), groups)
        return groups

    def release(self, queue: str, key: str, groups: Sequence[Group]) -> None:
        """Releases what one breaker lets go of one queue. While tideover does not act, every job goes, at the full pace."""
        drain, health = self.gate.health.settings.drain.policy(), self.gate.health
        breaker, acting = health.view(key), health.mode == "act"
        per_s = rate(breaker, now=clock.now(), policy=drain) if acting else drain.max_rate
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
            most_queued=health.settings.worker.concurrency,
        )
        released, looked_at = self.gate.backlog.release(queue, list(plan.members), Permit(key, breaker.generation), pace)
        for _ in range(looked_at):
            plan.members.popleft()
        if released:
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


def released_line(facts: HeldFacts, key: str, breaker: Breaker) -> Line:
    now = clock.now()
    said = {"by": key, "generation": breaker.generation, "held_s": round(now - facts.held_ms / 1000, 1)}
    return Line(facts.job_id, now, "released", said)


def settle(gate: Gate, waited_for: set[str]) -> None:
    """Lets breakers that recover close once they have stood their time, and suspect ones that are calm."""
    health = gate.health
    for key, view in list(health.views.items()):
        if view.state in ("recovering", "suspect"):
            reading = health.breakers.report(key, health.process)
            change = health.reporter.judged(key, reading, waiting=key in waited_for)
            if change is not None:
                health.move(key, reading.breaker, change)
