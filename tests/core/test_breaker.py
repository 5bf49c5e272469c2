# SPDX-License-Identifier: Apache-2.0
"""The breaker's table, and what walks it: openings, closings, probes, generations, and the pace that follows from them."""

from __future__ import annotations

from itertools import pairwise, product
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tideover.core.breaker import (
    CLOSED,
    TRANSITIONS,
    Breaker,
    IllegalTransition,
    State,
    Transition,
    Window,
    generation_after,
    judge,
    probe_due,
    probe_wait_s,
)
from tideover.core.pacing import rate
from tideover.core.policy import BreakerPolicy, PacePolicy

STATES: tuple[State, ...] = get_args(State)
LEGAL: dict[tuple[State, State], int] = {
    ("closed", "open"): 1,
    ("open", "half-open"): 0,
    ("half-open", "open"): 0,
    ("half-open", "recovering"): 0,
    ("recovering", "open"): 1,
    ("recovering", "closed"): 1,
}
"""Every arrow of the diagram, with what it adds to the generation."""

POLICY = BreakerPolicy(
    window_s=10, min_calls=5, failure_ratio=0.5, probe_after_s=5, probe_max_s=15, settle_s=10, settle_max_s=120
)
PACE = PacePolicy(start_rate=2, max_rate=50, double_s=2)
NOW = 1000.0


@pytest.mark.parametrize(("before", "after"), list(product(STATES, STATES)))
def test_only_the_arrows_of_the_diagram_exist(before: State, after: State) -> None:
    """Any other change is a defect of its caller, and says so."""
    breaker = Breaker(state=before, generation=7)
    if (before, after) in LEGAL:
        assert 7 + LEGAL[before, after] == generation_after(breaker, after)
    else:
        with pytest.raises(IllegalTransition, match=f"^{before} -> {after}$"):
            generation_after(breaker, after)


def test_the_diagram_is_the_tables() -> None:
    """What the reader sees at the top of the file is what the table has, arrow for arrow."""
    assert set(LEGAL) == {(before, after) for before, afters in TRANSITIONS.items() for after in afters}


@given(st.lists(st.integers(0, 2), max_size=60))
def test_the_generation_counts_openings_and_closings(choices: list[int]) -> None:
    """On any walk: it never falls, and probing alone, however often it fails, leaves it where it is."""
    breaker, openings, closings = CLOSED, 0, 0
    for choice in choices:
        ways = sorted(TRANSITIONS[breaker.state])
        to = ways[choice % len(ways)]
        openings += to == "open" and breaker.state != "half-open"
        closings += to == "closed"
        breaker = Breaker(state=to, generation=generation_after(breaker, to))
        assert openings + closings == breaker.generation


# judging the window


@pytest.mark.parametrize(
    ("ok", "failed", "opens"),
    [(0, 0, False), (0, 4, False), (0, 5, True), (2, 3, True), (3, 2, False), (5, 5, True), (6, 5, False), (500, 500, True)],
)
@pytest.mark.parametrize("state", ["closed", "recovering"])
def test_enough_calls_with_enough_failures_open(state: State, ok: int, failed: int, opens: bool) -> None:
    """Five calls at least, and half of them failed: a burst of two does not open it."""
    breaker = Breaker(state=state, since=NOW)
    change = judge(breaker, Window(ok, failed), now=NOW, waiting=True, policy=POLICY)
    assert ("open" if opens else None) == (None if change is None else change.to)


def test_an_opening_says_why() -> None:
    """With the last failure's words; where there are none, with the numbers."""
    seen = Breaker(why="529 overloaded_error")
    assert Transition("open", "529 overloaded_error") == judge(seen, Window(0, 9), now=NOW, waiting=False, policy=POLICY)
    assert Transition("open", "9 of 10 calls failed") == judge(CLOSED, Window(1, 9), now=NOW, waiting=False, policy=POLICY)


@pytest.mark.parametrize(
    ("stood_s", "waiting", "closes"),
    [(9.9, False, False), (10, False, True), (10, True, False), (119.9, True, False), (120, True, True)],
)
def test_a_recovering_breaker_closes_once_it_has_settled(stood_s: float, waiting: bool, closes: bool) -> None:
    """Soon when nothing waits for it; while jobs wait it stays paced, but not for ever."""
    breaker = Breaker(state="recovering", since=NOW - stood_s)
    expected = Transition("closed", "recovered") if closes else None
    assert expected == judge(breaker, Window(100, 0), now=NOW, waiting=waiting, policy=POLICY)


