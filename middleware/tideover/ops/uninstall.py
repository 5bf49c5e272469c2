# SPDX-License-Identifier: Apache-2.0
"""Taking tideover out of a namespace: every job goes to where stock dramatiq looks for it, then our keys go.

Each step moves a batch in one script, and a step that was done finds nothing to do. So after a kill at any instant the rest is
done by running it again; until the keys are deleted, workers with tideover may be started again instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dramatiq.errors import DecodeError
from dramatiq.message import Message

from tideover.core.job import CRITICAL_SUFFIX, lane
from tideover.ops.access import Operator, Refused, Space, reaching
from tideover.stamp import STAMP
from tideover.store.keys import DELAYED_SUFFIX, queue_of
from tideover.store.removal import Body, Removal

AT_ONCE = 500
"""Jobs that one script moves."""
ROUNDS = 3
"""How often it looks again for jobs that came to be held, or were sent, meanwhile."""
NO_MESSAGE = (DecodeError, AttributeError, KeyError, TypeError)
"""What it means to dramatiq that nobody can read a body."""

Tell = Callable[[int], None]
"""Hears of so many jobs, bodies or keys that are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What there is to do.

    `workers`: those with tideover that are alive; `fetched`: jobs of workers that are dead; `critical`: jobs and dead letters
    in critical lanes; `bodies`: to be looked through for what is to follow a job.
    """

    namespace: str
    workers: tuple[str, ...]
    fetched: int
    held: int
    critical: int
    bodies: int
    keys: int

    @property
    def steps(self) -> int:
        return self.fetched + self.held + self.critical + self.bodies + self.keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What was done. `unreadable`: jobs whose bodies nobody can read here; they stay in their critical lane."""

    namespace: str
    recovered: int
    put_back: int
    merged: int
    rewritten: int
    unreadable: int
    keys: int


@dataclass(frozen=True, slots=True)
class Crew:
    """Who is there: workers with tideover that are alive, by what people call them, and all that are dead."""

    alive: dict[str, str]
    dead: tuple[str, ...]


def crew_of(operator: Operator, space: Space) -> Crew:
    heartbeats, ours = space.registry.heartbeats(), space.registry.workers()
    since = operator.now() - operator.settings.worker.heartbeat_timeout_s
    dead = [worker for worker in sorted({*ours, *heartbeats}) if heartbeats.get(worker, 0.0) < since]
    return Crew({worker: named(worker, facts) for worker, facts in sorted(ours.items()) if worker not in dead}, tuple(dead))


def named(worker: str, facts: Mapping[str, Any]) -> str:
    return f"pid {facts['pid']} on {facts['host']}" if "host" in facts else worker


def plan(operator: Operator) -> Plan:
    """What `uninstall` would do in the operator's one namespace.

    Raises:
      Refused: the operator has several namespaces.
    """
    with reaching(operator.settings):
        space = operator.the_space("taking tideover out")
        way, queues, crew = Removal(operator.client, space.registry.keys), space.registry.queues(), crew_of(operator, space)
        names = lists_of(queues)
        return Plan(
            namespace=space.name,
            workers=tuple(crew.alive.values()),
            fetched=sum(space.backlog.fetched(worker, names) for worker in crew.dead),
            held=sum(space.backlog.size(queue) for queue in queues),
            critical=way.number_queued([*filter(is_critical, names)]) + way.number_dead([*filter(is_critical, queues)]),
            bodies=way.number_of_bodies([name for name in names if not is_critical(name)]),
            keys=sum(1 for _ in way.our_keys()),
        )


def uninstall(operator: Operator, *, force: bool, tell: Tell, at_once: int = AT_ONCE) -> Removed:
    """Takes tideover out of the operator's one namespace. `force`: its workers are gone, whatever their heartbeats say.

    Raises:
      Refused: workers with tideover are alive, or jobs came to be held meanwhile; or the operator has several namespaces.
    """
    with reaching(operator.settings):
        space = operator.the_space("taking tideover out")
        crew = crew_of(operator, space)
        if crew.alive and not force:
            raise Refused(refusal(crew.alive.values()))
        work = Work(space, Removal(operator.client, space.registry.keys), tell, at_once)
        for worker in crew.dead:
            work.recover(worker, operator.settings.worker.heartbeat_timeout_s)
        for worker in crew.alive:
            work.recover(worker, 0.0)
        work.move_all()
        work.wipe()
        return work.done()


def refusal(alive: Iterable[str]) -> str:
    return (
        f"workers with tideover are alive: {'; '.join(alive)}. Stop them first; one that was killed counts as dead once its "
        "heartbeat is old. --force goes on at once, and then what such a worker has fetched runs twice if it lives"
    )


