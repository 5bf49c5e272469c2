# SPDX-License-Identifier: Apache-2.0
"""How long first tokens usually take, and so from when on a call without one is overdue."""

from __future__ import annotations

import math
from collections.abc import Mapping

PER_DOUBLING = 4
"""Buckets per factor of two: an estimate is off by 19 % at the most."""
SHORTEST, LONGEST = -16, 44
"""Buckets of 1/16 s and of 34 min."""

LEAST_S = 6.0
"""No call is overdue before that, however quick its route usually is."""
UNKNOWN_S = 30.0
"""When a call is overdue whose route has answered fewer than `FEW` so far: its prompts may be long ones."""
FEW = 20
ENOUGH = 1000
"""So many must be known before their 99.9th percentile says anything. Until then one and a half times the slowest will do."""
QUANTILE, SLACK = 0.999, 1.5


def bucket_of(seconds: float) -> str:
    """
    >>> bucket_of(1.0), bucket_of(2.1), bucket_of(0.0)
    ('0', '4', '-16')
    """
    power = SHORTEST if seconds <= 0 else math.floor(PER_DOUBLING * math.log2(seconds))
    return f"{min(max(power, SHORTEST), LONGEST)}"


def overdue_s(buckets: Mapping[str, int]) -> float | None:
    """Seconds after which a call without a first token counts as failed: the 99.9th percentile of those that went well.

    None: too few are known.

    >>> overdue_s({"4": 19}), round(overdue_s({"16": 5000, "20": 100}))
    (None, 38)
    >>> [round(overdue_s(known)) for known in ({"4": 25}, {"4": 25, "21": 1})]
    [6, 68]
    """
    mine = sorted((int(name), n) for name, n in buckets.items())
    total, below = sum(n for _, n in mine), 0
    if total < FEW:
        return None
    if total < ENOUGH:
        return max(LEAST_S, SLACK * upper_s(mine[-1][0]))
    for power, n in mine:
        below += n
        if below >= QUANTILE * total:
            return max(LEAST_S, upper_s(power))
    return LEAST_S


def upper_s(power: int) -> float:
    """Where a bucket ends."""
    return float(2.0 ** ((power + 1) / PER_DOUBLING))
