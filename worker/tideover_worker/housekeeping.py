# SPDX-License-Identifier: Apache-2.0
"""Keeps house: signs of life, recovery of what dead workers had fetched, expiry of held jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tideover import clock, events
from tideover.gate import Gate
from tideover.store.registry import Registry
from tideover.store.stories import Line

EVERY_S = 1.0


def beat(gate: Gate, registry: Registry, facts: Mapping[str, Any]) -> None:
    """One sign of life, also while all slots are taken and nothing is fetched; it says again who this is."""
    registry.beat(gate.worker)
    registry.enter_worker(gate.worker, facts)


def turn(gate: Gate, registry: Registry, dead_message_ttl_ms: int) -> None:
    """One round for the whole namespace; one process at a time does it."""
    recover(gate, registry)
    expire(gate)
    for queue in registry.queues():
        gate.backlog.sweep(queue, dead_message_ttl_ms)


def recover(gate: Gate, registry: Registry) -> None:
    """Gives the jobs of dead workers back to their queues. The script decides who is dead, by Redis' clock."""
    dead_after_s = gate.health.settings.worker.heartbeat_timeout_s
    now = registry.beat(gate.worker)
    for worker, seen in registry.heartbeats().items():
        if now - seen < dead_after_s:
            continue
        lanes = [lane for queue in registry.queues() for lane in (queue, f"{queue}.DQ")]
        given_back = {lane: gate.backlog.recover(worker, lane, dead_after_s) for lane in lanes}
        for lane, n in given_back.items():
            if n > 0:
                events.jobs_recovered(worker, lane, n)
                registry.count("recovered", n)
        if all(n >= 0 for n in given_back.values()):
            registry.remove_worker(worker)


def expire(gate: Gate) -> None:
    """Ends held jobs that are past their expiry, within about a second of it."""
    if gate.health.mode != "act":
        return
    now_ms = clock.now_ms()
    for held in gate.backlog.held_sets():
        late = [fact for fact in gate.backlog.due(held, now_ms) if fact.expires_ms is not None and fact.expires_ms <= now_ms]
        if not late:
            continue
        gate.tell(*(Line(fact.job_id, clock.now(), "expired", {"task": fact.task, "while": "held"}) for fact in late))
        ended = set(gate.backlog.expire(held, late))
        for fact in late:
            if fact.job_id in ended:
                events.job_expired(fact.job_id, fact.task, fact.queue)
