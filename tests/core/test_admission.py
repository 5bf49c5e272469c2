# SPDX-License-Identifier: Apache-2.0
"""The decision table, read from the docstring of `core/admission.py` and asked of `decide`; then what always holds."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tideover.core import admission
from tideover.core.admission import Expire, GiveBack, Hold, Reroute, Run, Verdict, decide
from tideover.core.breaker import CLOSED, Breaker, State
from tideover.core.job import CRITICALITIES, Criticality, Job
from tideover.core.route import BUSY, FORCED, Hop, Permit

NOW = 1000.0
OPEN = Breaker(state="open", generation=3)
SUSPECT = Breaker(state="suspect", generation=3)
HALF_OPEN = Breaker(state="half-open", generation=3)
RECOVERING = Breaker(state="recovering", generation=3)
THROTTLED = Breaker(throttled_until=NOW + 1)

PRIMARIES: dict[str, dict[str, Breaker]] = {
    "primary usable": {"closed": CLOSED, "quiet is over": replace(THROTTLED, throttled_until=NOW)},
    "suspect": {"suspect": SUSPECT},
    "throttled or recovering": {"throttled": THROTTLED, "recovering": RECOVERING},
    "primary down, a fallback usable": {"open": OPEN, "half-open": HALF_OPEN},
    "no route usable": {"open": OPEN, "half-open": HALF_OPEN},
    "past its expiry": {"closed": CLOSED, "open": OPEN, "throttled": THROTTLED},
}
"""The states of the primary that a column of the table stands for."""

FALLBACKS: dict[str, dict[str, Breaker]] = {
    "primary down, a fallback usable": {"usable": CLOSED},
    "no route usable": {"down": OPEN, "throttled": THROTTLED},
}
"""The states of the fallback, where the column names them."""
ANY_FALLBACK = {"usable": CLOSED, "down": OPEN}


def table() -> dict[tuple[str, str], str]:
    """(criticality, column) → cell, as the docstring has it."""
    rows = [line.strip("|").split("|") for line in (admission.__doc__ or "").splitlines() if line.startswith("|")]
    (_, *columns), _, *body = ([cell.strip() for cell in row] for row in rows)
    return {(row[0], column): cell for row in body for column, cell in zip(columns, row[1:], strict=True)}


def said(cell: str, state: str, fallback: str) -> str:
    """The verdict that a cell has for a primary in this state: `recovering: run; throttled: reroute, else hold`."""
    clauses = [clause.strip() for clause in cell.split(";")]
    mine = next((c.removeprefix(f"{state}: ") for c in clauses if c.startswith(f"{state}: ")), clauses[0])
    first, _, otherwise = mine.partition(", else ")
    return first if fallback == "usable" or not otherwise else otherwise


def job(criticality: str, **more: Any) -> Job:
    assert criticality in CRITICALITIES
    return Job(id="j", task="t", criticality=criticality, routes=("a", "b"), **more)  # type: ignore[arg-type]


def chain(primary: Breaker, fallback: Breaker = CLOSED) -> tuple[Hop, Hop]:
    return Hop("a", "a/m", primary), Hop("b", "b/m", fallback)


CELLS = [
    (criticality, column, state, fallback)
    for criticality, column in table()
    for state, fallback in product(PRIMARIES[column], FALLBACKS.get(column, ANY_FALLBACK))
]


def test_the_table_has_a_row_for_each_criticality_and_every_column() -> None:
    """A new column needs a state here, so that it is tried."""
    assert set(product(CRITICALITIES, PRIMARIES)) == set(table())


@pytest.mark.parametrize(("criticality", "column", "state", "fallback"), CELLS)
def test_the_verdict_is_the_tables(criticality: str, column: str, state: str, fallback: str) -> None:
    """What the table says to the reader is what a job gets."""
    hops = chain(PRIMARIES[column][state], FALLBACKS.get(column, ANY_FALLBACK)[fallback])
    expires_at = NOW if column == "past its expiry" else NOW + 1
    verdict = decide(job(criticality, expires_at=expires_at), hops, now=NOW)
    cell = said(table()[criticality, column], state, fallback)
    word = {"run": Run("a"), "reroute": Reroute("b"), "expire": Expire()}.get(cell)
    if word is not None:
        assert word == verdict
    else:
        assert cell.startswith("hold")
        assert isinstance(verdict, Hold)
        throttled = state == "throttled" or (fallback == "throttled" and criticality == "critical")
        expected = "suspect" if "(`suspect`)" in cell else "pace" if throttled or "(`pace`)" in cell else "outage"
        assert expected == verdict.reason


# what a hold says


def test_a_critical_job_waits_for_whichever_route_comes_back_first() -> None:
    """Its wait key is every route that can serve it; a deferrable job waits for its primary only."""
    hops = chain(OPEN, OPEN)
    assert Hold(("a/m", "b/m"), "outage", 3 + 3) == decide(job("critical"), hops, now=NOW)
    assert Hold(("a/m",), "outage", 3) == decide(job("deferrable"), hops, now=NOW)
    assert Hold(("a/m", "b/m"), "outage", 3 + 3) == decide(job("deferrable", reroute_when_deferrable=True), hops, now=NOW)


def test_nobody_waits_for_a_route_that_does_not_know_the_model() -> None:
    """It would never free the job; the primary stays, because something must."""
    hops = (Hop("a", "a/m", OPEN), Hop("b", "b/m", CLOSED, "it has no model", serves=False))
    assert Hold(("a/m",), "outage", 3) == decide(job("critical"), hops, now=NOW)
    unmapped = (replace(hops[0], serves=False), hops[1])
    assert Hold(("a/m",), "outage", 3) == decide(job("critical"), unmapped, now=NOW)


def test_a_busy_route_is_a_matter_of_pace() -> None:
    """All slots taken is no outage: the job reroutes, else it waits for room."""
    hops = (Hop("a", "a/m", CLOSED, BUSY), Hop("b", "b/m", CLOSED))
    assert Reroute("b") == decide(job("critical"), hops, now=NOW)
    assert Hold(("a/m",), "pace", 0) == decide(job("deferrable"), hops, now=NOW)


def test_a_route_that_just_failed_this_call_is_not_tried_again() -> None:
    """The next one is, and after the last the job is held."""
    failed = Hop("a", "a/m", CLOSED, "529 overloaded_error")
    assert Reroute("b") == decide(job("critical"), (failed, Hop("b", "b/m", CLOSED)), now=NOW)
    assert Hold(("a/m", "b/m"), "outage", 0) == decide(
        job("critical"), (failed, Hop("b", "b/m", CLOSED, "500 api_error")), now=NOW
    )


# permits


def test_a_released_job_may_run_while_its_route_recovers() -> None:
    """Its permit is of this generation; without one a deferrable job waits for its turn."""
    assert Run("a") == decide(job("deferrable"), chain(RECOVERING), now=NOW, permit=Permit("a/m", 3))
    assert Hold(("a/m",), "pace", 3) == decide(job("deferrable"), chain(RECOVERING), now=NOW)


def test_a_permit_is_for_one_breaker_and_void_in_the_next_generation() -> None:
    """A reopening takes all permits back."""
    for permit in (Permit("b/m", 3), Permit("a/m", 2)):
        assert isinstance(decide(job("deferrable"), chain(RECOVERING), now=NOW, permit=permit), Hold)


def test_a_permit_from_a_newer_generation_than_ours_is_believed() -> None:
    """Our copy of the breaker is then the stale one, even where it says open."""
    assert Run("a") == decide(job("deferrable"), chain(OPEN), now=NOW, permit=Permit("a/m", 4))


@pytest.mark.parametrize("breaker", [CLOSED, OPEN, HALF_OPEN, RECOVERING, THROTTLED])
def test_an_operators_force_runs_whatever_the_breaker_says(breaker: Breaker) -> None:
    """But not past the expiry, and not where the call cannot be carried."""
    forced = Permit(FORCED, 0)
    assert Run("a") == decide(job("deferrable"), chain(breaker), now=NOW, permit=forced)
    assert Expire() == decide(job("deferrable", expires_at=NOW), chain(breaker), now=NOW, permit=forced)
    refused = (Hop("a", "a/m", breaker, "it has no model"),)
    assert isinstance(decide(job("deferrable"), refused, now=NOW, permit=forced), Hold)


# what always holds

breakers = st.builds(
    Breaker,
    state=st.sampled_from(get_args(State)),
    generation=st.integers(0, 4),
    throttled_until=st.sampled_from((0.0, NOW, NOW + 1)),
)
hops = st.builds(
    lambda breaker, refused, serves: ("", "", breaker, refused, serves),
    breakers,
    st.sampled_from((None, None, BUSY, "503")),
    st.booleans(),
)
chains = st.lists(hops, min_size=1, max_size=3).map(
    lambda parts: tuple(Hop(name, f"{name}/m", *part[2:]) for name, part in zip("abc", parts, strict=False))
)
permits = st.none() | st.builds(Permit, st.sampled_from(("a/m", "b/m", "x/m")), st.integers(0, 4))
jobs = st.builds(
    Job,
    id=st.just("j"),
    task=st.just("t"),
    criticality=st.sampled_from(get_args(Criticality)),
    routes=st.just(("a", "b", "c")),
    expires_at=st.sampled_from((None, NOW - 1, NOW, NOW + 1)),
    reroute_when_deferrable=st.booleans(),
)


def used(verdict: Verdict, hops: tuple[Hop, ...]) -> Hop | None:
    match verdict:
        case Run(route) | Reroute(route):
            return next(hop for hop in hops if hop.route == route)
        case Hold() | Expire():
            return None


@given(jobs, chains, permits)
def test_no_call_is_made_after_the_expiry(job: Job, hops: tuple[Hop, ...], permit: Permit | None) -> None:
    """And no job expires before it."""
    past = job.expires_at is not None and job.expires_at <= NOW
    assert past == isinstance(decide(job, hops, now=NOW, permit=permit), Expire)


@given(jobs, chains)
def test_an_open_breaker_lets_nobody_through_without_a_permit(job: Job, hops: tuple[Hop, ...]) -> None:
    """Neither does a half-open one: its calls are the probes', which are no jobs."""
    hop = used(decide(job, hops, now=NOW), hops)
    assert hop is None or hop.breaker.state in ("closed", "suspect", "recovering")
    assert hop is None or job.criticality == "critical" or hop.breaker.state == "closed"


