# SPDX-License-Identifier: Apache-2.0
"""Holding many jobs: the next are made ready while Redis holds those before, and no trouble on the way loses one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import redis

from tideover.store.backlog import HELD_AT_ONCE, Backlog
from tideover.store.client import FAILED, connect
from tideover.store.facts import HeldFacts
from tideover.store.keys import Keys
from tideover.store.scripts import source

if TYPE_CHECKING:
    from tests.conftest import WaitUntil
    from tests.store.conftest import House

QUEUE, WORKER = "default", "w1"
PARTS = 3
JOBS = PARTS * HELD_AT_ONCE - 1
NOBODY_LISTENS = "redis://127.0.0.1:1/0"


@pytest.fixture
def lone(valkey_url: str, keys: Keys) -> Iterator[Backlog]:
    """A backlog on a client with one connection, so that a connection that is not given back is missed."""
    client = redis.Redis.from_url(valkey_url, max_connections=1)
    client.script_load(source("hold-10"))
    yield Backlog(client, keys)
    client.close()


class CutWhenSending(redis.UnixDomainSocketConnection):
    """Loses the first script that it is to send."""

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]
        if cuts and b"EVALSHA" in b"".join(command):
            cuts.pop()
            self.disconnect()
            raise redis.ConnectionError("cut")


cuts: list[str] = []


def pausing(house: House, ids: Sequence[str], pause: Callable[[int], object]) -> Iterator[HeldFacts]:
    """Facts of these jobs; calls `pause` with the number of the part that begins, when the part before it was sent."""
    for nth, redis_id in enumerate(ids):
        if nth and nth % HELD_AT_ONCE == 0:
            pause(nth // HELD_AT_ONCE)
        yield house.facts(redis_id, order=nth)


def test_redis_holds_some_while_the_next_are_made_ready(house: House, lone: Backlog, wait_until: WaitUntil) -> None:
    ids = house.fetched(JOBS)
    seen: list[int] = []

    def see(part: int) -> None:
        wait_until(lambda: house.backlog.size(QUEUE) == part * HELD_AT_ONCE, within_s=60, description=f"part {part} is held")
        seen.append(part)

    assert [True] * JOBS == lone.hold(WORKER, QUEUE, pausing(house, ids, see))
    assert (list(range(1, PARTS)), ids) == (seen, house.held())


@pytest.mark.parametrize("before_the_answer", [True, False])
def test_a_lost_connection_loses_no_job(house: House, lone: Backlog, wait_until: WaitUntil, before_the_answer: bool) -> None:
    ids = house.fetched(JOBS)

    def cut(part: int) -> None:
        if before_the_answer:
            wait_until(lambda: house.backlog.size(QUEUE) == part * HELD_AT_ONCE, within_s=60, description="it is held")
        house.client.client_kill_filter(_type="normal", skipme=True)

    lone.hold(WORKER, QUEUE, pausing(house, ids, cut))
    assert (ids, 0) == (house.held(), house.client.scard(house.keys.acks(WORKER, QUEUE)))


def test_a_part_that_cannot_be_sent_is_sent_again(house: House, valkey_url: str) -> None:
    ids = house.fetched(JOBS)
    cuts.append("once")
    with redis.Redis.from_url(valkey_url, connection_class=CutWhenSending) as client:
        Backlog(client, house.keys).hold(WORKER, QUEUE, pausing(house, ids, lambda _: None))
    assert ([], ids) == (cuts, house.held())


def test_a_server_that_forgot_the_scripts_is_told_them_again(house: House, lone: Backlog) -> None:
    ids = house.fetched(JOBS)
    flushed = lone.hold(WORKER, QUEUE, pausing(house, ids, lambda _: house.client.script_flush()))
    assert ([True] * JOBS, ids) == (flushed, house.held())


def test_a_fault_between_two_parts_leaves_no_answer_unread(house: House, lone: Backlog) -> None:
    ids = house.fetched(JOBS)

    def fail(_: int) -> None:
        raise LookupError("no such tenant")

    with pytest.raises(LookupError):
        lone.hold(WORKER, QUEUE, pausing(house, ids, fail))
    assert [False] * HELD_AT_ONCE + [True] * (JOBS - HELD_AT_ONCE) == lone.hold(
        WORKER, QUEUE, pausing(house, ids, lambda _: None)
    )
    assert ids == house.held()


def test_each_part_shares_groups_by_itself(house: House, lone: Backlog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tideover.store.backlog.MOST_GROUPS", HELD_AT_ONCE // 2)
    ids = house.fetched(JOBS)
    jobs = (house.facts(redis_id, order=nth, tenant=f"tenant {nth}") for nth, redis_id in enumerate(ids))
    assert [True] * JOBS == lone.hold(WORKER, QUEUE, jobs)
    assert [f"tenant {nth}" for nth in range(JOBS)] == [job.tenant for job in house.backlog.browse(house.groups())]


def test_nothing_to_hold_asks_nobody(keys: Keys) -> None:
    nobody = Backlog(connect(NOBODY_LISTENS), keys)
    assert [] == nobody.hold(WORKER, QUEUE, iter(()))


def test_redis_that_is_gone_is_said_to_be(house: House, keys: Keys) -> None:
    with pytest.raises(FAILED):
        Backlog(connect(NOBODY_LISTENS), keys).hold(WORKER, QUEUE, [house.facts("r0")])
