# SPDX-License-Identifier: Apache-2.0
"""Who is there: namespaces, tasks, routes, workers. Producers and workers write it, so that tools need no user code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tideover.errors import ConfigurationError
from tideover.store.client import Client, text
from tideover.store.keys import BYPASS, DELAYED_SUFFIX, NAMESPACES, SCHEMA, Keys
from tideover.store.scripts import Scripts

STRANGERS_S = 3600
"""How long workers without tideover are remembered after the last of them was seen."""


def namespaces(client: Client) -> list[str]:
    """All namespaces of a database in which tideover was ever used."""
    return sorted(text(name) for name in client.smembers(NAMESPACES))


class Registry:
    def __init__(self, client: Client, keys: Keys) -> None:
        self.client, self.keys, self.scripts = client, keys, Scripts(client)

    def announce(self, schema: int = SCHEMA) -> int:
        """Enters the namespace; the schema that is stored in it: that of this process, or the next lower or higher one.

        Raises:
          ConfigurationError: what is stored is further apart, so that one would not understand what the other writes.
        """
        self.client.set(self.keys.schema, schema, nx=True)
        stored = int(self.client.get(self.keys.schema) or schema)
        if abs(stored - schema) > 1:
            raise ConfigurationError(too_far_apart(self.keys.namespace, stored, schema))
        self.client.sadd(NAMESPACES, self.keys.namespace)
        return stored

    def schema(self) -> int | None:
        """The schema that is stored; None: nobody has announced this namespace."""
        stored = self.client.get(self.keys.schema)
        return None if stored is None else int(stored)

    def raise_schema(self, schema: int = SCHEMA) -> bool:
        """Raises the stored schema by one to that of this process, unless a worker of an older one is there."""
        if any(facts.get("schema", 0) < schema for facts in self.workers().values()):
            return False
        return bool(self.scripts.run("raise-1", [self.keys.schema], [schema - 1, schema]))

    def enter_tasks(self, tasks: Mapping[str, Mapping[str, Any]]) -> None:
        if tasks:
            self.client.hset(self.keys.tasks, mapping={name: json.dumps(facts) for name, facts in tasks.items()})

    def enter_routes(self, routes: Mapping[str, Mapping[str, Any]]) -> None:
        """The routes of this deployment; a route that is gone from the settings goes from here."""
        with self.client.pipeline() as pipe:
            pipe.delete(self.keys.routes)
            pipe.hset(self.keys.routes, mapping={name: json.dumps(facts) for name, facts in routes.items()})
            pipe.execute()

    def now(self) -> float:
        """Redis' time (unix)."""
        seconds, microseconds = self.client.time()
        return float(seconds + microseconds / 1_000_000)

    def beat(self, worker: str) -> float:
        """A worker's sign of life; Redis' time (unix)."""
        return int(self.scripts.run("beat-1", [self.keys.heartbeats], [worker])) / 1000

    def enter_worker(self, worker: str, facts: Mapping[str, Any]) -> None:
        self.scripts.run("enter-1", [self.keys.workers], [worker, json.dumps(facts)])

    def leader(self, chore: str) -> str | None:
        """The worker that does a chore for the whole fleet; None: none just now."""
        worker = self.client.get(self.keys.lease(chore))
        return None if worker is None else text(worker)

    def remove_worker(self, worker: str) -> bool:
        """Forgets a worker. False: it has jobs still, which only its heartbeat leads to."""
        lanes = [lane for queue in self.queues() for lane in (queue, queue + DELAYED_SUFFIX)]
        keys = [self.keys.workers, self.keys.heartbeats, *(self.keys.acks(worker, lane) for lane in lanes)]
        return bool(self.scripts.run("leave-n", keys, [worker]))

    def tasks(self) -> dict[str, dict[str, Any]]:
        return self._read(self.keys.tasks)

    def routes(self) -> dict[str, dict[str, Any]]:
        return self._read(self.keys.routes)

    def workers(self) -> dict[str, dict[str, Any]]:
        return self._read(self.keys.workers)

    def learn(self, task: str, model: str) -> None:
        self.client.sadd(self.keys.models, f"{task}\t{model}")

    def models(self) -> dict[str, frozenset[str]]:
        """The models that each task was seen to call."""
        seen: dict[str, set[str]] = {}
        for entry in self.client.smembers(self.keys.models):
            task, model = text(entry).split("\t", 1)
            seen.setdefault(task, set()).add(model)
        return {task: frozenset(models) for task, models in seen.items()}

    def queues(self) -> list[str]:
        return sorted(text(queue) for queue in self.client.smembers(self.keys.queues))

    def heartbeats(self) -> dict[str, float]:
        """Each worker's last sign of life, unix time. Producers without tideover leave one too."""
        return {text(worker): ms / 1000 for worker, ms in self.client.zrange(self.keys.heartbeats, 0, -1, withscores=True)}

    def note_strangers(self, seen_at: Mapping[str, float]) -> list[str]:
        """Notes workers without tideover, each with its last sign of life (unix time); those that were not noted before."""
        noted = self.strangers()
        facts = {worker: {"since": noted.get(worker, {"since": at})["since"], "seen": at} for worker, at in seen_at.items()}
        if facts:
            with self.client.pipeline() as pipe:
                pipe.hset(self.keys.strangers, mapping={worker: json.dumps(fact) for worker, fact in facts.items()})
                pipe.expire(self.keys.strangers, STRANGERS_S)
                pipe.execute()
        return [worker for worker in facts if worker not in noted]

    def strangers(self) -> dict[str, dict[str, float]]:
        """Workers without tideover that were seen with jobs: when first, and their last sign of life (unix time)."""
        return self._read(self.keys.strangers)

    def with_jobs(self, workers: Sequence[str], lanes: Sequence[str]) -> list[str]:
        """Those of these workers that have fetched jobs of these lists."""
        with self.client.pipeline(transaction=False) as pipe:
            for worker in workers:
                for lane in lanes:
                    pipe.scard(self.keys.acks(worker, lane))
            sizes, n = pipe.execute(), len(lanes)
        return [worker for i, worker in enumerate(workers) if any(sizes[i * n : (i + 1) * n])]

    def end_elsewhere(self, known: int, n: int) -> bool:
        """Counts `n` jobs more that workers without tideover ended. False: there are not `known` of them any more."""
        return bool(self.scripts.run("elsewhere-1", [self.keys.account], [known, n]))

    def counters(self) -> dict[str, int]:
        return {text(name): int(n) for name, n in self.client.hgetall(self.keys.counters).items()}

    def count(self, name: str, n: int = 1) -> None:
        self.client.hincrby(self.keys.counters, name, n)

    def bypass(self) -> dict[str, Any] | None:
        """Who switched tideover off, when and why; None: nobody did."""
        raw = self.client.get(self.keys.bypass)
        return None if raw is None else json.loads(raw)

    def set_bypass(self, facts: Mapping[str, Any], for_s: float | None) -> None:
        self.client.set(self.keys.bypass, json.dumps(facts), px=None if for_s is None else int(for_s * 1000))
        self.client.publish(self.keys.news, BYPASS)

    def clear_bypass(self) -> bool:
        gone = bool(self.client.delete(self.keys.bypass))
        self.client.publish(self.keys.news, BYPASS)
        return gone

    def _read(self, key: str) -> dict[str, dict[str, Any]]:
        return {text(name): json.loads(raw) for name, raw in self.client.hgetall(key).items()}


def too_far_apart(namespace: str, stored: int, schema: int) -> str:
    if stored > schema:
        remedy = f"Upgrade this process to a version of schema {stored - 1} or {stored}"
    else:
        remedy = f"Deploy a version of schema {stored + 1} first, until no older worker is left; then the next one"
    return (
        f"namespace {namespace} holds data of tideover's schema {stored}, and this process has schema {schema}: "
        f"only neighbours understand each other. {remedy} (docs/deploys.md)"
    )
