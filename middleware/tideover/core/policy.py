# SPDX-License-Identifier: Apache-2.0
"""Every tunable a decision reads, with its unit and the reason for its default. Settings builds these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerPolicy:
    """When a route's model counts as down, and when as back.

    The window is small because a black-out must be seen within seconds; `min_calls` and `failure_ratio` keep a
    single bad answer, or a burst of two, from opening it.
    """

    window_s: float = 10.0
    min_calls: int = 5
    failure_ratio: float = 0.5
    probe_after_s: float = 5.0
    """First probe after the opening; each failed probe waits half as long again, up to `probe_max_s`."""
    probe_max_s: float = 15.0
    probes: int = 3
    """Probes that must succeed one after the other: at 65 % errors one success is a coin toss, three are 4 %."""
    settle_s: float = 10.0
    """A recovering route closes after this long without reopening, once nothing waits for it."""
    settle_max_s: float = 120.0
    """...and after this long even while jobs still wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PacePolicy:
    """How fast held jobs go back: slow start from `start_rate`, doubling every `double_s`, up to `max_rate` (jobs/s)."""

    start_rate: float = 2.0
    max_rate: float = 50.0
    double_s: float = 2.0
