# SPDX-License-Identifier: Apache-2.0
"""Held jobs of many groups as one list in order, read as it is asked for. It never reads a group as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import Any

from tideover.store.facts import GROUP, HEAD, UUID_BYTES, Group, Member

AT_ONCE = 100
"""Groups that one reading looks into: more in one script would block Redis for too long."""
MOST_READ = 2000
"""Members that one reading returns, more or less."""
LEAST, MOST = 4, 500
"""Members to read of a group at its second reading; each further one doubles that, up to the most."""

Place = tuple[Group, bytes, int]
"""A group, after which place (order and id) to read on, and how many members."""

Read = Callable[[Sequence[Place]], Sequence[Member]]
"""Reads the members at these places: those of a group in a row and in order."""

HIGHEST = b"\xff"


def bounds(group: Group, after: bytes, until: int | None) -> tuple[bytes, bytes]:
    """The limits of ZRANGEBYLEX for a group's members after a place (order and id), up to an order."""
    last = HIGHEST * HEAD if until is None else until.to_bytes(HEAD - GROUP)
    return b"(" + group.id + after, b"(" + group.id + last + HIGHEST * (UUID_BYTES + 1)


class Walk:
    """The members of these groups of one queue after a place, in order.

    A job that is held all the while comes exactly once, whatever else is held and released meanwhile: none is handed out
    before each group is read up to it, and what is read of a group has no gap.
    """

    def __init__(self, groups: Sequence[Group], first: Sequence[Member], asked: int, read: Read) -> None:
        """`first`: the first `asked` members of each group, read already."""
        self.read = read
        self.unread: list[tuple[bytes, bytes, Group, int]] = []
        self.ready: list[tuple[bytes, bytes, Member]] = []
        self._take(first, {group.id: asked for group in groups}, list.append)
        heapify(self.ready)
        heapify(self.unread)

    def __iter__(self) -> Iterator[Member]:
        while self.ready or self.unread:
            while self.ready and not (self.unread and self.unread[0][0] < self.ready[0][0]):
                yield heappop(self.ready)[2]
            if self.unread:
                self._refill()

    def _refill(self) -> None:
        """Reads on in the groups that are wanted next; the further one was read before, the more of it."""
        places: list[Place] = []
        while self.unread and len(places) < AT_ONCE and sum(n for _, _, n in places) < MOST_READ:
            place, _, group, asked = heappop(self.unread)
            places.append((group, place, min(MOST, max(LEAST, 2 * asked))))
        self._take(self.read(places), {group.id: asked for group, _, asked in places}, heappush)

    def _take(self, members: Sequence[Member], asked: Mapping[bytes, int], put: Callable[[list[Any], Any], None]) -> None:
        """Takes members in. A group that gave as many as were asked for may have more: it is read on after the last of them."""
        found: dict[bytes, int] = {}
        for member in members:
            key, group = member.key, member.group
            put(self.ready, (key, member.raw, member))
            found[group.id] = n = found.get(group.id, 0) + 1
            if n == asked[group.id]:
                put(self.unread, (key, group.id, group, n))
