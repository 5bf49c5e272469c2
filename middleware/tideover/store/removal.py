# SPDX-License-Identifier: Apache-2.0
"""What taking tideover out needs of the store: jobs to where stock dramatiq looks for them, and our keys away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tideover.core.route import NO_PERMIT
from tideover.store.backlog import PAGE, Allowance, Backlog
from tideover.store.client import Client, starting, text
from tideover.store.facts import GROUP
from tideover.store.keys import NAMESPACES, Keys
from tideover.store.scripts import Scripts

ANY_PACE = Allowance(key="uninstall", generation=None, rate=1e9, burst=float(PAGE), calls_each=1.0, most_queued=2**53)
"""Whatever a script can take at once, to the tail of the queue."""

AT_ONCE_BYTES = 4_194_304
"""Bodies that one script gets: more would block Redis for too long."""

Body = tuple[str, bytes]
"""A Redis id and an encoded message."""


def portions(jobs: Sequence[Body]) -> Iterator[list[Body]]:
    """Jobs in portions that one script may take."""
    part: list[Body] = []
    size = 0
    for job in jobs:
        if part and size + len(job[1]) > AT_ONCE_BYTES:
            yield part
            part, size = [], 0
        part.append(job)
        size += len(job[1])
    if part:
        yield part


class Removal:
    """The way out of one namespace. Each step is one script, and may be taken again."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self.client, self.keys, self.scripts, self.backlog = client, keys, Scripts(client), Backlog(client, keys)

    def held(self, queue: str) -> list[bytes]:
        """All held jobs of a queue, as members of its index, in the order in which they were to go."""
        members = {bytes(member) for member, _ in self.client.zscan_iter(self.keys.held(queue), count=PAGE)}
        return sorted(members, key=lambda member: member[GROUP:])

    def put_back(self, queue: str, members: Sequence[bytes]) -> int:
        """Puts held jobs back, a page at the most; how many of `members` were looked at."""
        return self.backlog.release(queue, members, NO_PERMIT, ANY_PACE)[1]

    def number_queued(self, names: Sequence[str]) -> int:
        return sum(int(self.client.llen(self.keys.queue(name))) for name in names)

    def number_dead(self, queues: Sequence[str]) -> int:
        return sum(int(self.client.zcard(self.keys.dead(queue))) for queue in queues)

    def number_of_bodies(self, names: Sequence[str]) -> int:
        return sum(int(self.client.hlen(self.keys.msgs(name))) for name in names)

    def queued(self, name: str) -> list[str]:
        """The Redis ids of a list."""
        return [text(redis_id) for redis_id in self.client.lrange(self.keys.queue(name), 0, -1)]

    def dead(self, queue: str) -> list[str]:
        """The Redis ids of a queue's dead letters."""
        return [text(redis_id) for redis_id in self.client.zrange(self.keys.dead(queue), 0, -1)]

    def bodies(self, name: str, ids: Sequence[str]) -> list[Body]:
        return self._bodies(self.keys.msgs(name), ids)

    def dead_bodies(self, queue: str, ids: Sequence[str]) -> list[Body]:
        return self._bodies(self.keys.dead_msgs(queue), ids)

    def all_bodies(self, name: str) -> Iterator[Body]:
        """All bodies of a list, wherever their ids are; one may come twice."""
        return ((text(i), bytes(body)) for i, body in self.client.hscan_iter(self.keys.msgs(name), count=PAGE))

    def merge(self, name: str, other: str, jobs: Sequence[Body]) -> int:
        """Moves jobs, which are in the order of their list, to the head of another one, each with a new body."""
        k = self.keys
        keys = [k.queue(name), k.msgs(name), k.queue(other), k.msgs(other)]
        parts = portions([*reversed(jobs)])
        return sum(self.scripts.run("merge-4", keys, [word for job in part for word in job]) for part in parts)

    def bury(self, queue: str, other: str, jobs: Sequence[Body]) -> int:
        """Moves dead letters to those of another queue, each with a new body."""
        k = self.keys
        keys = [k.dead(queue), k.dead_msgs(queue), k.dead(other), k.dead_msgs(other)]
        parts = portions(jobs)
        return sum(self.scripts.run("bury-4", keys, [word for job in part for word in job]) for part in parts)

    def rewrite(self, name: str, redis_id: str, old: bytes, new: bytes) -> int:
        """Replaces the body of a job that is as it was read."""
        return int(self.scripts.run("rewrite-1", [self.keys.msgs(name)], [redis_id, old, new]))

    def our_keys(self) -> Iterator[str]:
        return (text(key) for key in self.client.scan_iter(match=starting(self.keys.own("")), count=PAGE))

    def forget(self) -> int:
        """The last step: deletes the key by which the others find their way, and the namespace is known no more."""
        n = int(self.client.unlink(self.keys.queues))
        self.client.srem(NAMESPACES, self.keys.namespace)
        return n

    def wipe(self, names: Sequence[str]) -> int:
        """Deletes keys of ours."""
        return int(self.client.unlink(*names)) if names else 0

    def _bodies(self, key: str, ids: Sequence[str]) -> list[Body]:
        found = self.client.hmget(key, ids) if ids else []
        return [(redis_id, bytes(body)) for redis_id, body in zip(ids, found, strict=True) if body is not None]
