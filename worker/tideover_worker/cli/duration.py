# SPDX-License-Identifier: Apache-2.0
"""Durations as people type them: 90s, 15m, 2h, 1d."""

from __future__ import annotations

import math
import re
from typing import Any

import click

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
LONGEST_S = 10 * 365 * UNITS["d"]


class Duration(click.ParamType[float]):
    """A duration like 90s, 15m, 2h or 1d, in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"([0-9]+)([smhd])", str(value))
        if match is None or not 0 < int(match[1]) * UNITS[match[2]] <= LONGEST_S:
            self.fail(f"{value!r} is no duration; write 90s, 15m, 2h or 1d, ten years at the most", param, ctx)
        return float(int(match[1]) * UNITS[match[2]])


class DurationOrNever(Duration):
    """A duration, or the word never: infinitely many seconds."""

    name = "duration or never"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return math.inf if value == "never" else super().convert(value, param, ctx)
