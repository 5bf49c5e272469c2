# SPDX-License-Identifier: Apache-2.0
"""The walks: what happens to a few jobs, in which each step of accept, hand over, hold, release, expire, settle, reclaim and
maintenance comes up, and of groups, pipelines, degraded answers and what operators do with single jobs. They steer by nothing
that they are told, so that they can be walked whatever goes wrong on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any
from unittest.mock import patch

import dramatiq
from dramatiq.message import Message
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import RedisBackend
from tests.chaos.crew import LATER_S, MODEL, TURNS, Crew

from tideover import Tideover, ai_task, clock, settings
from tideover.attempt import processing
from tideover.errors import JobNotFound, StoreUnavailable
from tideover.gate import redis_id
from tideover.ops import acts, dead, discards, restoration
from tideover.ops.access import Operator, open_space
from tideover.store.client import FAILED, text
from tideover.store.letters import Letters

OVER = timedelta(0)
SOON = timedelta(hours=1)

Task = dramatiq.Actor[Any, Any]


@contextmanager
def later() -> Iterator[None]:
    """Two hours have passed, as this process sees it."""
    now = clock.now
    with patch.object(clock, "now", lambda: now() + LATER_S):
        yield


class Firm(Crew):
    """A crew whose jobs are sent in groups and pipelines, too, or have a degraded answer; an operator looks after it."""

    def declare(self) -> None:
        super().declare()
        barriers: Any = RedisBackend
        self.broker.add_middleware(GroupCallbacks(barriers(client=self.client)), before=Tideover)
        late: dict[str, Any] = {"broker": self.broker, "on_expiry": "degrade", "degrade": self.answer_late}

        @ai_task(criticality="deferrable", broker=self.broker)
        def next_step(tag: str, answer: str) -> str:
            if tag != after(answer):
                self.diary.note("fault", f"{tag} was given {answer}")
            return self.function(tag)

        @ai_task(criticality="deferrable", **late)
        def digest(tag: str) -> str:
            return self.function(tag)

        @ai_task(criticality="deferrable", **late)
        async def adigest(tag: str) -> str:
            return self.function(tag)

        def fragile(tag: str) -> None:
            self.function(tag)

        self.next_step, self.digest, self.adigest = next_step, digest, adigest
        once: dict[str, Any] = {"broker": self.broker, "max_retries": 0}
        dramatiq.actor(fragile, **once)

    # what runs

    def function(self, tag: str) -> str:
        """And `buggy...`, which fails until it is mended."""
        if tag.startswith("buggy") and not self.diary.tags("mended"):
            self.diary.note("failed", tag)
            raise ValueError(tag)
        return super().function(tag)

    def answer_late(self, tag: str) -> str:
        """The degraded answer."""
        message = processing.get()
        assert message is not None
        self.diary.note("began", tag, redis_id(message))
        self.diary.note("degraded", tag)
        return tag

    def finish(self) -> None:
        with later():
            super().finish()

    # producers and operators

    def send_group(self, members: Mapping[str, Task], then: Mapping[str, Task]) -> None:
        """Sends a group, which sends other jobs when it is complete. If Redis does not answer once, all of it is in doubt."""
        self.promise([*then], [*members])
        group_of: Any = dramatiq.group
        group = group_of([task.message(tag) for tag, task in members.items()], broker=self.broker)
        for tag, task in then.items():
            group.add_completion_callback(task.message(tag))
        with suppress(StoreUnavailable, *FAILED):
            group.run()
            for tag, message in zip(members, group.children, strict=True):
                self.diary.note("sent", tag, message.message_id)

    def send_pipeline(self, tag: str, task: Task) -> None:
        """Sends a job whose answer goes into the next one."""
        self.promise([after(tag)], [tag])
        pipeline_of: Any = dramatiq.pipeline
        pipe = pipeline_of([task.message(tag), self.next_step.message_with_options(args=(after(tag),))], broker=self.broker)
        with suppress(StoreUnavailable):
            pipe.run()
            self.diary.note("sent", tag, pipe.messages[0].message_id)

    def promise(self, then: list[str], jobs: list[str]) -> None:
        """Notes what is about to be sent, and which jobs follow when all the others have succeeded."""
        for tag in (*jobs, *then):
            self.diary.note("sending", tag)
        self.diary.note("follow", then, jobs)

    def by_hand(self, act: Callable[[Operator], object]) -> None:
        """An operator's command, and again if Redis did not answer, until nothing is left to be done."""
        operator = Operator(self.client, settings.settings(), (open_space(self.client, self.namespace),))
        for _ in range(TURNS):
            with suppress(StoreUnavailable, JobNotFound):
                act(operator)
                return