@given(breakers, st.integers(0, 4))
def test_a_stale_permit_never_covers(breaker: Breaker, generation: int) -> None:
    """One of this generation covers no open breaker either: it was given before that reopened."""
    permit = Permit("a/m", generation)
    if generation < breaker.generation or (generation == breaker.generation and breaker.state in ("open", "half-open")):
        assert not permit.covers("a/m", breaker)
    assert not permit.covers("b/m", breaker)


@given(jobs, chains, permits)
def test_a_deferrable_job_spends_no_fallback_money_unasked(job: Job, hops: tuple[Hop, ...], permit: Permit | None) -> None:
    """Only its owner's word takes it to another route."""
    assume(not job.may_reroute)
    assert not isinstance(decide(job, hops, now=NOW, permit=permit), Reroute)


@given(jobs, chains, permits)
def test_a_critical_job_is_never_held_while_a_route_is_usable(job: Job, hops: tuple[Hop, ...], permit: Permit | None) -> None:
    """Of the usable routes it takes the first."""
    usable = [h for h in hops if h.refused is None and h.breaker.state == "closed" and h.breaker.throttled_until <= NOW]
    verdict = decide(replace(job, criticality="critical", expires_at=None), hops, now=NOW, permit=permit)
    assert not (usable and isinstance(verdict, Hold))
    hop = used(verdict, hops)
    assert hop is None or not usable or hops.index(hop) <= hops.index(usable[0])


