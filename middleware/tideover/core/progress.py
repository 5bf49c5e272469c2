# SPDX-License-Identifier: Apache-2.0
"""How a backlog comes home: what left it, how fast it shrinks, and when it will be gone, as a range."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

MEMORY_S = 60.0
"""Time constant of how fast it shrinks."""
YOUNG_S = 60.0
"""A drain younger than this still gathers speed, so that less is known of its end."""
SOONEST, LATEST = 0.70, 1.35
"""The true end lies within these shares of what the pace so far says; of a young one the sooner one is half as far away."""
YOUNG_SOONEST = 0.34


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Of one drain, since `began_at`. Instants are unix time.

    `most`: jobs at its beginning and those held since; `held`: jobs left; `released` so far; `per_s`: how fast it shrinks, new
    jobs that are held meanwhile included.
    """

    began_at: float
    at: float
    held: int
    most: int
    released: int = 0
    per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Left:
    """Seconds until the end: at the soonest, and at the latest."""

    soonest_s: float
    latest_s: float


def begun(held: int, now: float) -> Progress:
    return Progress(began_at=now, at=now, held=held, most=held)


def after(progress: Progress, held: int, released: int, now: float) -> Progress:
    """Later: `held` are left, and `released` more have gone.

    >>> half = after(begun(100, 0.0), held=50, released=60, now=10.0)
    >>> half.most, half.released, half.per_s
    (110, 60, 5.0)
    """
    elapsed_s = now - progress.at
    if elapsed_s <= 0:
        return replace(progress, released=progress.released + released)
    weight = max(1 - math.exp(-elapsed_s / MEMORY_S), elapsed_s / (now - progress.began_at))
    per_s = progress.per_s + weight * ((progress.held - held) / elapsed_s - progress.per_s)
    new = max(0, held + released - progress.held)
    return replace(progress, at=now, held=held, most=progress.most + new, released=progress.released + released, per_s=per_s)


def left(progress: Progress) -> Left | None:
    """When the backlog will be gone; None: it does not shrink, or nobody can tell yet.

    >>> left(after(begun(1000, 0.0), held=900, released=100, now=100.0))
    Left(soonest_s=630.0, latest_s=1215.0)
    """
    if progress.held == 0:
        return Left(0.0, 0.0)
    if progress.per_s <= 0:
        return None
    even_s = progress.held / progress.per_s
    young = progress.at - progress.began_at < YOUNG_S
    return Left((YOUNG_SOONEST if young else SOONEST) * even_s, LATEST * even_s)
