# SPDX-License-Identifier: Apache-2.0
"""What routes and tasks have spent in an hour of the clock, over all processes."""

from __future__ import annotations

from collections.abc import Mapping

from tideover.store.client import Client, text
from tideover.store.keys import Keys

HOUR_S = 3600


class Spending:
    """The sums of one namespace. A sum's name says whose it is: `route:openai`, `task:reply`."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self.client, self.keys = client, keys

    def add(self, costs: Mapping[str, float], now: float) -> dict[str, float]:
        """Adds to sums of this hour; their totals. In a lost reply's place it is told again: then a little is counted twice."""
        key = self.keys.spent(str(int(now // HOUR_S)))
        with self.client.pipeline(transaction=False) as pipe:
            for name, cost in costs.items():
                pipe.hincrbyfloat(key, name, cost)
            pipe.expire(key, 2 * HOUR_S)
            *totals, _ = pipe.execute()
        return {name: float(total) for name, total in zip(costs, totals, strict=True)}

    def read(self, now: float) -> dict[str, float]:
        """The sums of this hour."""
        return {text(name): float(sum_) for name, sum_ in self.client.hgetall(self.keys.spent(str(int(now // HOUR_S)))).items()}
