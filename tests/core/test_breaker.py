# SPDX-License-Identifier: Apache-2.0
"""The breaker's table, and what walks it: evidence, probes, operators and time; and the pace that follows from them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tideover.core import detector
from tideover.core.breaker import (
    CLOSED,
    FLAP_S,
    FLOOR_S,
    GRAVITY,
    MASS,
    TRANSITIONS,
    Breaker,
    Forced,
    IllegalTransition,
    State,
    Transition,
    Witnesses,
    burst_says,
    in_force,
    is_probe_due,
    judge,
    judge_task,
    moved,
    next_probe_at,
    probe_wait_s,
    threshold,
    together,
    weigh,
)
from tideover.core.detector import Base, Charts, Run, Steps
from tideover.core.policy import BreakerPolicy, PacePolicy

STATES: tuple[State, ...] = get_args(State)
LEGAL: dict[tuple[State, State], int] = {
    ("closed", "suspect"): 0,
    ("closed", "open"): 1,
    ("suspect", "closed"): 0,
    ("suspect", "open"): 1,
    ("open", "half-open"): 0,
    ("open", "recovering"): 0,
    ("half-open", "half-open"): 0,
    ("half-open", "open"): 0,
    ("half-open", "recovering"): 0,
    ("recovering", "recovering"): 0,
    ("recovering", "open"): 1,
    ("recovering", "closed"): 1,
}
"""Every arrow of the diagram, with what it adds to the generation."""

POLICY = BreakerPolicy(probe_after_s=5, probe_max_s=15, settle_s=10, settle_max_s=120)
PACE = PacePolicy(start_rate=2, max_rate=50, double_s=2)
NOW = 10_000.0
ALONE, AGREED, CONTRADICTED = Witnesses(), Witnesses(reporters=2, failing=2), Witnesses(reporters=8, failing=1)


def go(breaker: Breaker, to: State, now: float = NOW, **more: Any) -> Breaker:
    return moved(breaker, Transition(to=to, why="why", **more), now)


def with_evidence(breaker: Breaker, *runs: Run) -> Breaker:
    return replace(breaker, charts=detector.after(breaker.charts, runs, Steps.of(breaker.base)))


def judged(breaker: Breaker, by: Witnesses = ALONE, *, now: float = NOW, waiting: bool = False) -> State | None:
    change = judge(breaker, by, now=now, waiting=waiting, policy=POLICY)
    return None if change is None else change.to


# the table


@pytest.mark.parametrize(("before", "after"), list(product(STATES, STATES)))
def test_only_the_arrows_of_the_diagram_exist(before: State, after: State) -> None:
    """Any other change is a defect of its caller, and says so."""
    breaker = Breaker(state=before, generation=7)
    if (before, after) in LEGAL:
        assert 7 + LEGAL[before, after] == go(breaker, after).generation
    else:
        with pytest.raises(IllegalTransition, match=f"^{before} -> {after}$"):
            go(breaker, after)


def test_the_diagram_is_the_tables() -> None:
    """What the reader sees at the top of the file is what the table has, arrow for arrow."""
    assert set(LEGAL) == {(before, after) for before, afters in TRANSITIONS.items() for after in afters}
    assert set(STATES) == set(TRANSITIONS) == set(GRAVITY)


@given(st.lists(st.integers(0, 3), max_size=60))
def test_the_generation_counts_openings_and_closings(choices: list[int]) -> None:
    """On any walk: neither suspicion nor probing, however often, moves it; and each opening begins an era of its own."""
    breaker, openings, closings = CLOSED, 0, 0
    for choice in choices:
        ways = sorted(TRANSITIONS[breaker.state])
        to, was = ways[choice % len(ways)], breaker
        opened = to == "open" and was.state != "half-open"
        openings += opened
        closings += (was.state, to) == ("recovering", "closed")
        breaker = go(was, to)
        assert openings + closings == breaker.generation
        assert breaker.era >= was.era + opened


def test_charts_begin_anew_where_old_evidence_says_nothing() -> None:
    """After a brake, a recovery and a closing; what opened a breaker stays readable while it is open."""
    failing = with_evidence(Breaker(state="recovering", generation=3), ("failed", 9))
    assert failing.charts == go(failing, "open").charts
    for to in ("recovering", "closed"):
        assert (Charts(), NOW) == (go(failing, to).charts, go(failing, to).began_at)  # type: ignore[arg-type]
        assert failing.era + 1 == go(failing, to).era  # type: ignore[arg-type]
    doubted = with_evidence(CLOSED, ("failed", 2))
    assert doubted.charts == go(doubted, "suspect").charts


# judging the evidence


def test_few_failures_make_a_route_suspect_and_a_few_more_open_it() -> None:
    """Where few jobs run, two and four in a row."""
    assert [None, "suspect", "suspect", "open"] == [judged(with_evidence(CLOSED, ("failed", n))) for n in (1, 2, 3, 4)]
    suspect = go(CLOSED, "suspect")
    assert [None, "open"] == [judged(with_evidence(suspect, ("failed", n))) for n in (3, 4)]


def test_where_two_look_two_must_see_it() -> None:
    """One process whose network is broken moves nobody's breaker; and where one alone looks, it is believed."""
    failing = with_evidence(CLOSED, ("failed", 50))
    assert ["open", "open", None] == [judged(failing, by) for by in (ALONE, AGREED, CONTRADICTED)]
    assert judged(replace(failing, state="recovering", since=NOW), CONTRADICTED) is None


