# SPDX-License-Identifier: Apache-2.0
"""The charts, whatever comes in: they stay where they may, count the same in runs as one by one, and say what they promise."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tideover.core.detector import (
    BUDGET_S,
    CALM_ROW,
    LEAST_BASE,
    LEAST_H,
    MEMORY_S,
    MOST_BASE,
    MOST_H,
    TOP,
    WARM_CALLS,
    WARM_S,
    Base,
    Charts,
    Run,
    Steps,
    after,
    is_brownout,
    is_calm,
    is_down,
    is_suspect,
)

RUNS = st.lists(st.tuples(st.sampled_from(["ok", "failed", "back", "lapsed"]), st.integers(1, 9)), max_size=12)
BASES = st.builds(
    lambda rate, share: Base(calls=rate * MEMORY_S, failed=rate * MEMORY_S * share), st.floats(0, 1000), st.floats(0, 0.2)
)
AGE_S = 3600.0
WELL = Base(calls=MEMORY_S, failed=0.005 * MEMORY_S)
"""One call a second, and one in 200 fails."""


def of(*runs: Run, base: Base = WELL) -> Charts:
    return after(Charts(), runs, Steps.of(base))


@given(runs=RUNS, base=BASES)
def test_charts_stay_between_nothing_and_their_top(runs: list[Run], base: Base) -> None:
    """What has to come down again need not come from the clouds."""
    charts = of(*runs, base=base)
    top = TOP * base.threshold
    assert all(0 <= chart <= top for chart in (charts.brownout, charts.blackout, charts.majority))
    assert min(charts.calls, charts.failed, charts.ok, charts.row) >= 0


@given(runs=RUNS, base=BASES)
def test_a_run_is_as_many_calls_one_by_one(runs: list[Run], base: Base) -> None:
    """However evidence is batched, it says the same."""
    singly = of(*((kind, 1) for kind, n in runs for _ in range(n)), base=base)
    assert pytest.approx(astuple(singly)[:3]) == astuple(of(*runs, base=base))[:3]
    if not any(kind == "lapsed" for kind, _ in runs):  # of which none can undo more successes than there were
        assert singly.ok == of(*runs, base=base).ok


@given(base=BASES, n=st.integers(1, 40))
def test_streams_that_break_are_failures(base: Base, n: int) -> None:
    """Each counted as a success at its first token. Where most break it is an outage, not a brown-out."""
    charts = of(*[("ok", 1), ("lapsed", 1)] * n, base=base)
    assert (n, n) == (charts.calls, charts.failed)
    assert not is_brownout(charts, base.threshold)
    if n >= 12:
        assert is_down(charts, base.threshold)


@given(runs=RUNS, base=BASES)
def test_what_was_counted_too_early_is_taken_back(runs: list[Run], base: Base) -> None:
    """To where a success would have brought it, or below: never does a slow answer leave doubt behind."""
    taken_back, well = (of(*runs, *last, base=base) for last in ([("failed", 1), ("back", 1)], [("ok", 1)]))
    for one, other in zip(astuple(taken_back)[:3], astuple(well)[:3], strict=True):
        assert one <= other + 1e-9


@given(ok=st.integers(0, 10_000), base=BASES)
def test_a_few_failures_in_a_row_are_an_outage(ok: int, base: Base) -> None:
    """Four, ordinarily, whatever went well before; up to nine where it is called often and one failure in twenty is usual."""
    rows = [of(("ok", ok), ("failed", n), base=base) for n in range(12)]
    downs = [is_down(charts, base.threshold) for charts in rows]
    assert downs == sorted(downs)
    first = downs.index(True)
    assert 4 <= first <= 9
    assert [False] * 4 + [True] == [is_down(of(("ok", ok), ("failed", n)), WELL.threshold) for n in range(5)]
    doubts = [is_suspect(charts, base.threshold, AGE_S) for charts in rows]
    assert doubts.index(True) < first


@given(charts=RUNS, base=BASES)
def test_who_is_down_is_suspect(charts: list[Run], base: Base) -> None:
    """There is no way to be given up without being doubted."""
    found = of(*charts, base=base)
    assert is_down(found, base.threshold) <= is_suspect(found, base.threshold, AGE_S)


def test_a_quarter_failing_is_a_brownout_and_no_outage() -> None:
    """However long it lasts: every fourth call fails, evenly."""
    charts = Charts()
    for _ in range(500):
        charts = after(charts, [("failed", 1), ("ok", 3)], Steps.of(WELL))
        assert not is_down(charts, WELL.threshold)
    assert is_brownout(charts, WELL.threshold)
    assert is_suspect(charts, WELL.threshold, AGE_S)


@given(runs=RUNS, base=BASES)
def test_many_successes_in_a_row_calm_it(runs: list[Run], base: Base) -> None:
    """Whatever was before; one failure among them, and the count begins anew."""
    assert [CALM_ROW - 1, 0, 1] == [
        of(("ok", CALM_ROW - 1), *more).row for more in ([], [("failed", 1)], [("failed", 1), ("ok", 1)])
    ]
    assert is_calm(of(*runs, ("ok", CALM_ROW), base=base), base.threshold)


def test_the_brownout_chart_waits_until_successes_had_the_time_to_show() -> None:
    """After a beginning errors come first, because they are quicker. The blackout chart waits for nothing."""
    slow = Charts(brownout=WELL.threshold, ok=WARM_CALLS - 1)
    h = WELL.threshold
    assert not is_suspect(slow, h, WARM_S - 1)
    assert is_suspect(slow, h, WARM_S)
    assert is_suspect(Charts(brownout=h, ok=WARM_CALLS), h, 0)
    assert is_suspect(Charts(blackout=h), h, 0)


@given(base=BASES, more=st.floats(0, 1000))
def test_who_is_called_more_often_needs_more_evidence(base: Base, more: float) -> None:
    """Or it would be given up wrongly more often than once in 30 days."""
    busier = Base(calls=base.calls + more * MEMORY_S, failed=base.failed)
    assert LEAST_H <= base.threshold <= busier.threshold <= MOST_H
    assert math.exp(base.threshold) >= min(base.per_s * BUDGET_S, math.exp(MOST_H)) * (1 - 1e-9)
    assert LEAST_BASE <= base.failure_rate <= MOST_BASE


@given(
    base=BASES, first_s=st.floats(1, 10_000), second_s=st.floats(0, 10_000), ok=st.integers(0, 99), failed=st.integers(0, 99)
)
def test_what_is_usual_fades_alike_in_one_step_or_two(
    base: Base, first_s: float, second_s: float, ok: int, failed: int
) -> None:
    """It is the same whether somebody looked in between; a clock that ran backwards changes nothing."""
    began = base.after(ok, failed, 1.0)
    once, twice = (
        began.after(1, 0, 1.0 + first_s + second_s),
        began.after(0, 0, 1.0 + first_s).after(1, 0, 1.0 + first_s + second_s),
    )
    assert pytest.approx(astuple(once)) == astuple(twice)
    assert began.after(0, 0, 0.5) == began
