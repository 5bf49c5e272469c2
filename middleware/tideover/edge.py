# SPDX-License-Identifier: Apache-2.0
"""The edge of a task's function: what leaves it becomes an answer, an error or a hold of the job."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps
from inspect import isawaitable, signature, unwrap
from traceback import walk_tb
from typing import Any, TypeVar, cast

from tideover import clock
from tideover.attempt import Attempt, Held, HoldSignal, current
from tideover.core.admission import Hold, needs_review
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


def is_late(attempt: Attempt | None) -> bool:
    """Whether a job is past its expiry, so that only its degraded answer is of use."""
    return attempt is not None and attempt.job.expires_at is not None and clock.now() >= attempt.job.expires_at


def async_edge(fn: Callable[..., Awaitable[R]], degraded: Callable[..., Any] | None) -> Callable[..., Awaitable[R]]:
    async def answer_degraded(attempt: Attempt, *args: Any, **kwargs: Any) -> R:
        assert degraded is not None
        attempt.degraded = True
        answer = degraded(*args, **kwargs)
        return cast(R, await answer if isawaitable(answer) else answer)

    @wraps(fn)
    async def run(*args: Any, **kwargs: Any) -> R:
        attempt = current.get()
        try:
            if degraded is not None and attempt is not None and is_late(attempt):
                return await answer_degraded(attempt, *args, **kwargs)
            result = await fn(*args, **kwargs)
        except asyncio.CancelledError:
            raise
        except JobExpired:
            if degraded is None or attempt is None or attempt.degraded:
                raise
            return await answer_degraded(attempt, *args, **kwargs)
        except BaseException as error:
            if attempt is not None:
                attempt.stop_the_clock()
            leave(attempt, error, misfit(attempt, error, fn) or await asyncio.to_thread(hold_for, attempt, error))
            raise
        done(attempt)
        leave(attempt, None)
        return result

    return run


def sync_edge(fn: Callable[..., R], degraded: Callable[..., Any] | None) -> Callable[..., R]:
    def answer_degraded(attempt: Attempt, *args: Any, **kwargs: Any) -> R:
        assert degraded is not None
        attempt.degraded = True
        return cast(R, degraded(*args, **kwargs))

    @wraps(fn)
    def run(*args: Any, **kwargs: Any) -> R:
        attempt = current.get()
        try:
            if degraded is not None and attempt is not None and is_late(attempt):
                return answer_degraded(attempt, *args, **kwargs)
            result = fn(*args, **kwargs)
        except JobExpired:
            if degraded is None or attempt is None or attempt.degraded:
                raise
            return answer_degraded(attempt, *args, **kwargs)
        except BaseException as error:
            leave(attempt, error, misfit(attempt, error, fn) or hold_for(attempt, error))
            raise
        done(attempt)
        leave(attempt, None)
        return result

    return run
