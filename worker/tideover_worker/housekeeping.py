# SPDX-License-Identifier: Apache-2.0
"""Keeps house: signs of life, recovery of what dead workers had fetched, expiry of held jobs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from dramatiq.broker import Broker

from tideover import clock, events
from tideover.core.route import NO_PERMIT
from tideover.gate import Gate
from tideover.results import store_expired
from tideover.store.backlog import PAGE
from tideover.store.due import Due
from tideover.store.facts import TICKS, Group, HeldFacts
from tideover.store.keys import SCHEMA
from tideover.store.registry import STRANGERS_S, Registry
from tideover.store.stories import Line, told_by
from tideover.task import AITask
from tideover_worker.strangers import Watch

EVERY_S = 0.5
"""Held jobs end within a second of their expiry."""
MOST_OF_TASKS = 8192
"""Characters of the names of its tasks that a worker tells."""


def beat(gate: Gate, registry: Registry, facts: Mapping[str, Any]) -> None:
    """One sign of life, also while all slots are taken and nothing is fetched; it says again who this is."""
    sign(gate, registry)
    registry.enter_worker(gate.worker, {**facts, **imported(gate.broker), "apart": sorted(gate.health.apart)})


def imported(broker: Broker) -> dict[str, list[str]]:
    """The AI tasks that a worker knows; nothing of very many, as it is told with each sign of life."""
    names = sorted(name for name, actor in list(broker.actors.items()) if isinstance(actor, AITask))
    return {"tasks": names} if sum(map(len, names)) <= MOST_OF_TASKS else {}


def sign(gate: Gate, registry: Registry) -> float:
    """A sign of life; Redis' time (unix), which this process goes by from here on."""
    begun_at = clock.monotonic()
    now = registry.beat(gate.worker)
    gate.note_beat(begun_at)
    clock.follow(now, begun_at)
    return now


def turn(gate: Gate, registry: Registry, watch: Watch, due: Due, dead_message_ttl_ms: int) -> None:
    """One round for the whole namespace; one process at a time does it."""
    now, queues = sign(gate, registry), registry.queues()
    recover(gate, registry, queues, now)
    expire(gate, registry, due, queues, now)
    for queue in queues:
        gate.backlog.sweep(queue, dead_message_ttl_ms)
    watch.look(queues, now)
    if registry.raise_schema():
        events.schema_raised(registry.keys.namespace, SCHEMA)


def recover(gate: Gate, registry: Registry, queues: Iterable[str], now: float) -> None:
    """Gives the jobs of dead workers back to their queues. The script decides who is dead, by Redis' clock."""
    dead_after_s = gate.health.settings.worker.heartbeat_timeout_s
    if clock.monotonic() - gate.doubted_at < dead_after_s / 2:
        return  # we were silent ourselves: if Redis was away, the others need a moment to say that they live
    lanes, ours = [lane for queue in queues for lane in (queue, f"{queue}.DQ")], registry.workers()
    for worker, seen in registry.heartbeats().items():
        if now - seen < dead_after_s:
            continue
        may_go = worker in ours or now - seen >= STRANGERS_S
        if not may_go and not gate.backlog.fetched(worker, lanes):
            continue  # dramatiq's own maintenance needs its heartbeat to find what it has of queues unknown to us
        given_back = {lane: gate.backlog.recover(worker, lane, dead_after_s) for lane in lanes}
        for lane, n in given_back.items():
            if n > 0:
                events.jobs_recovered(worker, lane, n)
                registry.count("recovered", n)
        if may_go and all(n >= 0 for n in given_back.values()):
            registry.remove_worker(worker)


def expire(gate: Gate, registry: Registry, due: Due, queues: Sequence[str], now: float) -> None:
    """Ends held jobs that are past their expiry, within about a second of it; those with a degraded answer go and make it."""
    if gate.health.mode != "act":
        return
    now_ms = int(now * 1000)
    for queue, groups in due.groups(queues, last_order(now_ms)).items():
        for page in late(gate, groups, now_ms):
            degrading = {name for name, facts in registry.tasks().items() if facts.get("on_expiry") == "degrade"}
            going = [fact for fact in page if fact.task in degrading and fact.reason != "review"]
            end(gate, queue, [fact for fact in page if fact not in going], now)
            members = gate.backlog.members(queue, [fact.redis_id for fact in going])
            if members:
                released = gate.backlog.release(queue, list(members.values()), NO_PERMIT).jobs
                gate.tell(*(line for fact in released for line in told_by(fact)))


def end(gate: Gate, queue: str, late: Sequence[HeldFacts], now: float) -> None:
    """Ends held jobs as expired. First it is told, because whoever waits for an expired job asks how it ended."""
    gate.tell(*(line for fact in late for line in (*told_by(fact), expired_line(fact, now))))
    for fact in late:
        store_expired(gate.broker, queue, fact.task, fact.job_id)
    for fact, ended in zip(late, gate.backlog.expire(queue, late) if late else [], strict=True):
        if ended:
            events.job_expired(fact.job_id, fact.task, queue)


def last_order(now_ms: int) -> int:
    """The order of the last job that may have expired by now."""
    return now_ms * TICKS + TICKS - 1


def late(gate: Gate, groups: Sequence[Group], now_ms: int) -> Iterator[list[HeldFacts]]:
    """The held jobs of these groups that are past their expiry. Those that have waited longest are looked at with them."""
    found_due = gate.backlog.browse(groups, until=last_order(now_ms))
    while page := list(islice(found_due, PAGE)):
        if found := [fact for fact in page if fact.expires_ms is not None and fact.expires_ms <= now_ms]:
            yield found


def expired_line(fact: HeldFacts, now: float) -> Line:
    return Line(fact.job_id, now, "expired", {"task": fact.task, "while": "held"})
