# SPDX-License-Identifier: Apache-2.0
"""Which held jobs are meant: a filter, answered by groups where these can tell, and else by the facts of job after job."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import crc_hqx
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from heapq import merge
from itertools import chain, islice
from typing import Literal, get_args

from tideover.core.admission import Reason
from tideover.core.job import CRITICALITIES
from tideover.ops.access import Misasked, Space
from tideover.store.backlog import PAGE
from tideover.store.facts import GROUP, HEAD, SHARED, TICKS, UUID_BYTES, Facet, Group, HeldFacts, Member, bucket

REASONS: tuple[Reason, ...] = get_args(Reason)

MOST_LOOKED = 100_000
"""Jobs that one question looks at one by one; the answer says so when it stops there.

They are the most urgent ones, not those that were held last: the answer lists the most urgent first, a cursor can go on behind
them, and jobs that were held for long (`held_for_s`), or that expire soon, are among the first.
"""

Share = Literal["none", "all", "some"]
"""How many jobs of a group are meant. *some*: only the facts of each can tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """What held jobs must have to be meant; None: anything. An empty tenant or tag means none.

    `waits_for`: a route, or a breaker or the beginning of one. `held_for_s`: so long at least, `expires_before_s`: their expiry
    comes within so long; both in seconds from now.

    Raises:
      Misasked: there is no such reason or criticality, or a duration is negative.
    """

    task: str | None = None
    waits_for: str | None = None
    reason: str | None = None
    criticality: str | None = None
    tenant: str | None = None
    tag: str | None = None
    held_for_s: float | None = None
    expires_before_s: float | None = None

    def __post_init__(self) -> None:
        for what, asked, allowed in (("reason", self.reason, REASONS), ("criticality", self.criticality, CRITICALITIES)):
            if asked is not None and asked not in allowed:
                raise Misasked(f"there is no {what} {asked!r}; it is one of {', '.join(allowed)}")
        for seconds in (self.held_for_s, self.expires_before_s):
            if seconds is not None and not 0 <= seconds < float("inf"):
                raise Misasked(f"{seconds} s is no duration; it is 0 or more")

    @property
    def by_time(self) -> bool:
        return self.held_for_s is not None or self.expires_before_s is not None

    def share_of(self, facet: Facet) -> Share:
        """How many jobs of a group with this facet are meant."""
        if self.task not in (None, facet.task) or self.reason not in (None, facet.reason):
            return "none"
        if self.criticality not in (None, facet.criticality):
            return "none"
        if self.waits_for is not None and not any(names(self.waits_for, key) for key in facet.breaker_keys):
            return "none"
        shares = {share_of(self.tenant, facet.tenant, facet), share_of(self.tag, facet.tag, facet)}
        if "none" in shares:
            return "none"
        return "some" if "some" in shares or self.by_time else "all"

    def takes(self, facts: HeldFacts, now_ms: int) -> bool:
        """Whether a job of a group of which some are meant is one of them."""
        if self.tenant not in (None, facts.tenant) or self.tag not in (None, facts.tag):
            return False
        if self.held_for_s is not None and facts.held_ms > now_ms - self.held_for_s * 1000:
            return False
        within_s = self.expires_before_s
        return within_s is None or (facts.expires_ms is not None and facts.expires_ms < now_ms + within_s * 1000)

    def latest_order(self, now_ms: int) -> int | None:
        """The order up to which jobs may be meant: a job goes by its expiry at the latest. None: any."""
        return None if self.expires_before_s is None else min(2**48 - 1, round(now_ms + self.expires_before_s * 1000) * TICKS)


ANY = Filter()


def names(asked: str, key: str) -> bool:
    """Whether this is the route of a breaker, or the beginning of its name.

    >>> [names(asked, "anthropic/claude-opus-4-8") for asked in ("anthropic", "anthropic/claude", "anth", "openai")]
    [True, True, False, False]
    """
    return key.startswith(asked if "/" in asked else f"{asked}/")


def share_of(asked: str | None, value: str, facet: Facet) -> Share:
    """How many jobs of a group have this tenant (or tag). Where its `salt` says so, its own stands for those of many."""
    if asked is None:
        return "all"
    if facet.salt and value:
        return "some" if asked and value in (SHARED, bucket(asked)) else "none"
    return "all" if value == asked else "none"


def cursor_of(place: bytes) -> str:
    """A place in the order of held jobs, as text for a URL or a shell; two bytes show whether it was copied as a whole.

    >>> place_of(cursor_of(bytes(22))) == bytes(22)
    True
    """
    return urlsafe_b64encode(place + check_of(place)).rstrip(b"=").decode()


def check_of(place: bytes) -> bytes:
    return crc_hqx(place, 0xFFFF).to_bytes(2)


