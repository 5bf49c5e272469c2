# SPDX-License-Identifier: Apache-2.0
"""What each move promises, one promise a test. `test_model.py` checks that together they keep every job."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import redis

from tideover.core.breaker import State
from tideover.core.job import ENDS, End
from tideover.store.backlog import HeldSet

if TYPE_CHECKING:
    from tests.store.conftest import House


def redis_time(client: redis.Redis) -> float:
    seconds, micros = client.time()
    return float(seconds + micros / 1e6)


# accept, fetch, settle, hand over


def test_accepting_again_changes_nothing(house: House) -> None:
    """A send that is repeated after a lost reply makes one job."""
    for _ in range(2):
        house.ledger.accept("default", "r0", b"body")
    assert house.queued() == ["r0"]
    assert house.ledger.read().accepted == 1


def test_fetching_is_a_sign_of_life(house: House) -> None:
    """A worker that fetches is alive by Redis' clock, even where nothing is queued."""
    before = redis_time(house.client)
    assert house.backlog.fetch("w1", "default", 5) == ([], [])
    assert before - 0.001 <= house.registry.heartbeats()["w1"] <= redis_time(house.client)


def test_a_job_without_a_body_is_reported_and_not_kept(house: House) -> None:
    """Its id is named, so that somebody can look; it does not stay with the worker for ever, and the account misses it."""
    house.accepted(2)
    house.client.hdel(house.keys.msgs("default"), "r0")
    jobs, missing = house.backlog.fetch("w1", "default", 5)
    assert (["r1"], ["r0"]) == ([job.redis_id for job in jobs], missing)
    assert house.ledger.read().lost == 1


@pytest.mark.parametrize("end", ENDS)
def test_settling_ends_a_job_once(house: House, end: End) -> None:
    """One line in the account, no body left behind, and a repetition is told that it came late."""
    house.fetched(1)
    assert [True, False] == [house.settle("r0", end), house.settle("r0", end)]
    account = house.ledger.read()
    assert {end: 1} == {name: n for name, n in account.ends.items() if n}
    assert set() == house.bodies()


def test_what_failed_or_expired_can_be_read_afterwards(house: House) -> None:
    """It is kept as dramatiq keeps dead letters, so that its tools find it; what went well is not kept."""
    house.fetched(3)
    for redis_id, end in (("r0", "failed"), ("r1", "expired"), ("r2", "succeeded")):
        house.settle(redis_id, end)
    assert {b"r0", b"r1"} == set(house.client.zrange(house.keys.dead("default"), 0, -1))
    assert b"body of r1" == house.client.hget(house.keys.dead_msgs("default"), "r1")


def test_handing_over_twice_makes_one_successor(house: House) -> None:
    """A retry repeated after a lost reply is one retry: one job before, one job after."""
    house.fetched(1)
    move: Any = ("w1", ("default", "r0"), ("default.DQ", "r0-again"), b"retry", "job-r0")
    assert [True, True] == [house.ledger.hand_over(*move), house.ledger.hand_over(*move)]
    assert ["r0-again"] == house.queued("default.DQ")
    assert ("default.DQ", "r0-again") == house.backlog.place("job-r0")
    account = house.ledger.read()
    assert (1, 1, 1) == (account.accepted, account.queued, account.queues["default"].delayed)


def test_a_delayed_job_is_counted_once(house: House) -> None:
    """dramatiq keeps delayed jobs in a list of their own; it belongs to its queue and is no queue itself."""
    house.ledger.accept("default.DQ", "r0", b"body")
    account = house.ledger.read()
    assert {"default"} == set(account.queues)
    assert (1, 0, 0) == (account.queued, account.lost, account.not_adopted)


