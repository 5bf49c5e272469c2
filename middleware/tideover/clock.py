# SPDX-License-Identifier: Apache-2.0
"""The one place that asks for the time. A worker goes by Redis' clock, so that no machine's own clock decides anything."""

from __future__ import annotations

import time

_ahead: float | None = None
"""Redis' unix time less this process's monotonic time; None: Redis' time is not known."""


def now() -> float:
    """Unix time in seconds: Redis' once `follow` has told it, whatever the machine's clock says meanwhile."""
    return time.time() if _ahead is None else time.monotonic() + _ahead


def now_ms() -> int:
    """Unix time in milliseconds, as on the wire."""
    return int(now() * 1000)


def follow(redis_now: float) -> None:
    """Takes Redis' unix time as that of this process."""
    global _ahead
    _ahead = redis_now - time.monotonic()


def skew_ms() -> int:
    """How far the machine's own clock, which dramatiq goes by, is behind `now`, in milliseconds."""
    return int((now() - time.time()) * 1000)


def monotonic() -> float:
    """Seconds that never run backwards; for durations within this process."""
    return time.monotonic()
