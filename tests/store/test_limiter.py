# SPDX-License-Identifier: Apache-2.0
"""The limits of a route, over all processes: room comes free evenly, and tokens are counted as calls tell them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tideover.store.limiter import FIRST_TOKENS, Limiter

if TYPE_CHECKING:
    from tests.store.conftest import House


@pytest.fixture
def limiter(house: House) -> Limiter:
    return Limiter(house.client, house.keys)


def waits(
    limiter: Limiter, n: int, *, requests: float | None = None, tokens: float | None = None, most_s: float = 1e6
) -> list[int]:
    """How long each of `n` calls has to wait, in seconds; -1: none comes free soon enough."""
    found = [limiter.allow("a", requests, tokens, most_s) for _ in range(n)]
    return [-1 if one is None else round(one[0], -1) for one in found]


def test_calls_go_out_evenly(limiter: Limiter, house: House) -> None:
    """Those of another process too; another route has its own room."""
    assert [0, 10, 20] == waits(limiter, 3, requests=6)
    assert [30] == waits(Limiter(house.client, house.keys), 1, requests=6)
    assert (0.0, FIRST_TOKENS) == limiter.allow("b", 6, None, 0.0)


def test_a_second_s_worth_may_go_at_once(limiter: Limiter) -> None:
    """The limit is per minute, so that a few calls at one instant need not wait."""
    assert [0] * 100 == waits(limiter, 100, requests=6000)


def test_who_is_turned_away_takes_no_room(limiter: Limiter) -> None:
    """However often it asks."""
    assert [0, 10, -1, -1, -1] == waits(limiter, 5, requests=6, most_s=15)
    assert [20] == waits(limiter, 1, requests=6)


def test_tokens_are_set_aside_and_set_right(limiter: Limiter) -> None:
    """By what calls take on average; by a guess while none has told."""
    a_second_s = FIRST_TOKENS / 50
    assert [0, 50] == waits(limiter, 2, tokens=a_second_s * 60)
    limiter.took("a", 2 * (300 - FIRST_TOKENS), 2, 600)
    assert [30] == waits(limiter, 1, tokens=a_second_s * 60)
    found = limiter.allow("a", None, 600, 1e6)
    assert found is not None
    assert 300 == found[1]
    limiter.took("a", 0, 20, 20 * 500)
    again = limiter.allow("a", None, 600, 1e6)
    assert again is not None
    assert 400 == again[1]


def test_the_stricter_limit_counts(limiter: Limiter) -> None:
    """Of requests and tokens."""
    assert [0, 60] == waits(limiter, 2, requests=1, tokens=1e9)
    limiter.took("a", 0, 0, 0)
    assert [120] == waits(limiter, 1, requests=1, tokens=1e9)


def test_a_huge_call_holds_nobody_up_for_longer_than_a_minute(limiter: Limiter) -> None:
    """Nor does what is told of a route without a limit leave anything behind."""
    assert [0] == waits(limiter, 1, tokens=6000)
    limiter.took("a", 10**12, 1, 10**12)
    assert [60] == waits(limiter, 1, tokens=6000)
    limiter.took("unlimited", 5, 1, 5)
    assert not limiter.scripts.client.exists(limiter.keys.limiter("unlimited"))
