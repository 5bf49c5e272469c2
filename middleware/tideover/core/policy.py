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
    """...and although jobs wait, once none of them could be released for so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PacePolicy:
    """How fast a route that was down is used again, in model calls per second; see `core.pacing`."""

    start_rate: float = 2.0
    """The floor: at the beginning, after a brake, and of a route that flaps."""
    double_s: float = 6.0
    """In slow start the rate doubles in so long, or in one and a half times what whole answers take, if that is longer."""
    max_rate: float | None = None
    """Live calls included, so never less than those are; None: as fast as the provider can bear."""
    max_tokens_per_minute: float | None = None
    """Of input and output together, as far as whole answers tell them; None: no cap."""
    share: float = 1.0
    """Of the limits that the provider tells; the others are for whoever shares the account."""
