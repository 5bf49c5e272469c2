# SPDX-License-Identifier: Apache-2.0
"""What workers without tideover leave behind: notes of jobs that they ended, and too high a number of live jobs of a tenant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

from tideover.store.backlog import PAGE
from tideover.store.client import Client, text
from tideover.store.keys import DELAYED_SUFFIX, Keys
from tideover.store.scripts import Scripts

Note = tuple[str, str, str]
"""Its field, what it says ('' if that is all one), and the Redis id of its job."""


class Orphans:
    """Finds and forgets them, a page at a time: each page is one step, and between two of them the fleet goes on."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self.client, self.keys, self.scripts = client, keys, Scripts(client)

    def ended(self) -> int:
        """How many jobs ended elsewhere since it was tidied up; 0: there is nothing to do."""
        ended = int(self.client.hget(self.keys.account, "elsewhere") or 0)
        return ended - int(self.client.hget(self.keys.counters, "tidied") or 0) if ended else 0

    def tidied(self, n: int) -> None:
        """Notes that nothing is left of so many jobs more."""
        self.client.hincrby(self.keys.counters, "tidied", n)

    def forget_notes(self, queues: Sequence[str]) -> Iterator[int]:
        """Forgets marks, places and adoptions of jobs without a body; for each page how many."""
        k, lanes = self.keys, [lane for queue in queues for lane in (queue, queue + DELAYED_SUFFIX)]
        for lane in lanes:
            marks = ((text(i), "", text(i)) for i, _ in self.client.hscan_iter(k.marks(lane), count=PAGE))
            yield from self._forget("hash", k.marks(lane), marks, [lane])
        adopted = ((text(i), "", text(i)) for i in self.client.sscan_iter(k.adopted, count=PAGE))
        yield from self._forget("set", k.adopted, adopted, lanes)
        places: dict[str, list[Note]] = defaultdict(list)
        for job_id, place in self.client.hscan_iter(k.places, count=PAGE):
            lane, redis_id = text(place).split("\t", 1)
            places[lane].append((text(job_id), text(place), redis_id))
            if len(places[lane]) >= PAGE:
                yield from self._forget("hash", k.places, places.pop(lane), [lane])
        for lane, notes in places.items():
            yield from self._forget("hash", k.places, notes, [lane])

    def _forget(
        self, kind: Literal["hash", "set"], key: str, notes: Iterator[Note] | Sequence[Note], lanes: Sequence[str]
    ) -> Iterator[int]:
        rest, msgs = iter(notes), [self.keys.msgs(lane) for lane in lanes]
        while page := list(islice(rest, PAGE)):
            yield int(self.scripts.run("tidy-n", [key, *msgs], [kind, *(word for note in page for word in note)]))

    def tenants(self) -> dict[str, int]:
        """The number of live jobs of each tenant, as it stands."""
        return {text(tenant): int(n) for tenant, n in self.client.hgetall(self.keys.tenants).items()}

    def bodies(self, queues: Sequence[str]) -> Iterator[list[bytes]]:
        """The bodies of all live jobs, page by page; one that changes its list meanwhile may come twice, or not at all."""
        for lane in (lane for queue in queues for lane in (queue, queue + DELAYED_SUFFIX)):
            found = (bytes(body) for _, body in self.client.hscan_iter(self.keys.msgs(lane), count=PAGE))
            while page := list(islice(found, PAGE)):
                yield page

    def recount(self, tenant: str, seen: int, counted: int) -> bool:
        """Corrects the number of a tenant's live jobs. False: it is not `seen` any more."""
        return bool(self.scripts.run("recount-1", [self.keys.tenants], [tenant, seen, counted]))
