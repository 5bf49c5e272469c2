# SPDX-License-Identifier: Apache-2.0
"""The walk over many groups, against a sorted list that others change while it is read."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from itertools import count, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tideover.store import walk
from tideover.store.facts import GROUP, HEAD, Facet, Group, Member, packed_id
from tideover.store.walk import Place, Walk

FACETS = [Facet("a/m", f"t{n}", "deferrable", "outage") for n in range(12)]
GROUPS = [Group("default", n.to_bytes(GROUP), facet, 1) for n, facet in enumerate(FACETS)]


def member_of(group: Group, order: int, name: str) -> Member:
    return Member(group, group.id + order.to_bytes(HEAD - GROUP) + packed_id(name))


class Shelf:
    """Groups in memory. After each reading of a group others take away or add one, as the test says."""

    def __init__(self, jobs: Sequence[tuple[int, int, bool]], moves: Sequence[tuple[int, int, bool]]) -> None:
        self.names, self.moves = count(), iter(moves)
        self.groups: dict[bytes, list[bytes]] = {group.id: [] for group in GROUPS}
        self.steady: set[bytes] = set()
        for nth, order, stays in jobs:
            raw = self.add(nth, order)
            if stays:
                self.steady.add(raw)

    def add(self, nth: int, order: int) -> bytes:
        raw = member_of(GROUPS[nth], order, f"job{next(self.names)}").raw
        insort(self.groups[GROUPS[nth].id], raw)
        return raw

    def disturb(self) -> None:
        for nth, order, comes in islice(self.moves, 1):
            here = self.groups[GROUPS[nth].id]
            leaving = next((raw for raw in here if raw not in self.steady and raw[GROUP:HEAD] >= order.to_bytes(6)), None)
            if comes:
                self.add(nth, order)
            elif leaving is not None:
                here.remove(leaving)

    def read(self, places: Sequence[Place]) -> list[Member]:
        found: list[Member] = []
        for group, after, limit in places:
            here = self.groups[group.id]
            start = bisect_right(here, group.id + after) if after else 0
            found += [Member(group, raw) for raw in here[start : start + limit]]
            self.disturb()
        return found

    def walk(self, asked: int) -> Walk:
        return Walk(GROUPS, self.read([(group, b"", asked) for group in GROUPS]), asked, self.read)


JOBS = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 60), st.booleans()), max_size=80)


@given(JOBS, JOBS, st.integers(1, 9))
def test_what_stays_comes_once_and_in_order(
    jobs: list[tuple[int, int, bool]], moves: list[tuple[int, int, bool]], asked: int
) -> None:
    """Whatever others add and take away between two readings, a job that stays is neither missed nor repeated."""
    shelf = Shelf(jobs, moves)
    found = [member.raw for member in shelf.walk(asked)]
    keys = [raw[GROUP:] for raw in found]
    assert sorted(keys) == keys
    assert len(set(keys)) == len(keys)
    assert shelf.steady <= set(found)


@given(JOBS, st.integers(1, 9))
def test_undisturbed_it_is_the_sorted_list(jobs: list[tuple[int, int, bool]], asked: int) -> None:
    """All jobs of all groups, by order and id."""
    shelf = Shelf(jobs, [])
    expected = sorted((raw for group in shelf.groups.values() for raw in group), key=lambda raw: raw[GROUP:])
    assert expected == [member.raw for member in shelf.walk(asked)]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_it_reads_some_groups_at_a_time(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """No reading looks into more groups than is allowed, and little is read that is not handed out."""
    monkeypatch.setattr(walk, "AT_ONCE", most)
    shelf = Shelf([(n % 12, n, True) for n in range(1200)], [])
    asked: list[tuple[int, int]] = []

    def read(places: Sequence[Place]) -> list[Member]:
        found = shelf.read(places)
        asked.append((len(places), len(found)))
        return found

    walked = iter(Walk(GROUPS, shelf.read([(group, b"", 1) for group in GROUPS]), 1, read))
    assert list(range(300)) == [member.order for member in islice(walked, 300)]
    assert max(n for n, _ in asked) <= most
    assert sum(n for _, n in asked) <= 3 * 300
    assert 900 == len(list(walked))
