# SPDX-License-Identifier: Apache-2.0
"""Breakers as all processes share them: what is counted, and who may move them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import redis

from tideover.core.breaker import CLOSED, Breaker, IllegalTransition, Transition, Window
from tideover.store.breakers import breaker_of

if TYPE_CHECKING:
    from tests.conftest import WaitUntil
    from tests.store.conftest import House

KEY = "a/m"
WINDOW_S = 10.0


def report(house: House, **counted: Any) -> Window:
    return house.breakers.report(KEY, WINDOW_S, **counted).window


def make_older(house: House, seconds: int) -> None:
    """Shifts all that was counted into the past."""
    window = house.client.hgetall(house.keys.window(KEY))
    house.client.delete(house.keys.window(KEY))
    for field, calls in window.items():
        second, _, kind = field.decode().partition(":")
        house.client.hset(house.keys.window(KEY), f"{int(second) - seconds}:{kind}", calls)


def test_calls_add_up_whoever_reports_them(house: House) -> None:
    """Reports of all processes are one window; reading alone counts nothing."""
    report(house, generation=0, ok=3, failed=1)
    report(house, generation=0, failed=2, why="529 overloaded_error")
    assert Window(3, 3) == report(house) == report(house)
    assert "529 overloaded_error" == house.breaker().why


def test_only_the_current_generation_counts(house: House) -> None:
    """A call that began before the breaker opened says nothing of now, and one from the future is nobody's."""
    house.move("open", "half-open", "recovering")
    assert Window(0, 0) == report(house, generation=0, failed=9, why="old news")
    assert Window(0, 0) == report(house, generation=2, failed=9)
    assert Window(0, 1) == report(house, generation=1, failed=1, why="new")
    assert "new" == house.breaker().why


def test_calls_age_out_of_the_window(house: House) -> None:
    """What is older than the window counts no more and is not kept."""
    report(house, generation=0, ok=1, failed=2)
    make_older(house, 5)
    assert Window(1, 2) == report(house)
    make_older(house, 5)
    assert Window(0, 4) == report(house, generation=0, failed=4)
    assert 1 == house.client.hlen(house.keys.window(KEY))


def test_each_change_of_state_starts_a_new_window(house: House) -> None:
    """What opened a breaker must not open it again once it recovers."""
    report(house, generation=0, failed=9)
    house.move("open", "half-open", "recovering")
    assert Window(0, 0) == report(house)


def test_of_many_who_saw_the_same_one_moves_it(house: House, valkey_url: str) -> None:
    """State and generation as seen are the fence, so an opening is one opening."""

    def move(_: int) -> bool:
        with redis.Redis.from_url(valkey_url) as own:
            return type(house)(own, house.keys).breakers.transition(KEY, CLOSED, Transition("open", "why"))

    with ThreadPoolExecutor(8) as pool:
        assert [False] * 7 + [True] == sorted(pool.map(move, range(8)))
    assert ("open", 1) == (house.breaker().state, house.breaker().generation)
    assert {"openings": 1} == house.registry.counters()


@pytest.mark.parametrize("seen", [Breaker(state="closed", generation=2), Breaker(state="recovering", generation=0)])
def test_who_saw_it_elsewhere_moves_nothing(house: House, seen: Breaker) -> None:
    """Neither another generation nor another state will do."""
    assert not house.breakers.transition(KEY, seen, Transition("open", "why"))
    assert house.breaker() == CLOSED


def test_an_illegal_change_does_not_reach_redis(house: House) -> None:
    """The table of `core.breaker` is the only one."""
    with pytest.raises(IllegalTransition, match="closed -> recovering"):
        house.breakers.transition(KEY, CLOSED, Transition("recovering", "why"))


def test_failed_probes_are_counted_until_the_next_opening(house: House) -> None:
    """The pause between probes grows with them; it starts anew when a route that had recovered fails again."""
    breaker = house.move("open", "half-open", "open", "half-open", "open")
    assert (2, 1) == (breaker.probes_failed, breaker.generation)
    again = house.move("half-open", "recovering", "open")
    assert (0, 2) == (again.probes_failed, again.generation)
    assert breaker.opened_at <= again.opened_at == again.since


def test_quiet_that_a_provider_asked_for_is_never_shortened(house: House) -> None:
    """The longest pause stands, whatever generation the call was of; nobody who did not ask moves it."""
    now = house.breakers.report(KEY, WINDOW_S, generation=7, quiet_s=30).now
    house.breakers.report(KEY, WINDOW_S, quiet_s=2)
    house.breakers.report(KEY, WINDOW_S)
    assert now + 30 == pytest.approx(house.breaker().throttled_until, abs=0.01)


def test_news_name_the_breaker_that_changed(house: House, wait_until: WaitUntil) -> None:
    """Who follows the breakers hears of each transition and each longer quiet, and of nothing else."""
    news = house.breakers.listen()
    heard: list[str] = []

    def listen(n: int) -> bool:
        message = news.get_message(ignore_subscribe_messages=True)
        if message is not None:
            heard.append(message["data"].decode())
        return len(heard) >= n

    report(house, generation=0, failed=1)
    house.move("open")
    house.breakers.report("b/m", WINDOW_S, quiet_s=5)
    house.breakers.report("b/m", WINDOW_S, quiet_s=1)
    house.registry.set_bypass({}, None)
    wait_until(lambda: listen(3), within_s=5, description="three news")
    news.close()
    assert ["a/m", "b/m", "bypass"] == heard


def test_a_breaker_is_read_as_it_was_written(house: House) -> None:
    """All readers see the same; one that nobody ever reported is closed."""
    breaker = house.move("open")
    assert {KEY: breaker, "never/seen": CLOSED} == house.breakers.read([KEY, "never/seen"])
    assert breaker == house.breakers.report(KEY, WINDOW_S).breaker
    assert [KEY] == house.breakers.keys_known()
    assert CLOSED == breaker_of({})
