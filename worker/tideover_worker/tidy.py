# SPDX-License-Identifier: Apache-2.0
"""Tidies up after workers without tideover, when they are gone: else a tenant would keep the places of jobs that ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from dramatiq.errors import DecodeError
from dramatiq.message import Message

from tideover import clock, events
from tideover.stamp import tenant_of
from tideover.store.orphans import Orphans

PAGES = 10
"""Pages of one turn, of 500 notes or bodies each."""
AGAIN_S = 300.0
"""How soon tenants are counted again that had jobs come and go while they were counted."""


class Tidy:
    """Some pages at each turn, until nothing is left of what ended elsewhere."""

    def __init__(self, orphans: Orphans) -> None:
        self.orphans = orphans
        self._rest: Iterator[None] = iter(())
        self._again_at = 0.0

    def turn(self, queues: Sequence[str]) -> None:
        """Goes on where the last turn ended, or begins if there is something to do."""
        if sum(1 for _ in islice(self._rest, PAGES)) == 0 and clock.monotonic() >= self._again_at:
            ended = self.orphans.ended()
            self._rest = self.all(queues, ended) if ended > 0 else iter(())

    def all(self, queues: Sequence[str], ended: int) -> Iterator[None]:
        """All of it, page by page."""
        forgotten = 0
        for n in self.orphans.forget_notes(queues):
            forgotten += n
            yield
        before, counted = self.orphans.tenants(), Counter[str]()
        for bodies in self.orphans.bodies(queues) if before else ():
            counted.update(tenant for tenant in map(tenant_in, bodies) if tenant)
            yield
        settled = [self.orphans.recount(tenant, n, counted[tenant]) for tenant, n in before.items() if n > counted[tenant]]
        if all(settled):
            self.orphans.tidied(ended)
            events.orphans_forgotten(ended, forgotten, len(settled))
        else:
            self._again_at = clock.monotonic() + AGAIN_S
        yield


def tenant_in(body: bytes) -> str:
    """The tenant of a job; '' where it has none, or nobody can read it."""
    try:
        return tenant_of(Message.decode(body))
    except DecodeError:
        return ""
