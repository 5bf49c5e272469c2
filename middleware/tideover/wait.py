# SPDX-License-Identifier: Apache-2.0
"""Following one job from the sender's side: where it is, and its result when it is there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import dramatiq
from dramatiq.message import Message
from dramatiq.results import ResultFailure, ResultMissing

from tideover import clock
from tideover.core.job import CRITICALITIES, ENDS, End, lane
from tideover.errors import ConfigurationError, JobExpired, JobFailed, NotYet
from tideover.stamp import stamp_of
from tideover.store.backlog import Backlog
from tideover.store.client import store_errors
from tideover.store.facts import HeldFacts, packed_id
from tideover.store.keys import DELAYED_SUFFIX, Keys, queue_of
from tideover.store.stories import Line, Stories

R = TypeVar("R")

FIRST_POLL_S = 0.01
LONGEST_POLL_S = 0.25
SETTLING_S = 0.5
"""How long the result of a job that is gone may still come: dramatiq stores a failure after it parted with the job."""
PROBE_GAP_S = 15.0
"""When asking again makes sense for a held job: a breaker that is open is probed about so often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """Where a job is.

    `state` is `"queued"`, `"running"`, `"held"`, `"ended"` or `"unknown"`; `end` says how it ended, None while it lives or when
    nothing is recorded; `reason` and `waits_for` say why it is held and which breakers free it; `since` and `expires_at` are
    unix time.
    `overdue`: it is past its expiry, and ends as expired as soon as a worker reaches it; no call is made any more.
    `degraded`: it ended with its task's degraded answer.

    `"unknown"`: it is in no place, and neither a result nor its story tells an end. That is said only of a message that `send`
    did not return, such as a later step of a pipeline, which is enqueued when what it follows has ended: it waits for its turn,
    or never gets one, or it ended and left no trace.
    """

    job_id: str
    state: Literal["queued", "running", "held", "ended", "unknown"]
    end: End | None = None
    reason: str | None = None
    waits_for: tuple[str, ...] = ()
    since: float | None = None
    expires_at: float | None = None
    overdue: bool = False
    degraded: bool = False


def status(message: Message[Any]) -> JobStatus:
    """Where the job of a message is now: one that `send` returned, or a step of a pipeline, or a child of a group."""
    backlog = backlog_of()
    with store_errors("asking where a job is", accepts="nothing"):
        held = held_facts(backlog, message)
        if held is not None:
            return status_of_held(held)
        place = backlog.place(message.message_id, lanes_of(message))
        if place is None:
            last = last_line(backlog, message)
            if last is None and not was_sent(message) and not has_result(message):
                return JobStatus(job_id=message.message_id, state="unknown")
            degraded = last is not None and bool(last.facts.get("degraded"))
            return JobStatus(job_id=message.message_id, state="ended", end=end_told(last), degraded=degraded)
        state: Literal["queued", "running"] = "queued"
        if not place[0].endswith(DELAYED_SUFFIX) and backlog.is_running(*place):  # a delayed job waits in a worker's memory
            state = "running"
    expires_ms = stamp_of(message).get("expires_ms")
    return JobStatus(
        job_id=message.message_id,
        state=state,
        expires_at=None if expires_ms is None else expires_ms / 1000,
        overdue=state == "queued" and expires_ms is not None and expires_ms <= clock.now_ms(),
    )


def status_of_held(held: HeldFacts) -> JobStatus:
    return JobStatus(
        job_id=held.job_id,
        state="held",
        reason=held.reason,
        waits_for=held.breaker_keys,
        since=held.held_ms / 1000,
        expires_at=None if held.expires_ms is None else held.expires_ms / 1000,
    )


def wait_for_sync(message: Message[R], *, timeout: timedelta, through_holds: bool = False) -> R:
    """The result of a job, waited for in this thread.

    Raises:
      NotYet: it is held (unless `through_holds`), or the timeout is over: an answer like HTTP 202. A later step of a pipeline
        is waited for so, too, while what it follows is held, and also when that has failed: ask for the earlier steps then.
      JobExpired: it passed its expiry.
      JobFailed: it ended without a result.
      dramatiq.results.ResultFailure: its function raised, and its retries are spent.
    """
    for pause_s in (steps := Steps(message, timeout, through_holds)):
        time.sleep(pause_s)
    result: R = steps.result
    return result


async def wait_for(message: Message[R], *, timeout: timedelta, through_holds: bool = False) -> R:
    """`wait_for_sync` for an event loop, which goes on meanwhile."""
    steps = Steps(message, timeout, through_holds)
    walk = iter(steps)
    while (pause_s := await asyncio.to_thread(next, walk, None)) is not None:
        await asyncio.sleep(pause_s)
    result: R = steps.result
    return result


