# SPDX-License-Identifier: Apache-2.0
"""The controller of the pace: it finds what a provider can bear, stays below its limits, and gives way when it must."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tideover.core.breaker import FLAP_S, Breaker, State
from tideover.core.pacing import (
    CUSHION_S,
    FLAPPY,
    MOST_QUIET_S,
    PATIENCE_S,
    Felt,
    Limit,
    LimitOf,
    Limits,
    Pacer,
    after,
    begun,
    braked,
    ceiling,
    pace_of,
    unheard,
)
from tideover.core.policy import PacePolicy

POLICY = PacePolicy(start_rate=2, double_s=6)
NOW = 10_000.0
EVERY_S = 0.25
RECOVERING = Breaker(state="recovering", since=NOW)
NONE: Limits = {}
FELT = st.builds(
    Felt,
    sent=st.floats(0, 100),
    ok=st.floats(0, 100),
    lost=st.floats(0, 100),
    throttled=st.floats(0, 3),
    told=st.floats(0, 100),
    input_tokens=st.floats(0, 1e6),
    jobs=st.floats(0, 9),
    again=st.floats(0, 99),
    took_s=st.floats(0, 1000),
    quiet_s=st.floats(0, 1e6),
)
LIMITS = st.dictionaries(st.sampled_from(get_args(LimitOf)), st.builds(Limit, st.floats(0.01, 1e6), st.floats(0, 6e7)))


def used(pacer: Pacer, seconds: float, *, bears: float = math.inf, limits: Limits = NONE) -> Pacer:
    """After so long at its own pace, on a provider that answers within two seconds and bears so many calls a second."""
    for _ in range(int(seconds / EVERY_S)):
        sent = EVERY_S * pacer.rate
        ok = min(sent, EVERY_S * bears)
        felt = Felt(sent=sent, ok=ok, lost=sent - ok, took_s=2 * ok)
        pacer = after(pacer, felt, limits, now=pacer.at + EVERY_S, policy=POLICY)
    return pacer


@given(felts=st.lists(st.tuples(FELT, LIMITS, st.floats(0, 100)), max_size=20))
def test_whatever_happens_there_is_a_pace(felts: list[tuple[Felt, Limits, float]]) -> None:
    """A finite one, above nothing: what is stuck at 0 would never learn that the provider is back."""
    pacer, now = begun(NOW, POLICY), NOW
    for felt, limits, elapsed_s in felts:
        now += elapsed_s
        pacer = after(pacer, felt, limits, now=now, policy=POLICY)
        assert 0 < pacer.rate < math.inf
        assert pacer.quiet_until <= now + MOST_QUIET_S
        pace = pace_of(RECOVERING, pacer, limits, now=now, policy=POLICY)
        assert (pace.rate == 0) == (pace.factor == "quiet")
        assert "requests" not in limits or pace.rate <= 1.3 * max(0.2, limits["requests"].per_s) + 1e-9


def test_it_starts_slowly_and_doubles() -> None:
    """In six seconds, or in one and a half times what an answer takes."""
    assert [2.0, 4.0, 8.0, 16.0] == [pytest.approx(used(begun(NOW, POLICY), s).rate, rel=0.25) for s in (0, 6, 12, 18)]


def test_it_finds_what_a_provider_can_bear() -> None:
    """Within a minute, and stays there: a little below or above, and never at half of it."""
    pacer = used(begun(NOW, POLICY), 60, bears=20)
    rates = []
    for _ in range(100):
        pacer = used(pacer, 3, bears=20)
        rates.append(pacer.rate)
    assert 18 <= sum(rates) / len(rates) <= 21
    assert 15 <= min(rates) <= max(rates) <= 24


def test_it_follows_a_provider_that_bears_more_every_second() -> None:
    """Once it met what that bore at the time it does not stay there: it uses most of what there is."""
    pacer, delivered, room = begun(NOW, POLICY), 0.0, 0.0
    for second in range(100):
        bears = min(45.0, 6 + 0.65 * second)
        pacer = used(pacer, 1, bears=bears)
        if second >= 20:
            delivered, room = delivered + min(pacer.rate, bears), room + bears
    assert delivered >= 0.75 * room


def test_a_call_that_fails_now_and_then_is_no_congestion() -> None:
    """One in a hundred costs no speed."""
    pacer = used(begun(NOW, POLICY), 10)
    felt = Felt(sent=10, ok=9.9, lost=0.1, took_s=19.8)
    assert after(pacer, felt, NONE, now=pacer.at + EVERY_S, policy=POLICY).rate >= pacer.rate


def test_it_is_cut_once_in_the_time_of_an_answer() -> None:
    """What fails then was sent before."""
    pacer = used(begun(NOW, POLICY), 18)
    lost = Felt(sent=5, ok=1, lost=4, took_s=2)
    first = after(pacer, lost, NONE, now=pacer.at + EVERY_S, policy=POLICY)
    assert first.rate < pacer.rate
    assert first.rate == after(first, lost, NONE, now=first.at + EVERY_S, policy=POLICY).rate


def test_a_429_keeps_it_quiet_for_a_while() -> None:
    """As long as it asks for, and three seconds at the most: then it is asked again."""
    pacer = used(begun(NOW, POLICY), 12)
    for asked_s, quiet_s in ((1.0, 1.0), (3600.0, MOST_QUIET_S)):
        told = after(pacer, Felt(throttled=1, quiet_s=asked_s), NONE, now=pacer.at + EVERY_S, policy=POLICY)
        pace = pace_of(RECOVERING, told, NONE, now=told.at, policy=POLICY)
        assert (0.0, "quiet") == (pace.rate, pace.factor)
        assert quiet_s == pytest.approx(told.quiet_until - told.at)
        assert pace_of(RECOVERING, told, NONE, now=told.quiet_until + 0.001, policy=POLICY).rate > 0


def test_the_providers_limit_is_a_ceiling_with_a_cushion() -> None:
    """Where most of it is left more is sent than it says per second, so that it is used up; near its end less."""
    full, usual, empty = (ceiling(Limit(20, left), POLICY) for left in (20 * 60, 20 * CUSHION_S, 0))
    assert (26.0, 20.0) == (pytest.approx(full), pytest.approx(usual))
    assert 10 <= empty < 20
    assert 0.3 * 20 == pytest.approx(ceiling(Limit(20, 20 * CUSHION_S), replace(POLICY, share=0.3)))
    pacer = used(begun(NOW, POLICY), 60, limits={"requests": Limit(20, 20 * CUSHION_S)})
    pace = pace_of(RECOVERING, pacer, {"requests": Limit(20, 20 * CUSHION_S)}, now=pacer.at, policy=POLICY)
    assert (20.0, "provider limit") == (pytest.approx(pace.rate), pace.factor)


def test_a_limit_of_tokens_counts_in_calls() -> None:
    """By what whole answers took so far; until one is known it says nothing. The tighter limit wins."""
    limits: Limits = {"requests": Limit(50, 50 * CUSHION_S), "output_tokens": Limit(1000, 1000 * CUSHION_S)}
    pacer = replace(begun(NOW, POLICY), rate=100.0)
    assert 50 == pytest.approx(pace_of(RECOVERING, pacer, limits, now=NOW, policy=POLICY).rate)
    felt = Felt(sent=10, ok=10, took_s=20, told=10, input_tokens=3000, output_tokens=1000)
    told = after(pacer, felt, limits, now=NOW + EVERY_S, policy=POLICY)
    assert (300.0, 100.0, 400.0) == (told.each("input_tokens"), told.each("output_tokens"), told.each("tokens"))
    pace = pace_of(RECOVERING, replace(told, rate=100.0), limits, now=told.at, policy=POLICY)
    assert (10.0, "token limit") == (pytest.approx(pace.rate), pace.factor)


def test_settings_cap_calls_tokens_and_calls_at_one_time() -> None:
    """So many tokens a minute are so many calls a second, and so many calls at a time too, by how long they take."""
    pacer = replace(begun(NOW, POLICY), rate=100.0, answers=5, answer_s=4.0, input_tokens=500.0, output_tokens=100.0)
    capped = pace_of(RECOVERING, pacer, NONE, now=NOW, policy=replace(POLICY, max_tokens_per_minute=72_000.0))
    assert (2.0, "own cap") == (pytest.approx(capped.rate), capped.factor)
    few = pace_of(RECOVERING, pacer, NONE, now=NOW, policy=POLICY, most_in_flight=12.0)
    assert (3.0, "own cap") == (few.rate, few.factor)


def test_it_learns_how_many_calls_a_job_makes() -> None:
    """And still knows it at the next recovery, as it knows what its calls are like."""
    pacer = begun(NOW, POLICY)
    for _ in range(100):
        felt = Felt(sent=8, ok=8, took_s=24, jobs=2, again=6)
        pacer = after(pacer, felt, NONE, now=pacer.at + EVERY_S, policy=POLICY)
    assert 4.0 == pytest.approx(pacer.calls_each)
    again = begun(NOW + 3600, POLICY, pacer)
    assert (POLICY.start_rate, pacer.calls_each, pacer.answer_s) == (again.rate, again.calls_each, again.answer_s)


def test_a_brake_goes_to_the_floor_and_grows_quickly_to_what_was_borne() -> None:
    """What fails within an answer's time was sent before, and cuts nothing."""
    pacer = used(begun(NOW, POLICY), 60, bears=20)
    slow = braked(pacer, pacer.at, POLICY)
    assert POLICY.start_rate == slow.rate
    assert slow.rate <= after(slow, Felt(sent=2, lost=9), NONE, now=slow.at + EVERY_S, policy=POLICY).rate
    assert slow.ssthresh < pacer.rate
    assert slow.ssthresh <= used(slow, 20, bears=20).rate <= pacer.rate


