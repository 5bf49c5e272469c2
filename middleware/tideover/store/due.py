# SPDX-License-Identifier: Apache-2.0
"""Which groups of held jobs have one whose time has come, without a look into each of them every time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from tideover import clock
from tideover.store.backlog import UNKNOWN, Backlog
from tideover.store.client import Client
from tideover.store.facts import Group
from tideover.store.keys import Keys

LOOK_ANEW_S = 60.0
"""How often each group is looked into all the same: a Redis that lost what it knew could count to the same number again."""

Place = tuple[str, bytes]
"""Queue and id of a group."""


class Due:
    """Remembers the order of each group's first job, and reads on only where that may have changed.

    A first job becomes an earlier one only when a job is held, and each hold is counted: in the namespace's counter, and in the
    number of its group's jobs. Where the numbers of the groups have grown by as much as that counter, the groups that have not
    grown have no new job. Where they have not, as when jobs are released and held at once, each group is looked into.
    """

    def __init__(self, client: Client, keys: Keys) -> None:
        self.client, self.keys, self.backlog = client, keys, Backlog(client, keys)
        self._holds = -1
        self._sizes: dict[Place, int] = {}
        self._firsts: dict[Place, int] = {}
        self._anew_at = 0.0

    def groups(self, queues: Sequence[str], until: int) -> dict[str, list[Group]]:
        """The groups of these queues with a job up to this order, for each queue that has some."""
        asked = self._changed(queues) | {place for place, first in self._firsts.items() if first <= until}
        for queue, places in groupby(sorted(asked), key=lambda place: place[0]):
            self._look(queue, [group for _, group in places])
        due = {place for place, first in self._firsts.items() if first <= until}
        named = {queue: self.backlog.groups(queue) for queue in {queue for queue, _ in due}}
        found = {queue: [group for group in groups if (queue, group.id) in due] for queue, groups in named.items()}
        return {queue: groups for queue, groups in found.items() if groups}

    def _changed(self, queues: Sequence[str]) -> set[Place]:
        """Groups that may have a first job which is not known."""
        anew = clock.monotonic() >= self._anew_at
        if not anew and int(self.client.hget(self.keys.counters, "holds") or 0) == self._holds:
            return set()
        before, before_holds = self._sizes, self._holds
        self._sizes, self._holds = self._read(queues)
        self._firsts = {place: first for place, first in self._firsts.items() if place in self._sizes}
        grown = {place for place, n in self._sizes.items() if n > before.get(place, 0)}
        if not anew and self._holds - before_holds == sum(self._sizes[place] - before.get(place, 0) for place in grown):
            return grown
        self._anew_at = clock.monotonic() + LOOK_ANEW_S
        return set(self._sizes)

    def _read(self, queues: Sequence[str]) -> tuple[dict[Place, int], int]:
        """The number of jobs of each group, and of all holds there ever were, at one instant."""
        with self.client.pipeline() as pipe:
            pipe.hget(self.keys.counters, "holds")
            for queue in queues:
                pipe.hgetall(self.keys.counts(queue))
            holds, *counts = pipe.execute()
        sizes = {place: n for queue, of_it in zip(queues, counts, strict=True) for place, n in numbered(queue, of_it)}
        return sizes, int(holds or 0)

    def _look(self, queue: str, groups: Sequence[bytes]) -> None:
        """Reads the first jobs of these groups."""
        for group in groups:
            self._firsts.pop((queue, group), None)
        for member in self.backlog.heads([Group(queue, group, UNKNOWN, 1) for group in groups], 1):
            self._firsts[queue, member.group.id] = member.order


def numbered(queue: str, sizes: Mapping[bytes, bytes]) -> Iterable[tuple[Place, int]]:
    return (((queue, bytes(group)), int(n)) for group, n in sizes.items())