def test_a_job_of_a_queue_that_only_strangers_send_to_is_no_loss(house: House) -> None:
    """It is in the account from its first fetch, and its queue is, too."""
    house.client.hset(house.keys.msgs("reports"), "x", b"body")
    house.client.rpush(house.keys.queue("reports"), "x")
    house.backlog.fetch("w1", "reports", 1)
    assert 1 == house.ledger.adopt("w1", "reports", ["x"])
    account = house.ledger.read()
    assert (1, 1, 0, 0) == (account.accepted, account.running, account.lost, account.not_adopted)


# hold


def test_holding_moves_an_id_once_and_leaves_the_body(house: House) -> None:
    """The body stays where dramatiq keeps it: a hold repeated after a lost reply finds nothing to move."""
    house.fetched(1)
    assert [[True], [False]] == [house.hold(["r0"]), house.hold(["r0"])]
    assert {"r0"} == house.bodies()
    assert 1 == house.client.zcard(house.keys.held("default", "a/m"))
    assert 1 == house.ledger.read().held


def test_held_jobs_go_in_the_order_of_their_deadlines(house: House) -> None:
    """The earliest deadline first; a job without one ages as if it had the longest wait."""
    house.fetched(3)
    for redis_id, expires_ms in (("r0", None), ("r1", 50_000), ("r2", 20_000)):
        house.hold([redis_id], held_ms=1000, expires_ms=expires_ms)
    assert ["r2", "r1", "r0"] == [fact.redis_id for fact in house.backlog.browse(house.held)]
    assert 61_000 == house.client.zscore(house.keys.held("default", "a/m"), "r0")


def test_a_large_backlog_is_browsed_page_by_page(house: House) -> None:
    """Everything comes, once, in order."""
    ids = house.accepted(1201)
    for _ in range(3):
        jobs, _ = house.backlog.fetch("w1", "default", 500)
        house.hold([job.redis_id for job in jobs])
    assert sorted(ids) == [fact.redis_id for fact in house.backlog.browse(house.held)]


# the dead


def test_a_worker_that_was_declared_dead_is_fenced_out(house: House) -> None:
    """Whoever has its jobs now will end them; what it still does changes nothing."""
    house.fetched(4)
    house.client.zadd(house.keys.heartbeats, {"w1": 1})
    assert 4 == house.backlog.recover("w1", "default", 15)
    jobs, _ = house.backlog.fetch("w2", "default", 4)
    before = house.ledger.read()
    assert not house.settle("r0", worker="w1")
    assert [False] == house.hold(["r1"], worker="w1")
    assert 0 == house.backlog.give_back("w1", "default", ["r2"])
    assert not house.ledger.hand_over("w1", ("default", "r3"), ("default", "r3-again"), b"retry", "job-r3")
    assert before == house.ledger.read()
    assert all(house.settle(job.redis_id, worker="w2") for job in jobs)


def test_a_dead_worker_adopts_nothing(house: House) -> None:
    """It fetched a stranger's job, stalled, and another worker has ended it since: adopting it now would look like a loss."""
    house.client.hset(house.keys.msgs("default"), "x", b"body")
    house.client.rpush(house.keys.queue("default"), "x")
    house.backlog.fetch("w1", "default", 1)
    house.client.zadd(house.keys.heartbeats, {"w1": 1})
    house.backlog.recover("w1", "default", 15)
    house.backlog.fetch("w2", "default", 1)
    assert 1 == house.ledger.adopt("w2", "default", ["x"])
    assert house.ledger.settle("w2", "default", "x", "job-x", "succeeded")
    house.ledger.adopt("w1", "default", ["x"])
    assert 0 == house.ledger.read().lost


def test_the_living_keep_their_jobs(house: House) -> None:
    """Redis' clock decides who is dead, not the worker that asks."""
    house.fetched(1)
    assert -1 == house.backlog.recover("w1", "default", 15)
    assert 1 == house.ledger.read().running


def test_giving_back_keeps_the_order(house: House) -> None:
    """Jobs given back are the next to be fetched, in their old order."""
    ids = house.accepted(4)
    house.backlog.fetch("w1", "default", 3)
    assert 3 == house.backlog.give_back("w1", "default", ids[:3])
    assert ids == house.queued()


