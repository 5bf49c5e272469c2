# SPDX-License-Identifier: Apache-2.0
"""The states that breakers went through in a run, each with its route's, and what follows from them at any instant."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tideover.core.breaker import CLOSED, Breaker, State, together
from tideover.core.route import above, is_task_key
from tideover.store.breakers import Breakers
from tideover.store.client import FAILED

LISTEN_S = 0.2
DOWN: frozenset[State] = frozenset({"open", "half-open"})
PACED: frozenset[State] = frozenset({"open", "half-open", "recovering"})


@dataclass(frozen=True, slots=True)
class Move:
    """A breaker's change of state at unix time `at` (Redis' clock), and the failure that it remembers."""

    at: float
    key: str
    was: State
    state: State
    generation: int
    why: str


class History:
    """Moves by breaker, in order. A breaker starts closed."""

    def __init__(self) -> None:
        self.moves: dict[str, list[Move]] = defaultdict(list)
        self.now: dict[str, Breaker] = {}

    def see(self, key: str, breaker: Breaker) -> None:
        """Notes a reading; a breaker that has not moved since the last one adds nothing."""
        before = self.now.get(key, Breaker())
        self.now[key] = breaker
        if (before.state, before.generation) != (breaker.state, breaker.generation):
            move = Move(breaker.since, key, before.state, breaker.state, breaker.generation, breaker.why)
            self.moves[key].append(move)

    def all_moves(self) -> list[Move]:
        return sorted((move for moves in list(self.moves.values()) for move in moves), key=lambda move: move.at)

    def spells(self, key: str, states: frozenset[State] = DOWN) -> list[tuple[float, float]]:
        """From when to when the breaker was in these states; the last may have no end (inf)."""
        spans: list[tuple[float, float]] = []
        since: float | None = None
        for move in self.moves.get(key, ()):
            if move.state in states and since is None:
                since = move.at
            elif move.state not in states and since is not None:
                spans.append((since, move.at))
                since = None
        return spans if since is None else [*spans, (since, math.inf)]

    def down_since(self, key: str, at: float) -> float | None:
        """For how many seconds the breaker had been down at this instant; None: it was not."""
        return next((at - start for start, end in self.spells(key) if start <= at < end), None)

    def usable_throughout(self, keys: Iterable[str], start: float, end: float, *, paced: bool = False) -> list[str]:
        """Those of these breakers that let calls through during the whole span; `paced`: as many as came."""
        found = {key: self.spells(key, PACED if paced else DOWN) for key in keys}
        return [key for key, spells in found.items() if not any(begin < end and until > start for begin, until in spells)]


class Historian:
    """Follows the breakers' news from a thread of its own, as a context manager."""

    def __init__(self, breakers: Breakers) -> None:
        self.breakers, self.history = breakers, History()
        self.failure: Exception | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tideover-demo-history", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> None:
        with self._lock:
            self._look()

    def _look(self) -> None:
        known = self.breakers.read(self.breakers.keys_known())
        for key, breaker in known.items():
            if key != above(key) and not is_task_key(key):
                self.history.see(key, together(breaker, known.get(above(key), CLOSED), breaker.since))

    def _follow(self) -> None:
        news = self.breakers.listen()
        try:
            while not self._stop.is_set():
                news.heard(LISTEN_S)
                self.look()
        except FAILED as error:
            self.failure = error
        finally:
            news.close()