def accept(crew: Crew) -> None:
    """A worker boots; jobs of both lanes, delayed, with a tenant, of a plain actor and of a stranger are sent, and run."""
    crew.tap.counting = True
    crew.boot()
    crew.send(crew.summary, "one", tenant="t")
    crew.send(crew.asummary, "two", tenant="t", delay=0)
    crew.send(crew.reply, "three", idempotency_key="three")
    crew.send(crew.plain, "four")
    crew.send_as_stranger("five")
    crew.send_as_stranger("six", delay=0)
    crew.chore("heartbeat")
    crew.work()
    crew.follow()


def hold(crew: Crew) -> None:
    """The primary fails: a job is held after its call, two at the gate; a critical one is rerouted, the next one held."""
    crew.boot()
    crew.tap.counting = True
    crew.send(crew.summary, "one")
    crew.work()
    crew.follow()
    crew.down.add("anthropic")
    crew.send(crew.summary, "two")
    crew.work()
    crew.follow()
    crew.send(crew.plain, "another")
    crew.send(crew.summary, "three", tenant="t")
    crew.send_as_stranger("four")
    crew.send(crew.reply, "five")
    crew.work()
    crew.down.add("openai")
    crew.send(crew.reply, "six")
    crew.work()
    crew.down.clear()
    crew.probe()
    for _ in range(2):
        crew.drain()
        crew.work()


def retry(crew: Crew) -> None:
    """Jobs fail by their own fault: once, or until no attempt is left; one of them was held before."""
    crew.boot()
    close_the_gate(crew)
    crew.tap.counting = True
    crew.send(crew.summary, "flaky-held", tenant="t")
    crew.work("default")
    crew.probe()
    crew.drain()
    crew.drain()
    crew.send(crew.plain, "flaky")
    crew.send(crew.plain, "fails")
    crew.send_as_stranger("flaky-stranger", "plain")
    crew.work()


def expire(crew: Crew) -> None:
    """Held jobs expire, and one in its queue; others are released by hand; they are swept; another dead letter is restored."""
    crew.boot()
    close_the_gate(crew)
    crew.tap.counting = True
    crew.send(crew.summary, "late-queued", expires_in=OVER)
    crew.send(crew.summary, "late-held", expires_in=SOON)
    crew.send(crew.summary, "late-tenant", expires_in=SOON, tenant="t")
    crew.send(crew.summary, "held", tenant="t")
    crew.send_as_stranger("held-stranger")
    crew.work()
    crew.keep_house(LATER_S)
    crew.release_by_hand()
    crew.send(crew.plain, "fails", max_retries=0)
    crew.work()
    restore(crew)
    crew.work()


def recover(crew: Crew) -> None:
    """A worker died with jobs of each lane aboard; this one has fetched a job without knowing it."""
    crew.boot()
    for task, tag, delay in ((crew.summary, "one", None), (crew.summary, "two", 0), (crew.reply, "three", None)):
        crew.send(task, tag, tenant="t", delay=delay)
    crew.send_as_stranger("four")
    crew.send(crew.asummary, "five")
    backlog, dead = crew.node.gate.backlog, "dead"
    for lane, n in (("default", 2), ("default.DQ", 1), ("default.critical", 1)):
        backlog.fetch(dead, lane, n)
    crew.node.registry.enter_worker(dead, {})
    crew.run_out(dead)
    backlog.fetch(crew.worker_id, "default", 1)
    crew.tap.counting = True
    crew.chore("housekeeping")
    crew.consume("default")
    crew.work()


def shut_down(crew: Crew) -> None:
    """A worker stops with jobs in its hands: in the work queue, behind it, and waiting for their time."""
    crew.boot()
    for tag in ("one", "two", "three"):
        crew.send(crew.summary, tag)
    crew.send(crew.reply, "four", delay=60_000)
    crew.send(crew.reply, "five")
    crew.tap.counting = True
    for lane in ("default", "default.critical", "default.critical.DQ"):
        crew.consume(lane)
    crew.stop()


def share(crew: Crew) -> None:
    """A worker without tideover works on the same queue: it ends one job, and dies with another."""
    crew.boot()
    for tag in ("elsewhere", "two", "three"):
        crew.send(crew.plain, tag)
    consumer = crew.stranger.consume("default", prefetch=2, timeout=1)
    message = next(consumer)
    assert message is not None
    crew.tap.counting = True
    crew.keep_house()
    crew.tap.counting = False
    crew.diary.note("elsewhere", "elsewhere")
    consumer.ack(message)
    crew.run_out(crew.stranger.broker_id)
    crew.tap.counting = True
    crew.keep_house()
    crew.work()