def test_reclaiming_takes_back_only_what_the_worker_does_not_know(house: House) -> None:
    """The rest was fetched with a reply that never came."""
    house.fetched(3)
    assert 2 == house.backlog.reclaim("w1", "default", ["r1"])
    assert {"r0", "r2"} == set(house.queued())
    assert 1 == house.ledger.read().running


# release


@pytest.mark.parametrize("states", [("open",), ("open", "half-open")])
def test_a_breaker_that_is_down_releases_nothing(house: House, states: tuple[State, ...]) -> None:
    """Not even in its own generation."""
    house.holding(2)
    breaker = house.move(*states)
    assert [] == house.release(breaker.generation)
    assert 2 == house.ledger.read().held


def test_a_breaker_that_moved_on_releases_nothing(house: House) -> None:
    """A process with an old view asks in an old generation."""
    house.holding(2)
    seen = house.move("open", "half-open", "recovering")
    house.move("open", "half-open", "recovering")
    assert [] == house.release(seen.generation)
    assert ["r0"] == house.release(seen.generation + 1)


def test_a_release_without_generation_asks_no_breaker(house: House) -> None:
    """While tideover does not act, held jobs go whatever the breaker says."""
    house.holding(1)
    house.move("open")
    assert ["r0"] == house.release(None)


def test_a_release_is_a_permit_until_the_next_hold(house: House) -> None:
    """It comes with the job when it is fetched, and is void once the job is held again, has ended or has a successor."""
    house.holding(3)
    assert ["r0"] == house.release(permit="a/m@0")
    house.client.delete(house.keys.bucket("a/m"))
    house.backlog.free(house.held, ["r1", "r2"], "*@0")
    jobs, _ = house.backlog.fetch("w1", "default", 3)
    assert {"r0": "a/m@0", "r1": "*@0", "r2": "*@0"} == {job.redis_id: job.permit for job in jobs}
    house.hold(["r0"])
    house.settle("r1")
    house.ledger.hand_over("w1", ("default", "r2"), ("default", "r2-again"), b"retry", "job-r2")
    assert 0 == house.client.exists(house.keys.permits("default"))


def test_a_released_job_has_its_old_bytes(house: House) -> None:
    """What runs is what was sent."""
    house.holding(1)
    house.release()
    (job,), _ = house.backlog.fetch("w1", "default", 1)
    assert (b"body of r0", "a/m@0") == (job.body, job.permit)


def test_the_queue_is_not_filled_beyond_its_bound(house: House) -> None:
    """A release stops where workers have enough, and leaves the rest held, where it can be steered."""
    house.holding(5)
    house.client.hset(house.keys.bucket("a/m"), mapping={"tokens": "100", "at": "0"})
    assert ["r0", "r1", "r2"] == house.release(most_queued=3)
    assert [] == house.release(most_queued=3)
    assert (3, 2) == (len(house.queued()), house.ledger.read().held)


def test_the_pace_is_never_exceeded(house: House) -> None:
    """Released at any moment: at most the first one, and rate x elapsed by Redis' clock, whoever asks and how often."""
    rate, total = 2000.0, 0
    house.holding(400)
    started = redis_time(house.client)
    while total < 400:
        total += len(house.release(rate=rate, burst=50.0))
        assert total <= 1 + rate * (redis_time(house.client) - started)
    assert 0.95 * 399 / rate <= redis_time(house.client) - started


def test_many_processes_share_one_pace(house: House, valkey_url: str) -> None:
    """Token, permit and move are one step, so that four who ask at once get what one would."""
    house.holding(200)
    barrier, rate = threading.Barrier(4), 1000.0
    started = redis_time(house.client)

    def ask(_: int) -> int:
        with redis.Redis.from_url(valkey_url) as own:
            mine = type(house)(own, house.keys)
            barrier.wait()
            return sum(len(mine.release(rate=rate, burst=10.0)) for _ in range(60))

    with ThreadPoolExecutor(4) as pool:
        released = sum(pool.map(ask, range(4)))
    assert 1 <= released <= 1 + rate * (redis_time(house.client) - started)
    assert released == len(set(house.queued()))


