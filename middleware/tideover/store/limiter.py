# SPDX-License-Identifier: Apache-2.0
"""The limits per minute of each route, over all processes: a call takes its room before it goes out."""

from __future__ import annotations

from tideover.store.client import Client
from tideover.store.keys import Keys
from tideover.store.scripts import Scripts

FIRST_TOKENS = 1000
"""What a call counts for until one has told what it took."""


class Limiter:
    """One namespace's. Room comes free evenly, as in a token bucket; no more than a second's worth is saved up."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self.keys, self.scripts = keys, Scripts(client)

    def allow(self, route: str, requests: float | None, tokens: float | None, most_s: float) -> tuple[float, int] | None:
        """Takes one call's room: how long to wait for it (seconds), and the tokens set aside. None: longer than `most_s`.

        `requests`, `tokens`: per minute; None: no limit.
        """
        args = [requests or 0, tokens or 0, int(most_s * 1000), FIRST_TOKENS]
        wait_ms, aside = self.scripts.run("allow-1", [self.keys.limiter(route)], args)
        return None if wait_ms < 0 else (wait_ms / 1000, aside)

    def took(self, route: str, beyond: int, told: int, tokens: int) -> None:
        """Tells what `told` calls took (`tokens`), and how much more that is than was set aside for all that ended."""
        self.scripts.run("took-1", [self.keys.limiter(route)], [beyond, told, tokens])
