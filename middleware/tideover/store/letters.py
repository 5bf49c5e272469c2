# SPDX-License-Identifier: Apache-2.0
"""Dead letters: bodies of jobs that failed, expired or were discarded. dramatiq keeps them for 7 days unless told otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tideover import clock
from tideover.core.job import ENDS
from tideover.store.backlog import PAGE
from tideover.store.client import Client, text
from tideover.store.keys import Keys, queue_of
from tideover.store.scripts import Scripts
from tideover.store.stories import DAYS, Line, day

DAY_S = 86_400


class Letter(NamedTuple):
    """A dead letter as it is found: when its job ended (unix time), and its body."""

    redis_id: str
    ended_at: float
    body: bytes


class Letters:
    """The dead letters of one namespace."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self.client, self.keys, self.scripts = client, keys, Scripts(client)

    def bodies(self, queue: str, redis_ids: Sequence[str]) -> dict[str, bytes]:
        """Redis id → body, of those that are dead letters of this queue."""
        found = self.client.hmget(self.keys.dead_msgs(queue), redis_ids) if redis_ids else []
        return {redis_id: bytes(body) for redis_id, body in zip(redis_ids, found, strict=True) if body}

    def pages(self, queue: str, since_at: float = 0.0) -> Iterator[list[Letter]]:
        """The dead letters of a queue whose jobs ended since then, the first to end first; later ones are not among them."""
        ended = {text(redis_id): ms / 1000 for redis_id, ms in self.client.zscan_iter(self.keys.dead(queue), count=PAGE)}
        ids = sorted((redis_id for redis_id, at in ended.items() if at >= since_at), key=lambda redis_id: ended[redis_id])
        for page in (ids[start : start + PAGE] for start in range(0, len(ids), PAGE)):
            bodies = self.bodies(queue, page)
            yield [Letter(redis_id, ended[redis_id], bodies[redis_id]) for redis_id in page if redis_id in bodies]

    def like(self, job_id: str, queues: Sequence[str]) -> Iterator[tuple[str, Letter]]:
        """What may be the dead letter of a job, with its queue: by its id, then all whose bodies name it somewhere."""
        for queue in queues:
            ended_ms = self.client.zscore(self.keys.dead(queue), job_id)
            body = None if ended_ms is None else self.bodies(queue, [job_id]).get(job_id)
            if body is not None:
                yield queue, Letter(job_id, ended_ms / 1000, body)
        said = job_id.encode()
        every = ((queue, letter) for queue in queues for page in self.pages(queue) for letter in page)
        yield from ((queue, letter) for queue, letter in every if said in letter.body)

    def has(self, job_id: str, queues: Sequence[str]) -> bool:
        """Whether there is a dead letter under the id of a job; one with another Redis id is not looked for."""
        return any(self.client.zscore(self.keys.dead(queue), job_id) is not None for queue in queues)

    def oldest_at(self, queues: Sequence[str]) -> float | None:
        """When the job of the oldest dead letter of these queues ended; None: there is none."""
        first = [self.client.zrange(self.keys.dead(queue), 0, 0, withscores=True) for queue in queues]
        return min((ms / 1000 for found in first for _, ms in found), default=None)

    def last_words(self, job_ids: Sequence[str]) -> list[Line | None]:
        """For each job the line of its story that says how it ended at last; None where nobody wrote that down."""
        days = [self.keys.stories(day(clock.now() - back * DAY_S)) for back in range(DAYS + 1, -1, -1)]
        with self.client.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                for name in days:
                    pipe.hget(name, job_id)
            found, n = pipe.execute(), len(days)
        told: list[Line | None] = []
        for i, job_id in enumerate(job_ids):
            stories = found[i * n : (i + 1) * n]
            lines = [Line.decode(job_id, raw) for story in stories if story for raw in text(story).splitlines()]
            told.append(next((line for line in sorted(lines, key=lambda line: -line.at) if line.event in ENDS), None))
        return told

    def restore(self, queue: str, redis_id: str, job_id: str, body: bytes, tenant: str) -> bool:
        """Puts a dead letter back into its queue, as a new job with this body, to be found by its id. False: it is none."""
        k = self.keys
        keys = [k.dead(queue), k.dead_msgs(queue), k.msgs(queue), k.queue(queue), k.account, k.queues, k.tenants, k.counters]
        # placed first, because the job's end takes it away
        placed = job_id != redis_id and self.client.hsetnx(k.places, job_id, f"{queue}\t{redis_id}")
        done = bool(self.scripts.run("restore-8", keys, [redis_id, body, queue_of(queue), tenant]))
        if placed and not done:
            self.client.hdel(k.places, job_id)
        return done

    def live_body(self, name: str, redis_id: str) -> bytes | None:
        """The body of a job that is queued, running or held, by its list."""
        found = self.client.hget(self.keys.msgs(name), redis_id)
        return None if found is None else bytes(found)

    def drop(self, names: Sequence[str]) -> int:
        """Deletes what is kept under these names, which are no keys of ours: results of jobs."""
        return sum(int(self.client.delete(name)) for name in names)