def complete(crew: Firm) -> None:
    """A group: one member succeeds at its second attempt, the other is held after its call. Two jobs follow it."""
    crew.boot()
    crew.tap.counting = True
    crew.send_group({"flaky": crew.plain, "called": crew.summary}, {"completed": crew.plain, "summed-up": crew.summary})
    crew.down.add("anthropic")
    hold_and_release(crew)


def pipe(crew: Firm) -> None:
    """Two pipelines, whose first jobs are held: one after its call, one at the gate."""
    crew.boot()
    crew.send_pipeline("called", crew.asummary)
    crew.down.add("anthropic")
    crew.tap.counting = True
    crew.work()
    crew.follow()
    crew.tap.counting = False
    crew.send_pipeline("at-the-gate", crew.asummary)
    crew.tap.counting = True
    hold_and_release(crew)


def degrade(crew: Firm) -> None:
    """Jobs with a degraded answer expire while they are held."""
    crew.boot()
    close_the_gate(crew)
    for task in ("digest", "adigest"):
        crew.health.learn(task, MODEL)
    crew.follow()
    crew.send(crew.digest, "late-digest", expires_in=SOON, tenant="t")
    crew.send(crew.adigest, "late-adigest", expires_in=SOON)
    crew.tap.counting = True
    crew.work()
    with later():
        crew.keep_house(LATER_S)
        crew.work()


def restore_dead(crew: Firm) -> None:
    """Jobs have failed by a fault that is mended now, so an operator restores them."""
    crew.boot()
    crew.send(crew.plain, "buggy")
    crew.send(crew.summary, "buggy-tenant", tenant="t", idempotency_key="buggy")
    crew.send_as_stranger("buggy-stranger", "fragile")
    crew.work()
    crew.diary.note("mended", "buggy")
    crew.tap.counting = True
    restore_by_hand(crew)


def discard(crew: Firm) -> None:
    """An operator discards what is held in both lanes."""
    crew.boot()
    crew.down |= {"anthropic", "openai"}
    crew.send(crew.summary, "dropped", tenant="t")
    crew.send(crew.reply, "dropped-critical")
    crew.send_as_stranger("dropped-stranger")
    crew.work()
    crew.follow()
    crew.tap.counting = True
    discard_by_hand(crew)


def coalesce(crew: Firm) -> None:
    """Jobs with one key are held: one of them runs, and its answer is for all."""
    crew.boot()
    close_the_gate(crew)
    crew.tap.counting = True
    for tag in ("twin-a", "twin-b", "twin-c"):
        crew.send(crew.summary, tag, tenant="t", key="k", idempotency_key=tag)
    crew.work()
    crew.probe()
    crew.drain()
    crew.work()
    crew.follow()


WALKS: dict[str, Callable[[Firm], None]] = {
    walk.__name__: walk
    for walk in (
        accept,
        hold,
        retry,
        expire,
        recover,
        share,
        shut_down,
        complete,
        pipe,
        degrade,
        restore_dead,
        discard,
        coalesce,
    )
}


def restore_by_hand(crew: Firm) -> None:
    """`tideover restore --all`."""
    crew.by_hand(
        lambda operator: restoration.restore(operator, dead.choose_dead(operator, dead.DeadFilter()), who="we", why=None)
    )


def discard_by_hand(crew: Firm) -> None:
    """`tideover discard --all`."""
    crew.by_hand(lambda operator: discards.discard(operator, acts.choose(operator), who="we", because="stale"))


SAID_AGAIN: dict[str, Callable[[Firm], None]] = {"restore_dead": restore_by_hand, "discard": discard_by_hand}
"""What an operator says once more, whatever became of it, by walk."""


def after(tag: str) -> str:
    """The tag of the job that follows in a pipeline."""
    return f"after-{tag}"


def hold_and_release(crew: Crew) -> None:
    """The primary does not answer, then it does again."""
    crew.work()
    crew.follow()
    crew.work()
    crew.down.clear()
    crew.probe()
    for _ in range(2):
        crew.drain()
        crew.work()


def close_the_gate(crew: Crew) -> None:
    """The breaker of the primary is open, and it is known what summaries call."""
    crew.health.learn("summary", MODEL)
    crew.fail(f"anthropic/{MODEL}", "down")
    crew.follow()


def restore(crew: Crew) -> None:
    """Puts the failed jobs back from among the dead letters."""
    letters = Letters(crew.node.gate.backlog.client, crew.keys)
    found: Any = crew.admin.hgetall(crew.keys.dead_msgs("default"))
    for name, body in found.items():
        if Message.decode(body).args[0].startswith("fails"):
            crew.surely(partial(letters.restore, "default", text(name), text(name), body, ""))