@given(jobs, chains, permits)
def test_whatever_is_used_can_carry_the_call_and_is_not_hurried(job: Job, hops: tuple[Hop, ...], permit: Permit | None) -> None:
    """A refused route gets no call, and neither does one that asked for quiet."""
    hop = used(decide(job, hops, now=NOW, permit=permit), hops)
    assert hop is None or (hop.refused is None and hop.breaker.throttled_until <= NOW)


@given(jobs, chains, permits)
def test_a_hold_waits_for_something_that_may_come_back(job: Job, hops: tuple[Hop, ...], permit: Permit | None) -> None:
    """Its wait key names routes that the job may use, one at least; its generation moves when any of their breakers opens."""
    verdict = decide(job, hops, now=NOW, permit=permit)
    if isinstance(verdict, Hold):
        waits_for = [hop for hop in hops if hop.key in verdict.wait_key]
        assert 1 <= len(waits_for) == len(verdict.wait_key)
        assert job.may_reroute or waits_for == [hops[0]]
        assert sum(hop.breaker.generation for hop in waits_for) == verdict.generation


def test_what_only_this_process_cannot_reach_is_left_to_others() -> None:
    """For a while; then a critical job goes elsewhere, if this process reaches that. What all find down is held as ever."""
    lone, helped = Hop("a", "a/m", CLOSED, apart=True), Hop("b", "b/m", CLOSED)
    tired = replace(lone, refused="this process cannot reach it")
    for hops in ((lone, helped), (tired, replace(helped, apart=True))):
        assert GiveBack("a/m") == decide(job("critical"), hops, now=NOW)
    assert Reroute("b") == decide(job("critical"), (tired, helped), now=NOW)
    assert GiveBack("a/m") == decide(job("deferrable"), (tired, helped), now=NOW)
    assert Hold(("a/m",), "outage", 3) == decide(job("deferrable"), (replace(lone, breaker=OPEN), helped), now=NOW)
