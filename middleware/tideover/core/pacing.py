# SPDX-License-Identifier: Apache-2.0
"""How fast held jobs go back: a simple, safe slow start. Rates are jobs per second."""

from __future__ import annotations

from tideover.core.breaker import FLOOR_S, Breaker
from tideover.core.policy import PacePolicy

PATIENCE_S = 60.0
"""How long nothing is released while a breaker is suspect. After that it is a brown-out, whose provider answers most calls."""
FLAPPY = 3
"""Who opened so often in a row, soon after it had recovered, is used at the floor."""


def rate(breaker: Breaker, *, now: float, policy: PacePolicy) -> float:
    """The pace of releases that a breaker allows now; 0: none.

    A recovering route starts at `start_rate` and doubles every `double_s`; after a brake it stays at the floor for a while, and
    one that flaps takes longer to double. A throttled one starts again when its quiet is over.

    >>> slow = PacePolicy(start_rate=2, max_rate=50, double_s=2)
    >>> [rate(Breaker(state="recovering", since=100), now=100 + s, policy=slow) for s in (0, 2, 4, 60)]
    [2.0, 4.0, 8.0, 50.0]
    >>> [rate(Breaker(state="suspect", since=100), now=100 + s, policy=slow) for s in (0, 61)]
    [0.0, 2.0]
    >>> rate(Breaker(state="open", since=100), now=200, policy=slow)
    0.0
    """
    if breaker.throttled_until > now:
        return 0.0
    match breaker.state:
        case "open" | "half-open":
            return 0.0
        case "suspect":
            return float(policy.start_rate) if now - breaker.since >= PATIENCE_S else 0.0
        case "recovering" if breaker.flaps >= FLAPPY:
            return policy.start_rate
        case "recovering":
            braked = breaker.braked_at + FLOOR_S if breaker.braked_at >= breaker.since else 0.0
            return ramp(policy, now - max(breaker.since, braked, breaker.throttled_until), 2.0**breaker.flaps)
        case "closed" if breaker.throttled_until == 0:
            return policy.max_rate
        case "closed":
            return ramp(policy, now - breaker.throttled_until, 1.0)


def ramp(policy: PacePolicy, since_s: float, slower: float) -> float:
    doublings = min(max(0.0, since_s) / (policy.double_s * slower), 30.0)
    return float(min(policy.max_rate, policy.start_rate * 2.0**doublings))
