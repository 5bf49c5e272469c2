# SPDX-License-Identifier: Apache-2.0
"""What is known of a held job without reading its body, and how it is packed.

Jobs that have their *facet* in common (task, wait key, reason, tenant...) form a *group*. One sorted set per queue, all of
whose scores are 0, is order, index and page at once: its members are `group id (6 bytes) + order (6) + Redis id`, so the jobs
of a group lie side by side, the one first that goes first. The order never changes while a job is held, and ages all the
same: `min(expiry, time it was first held + longest wait)`.

| packed facts | bytes |
|---|---|
| group id, order (1/64 ms) | 6, 6 |
| held since, expires (0: never), sent, held before that: ms | 6, 6, 6, 6 |
| times held, generation, workers that died with it | 2, 4, 1 |
| JSON of what few jobs have: another job id, a detail, a key, a tenant or tag that its group does not tell | any |
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple
from uuid import UUID

from tideover.core.admission import Reason
from tideover.core.job import Criticality
from tideover.store.keys import breaker_keys_in

TICKS = 64
"""Ticks of the order in a millisecond, so that jobs held at one moment keep the order in which they came."""

GROUP, ORDER = 6, 6
DIGEST = 16
"""Characters of the digest of a job's key."""
HEAD = GROUP + ORDER
FIXED = HEAD + 4 * 6 + 2 + 4 + 1
UUID_BYTES = 16
UUID_TEXT = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
COUNTS = struct.Struct(">HIB")
FIELD = "\x1f"
SHARED = "~"
"""The first character of what stands for many tenants or tags."""
BUCKETS = 64
MOST_HOLDS, MOST_DEATHS = 0xFFFF, 0xFF
MOST_MS = 2**48 - 1


class Facet(NamedTuple):
    """What the held jobs of a group have in common.

    `salt` tells groups apart that would get one id. Where there is one, tenant and tag begin with `~` and stand for many.
    """

    wait_key: str
    task: str
    criticality: Criticality
    reason: Reason
    tenant: str = ""
    tag: str = ""
    salt: str = ""

    def encode(self) -> bytes:
        return FIELD.join(part.replace(FIELD, " ") for part in self).encode(errors="replace")

    @classmethod
    def decode(cls, raw: bytes) -> Facet:
        return cls(*raw.decode().split(FIELD))  # type: ignore[arg-type]  # it was encoded by us

    @property
    def breaker_keys(self) -> tuple[str, ...]:
        return breaker_keys_in(self.wait_key)

    def bucketed(self) -> Facet:
        """The facet to use when there are too many groups, or when another has its id: tenants share buckets, tags one."""
        if self.salt:
            return self._replace(salt=str(int(self.salt) + 1))
        return self._replace(tenant=bucket(self.tenant), tag=SHARED if self.tag else "", salt="1")


def bucket(value: str) -> str:
    return value and f"{SHARED}{int.from_bytes(blake2b(value.encode(), digest_size=2).digest()) % BUCKETS}"


@lru_cache(maxsize=16_384)
def encoded(facet: Facet) -> tuple[bytes, bytes]:
    """The id of a facet's group, and the facet as it is stored."""
    raw = facet.encode()
    return blake2b(raw, digest_size=GROUP).digest(), raw


def packed_id(redis_id: str) -> bytes:
    """A Redis id in 16 bytes if it is a UUID as dramatiq makes them; another is never 16 bytes long.

    >>> text_id(packed_id("x")), len(packed_id("6f9619ff-8b86-4d01-b42d-00cf4fc964ff"))
    ('x', 16)
    """
    if UUID_TEXT.fullmatch(redis_id):
        return bytes.fromhex(redis_id.replace("-", ""))
    return redis_id.encode().ljust(UUID_BYTES + 1, b"\0")


def text_id(packed: bytes) -> str:
    return str(UUID(bytes=packed)) if len(packed) == UUID_BYTES else packed.rstrip(b"\0").decode()


