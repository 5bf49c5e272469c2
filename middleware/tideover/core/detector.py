# SPDX-License-Identifier: Apache-2.0
"""Is this route failing? A sequential test over the outcomes of its calls, one after the other.

Three charts add up the log-likelihood ratio of two failure rates, never below 0 (Bernoulli CUSUM: Page 1954, Lorden 1971):

    chart      asks                                      so that
    brownout   10 % rather than the base rate            a quarter of the calls failing is seen within 50 calls
    blackout   60 % rather than the base rate            five failures in a row are enough
    majority   60 % rather than 30 %                     a provider that still answers most calls is not given up

A chart of threshold h crosses it by mistake once in e^h calls at most, so that h = ln(calls in 30 days) is one mistake a month.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Evidence = Literal["ok", "failed", "back", "lapsed"]
"""*back*: a failure was counted too early (no first token in time), and the call turned out well. *lapsed*: a success was, at
the first token, and the stream broke."""

Run = tuple[Evidence, int]
"""So many in a row."""

BROWNOUT, BLACKOUT, PARTIAL = 0.10, 0.60, 0.30
"""Failure rates that the charts ask about."""

LEAST_BASE, MOST_BASE = 0.01, 0.05
"""What failure rate is taken for usual: twice the learned one, within these. At 5 % one retry makes 0.25 % of it."""

PRIOR_CALLS, PRIOR_FAILED = 100.0, 1.0
"""What is assumed of a route before its first call."""

MEMORY_S = 1800.0
"""Time constant of the learned rates."""

BUDGET_S = 30 * 86_400.0
"""One false opening in so long is allowed."""

LEAST_H, MOST_H = 12.0, 20.0
TOP = 1.25
"""How far above its threshold a chart goes, as a share of it: what must come down again need not come from the clouds."""
MAJORITY_H = 2.7
"""Of the majority chart, while no brown-out is known: four failures that no success interrupts."""

CALM_ROW = 30
"""Were one call in ten to fail, so many in a row would go well once in 24 times."""

WARM_CALLS = 6
WARM_S = 10.0
"""First tokens, or seconds, before the brown-out chart may act. Errors are quicker than answers: one sees them first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Charts:
    """Where the charts stand.

    `calls`, `failed`: since all of them were last at 0; `ok`: first tokens since they began; `row`: since the last failure.
    """

    brownout: float = 0.0
    blackout: float = 0.0
    majority: float = 0.0
    calls: int = 0
    failed: int = 0
    ok: int = 0
    row: int = 0

    @property
    def highest(self) -> float:
        return max(self.brownout, self.blackout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What is usual for a route: calls and failures, fading with `MEMORY_S`, as of the instant `at`."""

    calls: float = 0.0
    failed: float = 0.0
    at: float = 0.0

    @property
    def failure_rate(self) -> float:
        """What the charts take for usual.

        >>> Base().failure_rate, Base(calls=1e6, failed=100).failure_rate, Base(calls=100, failed=100).failure_rate
        (0.02, 0.01, 0.05)
        """
        learned = (self.failed + PRIOR_FAILED) / (self.calls + PRIOR_CALLS)
        return min(max(2 * learned, LEAST_BASE), MOST_BASE)

    @property
    def per_s(self) -> float:
        """Calls per second."""
        return self.calls / MEMORY_S

    @property
    def threshold(self) -> float:
        """Where a chart must stand for its route to be given up.

        >>> [round(Base(calls=rate * MEMORY_S).threshold, 1) for rate in (0, 0.1, 1, 10, 1000)]
        [12.0, 12.5, 14.8, 17.1, 20.0]
        """
        return min(max(math.log(max(self.per_s * BUDGET_S, 1.0)), LEAST_H), MOST_H)

    def after(self, ok: float, failed: float, now: float) -> Base:
        """With calls that ended at `now`."""
        fades = math.exp(-max(0.0, now - self.at) / MEMORY_S) if self.at else 1.0
        return Base(calls=self.calls * fades + ok + failed, failed=self.failed * fades + failed, at=max(now, self.at))


@dataclass(frozen=True, slots=True)
class Step:
    """How far a chart moves: `up` at a failure, `down` (negative) at a success."""

    up: float
    down: float


def step(asked: float, usual: float) -> Step:
    """
    >>> five = step(0.6, 0.02)
    >>> round(five.up, 2), round(five.down, 2)
    (3.4, -0.9)
    """
    return Step(math.log(asked / usual), math.log((1 - asked) / (1 - usual)))


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of the three charts, and where they stop: no chart needs to go further than `top`, and must come down again."""

    brownout: Step
    blackout: Step
    majority: Step
    top: float

    @classmethod
    def of(cls, base: Base) -> Steps:
        usual = base.failure_rate
        return cls(step(BROWNOUT, usual), step(BLACKOUT, usual), step(BLACKOUT, PARTIAL), TOP * base.threshold)


def moved(at: float, by: Step, run: Run, top: float) -> float:
    """Where a chart stands after a run of equal evidence.

    >>> moved(0.0, Step(3.0, -1.0), ("failed", 2), 20.0), moved(2.0, Step(3.0, -1.0), ("ok", 5), 20.0)
    (6.0, 0.0)
    """
    kind, n = run
    match kind:
        case "ok":
            return max(0.0, at + n * by.down)
        case "failed":
            return min(top, at + n * by.up)
        case "back":
            return max(0.0, at + n * (by.down - by.up))
        case "lapsed":
            return min(top, at + n * (by.up - by.down))


def after(charts: Charts, runs: Iterable[Run], steps: Steps) -> Charts:
    """Where the charts stand after more evidence, in its order. `store/lua/report-n.lua` does the same for all processes."""
    for run in runs:
        kind, n = run
        failed = max(0, charts.failed + (-n if kind == "back" else 0 if kind == "ok" else n))
        new = Charts(
            brownout=moved(charts.brownout, steps.brownout, run, steps.top),
            blackout=moved(charts.blackout, steps.blackout, run, steps.top),
            majority=moved(charts.majority, steps.majority, run, steps.top),
            calls=max(failed, charts.calls + (n if kind in ("ok", "failed") else 0)),
            failed=failed,
            ok=max(0, charts.ok + (0 if kind == "failed" else -n if kind == "lapsed" else n)),
            row=0 if kind in ("failed", "lapsed") else charts.row + n,
        )
        charts = new if new.highest > 0 else replace(new, calls=0, failed=0)
    return charts


def is_warm(charts: Charts, age_s: float) -> bool:
    """Whether successes have had the time to show. `age_s`: since the charts began at 0."""
    return charts.ok >= WARM_CALLS or age_s >= WARM_S


def is_suspect(charts: Charts, h: float, age_s: float) -> bool:
    """Whether what can wait should wait: a chart is halfway to its threshold `h`."""
    return charts.blackout >= h / 2 or (charts.brownout >= h / 2 and is_warm(charts, age_s))


def is_calm(charts: Charts, h: float) -> bool:
    """Whether what was suspect is so no more: its charts are low, or too many calls in a row went well."""
    return charts.highest < h / 4 or charts.row >= CALM_ROW


def is_brownout(charts: Charts, h: float) -> bool:
    """Whether a part of the calls fails for certain, and less than half. Such a provider stays in use."""
    return charts.brownout >= h and 2 * charts.failed < charts.calls


def is_down(charts: Charts, h: float) -> bool:
    """Whether most calls fail."""
    return charts.blackout >= h and charts.majority >= (h if is_brownout(charts, h) else MAJORITY_H)
