# SPDX-License-Identifier: Apache-2.0
"""How fast held jobs go back: a simple, safe slow start. Rates are jobs per second."""

from __future__ import annotations

from tideover.core.breaker import Breaker
from tideover.core.policy import PacePolicy


def rate(breaker: Breaker, *, now: float, policy: PacePolicy) -> float:
    """The pace of releases that a breaker allows now; 0: none.

    A recovering route starts at `start_rate` and doubles every `double_s`; a throttled one starts again when its quiet is over.

    >>> slow = PacePolicy(start_rate=2, max_rate=50, double_s=2)
    >>> [rate(Breaker(state="recovering", since=100), now=100 + s, policy=slow) for s in (0, 2, 4, 60)]
    [2.0, 4.0, 8.0, 50.0]
    >>> rate(Breaker(state="open", since=100), now=200, policy=slow)
    0.0
    """
    if breaker.state in ("open", "half-open") or breaker.throttled_until > now:
        return 0.0
    if breaker.state == "closed" and breaker.throttled_until == 0:
        return policy.max_rate
    ramp_s = now - max(breaker.throttled_until, breaker.since if breaker.state == "recovering" else 0.0)
    doublings = min(max(0.0, ramp_s) / policy.double_s, 30.0)
    return float(min(policy.max_rate, policy.start_rate * 2.0**doublings))
