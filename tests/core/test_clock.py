# SPDX-License-Identifier: Apache-2.0
"""A process goes by Redis' clock, as well as it knows it."""

from __future__ import annotations

import pytest

from tideover import clock

REDIS = 1_800_000_000.0
NEAR_S = 0.05


def hear(redis_now: float, *, took_s: float = 0.0) -> None:
    """An answer that took so long, and has just come."""
    clock.follow(redis_now, clock.monotonic() - took_s)


def test_the_time_is_that_of_redis() -> None:
    """Whatever this machine's clock says."""
    hear(REDIS)
    assert pytest.approx(REDIS, abs=NEAR_S) == clock.now()


def test_a_slow_answer_replaces_no_better_one() -> None:
    """It was read in the middle of its way, or anywhere else on it: here, just before it came."""
    hear(REDIS)
    hear(REDIS, took_s=2.0)
    assert pytest.approx(REDIS, abs=NEAR_S) == clock.now()


def test_a_first_answer_will_do_until_a_better_one_comes() -> None:
    """Half the time that it took is the most it can be wrong by."""
    hear(REDIS, took_s=2.0)
    assert pytest.approx(REDIS + 1.0, abs=NEAR_S) == clock.now()
    hear(REDIS)
    assert pytest.approx(REDIS, abs=NEAR_S) == clock.now()


@pytest.mark.parametrize("by_s", [3600.0, -3600.0])
def test_a_clock_that_was_set_is_followed(by_s: float) -> None:
    """Even by a slow answer: the two cannot both be true."""
    hear(REDIS)
    hear(REDIS + by_s, took_s=0.2)
    assert pytest.approx(REDIS + by_s + 0.1, abs=NEAR_S) == clock.now()