def test_an_opening_says_why() -> None:
    """With the last failure's words; where there are none, with the numbers."""
    failing = with_evidence(CLOSED, ("ok", 3), ("failed", 9))
    change = judge(failing, ALONE, now=NOW, waiting=False, policy=POLICY)
    assert Transition(to="open", why="9 of 9 calls failed") == change
    change = judge(replace(failing, why="529 overloaded_error"), ALONE, now=NOW, waiting=False, policy=POLICY)
    assert Transition(to="open", why="529 overloaded_error") == change


def test_a_brown_out_keeps_the_provider_in_use() -> None:
    """A quarter of the calls failing is certain after a hundred of them, and opens nothing; all of them failing then does."""
    well = replace(CLOSED, charts=Charts(ok=50), base=Base(calls=18_000, failed=90, at=NOW))
    pattern: list[Run] = [("failed", 1), ("ok", 3)]
    browned = with_evidence(well, *pattern * 100)
    assert detector.is_brownout(browned.charts, threshold(browned, NOW))
    assert "suspect" == judged(browned)
    assert "open" == judged(with_evidence(browned, ("failed", 40)))


def test_a_suspect_route_that_is_calm_again_closes() -> None:
    """Neither the last failure nor the last minute keeps it suspect, only its charts."""
    suspect = go(with_evidence(CLOSED, ("failed", 2)), "suspect")
    assert judged(suspect) is None
    assert "closed" == judged(with_evidence(suspect, ("ok", 10)))


def test_a_brown_out_that_is_over_is_not_suspect_for_long() -> None:
    """However high its charts stood: thirty calls in a row that went well."""
    browned = go(with_evidence(CLOSED, *[("failed", 1), ("ok", 2)] * 300), "suspect")
    assert [None, "closed"] == [judged(with_evidence(browned, ("ok", n))) for n in (detector.CALM_ROW - 3, detector.CALM_ROW)]
    assert Charts() == go(browned, "closed").charts


def test_who_recovered_with_losses_and_is_silent_is_asked_too() -> None:
    """Otherwise nobody would ever say that it is well: neither calls nor time."""
    recovered = go(Breaker(state="half-open"), "recovering")
    lossy = with_evidence(recovered, ("ok", 50), *[("failed", 1), ("ok", 6)] * 9)
    later = NOW + POLICY.settle_max_s
    assert [None, True] == [judged(lossy, now=later), is_probe_due(lossy, later, POLICY)]
    assert not is_probe_due(replace(lossy, charts=Charts()), later, POLICY)
    well = with_evidence(lossy, ("ok", 30))
    assert ["closed", False] == [judged(well, now=later), is_probe_due(well, later, POLICY)]


def test_who_is_suspect_and_silent_is_asked_however_busy_it_was() -> None:
    """What can wait is held, so that nobody may call at all."""
    suspect = replace(go(CLOSED, "suspect"), base=Base(calls=1e5, failed=0, at=NOW), seen_at=NOW)
    assert [False, True] == [is_probe_due(suspect, NOW + s, POLICY) for s in (1, 3)]


