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


def test_what_does_not_shrink_has_no_end_that_anybody_could_tell() -> None:
    """And what is empty has ended."""
    assert left(begun(5, 0.0)) is None
    assert left(drained(1000, 0, 10)) is None
    assert Left(0.0, 0.0) == left(begun(0, 0.0))
    assert LATEST / SOONEST <= 2


def test_two_looks_at_one_instant_count_both() -> None:
    """A leader that looks again at once divides by no time."""
    progress = after(after(begun(10, 0.0), 8, 2, 1.0), 7, 1, 1.0)
    assert (3, 8) == (progress.released, progress.held)
