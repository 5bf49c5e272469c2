# SPDX-License-Identifier: Apache-2.0
"""Who is there: namespaces, tasks, routes, workers. Producers and workers write it, so that tools need no user code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tideover.store.client import Client, Scripts, text
from tideover.store.keys import NAMESPACES, Keys


def namespaces(client: Client) -> list[str]:
    """All namespaces of a database in which tideover was ever used."""
    return sorted(text(name) for name in client.smembers(NAMESPACES))


class Registry:
    def __init__(self, client: Client, keys: Keys) -> None:
        self.client, self.keys, self.scripts = client, keys, Scripts(client)

    def announce(self) -> None:
        self.client.sadd(NAMESPACES, self.keys.namespace)

    def enter_tasks(self, tasks: Mapping[str, Mapping[str, Any]]) -> None:
        if tasks:
            self.client.hset(self.keys.tasks, mapping={name: json.dumps(facts) for name, facts in tasks.items()})

    def enter_routes(self, routes: Mapping[str, Mapping[str, Any]]) -> None:
        """The routes of this deployment; a route that is gone from the settings goes from here."""
        with self.client.pipeline() as pipe:
            pipe.delete(self.keys.routes)
            pipe.hset(self.keys.routes, mapping={name: json.dumps(facts) for name, facts in routes.items()})
            pipe.execute()

    def beat(self, worker: str) -> float:
        """A worker's sign of life; Redis' time (unix)."""
        return int(self.scripts.run("beat-1", [self.keys.heartbeats], [worker])) / 1000

    def enter_worker(self, worker: str, facts: Mapping[str, Any]) -> None:
        self.client.hset(self.keys.workers, worker, json.dumps(facts))

    def remove_worker(self, worker: str) -> None:
        """Forgets a worker that has nothing fetched."""
        with self.client.pipeline() as pipe:
            pipe.hdel(self.keys.workers, worker)
            pipe.zrem(self.keys.heartbeats, worker)
            pipe.execute()

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
        self.client.publish(self.keys.news, "bypass")

    def clear_bypass(self) -> bool:
        gone = bool(self.client.delete(self.keys.bypass))
        self.client.publish(self.keys.news, "bypass")
        return gone

    def _read(self, key: str) -> dict[str, dict[str, Any]]:
        return {text(name): json.loads(raw) for name, raw in self.client.hgetall(key).items()}
