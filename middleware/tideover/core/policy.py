# SPDX-License-Identifier: Apache-2.0
"""Every tunable a decision reads, with its unit and the reason for its default. Settings builds these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerPolicy:
    """When a route that is down is asked again, and when it counts as well. When it counts as down is `core.detector`'s."""

    probe_after_s: float = 5.0
    """First probe after the opening; each burst that fails waits a little longer, up to `probe_max_s`."""
    probe_max_s: float = 15.0
    max_probes_per_hour: int = 600
    """Of one route and model; once they are spent it is asked less often."""
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
