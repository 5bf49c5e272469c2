# SPDX-License-Identifier: Apache-2.0
"""The account can fail, which is what makes it worth reading; and it is right while everything moves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TYPE_CHECKING

import pytest
import redis

if TYPE_CHECKING:
    from tests.store.conftest import House

THIEVES: dict[str, Callable[[House], object]] = {
    "queue": lambda house: house.client.lrem(house.keys.queue("default"), 1, "r3"),
    "delay queue": lambda house: house.client.lrem(house.keys.queue("default.DQ"), 1, "delayed"),
    "acks": lambda house: house.client.srem(house.keys.acks("w1", "default"), "r2"),
    "what is held": lambda house: house.client.zrem(house.keys.held("default"), *house.members("r0")),
    "a whole queue": lambda house: house.client.delete(house.keys.queue("default")),
}


@pytest.mark.parametrize("place", THIEVES)
def test_an_id_deleted_by_hand_is_lost(house: House, place: str) -> None:
    """Nothing but the sum of the places can say so, and it does."""
    house.accepted(4)
    house.accept("delayed", queue="default.DQ")
    house.backlog.fetch("w1", "default", 3)
    house.hold(["r0", "r1"])
    assert 0 == house.ledger.read().lost
    THIEVES[place](house)
    assert 1 == house.ledger.read().lost


def test_strangers_are_not_lost_before_they_are_fetched(house: House) -> None:
    """Queued jobs of a producer without tideover are more than was accepted, and are shown as such."""
    house.accepted(1)
    house.put("x")
    account = house.ledger.read()
    assert (2, 0, 1) == (account.queued, account.lost, account.not_adopted)


def test_an_empty_namespace_has_an_empty_account(house: House) -> None:
    """Before the first job all is zero."""
    account = house.ledger.read()
    assert (0, 0, 0, 0) == (account.accepted, account.queued, account.running, account.held)
    assert 0 == account.difference


def churn(house: House, me: str, stop: threading.Event) -> int:
    """A worker that comes, takes jobs through every move, and goes, again and again."""
    for n in count():
        worker, job = f"{me}-{n}", f"{me}-r{n}"
        if stop.is_set():
            return n
        queue = "default" if n % 2 else f"queue-{n % 10}"
        house.accept(job, queue=queue)
        house.backlog.fetch(worker, queue, 1)
        if house.hold([job], worker, queue, wait_key=f"{me}/{n % 7}") == [True]:
            assert [job] == house.release_by_hand(job, queue=queue)
        for taken in house.backlog.fetch(worker, queue, 1)[0]:
            house.settle(taken.redis_id, worker=worker, queue=queue)
        house.client.zadd(house.keys.heartbeats, {worker: 1})
        house.backlog.recover(worker, queue, 15)
        house.registry.remove_worker(worker)
    return 0


def test_the_account_is_right_while_everything_moves(house: House, valkey_url: str) -> None:
    """Jobs, workers, queues and groups come and go under the reader; not one reading may find a job lost or added."""
    stop = threading.Event()

    def mover(me: int) -> int:
        with redis.Redis.from_url(valkey_url) as own:
            return churn(type(house)(own, house.keys), f"m{me}", stop)

    with ThreadPoolExecutor(3) as pool:
        movers = [pool.submit(mover, me) for me in range(3)]
        try:
            differences = [house.ledger.read().difference for _ in range(1500)]
        finally:
            stop.set()
    assert all(mover.result() > 0 for mover in movers)
    assert {0} == set(differences)
