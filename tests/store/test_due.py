# SPDX-License-Identifier: Apache-2.0
"""Which groups have a job whose time has come: always the right ones, and without a look into each."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from tideover.store.due import Due

if TYPE_CHECKING:
    from tests.store.conftest import House

QUEUES = ("default", "other")
LAST = 2**48 - 1


def looked_into(house: House) -> int:
    """How many groups were looked into since the last question."""
    told = house.client.info("commandstats").get("cmdstat_zrangebylex", {"calls": 0})["calls"]
    house.client.config_resetstat()
    return int(told)


def put(house: House, redis_id: str, queue: str, order: int, tag: str) -> None:
    """One more held job; each tag is a group."""
    house.accept(redis_id, queue=queue)
    house.backlog.fetch("w", queue, 1)
    assert [True] == house.hold([redis_id], worker="w", queue=queue, order=order, tag=tag)


def truth(house: House, until: int) -> dict[str, set[str]]:
    """The tags of groups with a job up to this order, by a look into each."""
    found = {}
    for queue in QUEUES:
        groups = house.groups(queue)
        heads = house.backlog.heads(groups, 1, until=until) if groups else []
        found[queue] = {member.group.facet.tag for member in heads}
    return {queue: tags for queue, tags in found.items() if tags}


def told(due: Due, until: int) -> dict[str, set[str]]:
    return {queue: {group.facet.tag for group in groups} for queue, groups in due.groups(QUEUES, until).items()}


@pytest.mark.parametrize("seed", range(3))
def test_it_names_the_groups_that_are_due(house: House, seed: int) -> None:
    """Whatever is held, released and ended between two looks, by whomever; and who takes over knows it, too."""
    chance, due, known, n = Random(seed), Due(house.client, house.keys), list[tuple[str, str]](), 0
    for until in range(0, 1200, 20):
        for _ in range(chance.choice((0, 0, 1, 2, 5))):
            queue = chance.choice(QUEUES)
            order = chance.choice((max(0, until - 5), until + chance.randrange(400)))
            put(house, f"r{n}", queue, order, f"t{chance.randrange(6)}")
            known.append((queue, f"r{n}"))
            n += 1
        for _ in range(chance.choice((0, 0, 1, 3)) if known else 0):
            queue, redis_id = known.pop(chance.randrange(len(known))) if known else ("default", "none")
            if chance.random() < 0.5:
                house.release_by_hand(redis_id, queue=queue)
                house.backlog.fetch("w", queue, 500)
            else:
                house.backlog.expire(queue, house.backlog.facts_of(house.backlog.page(house.groups(queue), 1)))
        if chance.random() < 0.1:
            due = Due(house.client, house.keys)
        assert truth(house, until) == told(due, until)


def test_where_nothing_is_due_nothing_is_looked_into(house: House) -> None:
    """Once they are known, groups are looked into when their time comes, or when a job more is held in them."""
    for i in range(30):
        put(house, f"r{i}", "default", 1000 + i, f"t{i}")
    due = Due(house.client, house.keys)
    assert {} == told(due, 999)
    looked_into(house)
    assert ({}, 0) == (told(due, 999), looked_into(house))
    put(house, "more", "default", 500, "t7")
    assert ({}, 1) == (told(due, 499), looked_into(house))
    assert ({"default": {"t7"}}, 1) == (told(due, 500), looked_into(house))
    house.release_by_hand("r3", "r4")
    assert ({"default": {"t0", "t1", "t7"}}, 3) == (told(due, 1001), looked_into(house))
    assert {"t3", "t4"}.isdisjoint(told(due, LAST)["default"])


def test_a_job_held_and_one_released_in_one_group_are_seen(house: House) -> None:
    """The number of its jobs is the same, and its first job is another."""
    put(house, "r0", "default", 1000, "t")
    due = Due(house.client, house.keys)
    assert {} == told(due, 10)
    house.release_by_hand("r0")
    house.backlog.fetch("w", "default", 1)
    put(house, "r1", "default", 5, "t")
    assert {"default": {"t"}} == told(due, 10)
