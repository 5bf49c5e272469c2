# SPDX-License-Identifier: Apache-2.0
"""Stories: what was told is there again, in order; long ones lose their middle, never their sense."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tideover import clock
from tideover.store.stories import LONGEST, Line, day, told_by

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


def test_a_day_has_room_for_so_many_stories(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage of millions of jobs must not fill Redis with tales; those that have begun go on."""
    monkeypatch.setattr("tideover.store.stories.MOST", 2)
    house.stories.add([Line("a", 1.0, "held", {}), Line("a", 2.0, "released", {}), Line("b", 3.0, "held", {})])
    house.stories.add([Line("c", 4.0, "held", {}), Line("b", 5.0, "released", {}), Line("c", 6.0, "released", {})])
    assert {"a": ["held", "released"], "b": ["held", "released"]} == {
        job: [told.event for told in lines] for job, lines in house.stories.everything().items()
    }
    assert [] == house.stories.of("c")


def test_what_the_facts_of_a_held_job_tell(house: House) -> None:
    """Why it is held, and at its first hold when it was sent, too: nothing needs to be written down for that."""
    facts = house.facts("r0", sent_ms=900, held_ms=1000, wait_key="a/m|b/m", generation=3, detail="529")
    held = {"reason": "outage", "waits_for": ("a/m", "b/m"), "generation": 3, "detail": "529"}
    sent = Line("r0", 0.9, "enqueued", {"task": "t", "criticality": "deferrable"})
    assert [sent, Line("r0", 1.0, "held", held)] == told_by(facts)
    again = house.facts("r0", held_ms=5000, held_before_ms=100, wait_key="", reason="review")
    (line,) = told_by(again)
    assert ("held", 5.0, ()) == (line.event, line.at, line.facts["waits_for"])


def test_a_story_spans_days(house: House) -> None:
    """What was told yesterday and what is told today is one story; what is older than it is kept for is gone by itself."""
    told_then = [line(1, "enqueued"), line(2)]
    house.stories.add(told_then)
    (today,) = house.client.keys(house.keys.stories("*"))
    house.client.rename(today, house.keys.stories(day(clock.now() - 86_400)))
    house.stories.add([line(3, "released")])
    assert [*told_then, line(3, "released")] == house.stories.of("job") == house.stories.everything()["job"]
    assert {"job"} == house.stories.jobs_like("jo")