class Steps:
    """The polls of a wait: yields pauses in seconds until `result` is there, or raises why it will not be."""

    def __init__(self, message: Message[Any], timeout: timedelta, through_holds: bool) -> None:
        self.message, self.timeout_s, self.through_holds = message, timeout.total_seconds(), through_holds
        self.result: Any = None
        self._was_there = was_sent(message)
        self._gone_since: float | None = None

    def __iter__(self) -> Generator[float, None, None]:
        backlog = backlog_of()
        give_up_at, pause_s = clock.monotonic() + self.timeout_s, FIRST_POLL_S
        while True:
            with store_errors("waiting for a result", accepts="nothing"):
                if self.look(backlog):
                    return
            left_s = give_up_at - clock.monotonic()
            if left_s <= 0:
                raise NotYet(self.message.message_id, "timeout", pause_s)
            yield min(pause_s, left_s)
            pause_s = min(LONGEST_POLL_S, pause_s * 1.5)

    def look(self, backlog: Backlog) -> bool:
        try:
            self.result = self.message.get_result(backend=dramatiq.get_broker().get_results_backend())
        except ResultFailure as failure:
            if failure.orig_exc_type == JobExpired.__name__:
                raise JobExpired(self.message.message_id) from None
            if failure.orig_exc_type == JobFailed.__name__:
                last = last_line(backlog, self.message)
                because = "see its story" if last is None else str(last.facts.get("because", "see its story"))
                raise JobFailed(self.message.message_id, end_told(last) or "discarded", because) from None
            raise
        except ResultMissing:
            held = held_facts(backlog, self.message)
            if held is not None and not self.through_holds:
                raise NotYet(self.message.message_id, held.reason, PROBE_GAP_S) from None
            if held is not None or backlog.place(self.message.message_id, lanes_of(self.message)) is not None:
                self._was_there, self._gone_since = True, None
                return False
            return self.last_look(backlog)
        return True

    def last_look(self, backlog: Backlog) -> bool:
        """The job is in no place. If it was in one, its end is told, and its result stored, within moments of that."""
        end = end_of(backlog, self.message)
        if end is None and not self._was_there:  # not enqueued yet, as far as anybody can tell
            return False
        if self._gone_since is None:  # its result may have come between our looks at the two
            self._gone_since = clock.monotonic()
            return False
        if end == "expired":
            raise JobExpired(self.message.message_id) from None
        if clock.monotonic() - self._gone_since < SETTLING_S:
            return False
        why = "it stores no result, or its result has expired" if end in (None, "succeeded") else "see its story"
        raise JobFailed(self.message.message_id, end or "ended", why) from None


def was_sent(message: Message[Any]) -> bool:
    """Whether this very message was enqueued: `send` returned it. A copy as it was built does not tell."""
    return "sent_ms" in stamp_of(message)


def has_result(message: Message[Any]) -> bool:
    try:
        message.get_result(backend=dramatiq.get_broker().get_results_backend())
    except ResultMissing:
        return False
    except ResultFailure:
        return True
    except RuntimeError:  # this broker stores no results
        return False
    return True


def backlog_of() -> Backlog:
    broker: Any = dramatiq.get_broker()
    if not hasattr(broker, "client"):
        raise ConfigurationError(
            f"jobs can be followed on dramatiq's RedisBroker, not on {type(broker).__name__}; "
            "on its StubBroker once `pip install 'tideover[testing]'` has brought a store in memory"
        )
    return Backlog(broker.client, Keys(broker.namespace))


def lanes_of(message: Message[Any]) -> tuple[str, ...]:
    """The lists that its job may be in."""
    queue = queue_of(message.queue_name)
    return tuple(dict.fromkeys((queue, *(lane(queue, criticality) for criticality in CRITICALITIES))))


def held_facts(backlog: Backlog, message: Message[Any]) -> HeldFacts | None:
    noted = backlog.place(message.message_id, ())
    queues, redis_id = (lanes_of(message), message.message_id) if noted is None else ((noted[0],), noted[1])
    return next((facts for queue in queues for facts in backlog.facts(queue, [packed_id(redis_id)])), None)


def end_of(backlog: Backlog, message: Message[Any]) -> End | None:
    """How a job that is gone ended; None when nobody wrote it down."""
    return end_told(last_line(backlog, message))


def last_line(backlog: Backlog, message: Message[Any]) -> Line | None:
    """The line of its story that tells how a job ended, if there is one."""
    lines = Stories(backlog.client, backlog.keys).of(message.message_id)
    return next((line for line in reversed(lines) if end_told(line) is not None), None)


def end_told(line: Line | None) -> End | None:
    return next((end for end in ENDS if line is not None and line.event == end), None)
