# SPDX-License-Identifier: Apache-2.0
"""The pace as all processes share it: what they tell adds up, one leader makes the word, and releases wait for live calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tideover import clock
from tideover.core.breaker import Breaker
from tideover.core.pacing import Felt, Limit, Pace, Pacer, begun
from tideover.core.policy import PacePolicy
from tideover.core.progress import begun as begun_with
from tideover.core.route import Permit
from tideover.store.backlog import Allowance
from tideover.store.paces import Paces, Standing

if TYPE_CHECKING:
    from tests.store.conftest import House

KEY = "a/m"


@pytest.fixture
def paces(house: House) -> Paces:
    return Paces(house.client, house.keys)


def publish(paces: Paces, seen: Standing, pacer: Pacer, pace: Pace) -> bool:
    return paces.publish(KEY, seen, pacer, pace, begun_with(7, 1.0), Breaker(recovered_at=5.0, braked_at=6.0))


def test_what_processes_tell_adds_up(paces: Paces) -> None:
    """Nothing known before the first word; the latest limit counts, and the longest quiet."""
    assert (Felt(), {}, None) == (paces.read(KEY, 0.0).felt, paces.read(KEY, 0.0).limits, paces.read(KEY, 0.0).pacer)
    paces.feel(KEY, Felt(sent=3, ok=1, took_s=2.5, quiet_s=60), live=0, limits={"requests": Limit(20.0, 7.0)})
    paces.feel(KEY, Felt(sent=2, ok=1, lost=2, throttled=1, took_s=1, quiet_s=1), live=0, limits={})
    found = paces.read(KEY, clock.now())
    assert (5, 2, 2, 1, 3.5) == (found.felt.sent, found.felt.ok, found.felt.lost, found.felt.throttled, found.felt.took_s)
    assert {"requests": Limit(20.0, 7.0)} == found.limits
    assert 58 < found.felt.quiet_s <= 61


def test_the_next_leader_goes_on_where_the_last_one_stopped(paces: Paces, house: House) -> None:
    """What was heard is not heard again; what was told meanwhile is news."""
    paces.feel(KEY, Felt(sent=3, ok=3, took_s=6), live=0, limits={})
    pacer = begun(100.0, PacePolicy())
    assert publish(paces, paces.read(KEY, 0.0), pacer, Pace(2.0, "ramp"))
    paces.feel(KEY, Felt(sent=1, lost=1), live=0, limits={})
    found = Paces(house.client, house.keys).read(KEY, clock.now())
    assert (pacer, 5.0, 6.0, "ramp") == (found.pacer, found.recovered_at, found.braked_at, found.factor)
    assert begun_with(7, 1.0) == found.progress
    assert Felt(sent=1, lost=1) == found.news


def test_of_two_leaders_one_is_heard(paces: Paces, house: House) -> None:
    """One that stood still for longer than its lease does not bring back an old pace."""
    late = paces.read(KEY, 0.0)
    assert publish(paces, late, begun(1.0, PacePolicy()), Pace(2.0, "ramp"))
    assert not publish(paces, late, begun(1.0, PacePolicy()), Pace(99.0, "congestion"))
    breaker = house.breakers.read([KEY])[KEY]
    assert (2.0, "ramp") == (breaker.pace, breaker.limited_by)
    assert clock.now() - 5 < breaker.paced_at <= clock.now() + 1


def test_releases_wait_for_live_calls(paces: Paces, house: House) -> None:
    """What no release has paid for is taken out of the bucket; but never more than ten seconds of the pace."""
    house.holding(5)
    assert publish(paces, paces.read(KEY, 0.0), begun(1.0, PacePolicy()), Pace(1.0, "ramp"))
    paces.feel(KEY, Felt(sent=4), live=4, limits={})
    assert [] == house.release(rate=0.001, burst=100)
    paces.feel(KEY, Felt(sent=1000), live=1000, limits={})
    assert [] == house.release(rate=0.001, burst=100)
    assert -10.1 < float(house.client.hget(house.keys.bucket(KEY), "tokens") or 0) < -9


def test_a_live_call_takes_its_turn_before_every_release(paces: Paces, house: House) -> None:
    """It waits as long as the pace takes, two seconds at the most, and what it borrows no release gets."""
    house.holding(5)
    assert publish(paces, paces.read(KEY, 0.0), begun(1.0, PacePolicy()), Pace(1.0, "ramp"))
    waits = [paces.turn(KEY, 2.0, PacePolicy()) for _ in range(4)]
    assert [0.0, True, True, None] == [waits[0], 0.5 < (waits[1] or 0) <= 1, 1.5 < (waits[2] or 0) <= 2, waits[3]]
    assert [] == house.release(rate=1.0, burst=100)


def test_a_turn_waits_until_a_quiet_is_over(paces: Paces) -> None:
    """If that is soon."""
    assert publish(paces, paces.read(KEY, 0.0), begun(1.0, PacePolicy()), Pace(0.0, "quiet"))
    paces.feel(KEY, Felt(throttled=1, quiet_s=1.5), live=0, limits={})
    assert 1.0 < (paces.turn(KEY, 2.0, PacePolicy(start_rate=2)) or 0) <= 1.5
    paces.feel(KEY, Felt(throttled=1, quiet_s=30), live=0, limits={})
    assert 0.0 == paces.read(KEY, 0.0).refused_at
    assert paces.turn(KEY, 2.0, PacePolicy(start_rate=2)) is None
    assert clock.now() - 5 < paces.read(KEY, 0.0).refused_at <= clock.now() + 1


def test_a_job_that_makes_many_calls_costs_as_many(paces: Paces, house: House) -> None:
    """Five of a bucket of ten let two jobs go; the third waits."""
    house.holding(5)
    house.client.hset(house.keys.bucket(KEY), mapping={"tokens": "10", "at": "0"})
    assert ["r0", "r1"] == house.release(rate=0.001, burst=10, calls_each=5.0)
    assert [] == house.release(rate=0.001, burst=10, calls_each=5.0)


def test_held_critical_jobs_borrow_as_live_ones_do(paces: Paces, house: House) -> None:
    """Else those that come later would go before them."""
    house.holding(5)
    house.client.hset(house.keys.bucket(KEY), mapping={"tokens": "-1", "at": str(clock.now() + 60)})
    assert [] == house.release(rate=1.0, burst=1)
    assert ["r0"] == house.release(rate=1.0, burst=1, borrow=2.0)
    assert [] == house.release(rate=1.0, burst=1, borrow=2.0)


def test_a_release_says_when_the_workers_have_no_room(house: House) -> None:
    """The pace would have let three go."""
    house.holding(5)
    house.client.hset(house.keys.bucket(KEY), mapping={"tokens": "3", "at": "0"})
    allowed = Allowance(key=KEY, generation=None, rate=0.001, burst=9.0, calls_each=1.0, most_queued=2)
    released = house.backlog.release("default", [member.raw for member in house.plan()], Permit(KEY, 0), allowed)
    assert (2, True) == (len(released.jobs), released.crowded)


def test_what_operators_say_is_kept_until_it_is_taken_back(paces: Paces) -> None:
    """Each for its own breaker."""
    paces.order(KEY, {"max_rate": 1.0})
    paces.order("*", {"max_rate": 0.0})
    assert {KEY: {"max_rate": 1.0}, "*": {"max_rate": 0.0}} == paces.orders()
    assert [True, False] == [paces.countermand("*"), paces.countermand("*")]
    assert {KEY: {"max_rate": 1.0}} == paces.orders()
