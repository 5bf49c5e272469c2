# SPDX-License-Identifier: Apache-2.0
"""How a backlog comes home: what left it, how fast it shrinks, and when it will be gone, as a range."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

MEMORY_S, LATELY_S = 60.0, 30.0
"""Time constants of how fast it shrinks, and of how fast it does lately."""
STEADY = 0.2
"""Which are taken for the same if they differ by less; the longer one is less noisy."""
GROWS_ON_S, MOST_GROWTH = 90.0, 3.0
"""What grows is taken to grow on for so long, to so many times of what it is."""
YOUNG_S = 60.0
"""A drain younger than this still gathers speed, so that less is known of its end."""
SOONEST, LATEST = 0.70, 1.35
"""The true end lies within these shares of what the pace so far says; of a young one the sooner one is half as far away."""
YOUNG_SOONEST = 0.34
MOST_S = 30 * 86_400.0
"""What would take longer stands still."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Of one drain, since `began_at`. Instants are unix time.

    `held`: jobs left; `released` so far; `per_s`, `lately_per_s`: how fast it shrinks, new jobs that are held meanwhile
    included.
    """

    began_at: float
    at: float
    held: int
    released: int = 0
    per_s: float = 0.0
    lately_per_s: float = 0.0

    @property
    def most(self) -> int:
        """All that went and that are left."""
        return self.held + self.released


@dataclass(frozen=True, slots=True)
class Left:
    """Seconds until the end: at the soonest, and at the latest."""

    soonest_s: float
    latest_s: float


def begun(held: int, now: float) -> Progress:
    return Progress(began_at=now, at=now, held=held)


def after(progress: Progress, held: int, released: int, now: float) -> Progress:
    """Later: `held` are left, and `released` more have gone.

    >>> half = after(begun(100, 0.0), held=50, released=60, now=10.0)
    >>> half.most, half.released, half.per_s
    (110, 60, 5.0)
    """
    elapsed_s = now - progress.at
    if elapsed_s <= 0:
        return replace(progress, released=progress.released + released)
    shrank_per_s, age_s = (progress.held - held) / elapsed_s, now - progress.began_at
    per_s = faded(progress.per_s, shrank_per_s, max(1 - math.exp(-elapsed_s / MEMORY_S), elapsed_s / age_s))
    lately = faded(progress.lately_per_s, shrank_per_s, max(1 - math.exp(-elapsed_s / LATELY_S), elapsed_s / age_s))
    gone = progress.released + released
    return replace(progress, at=now, held=held, released=gone, per_s=per_s, lately_per_s=lately)


def faded(known: float, new: float, weight: float) -> float:
    return known + weight * (new - known)


def turn_s(nth: float, *, rate: float, most: float, double_s: float) -> float:
    """Seconds until the nth job goes, at a rate that doubles in `double_s` until it is `most`.

    >>> round(turn_s(10, rate=2, most=2, double_s=6)), round(turn_s(1000, rate=2, most=20, double_s=6))
    (5, 62)
    """
    grows_for_s = double_s * max(0.0, math.log2(most / rate))
    while_growing = max(0.0, most - rate) * double_s / math.log(2)
    if nth < while_growing:
        return double_s * math.log2(1 + nth * math.log(2) / (rate * double_s))
    return grows_for_s + (nth - while_growing) / max(rate, most)


def left(progress: Progress, *, limited: bool = False) -> Left | None:
    """When the backlog will be gone; None: it does not shrink, or nobody can tell yet. `limited`: the pace grows no more.

    >>> left(after(begun(1000, 0.0), held=900, released=100, now=100.0))
    Left(soonest_s=630.0, latest_s=1215.0)
    """
    if progress.held == 0:
        return Left(0.0, 0.0)
    per_s, lately = progress.per_s, progress.lately_per_s
    if min(per_s, lately) <= 0:
        return None
    if abs(lately - per_s) <= STEADY * per_s:
        ends_s = progress.held / per_s
    else:
        age_s = progress.at - progress.began_at
        behind_s, lag_s = min(MEMORY_S, age_s / 2), min(LATELY_S, age_s / 2)  # how old what they tell is on average
        grows = max(0.0, (lately - per_s) / max(behind_s - lag_s, lag_s / 2))
        now_per_s = min(lately + grows * lag_s, MOST_GROWTH * lately)
        ends_s = while_growing_s(progress.held, now_per_s, 0.0 if limited else grows, MOST_GROWTH * lately)
    if ends_s > MOST_S:
        return None
    young = progress.at - progress.began_at < YOUNG_S
    return Left((YOUNG_SOONEST if young else SOONEST) * ends_s, LATEST * ends_s)


def while_growing_s(jobs: float, per_s: float, grows: float, most: float) -> float:
    """Seconds for so many jobs at a rate that grows by so much a second for a while, up to the most.

    >>> while_growing_s(100, 10, 0, 30), round(while_growing_s(100, 1, 0.1, 30)), round(while_growing_s(1000, 1, 0.1, 3))
    (10.0, 36, 340)
    """
    if grows <= 0:
        return jobs / per_s
    grows_s = min(GROWS_ON_S, (most - per_s) / grows)
    meanwhile = per_s * grows_s + grows * grows_s**2 / 2
    if jobs <= meanwhile:
        return (math.sqrt(per_s**2 + 2 * grows * jobs) - per_s) / grows
    return grows_s + (jobs - meanwhile) / (per_s + grows * grows_s)
