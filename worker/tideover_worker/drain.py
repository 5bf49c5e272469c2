# SPDX-License-Identifier: Apache-2.0
"""Brings the backlog home: releases held jobs at the pace of the breakers that they wait for, critical ones first."""

from __future__ import annotations

from collections.abc import Sequence

from tideover import clock, events
from tideover.core.breaker import Breaker, judge
from tideover.core.job import CRITICAL_SUFFIX
from tideover.core.pacing import rate
from tideover.core.route import Permit
from tideover.gate import Gate
from tideover.store.backlog import HeldFacts, HeldSet
from tideover.store.stories import Line

EVERY_S = 0.1
BURST_S = 0.5
"""A release may catch up with at most so many seconds of its pace."""


def turn(gate: Gate) -> None:
    """One round over all held sets of the namespace, those of queues that this process never declared included."""
    held_sets = sorted(gate.backlog.held_sets(), key=lambda held: (not held.queue.endswith(CRITICAL_SUFFIX), held.name))
    for held in held_sets:
        for key in held.breaker_keys:
            release(gate, held, key)
    settle(gate, held_sets)


def release(gate: Gate, held: HeldSet, key: str) -> None:
    """Releases what one breaker lets go of one held set. While tideover does not act, every job goes, at the full pace."""
    pace = gate.health.settings.drain.policy()
    breaker = gate.health.view(key)
    acting = gate.health.mode == "act"
    per_s = rate(breaker, now=clock.now(), policy=pace) if acting else pace.max_rate
    if per_s <= 0:
        return
    permit = Permit(key, breaker.generation)
    released, left = gate.backlog.release(
        held,
        key,
        breaker.generation if acting else None,
        str(permit),
        rate=per_s,
        burst=max(1.0, per_s * BURST_S),
        most_queued=gate.health.settings.worker.concurrency,
    )
    if released:
        events.jobs_released(held.queue, len(released), left, key, per_s)
        gate.tell(*(released_line(fact, key, breaker) for fact in released))


def released_line(fact: HeldFacts, key: str, breaker: Breaker) -> Line:
    now = clock.now()
    facts = {"by": key, "generation": breaker.generation, "held_s": round(now - fact.held_ms / 1000, 1)}
    return Line(fact.job_id, now, "released", facts)


def settle(gate: Gate, held_sets: Sequence[HeldSet]) -> None:
    """Closes recovering breakers that have stood their time."""
    waited_for = {key for held in held_sets for key in held.breaker_keys}
    health = gate.health
    for key, view in list(health.views.items()):
        if view.state == "recovering":
            reading = health.breakers.report(key, health.policy.window_s)
            change = judge(reading.breaker, reading.window, now=reading.now, waiting=key in waited_for, policy=health.policy)
            if change is not None:
                health.move(key, reading.breaker, change)