class Work:
    """The steps, and how much each has done."""

    def __init__(self, space: Space, way: Removal, tell: Tell, at_once: int) -> None:
        self.space, self.way, self.tell, self.at_once = space, way, tell, at_once
        self.tasks = frozenset(space.registry.tasks())
        self._done: Counter[str] = Counter()
        self._unreadable: set[tuple[str, str]] = set()

    def did(self, what: str, n: int) -> None:
        self._done[what] += n
        self.tell(n)

    def done(self) -> Removed:
        counts = {name: self._done[name] for name in ("recovered", "put_back", "merged", "rewritten", "keys")}
        return Removed(namespace=self.space.name, unreadable=len(self._unreadable), **counts)

    def recover(self, worker: str, dead_after_s: float) -> None:
        """Gives back what a dead worker had fetched. Only one with tideover is forgotten: dramatiq cleans up after its own."""
        names = lists_of(self.space.registry.queues())
        given_back = [self.space.backlog.recover(worker, name, dead_after_s) for name in names]
        if worker in self.space.registry.workers() and all(n >= 0 for n in given_back):
            self.space.registry.remove_worker(worker)
        self.did("recovered", sum(n for n in given_back if n > 0))

    def move_all(self) -> None:
        """Puts every job where stock dramatiq looks for it."""
        for _ in range(ROUNDS):
            queues = self.space.registry.queues()
            for queue in queues:
                self.put_back(queue)
            for queue in filter(is_critical, queues):
                self.merge(queue)
        for name in lists_of(queues):
            if not is_critical(name):
                self.rewrite(name)

    def put_back(self, queue: str) -> None:
        """Puts held jobs at the end of their own list."""
        members = self.way.held(queue)
        at = 0
        while at < len(members):
            n = self.way.put_back(queue, members[at : at + self.at_once])
            at += n
            self.did("put_back", n)

    def merge(self, queue: str) -> None:
        """Moves what is in a critical lane to the head of its queue, which its body must name, too."""
        for name in (queue + DELAYED_SUFFIX, queue):
            ids = self.way.queued(name)
            for start in reversed(range(0, len(ids), self.at_once)):
                bodies = self.way.bodies(name, ids[start : start + self.at_once])
                self.did("merged", self.way.merge(name, base_of(name), self.rehomed(name, bodies)))
        ids = self.way.dead(queue)
        for start in range(0, len(ids), self.at_once):
            bodies = self.way.dead_bodies(queue, ids[start : start + self.at_once])
            self.did("merged", self.way.bury(queue, base_of(queue), self.rehomed(queue, bodies)))

    def rehomed(self, name: str, bodies: Sequence[Body]) -> list[Body]:
        """Bodies with the base queue's name; those of actors that have a queue of such a name stay as they are, and there."""
        moved = []
        for redis_id, body in bodies:
            try:
                message = Message.decode(body)
                fields = rehomed(message.asdict(), self.tasks)
            except NO_MESSAGE:
                self._unreadable.add((name, redis_id))
            else:
                if fields["queue_name"] != message.queue_name:
                    moved.append((redis_id, Message(**fields).encode()))
        return moved

    def rewrite(self, name: str) -> None:
        """Lets what is to follow a job (a pipeline's next step, a group's callback) go to a base queue, too."""
        for redis_id, body in self.way.all_bodies(name):
            if CRITICAL_SUFFIX.encode() in body and (new := with_followers_rehomed(body, self.tasks)) != body:
                self._done["rewritten"] += self.way.rewrite(name, redis_id, body, new)
            self.tell(1)

    def wipe(self) -> None:
        """Deletes our keys; those by which this command finds what is left to do go last.

        Raises:
          Refused: there are held jobs.
        """
        keys = self.way.keys
        names = [name for name in self.way.our_keys() if name != keys.queues]
        if not set(names).isdisjoint(map(keys.held, self.space.registry.queues())):
            raise Refused("jobs came to be held meanwhile: a worker with tideover is at work. Stop it, then run this again")
        for start in range(0, len(names), AT_ONCE):
            self.did("keys", self.way.wipe(names[start : start + AT_ONCE]))
        self.did("keys", self.way.forget())


def rehomed(fields: Mapping[str, Any], tasks: frozenset[str]) -> dict[str, Any]:
    """A message's fields in which critical lanes are their base queues, and so in the messages that are to follow it.

    A plain actor may have a queue of such a name: that of a job which is none of these AI tasks', and has no criticality.
    """
    options = dict(fields["options"])
    if isinstance(target := options.get("pipe_target"), Mapping):
        options["pipe_target"] = rehomed(target, tasks)
    if isinstance(callbacks := options.get("group_completion_callbacks"), list):
        options["group_completion_callbacks"] = [rehomed(callback, tasks) for callback in callbacks]
    stamp = options.get(STAMP)
    ours = fields["actor_name"] in tasks or (isinstance(stamp, Mapping) and "criticality" in stamp)
    return {**fields, "options": options, "queue_name": base_of(fields["queue_name"]) if ours else fields["queue_name"]}


def with_followers_rehomed(body: bytes, tasks: frozenset[str]) -> bytes:
    """A body whose followers name base queues; the same one where there is nothing to change, or nobody can read it."""
    try:
        fields = Message.decode(body).asdict()
        moved = rehomed(fields, tasks)
    except NO_MESSAGE:
        return body
    return body if moved == fields else Message(**moved).encode()


def lists_of(queues: Sequence[str]) -> list[str]:
    return [name for queue in queues for name in (queue, queue + DELAYED_SUFFIX)]


def is_critical(name: str) -> bool:
    return queue_of(name).endswith(CRITICAL_SUFFIX)


def base_of(name: str) -> str:
    """
    >>> base_of("default.critical.DQ"), base_of("default")
    ('default.DQ', 'default')
    """
    queue = queue_of(name)
    return lane(queue, "deferrable") + name.removeprefix(queue)
