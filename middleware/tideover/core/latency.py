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
"""Of a plain call, whose first sign of life is its whole answer, while nobody knows how long those take."""
ENOUGH = 1000
"""So many must be known before their 99.9th percentile says anything. Until then one and a half times the slowest will do."""
QUANTILE, SLACK = 0.999, 1.5


def bucket_of(seconds: float, *, streams: bool) -> str:
    """
    >>> bucket_of(1.0, streams=True), bucket_of(2.1, streams=False), bucket_of(0.0, streams=True)
    ('s0', 'p4', 's-16')
    """
    power = SHORTEST if seconds <= 0 else math.floor(PER_DOUBLING * math.log2(seconds))
    return f"{'s' if streams else 'p'}{min(max(power, SHORTEST), LONGEST)}"


def overdue_s(buckets: Mapping[str, int], *, streams: bool) -> float:
    """Seconds after which a call without a first token counts as failed: the 99.9th percentile of those that went well.

    >>> overdue_s({}, streams=True), overdue_s({}, streams=False), round(overdue_s({"p16": 5000, "p20": 100}, streams=False))
    (6.0, 30.0, 38)
    >>> [round(overdue_s(known, streams=False)) for known in ({"p4": 25}, {"p4": 25, "p21": 1})]
    [30, 68]
    """
    mine = sorted((int(name[1:]), n) for name, n in buckets.items() if name[0] == ("s" if streams else "p"))
    total, below = sum(n for _, n in mine), 0
    if total < ENOUGH:
        slowest_s = upper_s(mine[-1][0]) if mine else 0.0
        return max(LEAST_S if streams else UNKNOWN_S, SLACK * slowest_s)
    for power, n in mine:
        below += n
        if below >= QUANTILE * total:
            return max(LEAST_S, upper_s(power))
    return LEAST_S


def upper_s(power: int) -> float:
    """Where a bucket ends."""
    return float(2.0 ** ((power + 1) / PER_DOUBLING))
