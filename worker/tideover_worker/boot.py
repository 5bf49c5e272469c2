# SPDX-License-Identifier: Apache-2.0
"""What a worker process adds to dramatiq: the one door through which `Tideover.before_worker_boot` reaches up."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

from dramatiq.broker import Broker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.worker import Worker

from tideover import clock, events
from tideover.consumer import GatedConsumer
from tideover.core.job import CRITICAL_SUFFIX
from tideover.errors import ConfigurationError
from tideover.gate import Gate
from tideover.health import Health
from tideover.results import store_when_full
from tideover.settings import Settings, settings
from tideover.store.account import Ledger
from tideover.store.backlog import Backlog
from tideover.store.breakers import Breakers
from tideover.store.client import FULL, Client, safekeeping
from tideover.store.due import Due
from tideover.store.keys import SCHEMA, Keys
from tideover.store.registry import Registry
from tideover.store.stories import Stories
from tideover.stub import MemoryBroker
from tideover.task import AITask
from tideover_worker import drain, housekeeping, probe, run, status_pages
from tideover_worker.chore import Chore, Lease
from tideover_worker.probe import Prober
from tideover_worker.strangers import Watch

LEASE_S = 3.0


@dataclass(frozen=True, slots=True)
class Node:
    """tideover in one worker process."""

    gate: Gate
    registry: Registry
    chores: tuple[Chore, ...]
    prober: Prober
    shared: run.Shared

    def stop(self) -> None:
        for chore in self.chores:
            chore.stop()
        self.prober.stop()
        self.shared.stop()
        self.gate.health.stop()
        self.registry.remove_worker(self.gate.worker)


def start(broker: RedisBroker, worker: Worker) -> Node:
    """Checks what can be checked before the first job, then puts the parts in place. Raises `ConfigurationError`."""
    config = settings()
    tasks = ai_tasks(broker)
    check_tasks(config, tasks)
    if tasks:
        import_module("tideover.providers.anthropic")  # it takes a second, for which a first call would block the loop
    if not isinstance(broker, MemoryBroker):
        check_store(broker.client)
    keys = Keys(broker.namespace)
    registry = Registry(broker.client, keys)
    health = Health(config, Breakers(broker.client, keys), registry)
    gate = Gate(
        broker,
        broker.broker_id,
        health,
        Ledger(broker.client, keys),
        Backlog(broker.client, keys),
        Stories(broker.client, keys),
    )
    store_when_full(broker)
    try:
        enter(registry, config, tasks)
    except FULL as error:  # it can help to bring the backlog home all the same
        events.store_unavailable("entering what this worker knows", str(error)[:100])
    widen(worker, broker, tasks, config)
    facts = facts_of_worker(config, worker)
    housekeeping.beat(gate, registry, facts)
    health.start()
    vars(broker)["consume"] = partial(consumer, gate, {task.queue_name for task in tasks if task.coroutine is not None})
    shared = run.install(worker, gate)
    prober = Prober(health)
    chores = chores_of(broker.client, gate, registry, prober, facts, broker.dead_message_ttl)
    for chore in chores:
        chore.start()
    return Node(gate, registry, chores, prober, shared)


def chores_of(
    client: Client, gate: Gate, registry: Registry, prober: Prober, facts: Mapping[str, Any], dead_message_ttl_ms: int
) -> tuple[Chore, ...]:
    """What this process does again and again; with a lease it is done by one process of the fleet."""
    timeout_s, lease = gate.health.settings.worker.heartbeat_timeout_s, registry.keys.lease
    watch, due = Watch(registry, gate.ledger, timeout_s), Due(client, registry.keys)
    bringing = drain.Drain(gate, registry, Lease(client, lease("drain"), LEASE_S, gate.worker))
    turn = partial(housekeeping.turn, gate, registry, watch, due, dead_message_ttl_ms)
    beat = partial(housekeeping.beat, gate, registry, facts)
    return (
        Chore("drain", drain.EVERY_S, bringing.turn, bringing.lease, alone=False),
        Chore("probe", probe.EVERY_S, prober.turn),
        Chore(
            "status-pages",
            status_pages.TURN_S,
            status_pages.Corroboration(gate.health).turn,
            Lease(client, lease("pages"), LEASE_S, gate.worker),
        ),
        Chore("heartbeat", min(housekeeping.EVERY_S, timeout_s / 4), beat),
        Chore("housekeeping", housekeeping.EVERY_S, turn, Lease(client, lease("housekeeping"), LEASE_S, gate.worker)),
    )


def check_tasks(config: Settings, tasks: Iterable[AITask[Any, Any]]) -> None:
    """The routes that tasks name exist, and their credentials are there. Raises `ConfigurationError`."""
    for task in tasks:
        task.check_routes()
        for route in task.routes():
            config.check_route(route)


def check_store(client: Client) -> None:
    """Redis throws nothing away, else `ConfigurationError`; warns where it forgets at a restart, or may not be asked."""
    for server in safekeeping(client):
        if server.policy not in (None, "noeviction"):
            raise ConfigurationError(
                f"Redis has maxmemory-policy {server.policy}, so it may throw jobs away. "
                "Set maxmemory-policy noeviction, or give tideover a Redis of its own"
            )
        risk, remedy = server.risk
        if risk:
            events.store_at_risk(risk, remedy, certain=(server.logs, server.saves) == (False, False))


def ai_tasks(broker: Broker) -> list[AITask[Any, Any]]:
    return [task for task in broker.actors.values() if isinstance(task, AITask)]


def enter(registry: Registry, config: Settings, tasks: list[AITask[Any, Any]]) -> None:
    """Writes what tools need to know of this deployment; no secret is among it."""
    registry.announce()
    registry.enter_tasks({task.actor_name: task.facts() for task in tasks})
    routes = config.routes.items()
    registry.enter_routes({name: {"kind": r.kind, "models": r.models, "domain": r.domain} for name, r in routes})


def facts_of_worker(config: Settings, worker: Worker) -> dict[str, Any]:
    """What tools show of this process."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": clock.now(),
        "version": version("tideover"),
        "schema": SCHEMA,
        "mode": config.mode,
        "concurrency": config.worker.concurrency,
        "queues": sorted(worker.consumer_whitelist or worker.broker.get_declared_queues()),
    }


def widen(worker: Worker, broker: RedisBroker, tasks: list[AITask[Any, Any]], config: Settings) -> None:
    """A whitelist of a queue includes its critical lane; there is room for what is in flight."""
    if worker.consumer_whitelist:
        declared = broker.get_declared_queues()
        lanes = {queue + CRITICAL_SUFFIX for queue in worker.consumer_whitelist}
        worker.consumer_whitelist |= lanes & declared
    if any(task.coroutine is not None for task in tasks):
        worker.queue_prefetch = max(worker.queue_prefetch, config.worker.concurrency)


def consumer(
    gate: Gate, queues_with_coroutines: set[str], queue_name: str, prefetch: int = 1, timeout: int = 5000
) -> GatedConsumer:
    """dramatiq's `broker.consume`. A queue of functions only is prefetched as stock does it, a little ahead of the threads."""
    config = gate.health.settings.worker
    base = queue_name.removesuffix(".DQ").removesuffix(CRITICAL_SUFFIX)
    if not queue_name.endswith(".DQ") and base not in queues_with_coroutines:
        prefetch = min(prefetch, 64)
    return GatedConsumer(gate, queue_name, prefetch, min(config.poll_s, timeout / 1000))
