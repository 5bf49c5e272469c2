# SPDX-License-Identifier: Apache-2.0
"""The edge of a task's function: what leaves it becomes an answer, an error or a hold of the job."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps
from inspect import isawaitable, signature, unwrap
from traceback import walk_tb
from typing import Any, Literal, TypeVar

from tideover import clock, events
from tideover.attempt import Attempt, Held, HoldSignal, current
from tideover.core.admission import Hold, needs_review
from tideover.degrading import Degrade, Degraded, LastGood, degraded_answer
from tideover.errors import JobExpired

R = TypeVar("R")


def hold_in(error: BaseException | None) -> bool:
    """Whether a hold is among what left the function, task groups included."""
    if isinstance(error, BaseExceptionGroup):
        return any(hold_in(inner) for inner in error.exceptions)
    return isinstance(error, HoldSignal)


def hold_for(attempt: Attempt | None, error: BaseException) -> Hold | None:
    """The hold that a failure of the function means, if it was a provider's and nobody caught it."""
    if attempt is None or attempt.hold is not None or not isinstance(error, Exception):
        return None
    return attempt.health.hold_for(attempt, error)


def misfit(attempt: Attempt | None, error: BaseException, fn: Callable[..., Any]) -> Hold | None:
    """The hold of a job whose arguments its function does not take: a call of it raised, and it was not entered."""
    if not isinstance(error, TypeError) or attempt is None or attempt.health.mode != "act":
        return None
    if takes(fn, error, attempt.message.args, attempt.message.kwargs):
        return None
    return needs_review("its arguments do not fit the task's function any more")


def takes(fn: Callable[..., Any], error: TypeError, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function, decorated or not, takes these arguments, so that the error is its own or a decorator's."""
    raised_in = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
    try:
        innermost, signed = getattr(unwrap(fn), "__code__", None), signature(fn)
    except (TypeError, ValueError):  # it has none that can be read: then the call itself raised, or something below it
        return len(raised_in) > 1
    if innermost in raised_in:  # a decorator may have added what the arguments lack
        return True
    try:
        signed.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def leave(attempt: Attempt | None, error: BaseException | None, hold: Hold | None = None) -> None:
    """The task's edge: a hold anywhere below is a hold of the job."""
    if attempt is not None and attempt.hold is None:
        attempt.hold = hold
    if hold_in(error) or (attempt is not None and (attempt.hold is not None or attempt.give_back)):
        if attempt is not None:
            attempt.message.options["store_results"] = False  # in memory only: `None` would be taken for the answer
        raise Held("held") from None
    if error is not None:
        raise error


def done(attempt: Attempt | None) -> None:
    """Notes that a job's requests were fine, against the day on which most of its task's are not."""
    if attempt is not None and attempt.model is not None and attempt.hold is None:
        attempt.health.note_job(attempt.job.task, attempt.job.id, refused=False)


class Edge:
    """One run of a job at the edge of its function: what its task's degraded answer is, and when it is due."""

    def __init__(self, *, degrade: Degrade, when_late: bool) -> None:
        self.degrade, self.when_late, self.attempt = degrade, when_late, current.get()

    @property
    def is_late(self) -> bool:
        """The job is past its expiry, so that only its degraded answer is of use."""
        expires_at = None if self.attempt is None else self.attempt.job.expires_at
        return self.when_late and expires_at is not None and clock.now() >= expires_at

    @property
    def has_no_route(self) -> bool:
        """A call found no route usable, and nothing else stopped the job."""
        attempt = self.attempt
        return attempt is not None and not attempt.degraded and attempt.otherwise is not None and attempt.hold is None

    def begin(self, why: Literal["expired", "outage"]) -> Attempt:
        assert self.attempt is not None
        self.attempt.degraded = why
        events.job_degraded(self.attempt.job.id, self.attempt.job.task, why)
        return self.attempt

    def answer(self, why: Literal["expired", "outage"]) -> Any:
        """The degraded answer, which may be awaitable. Without one the job is held, or expires."""
        attempt = self.begin(why)
        return self.value(attempt, degraded_answer(self.degrade, attempt))

    async def async_answer(self, why: Literal["expired", "outage"]) -> Any:
        attempt = self.begin(why)
        if isinstance(self.degrade, LastGood):  # which is in Redis
            return self.value(attempt, await asyncio.to_thread(degraded_answer, self.degrade, attempt))
        value = self.value(attempt, degraded_answer(self.degrade, attempt))
        return await value if isawaitable(value) else value

    def value(self, attempt: Attempt, found: Degraded | None) -> Any:
        if found is not None:
            attempt.age_s = found.age_s
            return found.value
        why, attempt.degraded = attempt.degraded, ""
        if why == "expired":
            raise JobExpired(attempt.job.id)
        leave(attempt, HoldSignal(), attempt.otherwise)
        return None


def async_edge(fn: Callable[..., Awaitable[R]], edge: Callable[[], Edge]) -> Callable[..., Awaitable[R]]:
    @wraps(fn)
    async def run(*args: Any, **kwargs: Any) -> Any:
        job = edge()
        attempt = job.attempt
        try:
            if job.is_late:
                return await job.async_answer("expired")
            result = await fn(*args, **kwargs)
        except asyncio.CancelledError:
            raise
        except JobExpired:
            if attempt is None or attempt.degraded or not job.when_late:
                raise
            return await job.async_answer("expired")
        except BaseException as error:
            if job.has_no_route and hold_in(error):
                return await job.async_answer("outage")
            if attempt is not None:
                attempt.stop_the_clock()
            leave(attempt, error, misfit(attempt, error, fn) or await asyncio.to_thread(hold_for, attempt, error))
            raise
        if job.has_no_route:
            return await job.async_answer("outage")
        done(attempt)
        leave(attempt, None)
        return result

    return run


def sync_edge(fn: Callable[..., R], edge: Callable[[], Edge]) -> Callable[..., R]:
    @wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        job = edge()
        attempt = job.attempt
        try:
            if job.is_late:
                return job.answer("expired")
            result = fn(*args, **kwargs)
        except JobExpired:
            if attempt is None or attempt.degraded or not job.when_late:
                raise
            return job.answer("expired")
        except BaseException as error:
            if job.has_no_route and hold_in(error):
                return job.answer("outage")
            if attempt is not None:
                attempt.stop_the_clock()
            leave(attempt, error, misfit(attempt, error, fn) or hold_for(attempt, error))
            raise
        if job.has_no_route:
            return job.answer("outage")
        done(attempt)
        leave(attempt, None)
        return result

    return run
