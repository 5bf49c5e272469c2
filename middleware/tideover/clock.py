# SPDX-License-Identifier: Apache-2.0
"""The one place that asks for the time of this machine. Shared decisions use Redis' clock instead."""

from __future__ import annotations

import time


def now() -> float:
    """Unix time in seconds."""
    return time.time()


def now_ms() -> int:
    """Unix time in milliseconds, as on the wire."""
    return time.time_ns() // 1_000_000


def monotonic() -> float:
    """Seconds that never run backwards; for durations within this process."""
    return time.monotonic()
