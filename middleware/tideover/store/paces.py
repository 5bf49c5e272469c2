# SPDX-License-Identifier: Apache-2.0
"""The pace of each route and model: what its calls come to, told by all processes, and what the leader makes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tideover.core.breaker import Breaker
from tideover.core.pacing import Felt, Limit, Limits, Pace, Pacer
from tideover.core.policy import PacePolicy
from tideover.core.progress import Progress
from tideover.store.client import Client, text
from tideover.store.keys import Keys
from tideover.store.scripts import Scripts

ALL = "*"
"""In the place of a breaker's key: what an operator says of all of them."""
COUNTED = ("sent", "ok", "lost", "throttled", "told", "input_tokens", "output_tokens", "jobs", "again", "released")


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What is known of one pace. `felt`: of all calls since it was begun; `heard`: how much of that the pacer has taken in.

    `recovered_at`, `braked_at`: of the breaker, as the pacer knows them; `refused_at`: when a live call got no turn;
    `published_at`: unix time, 0: never.
    """

    felt: Felt
    heard: Felt
    limits: Limits
    pacer: Pacer | None
    progress: Progress | None
    recovered_at: float
    braked_at: float
    factor: str
    refused_at: float
    published_at: float

    @property
    def news(self) -> Felt:
        """What the pacer has not heard of yet."""
        both = zip(asdict(self.felt).items(), asdict(self.heard).values(), strict=True)
        return Felt(**{name: max(0.0, new - old) if name != "quiet_s" else new for (name, new), old in both})


def known(kind: type[Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """What this version knows of a leader's notes: another one may note more."""
    return {field.name: row[field.name] for field in fields(kind) if field.name in row}


def standing_of(row: Mapping[str, str], now: float) -> Standing:
    quiet_s = max(0.0, int(row.get("quiet_until_ms", 0)) / 1000 - now)
    counts = {name: float(row.get(name, 0)) for name in COUNTED}
    felt = Felt(**counts, took_s=int(row.get("took_ms", 0)) / 1000, quiet_s=quiet_s)
    kept: dict[str, Any] = json.loads(row.get("pacer", "{}"))
    return Standing(
        felt=felt,
        heard=Felt(**known(Felt, kept.get("heard", {}))),
        limits={kind: Limit(*limit) for kind, limit in json.loads(row.get("limits", "{}")).items()},
        pacer=Pacer(**known(Pacer, kept["pacer"])) if kept else None,
        progress=Progress(**known(Progress, kept["progress"])) if kept else None,
        recovered_at=kept.get("recovered_at", 0.0),
        braked_at=kept.get("braked_at", 0.0),
        factor=row.get("factor", ""),
        refused_at=int(row.get("refused_ms", 0)) / 1000,
        published_at=int(row.get("published_ms", 0)) / 1000,
    )


class Paces:
    def __init__(self, client: Client, keys: Keys) -> None:
        self.client, self.keys, self.scripts = client, keys, Scripts(client)

    def feel(self, key: str, felt: Felt, *, live: int, limits: Limits) -> None:
        """Adds what calls came to. `live`: calls that no release has paid for; the next releases wait for them."""
        told = json.dumps({kind: (limit.per_s, limit.left) for kind, limit in limits.items()}) if limits else ""
        args: list[Any] = [live, int(felt.quiet_s * 1000), told, "took_ms", int(felt.took_s * 1000)]
        args += [part for name in COUNTED for part in (name, int(getattr(felt, name)))]
        self.scripts.run("feel-2", [self.keys.pace(key), self.keys.bucket(key)], args)

    def turn(self, key: str, most_s: float, policy: PacePolicy) -> float | None:
        """Takes a live call's turn in the pace; the seconds until it comes, None if that would be more than `most_s`."""
        keys = [self.keys.pace(key), self.keys.bucket(key)]
        wait_ms = int(self.scripts.run("turn-2", keys, [policy.start_rate, int(most_s * 1000)]))
        return None if wait_ms < 0 else wait_ms / 1000

    def order(self, key: str, facts: Mapping[str, Any]) -> None:
        """Notes what an operator said of the releases for a breaker, or for all (`*`)."""
        self.client.hset(self.keys.orders, key, json.dumps(facts))

    def countermand(self, key: str) -> bool:
        """Takes that back; False: nothing was said."""
        return bool(self.client.hdel(self.keys.orders, key))

    def orders(self) -> dict[str, dict[str, Any]]:
        """What operators said, by breaker."""
        return {text(key): json.loads(raw) for key, raw in self.client.hgetall(self.keys.orders).items()}

    def read(self, key: str, now: float) -> Standing:
        return standing_of({text(a): text(b) for a, b in self.client.hgetall(self.keys.pace(key)).items()}, now)

    def publish(self, key: str, seen: Standing, pacer: Pacer, pace: Pace, progress: Progress, breaker: Breaker) -> bool:
        """Makes a pace known, unless another leader did so since it was `seen`. `breaker`: as the pacer knows it."""
        notes = {"pacer": asdict(pacer), "heard": asdict(seen.felt), "progress": asdict(progress)}
        kept = {**notes, "recovered_at": breaker.recovered_at, "braked_at": breaker.braked_at}
        args = [int(seen.published_at * 1000), json.dumps(kept), pace.rate, pace.factor]
        return bool(self.scripts.run("pace-2", [self.keys.pace(key), self.keys.breaker(key)], args))