class HeldFacts(NamedTuple):
    """A held job. Instants in unix milliseconds; `holds` counts this one, too; `held_before_ms` is the sum of the earlier ones.

    `order` (1/64 ms) says when it goes: the lowest first.
    """

    redis_id: str
    job_id: str
    task: str
    queue: str
    criticality: Criticality
    wait_key: str
    reason: Reason
    generation: int
    held_ms: int
    sent_ms: int
    expires_ms: int | None
    order: int
    tenant: str = ""
    tag: str = ""
    holds: int = 1
    held_before_ms: int = 0
    deaths: int = 0
    detail: str = ""
    twin: str = ""
    """Digest of its task, tenant and key; empty: it has no key."""

    @property
    def breaker_keys(self) -> tuple[str, ...]:
        return breaker_keys_in(self.wait_key)

    @property
    def facet(self) -> Facet:
        return Facet(self.wait_key, self.task, self.criticality, self.reason, self.tenant, self.tag)

    @property
    def by_ms(self) -> int:
        """Its expiry, or the longest it is to wait: what it is ordered by."""
        return self.order // TICKS

    @property
    def place(self) -> bytes:
        """Its place within its group."""
        return self.order.to_bytes(ORDER) + packed_id(self.redis_id)

    def packed(self, facet: Facet) -> tuple[bytes, bytes]:
        """Its member of the index, and its packed facts, in the group of this facet."""
        rest: dict[str, str] = {}
        if self.job_id != self.redis_id:
            rest["job_id"] = self.job_id
        if self.detail:
            rest["detail"] = self.detail
        if self.twin:
            rest["twin"] = self.twin
        if facet.salt:
            rest |= {"tenant": self.tenant, "tag": self.tag}
        tail = json.dumps(rest, separators=(",", ":")).encode() if rest else b""
        instants = [self.held_ms, self.expires_ms or 0, self.sent_ms, self.held_before_ms]
        if min(instants) < 0 or max(instants) > MOST_MS:
            instants = [min(max(ms, 0), MOST_MS) for ms in instants]
        held, expires, sent, before = instants
        ms = ((held << 48 | expires) << 48 | sent) << 48 | before
        counts = COUNTS.pack(min(self.holds, MOST_HOLDS), self.generation, min(self.deaths, MOST_DEATHS))
        head = encoded(facet)[0] + self.order.to_bytes(ORDER)
        return head + packed_id(self.redis_id), head + ms.to_bytes(24) + counts + tail

    @classmethod
    def decode(cls, queue: str, packed: bytes, raw: bytes, facet: Facet) -> HeldFacts:
        """From the packed Redis id, the packed facts and the facet of its group."""
        held_ms, expires_ms, sent_ms, before_ms = (int.from_bytes(raw[at : at + 6]) for at in (12, 18, 24, 30))
        holds, generation, deaths = COUNTS.unpack_from(raw, 36)
        redis_id = text_id(packed)
        facts = cls(
            redis_id=redis_id,
            job_id=redis_id,
            task=facet.task,
            queue=queue,
            criticality=facet.criticality,
            wait_key=facet.wait_key,
            reason=facet.reason,
            generation=generation,
            held_ms=held_ms,
            sent_ms=sent_ms,
            expires_ms=expires_ms or None,
            order=int.from_bytes(raw[GROUP:HEAD]),
            tenant=facet.tenant,
            tag=facet.tag,
            holds=holds,
            held_before_ms=before_ms,
            deaths=deaths,
        )
        rest: dict[str, Any] = json.loads(raw[FIXED:]) if len(raw) > FIXED else {}
        return facts._replace(**{name: rest[name] for name in facts._fields if name in rest}) if rest else facts


def order_of(*, held_ms: int, held_before_ms: int, expires_ms: int | None, max_wait_s: float, nth: int) -> int:
    """When a job goes, in ticks: by its expiry, and after its longest wait at the latest. `nth`: of those held just now."""
    latest_ms = held_ms - held_before_ms + int(max_wait_s * 1000)
    by_ms = latest_ms if expires_ms is None else min(expires_ms, latest_ms)
    return min(max(0, by_ms) * TICKS + nth, MOST_MS)


@dataclass(frozen=True, slots=True)
class Group:
    """Held jobs of a queue with one facet, and how many."""

    queue: str
    id: bytes
    facet: Facet
    n: int


@dataclass(frozen=True, slots=True)
class Member:
    """A held job as the index knows it: enough to say who goes first."""

    group: Group
    raw: bytes

    @property
    def order(self) -> int:
        return int.from_bytes(self.raw[GROUP:HEAD])

    @property
    def key(self) -> bytes:
        """Order and id: what members of all groups are sorted by, and where a page goes on."""
        return self.raw[GROUP:]


def breaker_keys_of(groups: Sequence[Group]) -> set[str]:
    return {key for group in groups for key in group.facet.breaker_keys}
