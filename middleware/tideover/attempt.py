# SPDX-License-Identifier: Apache-2.0
"""The running attempt: its job, its calls, and the signal that takes it off the worker."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dramatiq.broker import Broker, MessageProxy
from dramatiq.middleware import SkipMessage, TimeLimit

from tideover import clock
from tideover.core.admission import Hold
from tideover.core.job import End, Job
from tideover.core.route import Mark, Permit

if TYPE_CHECKING:
    from tideover.evidence import Paced
    from tideover.health import Health


MARGIN, MOST_MARGIN_S = 0.1, 1.0
"""The share of a job's time limit, and the seconds at most, that are left when its call is given up."""


class HoldSignal(BaseException):
    """Takes the running job off the worker.

    A `BaseException`, as asyncio's cancellation is, so that no `except Exception` on its way, and no retry loop of an SDK, can
    take it for an error. It is recorded on the attempt, too.
    """


class Held(SkipMessage):
    """A hold as dramatiq sees it: neither success nor failure."""


@dataclass(frozen=True, slots=True)
class Served:
    """Who answered a call: the route, its name for the model, and what could not be carried there.

    `degraded`: no route did, and the task's degraded answer takes its place. (`route` and `model` are empty.)
    """

    route: str
    model: str
    losses: tuple[str, ...] = ()
    degraded: bool = False


@dataclass(slots=True)
class Attempt:
    """One run of a job's function."""

    job: Job
    health: Health
    message: MessageProxy
    """dramatiq's proxy. Its options may be changed in memory; what waits in Redis stays as it was sent."""
    permit: Permit | None = None
    hold: Hold | None = None
    give_back: bool = False
    """Another process is to run it, because only this one cannot reach its route."""
    model: str | None = None
    """The model of its latest call, as the task names it."""
    foreign: bool = False
    """Its latest call went out with a credential that is not its route's own."""
    unfit: set[str] = field(default_factory=set)
    """Routes that could not carry what was asked of them."""
    detail: str = ""
    """The last failure, in a few words, for the job's story."""
    served: list[Served] = field(default_factory=list)
    spent: set[str] = field(default_factory=set)
    """Breakers over which it has begun a call."""
    degraded: Literal["", "expired", "outage"] = ""
    """Why its answer is the task's degraded one: it was past its expiry, or no route was usable."""
    age_s: float | None = None
    """How old that answer is, if it was a good one once."""
    otherwise: Hold | None = None
    """No route is usable, so the degraded answer is due; this hold, if there is none."""
    limit_s: float | None = None
    """How long its function may run, all calls over all routes included (dramatiq's `time_limit`); None: for ever."""
    ends_at: float | None = None
    """When that is over (monotonic)."""
    disarm: Callable[[], object] = lambda: None
    """Takes back what would end it then."""
    called_s: float = 0.0
    """How long its calls have taken so far."""

    def limit(self, limit_s: float | None, disarm: Callable[[], object]) -> None:
        """Its time begins now."""
        self.limit_s, self.ends_at = limit_s, None if limit_s is None else clock.monotonic() + limit_s
        self.disarm = disarm

    def ends_within(self, seconds: float) -> bool:
        """Whether its time limit cuts it within so long."""
        return self.ends_at is not None and clock.monotonic() + seconds >= self.ends_at

    def rest_s(self) -> float:
        """How long a call that begins now may take until it is given up: just before the job is cut, so that the job waits for
        its provider instead of failing.

        `inf`: there is no limit; or the job spent most of its time on something else, and is cut as ever.
        """
        if self.limit_s is None or self.ends_at is None:
            return math.inf
        rest_s = self.ends_at - clock.monotonic() - min(MOST_MARGIN_S, MARGIN * self.limit_s)
        return rest_s if self.called_s + rest_s >= self.limit_s / 2 else math.inf

    def stop_the_clock(self) -> None:
        """Its function has ended: what is decided about it from here on, maybe by a probe, is not its time."""
        self.ends_at = None
        self.disarm()

    def paid_by(self, key: str, *, turn: bool) -> Paced:
        """What pays for the call that begins now: the job's release for all over the route it waited for, or its own turn."""
        first = key not in self.spent
        self.spent.add(key)
        if self.permit is None or self.permit.key != key:
            return "turn" if turn else "live"
        return "released" if first else "again"

    @property
    def rerouted(self) -> bool:
        return any(served.route != self.job.routes[0] for served in self.served)


def time_limit_of(broker: Broker) -> Any:
    """dramatiq's TimeLimit; None where that is not in use."""
    return next((m for m in broker.middleware if isinstance(m, TimeLimit)), None)


def time_limit_s(broker: Broker, message: MessageProxy) -> float | None:
    """The time limit of a job's function in seconds, found as dramatiq's TimeLimit finds it; None: for ever."""
    found = time_limit_of(broker)
    if found is None:
        return None
    task = broker.actors[message.actor_name]
    limit_ms = message.options.get("time_limit") or task.options.get("time_limit", found.time_limit)
    return None if limit_ms == math.inf else float(limit_ms) / 1000


@dataclass(slots=True)
class Note:
    """What this process knows of a message that it has fetched; it rides on dramatiq's proxy, never in the message."""

    mark: Mark = field(default_factory=Mark)
    attempt: Attempt | None = None
    hold: Hold | None = None
    give_back: bool = False
    """It goes back to its queue, for a process that can reach its route."""
    end: End | None = None
    result: Any = None
    """What its function returned, for those that wait for its answer."""
    concluding: bool = False
    """Its function has ended; what is enqueued from here on is its retry or its next step."""
    fetched_at: float = 0.0
    body: bytes = b""
    again: list[Callable[[], object]] = field(default_factory=list)
    """Hooks that Redis failed when its function had succeeded: they run again before the acknowledgement."""
    parting: bool = False
    """Its last move is being made: if its id is fetched now, that is the job's next life, and not this message."""
    handed_over: bool = False
    """Its successor is under way, maybe under its own Redis id: no move of it is made here any more."""
    taken_over: bool = False
    """It is another worker's by now: its run here counts for nothing, and no move of it is made here any more."""
    follow_up_failed: bool = False
    """A retry or a next step could not be enqueued just now, so the message must go back instead of being acknowledged."""


def note_of(message: MessageProxy) -> Note:
    note: Note | None = message.__dict__.get("tideover_note")
    if note is None:
        note = message.__dict__["tideover_note"] = Note()
    return note


current: ContextVar[Attempt | None] = ContextVar("tideover_attempt", default=None)

processing: ContextVar[MessageProxy | None] = ContextVar("tideover_processing", default=None)
"""The message that this thread or task is at work on, after its function ended, too."""