@given(st.sampled_from(STATES), st.integers(0, 99), st.integers(0, 99), st.floats(0, 1e4), st.booleans())
def test_a_judgement_is_always_legal(state: State, ok: int, failed: int, age_s: float, waiting: bool) -> None:
    """Calls and time open and close; out of open and half-open only probes lead."""
    breaker = Breaker(state=state, since=NOW - age_s)
    change = judge(breaker, Window(ok, failed), now=NOW, waiting=waiting, policy=POLICY)
    assert change is None or change.to in TRANSITIONS[state]
    assert change is None or state in ("closed", "recovering")


@given(st.integers(0, 99), st.integers(0, 99))
def test_successes_alone_never_open(ok: int, failed: int) -> None:
    """More successes at the same failures can only speak for the route."""
    fewer = judge(CLOSED, Window(ok, failed), now=NOW, waiting=False, policy=POLICY)
    more = judge(CLOSED, Window(ok + POLICY.min_calls, failed), now=NOW, waiting=False, policy=POLICY)
    assert judge(CLOSED, Window(ok, 0), now=NOW, waiting=False, policy=POLICY) is None
    assert more is None or fewer is not None or ok + failed < POLICY.min_calls


# probes


@pytest.mark.parametrize(
    ("state", "failed", "stood_s", "due"),
    [
        ("closed", 0, 1e6, False),
        ("recovering", 0, 1e6, False),
        ("open", 0, 4.9, False),
        ("open", 0, 5, True),
        ("open", 1, 7.4, False),
        ("open", 1, 7.5, True),
        ("open", 1000, 15, True),
        ("half-open", 0, 14.9, False),
        ("half-open", 0, 15, True),
    ],
)
def test_a_probe_is_due(state: State, failed: int, stood_s: float, due: bool) -> None:
    """Soon after the opening, then ever less often; a half-open breaker whose prober died is probed again."""
    breaker = Breaker(state=state, since=NOW - stood_s, probes_failed=failed)
    assert due == probe_due(breaker, now=NOW, policy=POLICY)


@given(st.integers(0, 10**6))
def test_pauses_between_probes_grow_up_to_the_longest(failed: int) -> None:
    """However long an outage lasts, its end is seen within `probe_max_s`."""
    now, later = (probe_wait_s(Breaker(state="open", probes_failed=n), POLICY) for n in (failed, failed + 1))
    assert POLICY.probe_after_s <= now <= later <= POLICY.probe_max_s


# the pace that follows


@given(st.sampled_from(STATES), st.floats(0, 2000), st.floats(0, 2000), st.floats(0, 2000))
def test_the_pace_is_within_its_bounds(state: State, since: float, throttled_until: float, now: float) -> None:
    """Nothing goes to a route that is down or asked for quiet; to any other no more than the most."""
    pace = rate(Breaker(state=state, since=since, throttled_until=throttled_until), now=now, policy=PACE)
    if state in ("open", "half-open") or throttled_until > now:
        assert 0 == pace
    else:
        assert PACE.start_rate <= pace <= PACE.max_rate


def test_the_pace_only_grows_while_a_route_recovers() -> None:
    """It doubles every two seconds, reaches the most and stays there, through the closing too."""
    recovering = [rate(Breaker(state="recovering", since=NOW), now=NOW + s / 4, policy=PACE) for s in range(80)]
    assert PACE.start_rate == recovering[0]
    assert all(before <= after for before, after in pairwise(recovering))
    assert PACE.max_rate == recovering[-1] == rate(Breaker(state="closed", since=NOW + 20), now=NOW + 20, policy=PACE)


def test_a_throttled_route_starts_slowly_again() -> None:
    """When its quiet is over, not before, and in the end at full pace."""
    breaker = Breaker(throttled_until=NOW)
    assert [0.0, 2.0, 4.0, 50.0] == [rate(breaker, now=NOW + s, policy=PACE) for s in (-1, 0, 2, 60)]
