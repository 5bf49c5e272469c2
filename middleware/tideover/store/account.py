# SPDX-License-Identifier: Apache-2.0
"""The account: accepted = queued + running + held + ends. What is missing from the sum is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

from tideover import clock
from tideover.core.job import ENDS, End
from tideover.store.client import Client, text
from tideover.store.keys import DELAYED_SUFFIX, Keys, queue_of
from tideover.store.scripts import Scripts, pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueCount:
    """Jobs of one lane. `delayed` is the part of `queued` that waits for a retry or a delay."""

    queued: int = 0
    delayed: int = 0
    running: int = 0
    held: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """All jobs of a namespace at one instant."""

    accepted: int
    ends: dict[End, int]
    queues: dict[str, QueueCount] = field(default_factory=dict)

    def places(self, name: str) -> int:
        return sum(getattr(count, name) for count in self.queues.values())

    @property
    def queued(self) -> int:
        return self.places("queued")

    @property
    def running(self) -> int:
        return self.places("running")

    @property
    def held(self) -> int:
        return self.places("held")

    @property
    def difference(self) -> int:
        return self.accepted - self.queued - self.running - self.held - sum(self.ends.values())

    @property
    def lost(self) -> int:
        """Jobs that were accepted and are nowhere. 0, or something is wrong."""
        return max(0, self.difference)

    @property
    def not_adopted(self) -> int:
        """Queued jobs of producers without tideover: they enter the account when a worker fetches them."""
        return max(0, -self.difference)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job to be accepted. `once`: under which key it may be accepted only once, if any, and a digest of its arguments."""

    redis_id: str
    body: bytes
    tenant: str = ""
    once: tuple[str, str] = ("", "")

    def more(self, queue: str) -> str:
        """What only few jobs have to say, as the script reads it."""
        if not self.tenant and not self.once[0]:
            return ""
        key, digest = self.once
        return "\t".join((self.tenant, key.replace("\t", " "), queue, digest))


class Ended(NamedTuple):
    """A fetched job that has come to an end."""

    redis_id: str
    job_id: str
    end: End
    tenant: str = ""

    def more(self) -> str:
        """What is to be said of it but that it succeeded, as the script reads it."""
        if self.end == "succeeded" and not self.tenant and self.job_id == self.redis_id:
            return ""
        keep = self.end in ("failed", "expired", "discarded")
        return f"{self.end}\t{int(keep)}\t{self.tenant}\t{self.job_id}"


