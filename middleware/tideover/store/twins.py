# SPDX-License-Identifier: Apache-2.0
"""Held jobs with one key: one of them, the leader, runs for all, and its result answers those that wait for it.

A waiter is held as any other job, in a group of its own (`reason` *coalesced*), which the drain passes over. Who leads is a
hint and no lock: where it is lost or doubled, a job runs that could have waited, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice

from tideover.store.backlog import HELD_AT_ONCE, PAGE, Backlog
from tideover.store.client import FULL, Client, text
from tideover.store.facts import DIGEST, HeldFacts, packed_id
from tideover.store.keys import Keys
from tideover.store.scripts import Scripts

LAST = b"\xff" * 64


class Twins:
    """The jobs with keys of one namespace."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self.client, self.keys, self.scripts, self.backlog = client, keys, Scripts(client), Backlog(client, keys)
        self._cursors: dict[str, str] = {}

    def claimed(self, queue: str, jobs: Iterable[HeldFacts]) -> Iterator[HeldFacts]:
        """The jobs as they are to be held: those whose key another one has, which lives, wait for that one's answer."""
        todo = iter(jobs)
        while part := list(islice(todo, HELD_AT_ONCE)):
            asking = [job for job in part if job.twin and job.reason != "review"]
            leaders = self.claim(queue, asking) if asking else {}
            for job in part:
                leader = leaders.get(job.redis_id)
                yield job._replace(reason="coalesced", detail=leader) if leader else job

    def claim(self, queue: str, jobs: Sequence[HeldFacts]) -> dict[str, str]:
        """For each job, by Redis id, that of the one that runs for it; empty: it leads. On a full Redis all lead."""
        k = self.keys
        args = [part for job in jobs for part in (job.twin, job.order, job.redis_id)]
        with suppress(FULL):
            leaders = map(text, self.scripts.run("claim-2", [k.leaders(queue), k.msgs(queue)], args))
            return dict(zip((job.redis_id for job in jobs), leaders, strict=True))
        return {}

    def chosen(self, queue: str) -> list[bytes]:
        """Members of the index that are to go although they wait for another's answer: there will be none.

        Looks at some hundred keys at a time, and goes on there the next time.
        """
        k = self.keys
        keys = [k.leaders(queue), k.waiters(queue), k.msgs(queue), k.facts(queue), k.groups(queue)]
        with suppress(FULL):
            cursor, *members = self.scripts.run("tend-5", keys, [self._cursors.get(queue, "0"), PAGE])
            self._cursors[queue] = text(cursor)
            return [bytes(member) for member in members]
        return []

    def is_done(self, queue: str, twin: str) -> bool:
        """Whether nobody waits for the answer of a key's leader any more; then it is forgotten."""
        keys = [self.keys.leaders(queue), self.keys.waiters(queue), self.keys.facts(queue)]
        return bool(self.scripts.run("unclaim-3", keys, [twin]))

    def waiting(self, queue: str, twin: str) -> list[HeldFacts]:
        """Up to a page of held jobs that wait for the answer of a key's leader."""
        waiters, first = self.keys.waiters(queue), twin.encode()
        raws = self.client.zrangebylex(waiters, b"[" + first, b"[" + first + LAST, 0, PAGE)
        return self.backlog.facts(queue, [bytes(raw)[DIGEST:] for raw in raws])

    def answered(self, queue: str, jobs: Sequence[HeldFacts]) -> list[bool]:
        """Ends waiters as their leader has ended, with success; for each, whether it was still held."""
        ended = self.backlog.expire(queue, jobs, "succeeded")
        if done := [waiter_of(job) for job, ok in zip(jobs, ended, strict=True) if ok]:
            self.client.zrem(self.keys.waiters(queue), *done)
        return ended

    def leader(self, queue: str, twin: str) -> str | None:
        """The Redis id of who runs for all with a key; None: nobody does."""
        noted = self.client.hget(self.keys.leaders(queue), twin)
        return None if noted is None else text(noted).partition("\t")[2]


def waiter_of(job: HeldFacts) -> bytes:
    return job.twin.encode() + packed_id(job.redis_id)
