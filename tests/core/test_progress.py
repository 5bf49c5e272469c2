# SPDX-License-Identifier: Apache-2.0
"""How a backlog comes home: everything counts once, and the end is told as a range that narrows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tideover.core.progress import LATEST, SOONEST, YOUNG_S, Left, Progress, after, begun, left


def drained(held: int, per_s: float, seconds: int, *, new_per_s: float = 0.0) -> Progress:
    """After so long at an even pace, looked at every second."""
    progress, gone, came = begun(held, 0.0), 0.0, 0.0
    for second in range(1, seconds + 1):
        before = int(gone)
        gone, came = gone + per_s, came + new_per_s
        progress = after(progress, held - int(gone) + int(came), int(gone) - before, float(second))
    return progress


@given(held=st.integers(1000, 100_000), per_s=st.floats(0.5, 8), seconds=st.integers(1, 100))
def test_what_went_and_what_is_left_add_up(held: int, per_s: float, seconds: int) -> None:
    """Whatever the pace."""
    progress = drained(held, per_s, seconds)
    assert held == progress.held + progress.released == progress.most


def test_jobs_that_are_held_meanwhile_belong_to_it() -> None:
    """They make it longer, and it is the net pace that tells its end."""
    progress = drained(1000, 4, 100, new_per_s=1)
    assert (1100, 400, 700) == (progress.most, progress.released, progress.held)
    assert pytest.approx(3.0, abs=0.05) == progress.per_s


@given(held=st.integers(5000, 100_000), per_s=st.floats(1, 8), seconds=st.integers(1, 300))
def test_at_an_even_pace_the_end_is_within_the_range(held: int, per_s: float, seconds: int) -> None:
    """Which is at most twice as wide as its lower end after a minute, and four times before."""
    progress = drained(held, per_s, seconds)
    ends = left(progress)
    assert ends is not None
    assert ends.soonest_s <= progress.held / per_s <= ends.latest_s
    assert ends.latest_s <= (2 if seconds >= YOUNG_S else 4) * ends.soonest_s


def test_a_pace_that_grows_is_taken_to_grow_on() -> None:
    """While a provider comes back: most of what is told after a minute is right; the pace so far is far too slow for that."""
    held, progress, gone, right = 1000, begun(1000, 0.0), 0, [True]
    told: list[tuple[float, Left]] = []
    for second in range(1, 10_000):
        going = min(held - gone, round(0.02 * second**2) - round(0.02 * (second - 1) ** 2))
        gone += going
        progress = after(progress, held - gone, going, float(second))
        if gone == held:
            right = [ends.soonest_s <= second - at <= ends.latest_s for at, ends in told]
            break
        if second >= YOUNG_S and (ends := left(progress)) is not None:
            told.append((second, ends))
    assert len(right) > 100
    assert sum(right) >= 0.8 * len(right)


def test_a_pace_at_its_limit_is_not_taken_to_grow_on() -> None:
    """It grew for a minute and a half, to what the provider allows: what is told from then on is right."""
    held, progress, gone, told = 5000, begun(5000, 0.0), 0, []
    second = 0
    while gone < held:
        second += 1
        going = min(held - gone, min(12, round(12 * second / 90)))
        gone += going
        progress = after(progress, held - gone, going, float(second))
        if second > 90 and (ends := left(progress, limited=True)) is not None:
            told.append((float(second), ends))
    right = [at + ends.soonest_s <= second <= at + ends.latest_s for at, ends in told]
    assert len(right) > 300
    assert sum(right) >= 0.95 * len(right)


def test_what_does_not_shrink_has_no_end_that_anybody_could_tell() -> None:
    """And what is empty has ended."""
    assert left(begun(5, 0.0)) is None
    assert left(drained(1000, 0, 10)) is None
    assert Left(0.0, 0.0) == left(begun(0, 0.0))
    assert LATEST / SOONEST <= 2


def test_what_was_counted_late_is_counted_once() -> None:
    """Others tell of their releases before the leader has seen the backlog shrink."""
    progress = after(begun(100, 0.0), held=100, released=40, now=1.0)
    progress = after(progress, held=60, released=0, now=2.0)
    progress = after(progress, held=20, released=40, now=3.0)
    assert (100, 20, 80) == (progress.most, progress.held, progress.released)


def test_what_stands_still_for_long_has_no_end() -> None:
    """Its pace so far fades, and no date is that far away."""
    progress = drained(1000, 2, 60)
    for second in range(61, 4000):
        progress = after(progress, progress.held, 0, float(second))
    assert left(progress) is None


def test_two_looks_at_one_instant_count_both() -> None:
    """A leader that looks again at once divides by no time."""
    progress = after(after(begun(10, 0.0), 8, 2, 1.0), 7, 1, 1.0)
    assert (3, 8) == (progress.released, progress.held)