@dataclass(frozen=True, slots=True)
class Room:
    """How many jobs may live at once, in all and of each tenant; None: any number."""

    jobs: int | None = None
    jobs_per_tenant: int | None = None


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What became of a new job. *taken*: another has its Redis id. *duplicate*: it was sent before, to `queue`, with `once`."""

    verdict: Literal["accepted", "taken", "full", "tenant_full", "duplicate"]
    queue: str = ""
    once: str = ""


CODES = (Acceptance("accepted"), Acceptance("accepted"), Acceptance("taken"), Acceptance("full"), Acceptance("tenant_full"))

UNLIMITED = Room()


def first_of(noted: str) -> Acceptance:
    queue, once = noted.split("\t")
    return Acceptance("duplicate", queue, once)


class Ledger:
    """Writes and reads the account of one namespace. Each write moves the id and the counter in one script."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self.client, self.keys, self.scripts = client, keys, Scripts(client)

    def accept_plain(self, queue: str, redis_id: str, body: bytes) -> Acceptance:
        """Accepts a job with no tenant, no key and no limit: what most are."""
        k = self.keys
        keys = (k.msgs(queue), k.queue(queue), k.account, k.queues)
        return CODES[self.scripts.run("accept-n", keys, (queue_of(queue), "", redis_id, body, ""))]

    def accept(self, queue: str, jobs: Sequence[NewJob], room: Room) -> list[Acceptance]:
        """Accepts new jobs of one list, as far as there is room; for each how that went."""
        k = self.keys
        keys = [k.msgs(queue), k.queue(queue), k.account, k.queues]
        limits = [str(-1 if limit is None else limit) for limit in (room.jobs, room.jobs_per_tenant)]
        args: list[Any] = [queue_of(queue), "" if room == UNLIMITED else "\t".join(limits)]
        for job in jobs:
            args += [job.redis_id, job.body, job.more(queue)]
        if any(job.tenant or job.once[0] for job in jobs):
            now = datetime.fromtimestamp(clock.now(), UTC)
            days = (at.strftime("%Y%m%d") for at in (now, now - timedelta(days=1)))
            keys += [k.tenants, *map(k.once, days)]
        answer = self.scripts.run("accept-n", keys, args)
        codes = answer if isinstance(answer, list) else [answer]
        return [CODES[int(code)] if isinstance(code, int) else first_of(text(code)) for code in codes]

    def hand_over(self, worker: str, old: tuple[str, str], new: tuple[str, str], body: bytes, job_id: str) -> bool:
        """Replaces `old` (queue, Redis id), which `worker` has fetched, by `new`. False: it is not that worker's any more."""
        k, (old_queue, old_id), (queue, redis_id) = self.keys, old, new
        keys = [k.msgs(queue), k.queue(queue), k.queues, k.places, k.marks(queue)]
        keys += [k.acks(worker, old_queue), k.msgs(old_queue), k.marks(old_queue), k.adopted]
        return bool(self.scripts.run("handover-9", keys, [redis_id, body, queue, old_id, job_id, queue_of(queue)]))

    def adopt(self, worker: str, queue: str, redis_ids: Sequence[str]) -> int:
        """Enters fetched jobs of a producer without tideover; how many were new, and still this worker's."""
        k = self.keys
        return int(self.scripts.run("adopt-3", [k.acks(worker, queue), k.adopted, k.account], redis_ids))

    def settle(self, worker: str, queue: str, redis_id: str, job_id: str, end: End, tenant: str = "") -> bool:
        """Ends a fetched job. False: it is not this worker's any more, and whoever has it will end it."""
        return self.settle_all(worker, queue, [Ended(redis_id, job_id, end, tenant)])[0]

    def settle_all(self, worker: str, queue: str, jobs: Sequence[Ended]) -> list[bool]:
        """Ends fetched jobs of one list; for each, whether it was still this worker's."""
        k = self.keys
        keys = [k.acks(worker, queue), k.msgs(queue), k.account, k.marks(queue), k.adopted, k.places]
        keys += [k.dead(queue), k.dead_msgs(queue), k.tenants]
        args = [part for job in jobs for part in (job.redis_id, job.more())]
        return [bool(code) for code in self.scripts.run("settle-9", keys, args)]

    def read(self) -> Account:
        """The account at one instant: read again while that instant knows a worker or a queue that was not counted.

        One that is gone by then is counted all the same, and is empty; so the names only grow, and the reading comes to an end.
        """
        asked: list[list[str]] = [[], []]
        while True:
            answer = self._read(*asked)
            known = [sorted({*names, *map(text, now)}) for names, now in zip(asked, answer[1:3], strict=True)]
            if known == asked:
                return self._account(answer, *asked)
            asked = known

    def _read(self, workers: list[str], queues: list[str]) -> Any:
        k = self.keys
        lanes = [name for queue in queues for name in (queue, queue + DELAYED_SUFFIX)]
        lists = [k.queue(name) for name in lanes]
        sets = [k.acks(worker, name) for name in lanes for worker in workers]
        keys = [k.account, k.heartbeats, k.queues, *lists, *sets, *map(k.held, queues)]
        return self.scripts.run("account-n", keys, [len(lists), len(sets)])

    def _account(self, answer: Any, workers: list[str], queues: list[str]) -> Account:
        counters = pairs(answer[0])
        listed, taken, held = ([int(n) for n in part] for part in answer[3:6])
        counts: dict[str, QueueCount] = {}
        for i, queue in enumerate(queues):
            n = len(workers)
            running = sum(taken[2 * i * n : (2 * i + 1) * n])
            delayed = listed[2 * i + 1] + sum(taken[(2 * i + 1) * n : (2 * i + 2) * n])
            counts[queue] = QueueCount(queued=listed[2 * i] + delayed, delayed=delayed, running=running, held=held[i])
        ends: dict[End, int] = {end: int(counters.get(end, 0)) for end in ENDS}
        return Account(accepted=int(counters.get("accepted", 0)), ends=ends, queues=counts)