def test_after_a_pause_comes_no_flood(house: House) -> None:
    """Tokens of an hour without releases are capped by the burst."""
    house.holding(20)
    house.client.hset(house.keys.bucket("a/m"), mapping={"tokens": "0", "at": str(redis_time(house.client) - 3600)})
    assert 5 == len(house.release(rate=100.0, burst=5.9))


def test_an_operator_frees_whom_he_names(house: House) -> None:
    """Only jobs that are held here, at the head of the queue in his order, once."""
    house.holding(3)
    house.ledger.accept("default", "later", b"body")
    named = ["r1", "nobody", "later", "r2"]
    assert ["r1", "r2"] == [fact.redis_id for fact in house.backlog.free(house.held, named, "*@0")]
    assert [] == house.backlog.free(house.held, ["r1"], "*@0")
    assert ["r1", "r2", "later"] == house.queued()


def test_a_held_set_is_in_use_while_it_holds(house: House) -> None:
    """Drain and account find held sets by this list, so it names each that holds a job, and no other."""
    other = HeldSet("default", "a/m|b/m")
    house.holding(1)
    house.ledger.accept("default", "x", b"body")
    house.backlog.fetch("w1", "default", 1)
    house.backlog.hold("w1", "default", ("b/m", "a/m"), [house.facts("x", wait_key="a/m|b/m")], 60.0)
    assert [house.held, other] == house.backlog.held_sets()
    house.release()
    assert [other] == house.backlog.held_sets()


# expiry


def test_a_held_job_past_its_expiry_becomes_a_dead_letter(house: House) -> None:
    """It ends in the account, once; its body can still be read; a job that was released in time is left alone."""
    house.holding(2, expires_ms=2000)
    due = list(house.backlog.due(house.held, 2000))
    house.backlog.free(house.held, ["r1"], "*@0")
    assert [["job-r0"], []] == [house.backlog.expire(house.held, due), house.backlog.expire(house.held, due)]
    assert b"body of r0" == house.client.hget(house.keys.dead_msgs("default"), "r0")
    account = house.ledger.read()
    assert (1, 1, 0, 0) == (account.ends["expired"], account.queued, account.held, account.lost)
    assert house.backlog.place("job-r0") is None


def test_dead_letters_are_forgotten_after_their_lifetime(house: House) -> None:
    """Body and id together; a younger one stays, and so does whatever lives."""
    house.fetched(3)
    house.settle("r0", "failed")
    house.settle("r1", "failed")
    house.client.zadd(house.keys.dead("default"), {"r0": redis_time(house.client) * 1000 - 60_000})
    assert 1 == house.backlog.sweep("default", 59_000)
    assert [b"r1"] == house.client.zrange(house.keys.dead("default"), 0, -1)
    assert [b"r1"] == house.client.hkeys(house.keys.dead_msgs("default"))
    assert {"r2"} == house.bodies()


# following one job


def test_a_job_is_found_wherever_it_is(house: House) -> None:
    """By what its sender knows, and after a hold or a retry by its job id alone; once it has ended it is nowhere."""
    house.fetched(1)
    assert ("default", "r0") == house.backlog.place("job-r0", "r0", "default")
    assert house.backlog.is_running("default", "r0")
    house.hold(["r0"])
    assert ("default", "r0") == house.backlog.place("job-r0")
    assert not house.backlog.is_running("default", "r0")
    house.release()
    house.backlog.fetch("w1", "default", 1)
    house.settle("r0")
    assert house.backlog.place("job-r0", "r0", "default") is None