def test_failures_under_our_own_pressure_brake_first() -> None:
    """A recovering route that fails again goes back to its floor; only what fails there opens it."""
    recovering = with_evidence(go(Breaker(state="half-open"), "recovering"), ("failed", 6))
    assert "recovering" == judged(recovering)
    braked = go(recovering, "recovering", NOW + 5)
    assert (NOW, NOW + 5, Charts()) == (braked.since, braked.braked_at, braked.charts)
    assert judged(with_evidence(braked, ("failed", 2)), now=NOW + 6) is None
    assert "open" == judged(with_evidence(braked, ("failed", 4)), now=NOW + 6)
    assert "recovering" == judged(with_evidence(braked, ("failed", 4)), now=NOW + 6 + FLOOR_S)


@pytest.mark.parametrize(
    ("stood_s", "waiting", "closes"),
    [(9.9, False, False), (10, False, True), (10, True, False), (1e6, True, False)],
)
def test_a_recovering_breaker_closes_once_it_has_settled(stood_s: float, waiting: bool, closes: bool) -> None:
    """Soon when nothing waits for it; while its backlog comes home it stays paced."""
    breaker = Breaker(state="recovering", since=NOW - stood_s, began_at=NOW - stood_s)
    assert ("closed" if closes else None) == judged(breaker, waiting=waiting)


def test_who_flaps_opens_at_half_the_evidence() -> None:
    """For ten minutes after it had recovered; a route that stood longer begins with a clean slate."""
    recovered = go(Breaker(state="half-open"), "recovering")
    again = go(recovered, "open", NOW + 60)
    assert 1 == again.flaps
    assert again.base.threshold / 2 == threshold(again, NOW + 60) == threshold(again, NOW + FLAP_S - 1)
    assert again.base.threshold == threshold(again, NOW + FLAP_S)
    assert 0 == go(go(recovered, "closed", NOW + 10), "open", NOW + FLAP_S).flaps


@given(st.sampled_from(STATES), st.integers(0, 99), st.integers(0, 99), st.floats(0, 1e4), st.booleans())
def test_a_judgement_is_always_legal(state: State, ok: int, failed: int, age_s: float, waiting: bool) -> None:
    """Evidence and time open and close; out of open and half-open only probes and operators lead."""
    breaker = with_evidence(Breaker(state=state, since=NOW - age_s, began_at=NOW - age_s), ("ok", ok), ("failed", failed))
    to = judged(breaker, waiting=waiting)
    assert to is None or to in TRANSITIONS[state]
    assert to is None or not breaker.is_down


def judged_task(breaker: Breaker, *, waiting: bool = True) -> Transition | None:
    return judge_task(breaker, now=NOW, waiting=waiting, policy=POLICY)


def test_a_resumed_task_is_closed_once_it_has_stood_its_time() -> None:
    """Sooner where nothing waits for it; and paused again if its jobs are refused again."""
    resumed = Breaker(state="recovering", since=NOW - POLICY.settle_s)
    assert judged_task(resumed) is None
    assert Transition(to="closed", why="recovered") == judged_task(resumed, waiting=False)
    assert judged_task(replace(resumed, since=NOW - 1e6)) is None
    again = judged_task(with_evidence(resumed, ("failed", MASS)), waiting=False)
    assert again is not None
    assert "paused" == again.parked


def test_a_task_whose_jobs_are_suddenly_refused_is_paused() -> None:
    """Ten distinct jobs, most of them; neither nine, nor a task that always had its share of wrong requests."""
    well = with_evidence(CLOSED, ("ok", 200))
    assert judged_task(with_evidence(well, ("failed", MASS - 1))) is None
    change = judged_task(with_evidence(well, ("failed", MASS)))
    assert Transition(to="open", why="10 of 10 jobs were refused as wrong", parked="paused") == change
    sometimes: list[Run] = [("failed", 1), ("ok", 2)]
    assert judged_task(with_evidence(well, *sometimes * 50)) is None
    paused = go(well, "open", parked="paused")
    assert next_probe_at(paused, NOW + 1e6, POLICY) is None


# probes


