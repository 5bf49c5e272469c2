# SPDX-License-Identifier: Apache-2.0
"""The walks: what happens to a few jobs, in which each step of accept, hand over, hold, release, expire, settle, reclaim and
maintenance comes up. They steer by nothing that they are told, so that they can be walked whatever goes wrong on the way."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial

from dramatiq.message import Message
from tests.chaos.crew import LATER_S, MODEL, Crew

from tideover.store.client import text
from tideover.store.letters import Letters

OVER = timedelta(0)
SOON = timedelta(hours=1)


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


WALKS: dict[str, Callable[[Crew], None]] = {
    walk.__name__: walk for walk in (accept, hold, retry, expire, recover, share, shut_down)
}


def close_the_gate(crew: Crew) -> None:
    """The breaker of the primary is open, and it is known what summaries call."""
    crew.health.learn("summary", MODEL)
    crew.health.trip(f"anthropic/{MODEL}", "down")
    crew.follow()


def restore(crew: Crew) -> None:
    """Puts the failed jobs back from among the dead letters."""
    letters, found = Letters(crew.node.gate.backlog.client, crew.keys), crew.admin.hgetall(crew.keys.dead_msgs("default"))
    for redis_id, body in found.items():
        if Message.decode(body).args[0].startswith("fails"):
            crew.surely(partial(letters.restore, "default", text(redis_id), text(redis_id), body, ""))