def test_it_does_not_run_away_from_what_is_sent() -> None:
    """Where few calls are made nobody knows what the provider bears."""
    pacer = begun(NOW, POLICY)
    for _ in range(400):
        pacer = after(pacer, Felt(sent=0.25, ok=0.25, took_s=0.5), NONE, now=pacer.at + EVERY_S, policy=POLICY)
    assert pacer.rate <= 2 * POLICY.start_rate


def test_a_route_that_is_well_bears_what_it_usually_has() -> None:
    """And more, step by step, as long as jobs are released; after a pause of an hour it starts low, and not with a flood."""
    pacer = begun(NOW, POLICY)
    assert 9.0 == unheard(pacer, 0, 9.0, now=NOW + EVERY_S, policy=POLICY).rate
    for _ in range(200):
        pacer = unheard(pacer, round(EVERY_S * pacer.rate), 0.0, now=pacer.at + EVERY_S, policy=POLICY)
    assert pacer.rate > 50
    for _ in range(4 * 3600):
        pacer = unheard(pacer, 0, 0.0, now=pacer.at + EVERY_S, policy=POLICY)
    assert 2 * POLICY.start_rate == pacer.rate


@pytest.mark.parametrize("state", ["closed", "suspect", "open", "half-open", "recovering"])
def test_what_the_breaker_allows(state: State) -> None:
    """Nothing while it is down or newly suspect; the floor in a lasting brown-out and where it flaps; else the pace."""
    pacer = Pacer(at=NOW, rate=30.0)
    rates = [pace_of(Breaker(state=state, since=NOW), pacer, NONE, now=NOW + s, policy=POLICY).rate for s in (1, PATIENCE_S)]
    assert {"closed": [30, 30], "recovering": [30, 30], "suspect": [0, 2], "open": [0, 0], "half-open": [0, 0]}[state] == rates
    flapping = replace(RECOVERING, flaps=FLAPPY, recovered_at=NOW)
    paces = [pace_of(flapping, pacer, NONE, now=NOW + after_s, policy=POLICY) for after_s in (1, FLAP_S)]
    assert [(2.0, "flapping"), (30.0, "ramp")] == [(pace.rate, pace.factor) for pace in paces]
    capped = pace_of(RECOVERING, pacer, NONE, now=NOW, policy=replace(POLICY, max_rate=7.0))
    assert (7.0, "own cap") == (capped.rate, capped.factor)
    assert 0 == pace_of(replace(RECOVERING, throttled_until=NOW + 1), pacer, NONE, now=NOW, policy=POLICY).rate


def test_the_pace_only_grows_on_a_provider_that_is_well() -> None:
    """Step by step."""
    paces = [used(begun(NOW, POLICY), s).rate for s in range(60)]
    assert all(before <= after_ for before, after_ in pairwise(paces))