def test_pauses_between_probes_grow_and_are_spread() -> None:
    """From about five seconds to about fifteen, an hour later thirty; the same for all processes, another for each outage."""
    waits = [probe_wait_s(Breaker(state="open", probes_failed=n, opened_at=NOW), NOW, POLICY) for n in range(40)]
    assert all(0.75 * 5 <= wait <= 1.25 * 15 for wait in waits)
    assert waits[0] < 6.25 < min(waits[20:])
    late = [probe_wait_s(Breaker(state="open", probes_failed=n, opened_at=NOW), NOW + 3601, POLICY) for n in range(300, 340)]
    assert 25 < sum(late) / len(late) < 35
    assert len({probe_wait_s(Breaker(state="open", opened_at=NOW + n), NOW, POLICY) for n in range(20)}) == 20


def test_whom_to_ask_and_when() -> None:
    """An open breaker after its pause, a half-open one whose prober died, a doubted one at once; nobody else."""
    opened = go(CLOSED, "open")
    at = NOW + probe_wait_s(opened, NOW, POLICY)
    assert [False, True] == [is_probe_due(opened, now, POLICY) for now in (at - 0.01, at)]
    probed = replace(go(opened, "half-open", at), probing_until=at + 30)
    assert [False, True] == [is_probe_due(probed, now, POLICY) for now in (at + 29, at + 30)]
    doubted = with_evidence(CLOSED, ("failed", 1))
    assert [False, True] == [is_probe_due(breaker, NOW, POLICY) for breaker in (CLOSED, doubted)]
    busy = replace(doubted, base=Base(calls=1e5, failed=0, at=NOW), seen_at=NOW)
    assert [False, False] == [is_probe_due(b, NOW, POLICY) for b in (busy, replace(doubted, probing_until=NOW + 1))]


def test_a_parked_route_is_asked_at_its_date() -> None:
    """Spent money comes back on a day that the provider names; until then nobody asks."""
    parked = go(CLOSED, "open", parked="quota", probe_at=NOW + 86_400)
    assert [False, True] == [is_probe_due(parked, now, POLICY) for now in (NOW + 86_399, NOW + 86_400)]
    assert ("quota", "") == (parked.parked, go(go(parked, "half-open"), "recovering").parked)


@given(st.lists(st.booleans(), max_size=60))
def test_a_burst_decides_by_all_of_its_answers(answers: list[bool]) -> None:
    """A first probe that fails reopens at once, ten good ones in a row close, and no answer decides both ways."""
    weight, says = 0.0, None
    for nth, answered in enumerate(answers):
        weight = weigh(weight, answered=answered)
        says = burst_says(weight)
        if says is not None:
            assert answered == says
            assert (nth, answered) == (0, False) or nth >= 1
            break
    assert says is not None or len(answers) < 10 or not all(answers)


# operators, and routes above models


def test_an_operators_word_is_in_force_until_its_time_is_over() -> None:
    """What is computed goes on beneath it."""
    forced = Forced(state="closed", until=NOW + 60, who="me", why="I know better")
    breaker = replace(go(CLOSED, "open"), forced=forced)
    seen = in_force(breaker, NOW)
    assert ("closed", "forced closed by me: I know better") == (seen.state, seen.why)
    assert breaker == in_force(breaker, NOW + 60)
    assert "open" == breaker.state


@given(st.sampled_from(STATES), st.sampled_from(STATES), st.integers(0, 9), st.integers(0, 9))
def test_a_job_sees_the_graver_of_model_and_route(model: State, route: State, one: int, other: int) -> None:
    """And a permit of the two together is void once either opens or closes."""
    seen = together(Breaker(state=model, generation=one), Breaker(state=route, generation=other), NOW)
    assert max(GRAVITY[model], GRAVITY[route]) == GRAVITY[seen.state]
    assert one + other == seen.generation


def test_two_alike_are_so_since_the_later_one_is() -> None:
    """A model that has been recovering since an earlier outage recovers from this one once its route does."""
    model, route = Breaker(state="recovering", since=NOW - 60), Breaker(state="recovering", since=NOW)
    assert NOW == together(model, route, NOW).since == together(route, model, NOW).since
    assert NOW - 60 == together(model, replace(route, state="closed"), NOW).since


# the pace that follows