def place_of(cursor: str | None) -> bytes:
    """The place that a cursor stands for; None: the beginning. Raises `Misasked`."""
    if cursor is None:
        return b""
    try:
        raw = urlsafe_b64decode(cursor.encode() + b"=" * (-len(cursor) % 4))
    except ValueError:
        raw = b""
    place, check = raw[:-2], raw[-2:]
    if len(place) < HEAD - GROUP + UUID_BYTES or check != check_of(place):
        raise Misasked(f"{cursor!r} is no cursor; give what the page before said, all of it")
    return place


@dataclass(frozen=True, slots=True)
class Part:
    """What may be meant of one queue. `sifted`: ids of groups of which only some jobs are."""

    space: Space
    queue: str
    groups: tuple[Group, ...]
    sifted: frozenset[bytes]


@dataclass(slots=True)
class Search:
    """The held jobs of some namespaces that a filter means, those first that must go first.

    `certain`: how many there are as far as groups tell. `stopped_at`: where it gave up, having looked at too many one by one.
    """

    spaces: Iterable[Space]
    filter: Filter
    now_ms: int
    looked_at: int = 0
    stopped_at: bytes | None = None
    parts: list[Part] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = [part for space in self.spaces for queue in space.registry.queues() if (part := self.part(space, queue))]

    def part(self, space: Space, queue: str) -> Part | None:
        shares = [(group, self.filter.share_of(group.facet)) for group in space.backlog.groups(queue)]
        groups = tuple(group for group, share in shares if share != "none")
        return Part(space, queue, groups, frozenset(g.id for g, share in shares if share == "some")) if groups else None

    @property
    def certain(self) -> int:
        return sum(group.n for part in self.parts for group in part.groups if group.id not in part.sifted)

    @property
    def must_sift(self) -> bool:
        return any(part.sifted for part in self.parts)

    def sift(self) -> Iterator[HeldFacts]:
        """The jobs that are meant of groups of which only some are, until too many were looked at."""
        self.parts = [replace(p, groups=tuple(g for g in p.groups if g.id in p.sifted)) for p in self.parts if p.sifted]
        return (facts for _, _, facts in self.jobs(PAGE))

    def leave_out_review(self) -> int:
        """Forgets jobs that need review; how many they are, as far as groups tell."""
        n = self.certain
        kept = (replace(p, groups=tuple(g for g in p.groups if g.facet.reason != "review")) for p in self.parts)
        self.parts = [part for part in kept if part.groups]
        return n - self.certain

    def meant(self) -> Iterator[tuple[Part, Member]]:
        """All jobs that are meant, those of a queue in order; facts are read only where groups cannot tell."""
        if self.must_sift:
            return ((part, member) for part, member, _ in self.jobs(PAGE, to_the_end=True))
        return chain.from_iterable(self._members_of(part, PAGE, b"") for part in self.parts)

    def members(self, first: int, after: bytes = b"") -> Iterator[tuple[Part, Member]]:
        """All jobs of the groups of which some are meant; about `first` are wanted."""
        return merge(*(self._members_of(part, first, after) for part in self.parts), key=lambda found: found[1].key)

    def _members_of(self, part: Part, first: int, after: bytes) -> Iterator[tuple[Part, Member]]:
        until = self.filter.latest_order(self.now_ms)
        return ((part, member) for member in part.space.backlog.walk(part.groups, first, after=after, until=until))

    def jobs(self, first: int, after: bytes = b"", *, to_the_end: bool = False) -> Iterator[tuple[Part, Member, HeldFacts]]:
        """The jobs that are meant and still held; unless `to_the_end`, until `MOST_LOOKED` were looked at one by one."""
        step = max(1, min(first, PAGE))
        found = self.members(step, after)
        while page := list(islice(found, step)):
            meant = list(self._meant(page))
            self.looked_at += sum(member.group.id in part.sifted for part, member in page)
            yield from meant
            step = min(2 * step, PAGE)
            if not to_the_end:
                step = min(step, MOST_LOOKED - self.looked_at)
            if step <= 0:
                self.stopped_at = page[-1][1].key
                return

    def _meant(self, page: list[tuple[Part, Member]]) -> Iterator[tuple[Part, Member, HeldFacts]]:
        held: dict[tuple[int, bytes], HeldFacts | None] = {}
        for part in {id(part): part for part, _ in page}.values():
            members = [member for of, member in page if of is part]
            facts = part.space.backlog.facts_at(members)
            held |= {(id(part), member.raw): of_it for member, of_it in zip(members, facts, strict=True)}
        for part, member in page:
            of_it = held[id(part), member.raw]
            if of_it is not None and (member.group.id not in part.sifted or self.filter.takes(of_it, self.now_ms)):
                yield part, member, of_it
