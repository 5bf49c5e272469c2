# SPDX-License-Identifier: Apache-2.0
"""The one place that asks for the time. A worker goes by Redis' clock, so that no machine's own clock decides anything."""

from __future__ import annotations

import time

_ahead: float | None = None
"""Redis' unix time less this process's monotonic time; None: Redis' time is not known."""

_error = 0.0
"""How far wrong that may be, in seconds."""

DOUBT_S = 0.0005
"""What is known grows so much more doubtful each time that it is told again: clocks drift."""


def now() -> float:
    """Unix time in seconds: Redis' once `follow` has told it, whatever the machine's clock says meanwhile."""
    return time.time() if _ahead is None else time.monotonic() + _ahead


def now_ms() -> int:
    """Unix time in milliseconds, as on the wire."""
    return int(now() * 1000)


def follow(redis_now: float, asked_at: float) -> None:
    """Takes Redis' unix time as that of this process; `asked_at`: when it was asked for (monotonic).

    Redis read its clock somewhere between question and answer, so a slow answer tells little: it replaces a better one only
    where the two cannot both be true, because a clock was set.
    """
    global _ahead, _error
    heard_at = time.monotonic()
    ahead, error = redis_now - (asked_at + heard_at) / 2, (heard_at - asked_at) / 2
    _error += DOUBT_S
    if _ahead is None or error <= _error or abs(ahead - _ahead) > error + _error:
        _ahead, _error = ahead, error


def skew_ms() -> int:
    """How far the machine's own clock, which dramatiq goes by, is behind `now`, in milliseconds."""
    return int((now() - time.time()) * 1000)


def monotonic() -> float:
    """Seconds that never run backwards; for durations within this process."""
    return time.monotonic()
