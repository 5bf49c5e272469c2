# SPDX-License-Identifier: Apache-2.0
"""A worker's clock that jumps: on the path of a worker process, Python runs this before anything else asks for the time.

Unix time is the machine's plus the seconds in the file that CHAOS_CLOCK names, read anew every few hundredths of a second.
As with a real clock that is set, monotonic time goes on undisturbed.
"""

from __future__ import annotations

import os
import time

LOOK_S = 0.05

true_time, true_time_ns = time.time, time.time_ns
offset_s, look_at = 0.0, 0.0


def offset() -> float:
    global offset_s, look_at
    if time.monotonic() >= look_at:
        look_at = time.monotonic() + LOOK_S
        try:
            with open(os.environ["CHAOS_CLOCK"]) as file:  # noqa: PTH123 - every process would have to load pathlib first
                offset_s = float(file.read() or 0)
        except (OSError, ValueError):
            offset_s = 0.0
    return offset_s


if "CHAOS_CLOCK" in os.environ:
    time.time = lambda: true_time() + offset()
    time.time_ns = lambda: true_time_ns() + int(offset() * 1e9)
