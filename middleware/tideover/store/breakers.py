# SPDX-License-Identifier: Apache-2.0
"""Breakers as all processes share them: counted and moved by scripts, judged by `core.breaker`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from tideover.core.breaker import CLOSED, Breaker, State, Transition, Window, generation_after
from tideover.store.client import Client, text
from tideover.store.keys import Keys
from tideover.store.scripts import Scripts, pairs

STATES: dict[str, State] = {"closed": "closed", "open": "open", "half-open": "half-open", "recovering": "recovering"}


@dataclass(frozen=True, slots=True)
class Reading:
    """A breaker and its window at one instant of Redis' clock (unix time)."""

    breaker: Breaker
    window: Window
    now: float


def breaker_of(row: Mapping[str, str]) -> Breaker:
    """A breaker from its hash; an empty hash is one that never failed."""
    if not row:
        return CLOSED
    return Breaker(
        state=STATES[row.get("state", "closed")],
        generation=int(row.get("generation", 0)),
        since=int(row.get("since_ms", 0)) / 1000,
        opened_at=int(row.get("opened_ms", 0)) / 1000,
        probes_failed=int(row.get("probes_failed", 0)),
        throttled_until=int(row.get("throttled_until_ms", 0)) / 1000,
        why=row.get("why", ""),
    )


class Breakers:
    def __init__(self, client: Client, keys: Keys) -> None:
        self.client, self.keys, self.scripts = client, keys, Scripts(client)

    def report(
        self,
        key: str,
        window_s: float,
        *,
        generation: int | None = None,
        ok: int = 0,
        failed: int = 0,
        why: str = "",
        quiet_s: float = 0,
    ) -> Reading:
        """Counts calls of a generation (None: none) and reads the breaker. `quiet_s`: the pause the provider asked for."""
        k = self.keys
        args = [
            key,
            "" if generation is None else generation,
            ok,
            failed,
            ceil(window_s),
            why,
            int(quiet_s * 1000),
            k.news,
        ]
        row, good, bad, now_ms = self.scripts.run("report-3", [k.breaker(key), k.window(key), k.breakers], args)
        return Reading(breaker_of(pairs(row)), Window(int(good), int(bad)), int(now_ms) / 1000)

    def transition(self, key: str, seen: Breaker, change: Transition) -> bool:
        """Moves a breaker that still is as `seen`; False: somebody was faster."""
        k = self.keys
        args = [key, seen.state, seen.generation, change.to, generation_after(seen, change.to), change.why, k.news]
        return bool(self.scripts.run("transition-3", [k.breaker(key), k.window(key), k.counters], args))

    def listen(self) -> Any:
        """A subscription to the news of this namespace: one message for each breaker that changed."""
        news = self.client.pubsub()
        news.subscribe(self.keys.news)
        return news

    def keys_known(self) -> list[str]:
        return sorted(text(key) for key in self.client.smembers(self.keys.breakers))

    def read(self, keys: Sequence[str]) -> dict[str, Breaker]:
        with self.client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hgetall(self.keys.breaker(key))
            rows = pipe.execute()
        return {key: breaker_of({text(a): text(b) for a, b in row.items()}) for key, row in zip(keys, rows, strict=True)}
