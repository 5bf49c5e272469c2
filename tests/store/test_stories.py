# SPDX-License-Identifier: Apache-2.0
"""Stories: what was told is there again, in order; long ones lose their middle, never their sense."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tideover import clock
from tideover.store.stories import LONGEST, Line, day

if TYPE_CHECKING:
    import redis
    from tests.store.conftest import House


def line(n: int, event: str = "held", **facts: Any) -> Line:
    return Line("job", 1_000_000.0 + n, event, facts)


def told(house: House) -> bytes | None:
    found: Any = house.client.hget(house.keys.stories(day(clock.now())), "job")
    return found


def test_a_story_is_told_in_order(house: House) -> None:
    """Lines come back as they were told, by job, oldest first, whoever told them first."""
    house.stories.add([line(1, "enqueued"), Line("other", 5.0, "held", {})])
    house.stories.add([line(3, "released", by="a/m"), line(2, "held", reason="outage")])
    assert [line(1, "enqueued"), line(2, "held", reason="outage"), line(3, "released", by="a/m")] == house.stories.of("job")
    assert [] == house.stories.of("nobody")


def test_a_long_story_keeps_its_first_and_its_latest_lines(house: House) -> None:
    """How it began and how it stands now explain more than the middle."""
    for n in range(500):
        house.stories.add([line(n, detail="x" * 50)])
    lines = house.stories.of("job")
    assert (line(0, detail="x" * 50), line(499, detail="x" * 50)) == (lines[0], lines[-1])
    latest = lines[1:]
    assert [line(500 - len(latest) + n, detail="x" * 50) for n in range(len(latest))] == latest
    assert LONGEST / 3 < len(told(house) or b"") <= LONGEST


@pytest.mark.parametrize("sizes", [(5000,), (5000, 10), (10, 5000), (10, 5000, 10), (5000, 5000), (3000, 3000, 3000)])
def test_a_line_longer_than_a_story_is_kept_whole(house: House, sizes: tuple[int, ...]) -> None:
    """A job that was served by hundreds of calls has such a line; half a line could not be read again."""
    for n, size in enumerate(sizes):
        house.stories.add([line(n, served="x" * size)])
    lines = house.stories.of("job")
    assert line(0, served="x" * sizes[0]) == lines[0]
    assert line(len(sizes) - 1, served="x" * sizes[-1]) == lines[-1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=30))
def test_whatever_the_lengths_a_story_can_be_read(house: House, client: redis.Redis, sizes: list[int]) -> None:
    """First and latest line are whole, those between have no gap after the cut, and the rest is within the cap."""
    client.flushdb()
    for n, size in enumerate(sizes):
        house.stories.add([line(n, d="x" * size)])
    numbers = [round(found.at - 1_000_000) for found in house.stories.of("job")]
    assert (0, len(sizes) - 1) == (numbers[0], numbers[-1])
    assert list(range(len(sizes) - len(numbers) + 1, len(sizes))) == numbers[1:]
    assert len(told(house) or b"") <= max(LONGEST, sizes[0] + sizes[-1] + LONGEST // 2 + 100)
