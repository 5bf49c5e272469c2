# SPDX-License-Identifier: Apache-2.0
"""What is noted of jobs that a worker without tideover ended is forgotten; what is noted of any other stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tideover.store.orphans import Orphans

if TYPE_CHECKING:
    from tests.store.conftest import House

QUEUES = ["default"]


@pytest.fixture
def orphans(house: House) -> Orphans:
    return Orphans(house.client, house.keys)


def notes(house: House) -> dict[str, set[bytes]]:
    k = house.keys
    return {
        "marks": set(house.client.hkeys(k.marks("default"))),
        "places": set(house.client.hkeys(k.places)),
        "adopted": set(house.client.smembers(k.adopted)),
    }


def end_elsewhere(house: House, *redis_ids: str) -> None:
    """As dramatiq's own acknowledgement does it."""
    house.client.srem(house.keys.acks("stock", "default"), *redis_ids)
    house.client.hdel(house.keys.msgs("default"), *redis_ids)


def test_notes_of_jobs_without_a_body_are_forgotten(house: House, orphans: Orphans) -> None:
    """Marks of released jobs, places of those with another id, and adoptions."""
    for i in range(4):
        house.put(f"r{i}")
    house.backlog.fetch("w1", "default", 4)
    house.ledger.adopt("w1", "default", [f"r{i}" for i in range(4)])
    for i in range(4):
        house.hold([f"r{i}"], job_id=f"job{i}")
    house.release_by_hand("r0", "r1", "r2")
    house.backlog.fetch("stock", "default", 2)
    fetched = sorted(i for i in ("r0", "r1", "r2") if house.backlog.has("stock", "default", i))
    whole = notes(house)
    assert (3, 4, 4) == tuple(len(names) for names in whole.values())
    end_elsewhere(house, *fetched)
    assert 6 == sum(orphans.forget_notes(QUEUES))
    gone = {name.encode() for i in fetched for name in (i, i.replace("r", "job"))}
    assert {name: names - gone for name, names in whole.items()} == notes(house)
    assert 0 == sum(orphans.forget_notes(QUEUES))


def test_a_note_of_a_job_that_went_on_stays(house: House, orphans: Orphans) -> None:
    """A retry has moved the job since its place was read."""
    house.accept("r0")
    run = orphans.scripts.run
    keys = [house.keys.places, house.keys.msgs("default.DQ")]
    house.client.hset(house.keys.places, "job0", "default\tr0")
    assert 0 == run("tidy-n", keys, ["hash", "job0", "default.DQ\told", "old"])
    assert 0 == sum(orphans.forget_notes(QUEUES))
    house.client.hset(house.keys.places, "job0", "default.DQ\told")
    assert 1 == sum(orphans.forget_notes(QUEUES))


def test_a_tenants_number_is_corrected_only_while_it_stands(house: House, orphans: Orphans) -> None:
    """A job that came or went while they were counted makes the count worthless."""
    house.accept("r0", "r1", tenant="acme")
    assert not orphans.recount("acme", 3, 1)
    assert {"acme": 2} == orphans.tenants()
    assert orphans.recount("acme", 2, 1)
    assert {"acme": 1} == orphans.tenants()
    assert orphans.recount("acme", 1, 0)
    assert {} == orphans.tenants()


def test_it_knows_what_is_left_to_do(house: House, orphans: Orphans) -> None:
    """By two counters, so that any process may go on with it."""
    assert 0 == orphans.ended()
    house.registry.end_elsewhere(0, 3)
    assert 3 == orphans.ended()
    orphans.tidied(3)
    assert 0 == orphans.ended()
