# SPDX-License-Identifier: Apache-2.0
"""What each move promises, one promise a test. `test_model.py` checks that together they keep every job."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import redis

from tideover.core.breaker import State
from tideover.core.job import ENDS, End
from tideover.core.route import Mark, Permit
from tideover.store.account import Acceptance, Room
from tideover.store.backlog import Allowance
from tideover.store.facts import TICKS, Facet

if TYPE_CHECKING:
    from tests.store.conftest import House

BY_HAND = Permit("*", 0)
ACCEPTED, TAKEN, FULL, TENANT_FULL = (Acceptance(said) for said in ("accepted", "taken", "full", "tenant_full"))


def redis_time(client: redis.Redis) -> float:
    seconds, micros = client.time()
    return float(seconds + micros / 1e6)


# accept, fetch, settle, hand over


def test_accepting_again_changes_nothing(house: House) -> None:
    """A send that is repeated after a lost reply makes one job."""
    for _ in range(2):
        assert [ACCEPTED] * 2 == house.accept("r0", "r1", tenant="x")
    assert ["r0", "r1"] == house.queued()
    assert 2 == house.ledger.read().accepted
    assert {b"x": b"2"} == house.client.hgetall(house.keys.tenants)


def test_another_job_does_not_take_the_place_of_one(house: House) -> None:
    """A message that was changed and sent again under its old id is told so, and neither body nor queue is touched."""
    house.accept("r0")
    house.client.hset(house.keys.msgs("default"), "r0", b"as it was")
    assert [TAKEN, ACCEPTED] == house.accept("r0", "r1")
    assert b"as it was" == house.client.hget(house.keys.msgs("default"), "r0")
    assert (["r0", "r1"], 2) == (house.queued(), house.ledger.read().accepted)


def test_there_is_room_for_so_many_jobs(house: House) -> None:
    """Of all live jobs, wherever they are; who ends makes room, and a repetition needs none."""
    room = Room(jobs=3)
    assert [ACCEPTED, ACCEPTED] == house.accept("r0", "r1", room=room)
    house.backlog.fetch("w1", "default", 2)
    house.hold(["r0"])
    assert [ACCEPTED, FULL, ACCEPTED] == house.accept("r2", "r3", "r2", room=room)
    house.settle("r1")
    assert [ACCEPTED, FULL] == house.accept("r4", "r5", room=room)
    assert (0, 3) == (house.ledger.read().lost, house.ledger.read().accepted - 1)


def test_there_is_room_for_so_many_jobs_of_a_tenant(house: House) -> None:
    """The flood of one does not keep others out; whatever way a job ends, it makes room."""
    room = Room(jobs_per_tenant=2)
    assert [ACCEPTED, ACCEPTED, TENANT_FULL] == house.accept("r0", "r1", "r2", room=room, tenant="x")
    assert [ACCEPTED] == house.accept("r3", room=room, tenant="y")
    assert [ACCEPTED] * 3 == house.accept("r4", "r5", "r6", room=room)
    house.backlog.fetch("w1", "default", 2)
    house.hold(["r0"], expires_ms=2000, tenant="x")
    assert [TENANT_FULL] == house.accept("r7", room=room, tenant="x")
    house.settle("r1", tenant="x")
    house.backlog.expire("default", [house.facts("r0", tenant="x")])
    assert [ACCEPTED, ACCEPTED, TENANT_FULL] == house.accept("r7", "r8", "r9", room=room, tenant="x")


def test_the_last_job_of_a_tenant_takes_its_counter_along(house: House) -> None:
    """Or a namespace with millions of tenants would remember all of them."""
    house.accept("r0", "r1", tenant="x")
    house.backlog.fetch("w1", "default", 2)
    house.settle("r0", tenant="x")
    house.hold(["r1"], tenant="x")
    house.backlog.expire("default", [house.facts("r1", tenant="x")])
    assert 0 == house.client.exists(house.keys.tenants)


def test_what_may_be_sent_once_is_sent_once(house: House) -> None:
    """Also when the first has long ended: the sender hears which list it went to, and with which arguments."""
    house.accept("r0", queue="default.critical", once=("key", "digest"))
    house.backlog.fetch("w1", "default.critical", 1)
    house.settle("r0", queue="default.critical")
    duplicate = Acceptance("duplicate", "default.critical", "digest")
    assert [duplicate, duplicate] == house.accept("r0", "r1", once=("key", "another"))
    assert (1, []) == (house.ledger.read().accepted, house.queued())


def test_what_was_sent_yesterday_is_known_today(house: House) -> None:
    """A day has an end, and a repetition may come after it."""
    house.accept("r0", once=("key", "digest"))
    (today,) = house.client.keys(house.keys.once("*"))
    yesterday = (datetime.now(UTC) - timedelta(days=1)).strftime("%Y%m%d")
    house.client.rename(today, house.keys.once(yesterday))
    house.client.delete(house.keys.msgs("default"))
    assert [Acceptance("duplicate", "default", "digest")] == house.accept("r0", once=("key", "digest"))


def test_fetching_is_a_sign_of_life(house: House) -> None:
    """A worker that fetches is alive by Redis' clock, even where nothing is queued."""
    before = redis_time(house.client)
    assert house.backlog.fetch("w1", "default", 5) == ([], [])
    assert before - 0.001 <= house.registry.heartbeats()["w1"] <= redis_time(house.client)


def test_a_job_without_a_body_is_reported_and_not_kept(house: House) -> None:
    """Its id is named, so that somebody can look; it does not stay with the worker for ever, and the account misses it."""
    house.holding(2)
    house.release_by_hand("r0", "r1")
    house.client.hdel(house.keys.msgs("default"), "r0")
    jobs, missing = house.backlog.fetch("w1", "default", 5)
    assert (["r1"], ["r0"]) == ([job.redis_id for job in jobs], missing)
    assert 1 == house.ledger.read().lost
    assert house.mark("r0") is None


@pytest.mark.parametrize("end", ENDS)
def test_settling_ends_a_job_once(house: House, end: End) -> None:
    """One line in the account, no body left behind, and a repetition is told that it came late."""
    house.fetched(1)
    assert [True, False] == [house.settle("r0", end), house.settle("r0", end)]
    account = house.ledger.read()
    assert {end: 1} == {name: n for name, n in account.ends.items() if n}
    assert set() == house.bodies()


def test_what_did_not_succeed_can_be_read_afterwards(house: House) -> None:
    """It is kept as dramatiq keeps dead letters, so that its tools find it; what went well is not kept."""
    ends = dict(zip(house.fetched(len(ENDS)), ENDS, strict=True))
    for redis_id, end in ends.items():
        house.settle(redis_id, end)
    kept = {redis_id for redis_id, end in ends.items() if end in ("failed", "expired", "discarded")}
    assert {i: f"body of {i}".encode() for i in kept} == house.dead() == house.letters.bodies("default", list(ends))


def test_handing_over_twice_makes_one_successor(house: House) -> None:
    """A retry repeated after a lost reply is one retry: one job before, one job after."""
    house.fetched(1)
    move: Any = ("w1", ("default", "r0"), ("default.DQ", "r0"), b"retry", "r0")
    assert [True, False] == [house.ledger.hand_over(*move), house.ledger.hand_over(*move)]
    assert ["r0"] == house.queued("default.DQ")
    assert ("default.DQ", "r0") == house.backlog.place("r0", ["default"])
    account = house.ledger.read()
    assert (1, 1, 1) == (account.accepted, account.queued, account.queues["default"].delayed)


def test_a_successor_in_the_same_list_keeps_its_id(house: House) -> None:
    """A retry without a delay has the bytes of the retry, and is fetched as such."""
    house.fetched(1)
    assert house.ledger.hand_over("w1", ("default", "r0"), ("default", "r0"), b"retry", "r0")
    (job,), _ = house.backlog.fetch("w1", "default", 1)
    assert (b"retry", {"r0"}, 0) == (job.body, house.bodies(), house.ledger.read().lost)


def test_a_successor_with_an_id_of_its_own_is_found(house: House) -> None:
    """By the job's id, until it ends; no note is kept of the others."""
    house.put("x")
    house.backlog.fetch("w1", "default", 1)
    house.ledger.adopt("w1", "default", ["x"])
    assert house.ledger.hand_over("w1", ("default", "x"), ("default.DQ", "x2"), b"retry", "job-x")
    assert ("default.DQ", "x2") == house.backlog.place("job-x", [])
    house.backlog.fetch("w1", "default.DQ", 1)
    assert house.ledger.hand_over("w1", ("default.DQ", "x2"), ("default", "job-x"), b"retry", "job-x")
    assert ("default", "job-x") == house.backlog.place("job-x", ["default"])
    assert 0 == house.client.exists(house.keys.places)


def test_a_delayed_job_is_counted_once(house: House) -> None:
    """dramatiq keeps delayed jobs in a list of their own; it belongs to its queue and is no queue itself."""
    house.accept("r0", queue="default.DQ")
    account = house.ledger.read()
    assert {"default"} == set(account.queues)
    assert (1, 0, 0) == (account.queued, account.lost, account.not_adopted)


def test_a_job_of_a_queue_that_only_strangers_send_to_is_no_loss(house: House) -> None:
    """It is in the account from its first fetch, and its queue is, too."""
    house.put("x", "reports")
    house.backlog.fetch("w1", "reports", 1)
    assert 1 == house.ledger.adopt("w1", "reports", ["x"])
    account = house.ledger.read()
    assert (1, 1, 0, 0) == (account.accepted, account.running, account.lost, account.not_adopted)


# hold


def test_holding_moves_an_id_once_and_leaves_the_body(house: House) -> None:
    """The body stays where dramatiq keeps it: a hold repeated after a lost reply finds nothing to move."""
    house.fetched(2)
    assert [[True], [False, True], [False, False]] == [house.hold(["r0"]), house.hold(["r0", "r1"]), house.hold(["r0", "r1"])]
    assert {"r0", "r1"} == house.bodies()
    assert (2, 2) == (house.backlog.size("default"), house.ledger.read().held)
    assert [2] == [group.n for group in house.groups()]
    assert {"holds": 2} == house.registry.counters()


def test_the_facts_of_a_held_job_come_back_as_they_were(house: House) -> None:
    """Whatever is to be told of it is told without reading its body."""
    ids = [str(uuid4()), "not-a-uuid"]
    house.accept(*ids)
    house.backlog.fetch("w1", "default", 2)
    held = [
        house.facts(ids[0], tenant="acme", tag="mail", detail="529 overloaded", holds=3, held_before_ms=7000, generation=7),
        house.facts(ids[1], job_id="another", wait_key="", reason="review", expires_ms=4000, criticality="critical"),
    ]
    assert [True, True] == house.backlog.hold("w1", "default", held)
    assert held[::-1] == list(house.backlog.browse(house.groups()))
    assert [("held", facts) for facts in held] == [house.backlog.whereabouts("default", i) for i in ids]


def test_a_late_hold_leaves_the_marks_of_others_alone(house: House) -> None:
    """Of jobs that are with another worker by now: their permit, and how many workers died with them."""
    house.holding(2)
    house.release_by_hand("r0", "r1")
    house.backlog.fetch("w1", "default", 2)
    house.backlog.give_back("w1", "default", ["r1"])
    (job,), _ = house.backlog.fetch("w2", "default", 1)
    assert [True, False] == house.hold(["r0", "r1"])
    assert str(job.mark) == house.mark("r1")


def test_a_job_that_is_named_twice_is_held_once(house: House) -> None:
    """What a caller says twice in one breath must not be counted twice."""
    house.fetched(1)
    house.backlog.hold("w1", "default", [house.facts("r0", order=1), house.facts("r0", order=2)])
    assert ([1], 1, {"holds": 1}) == ([g.n for g in house.groups()], house.backlog.size("default"), house.registry.counters())


def test_jobs_with_a_facet_in_common_are_one_group(house: House) -> None:
    """Groups and their numbers tell what is held without a look at each job; an empty group is none."""
    house.fetched(4)
    house.hold(["r0", "r1"], tenant="x")
    house.hold(["r2"], tenant="y")
    house.hold(["r3"], tenant="x", wait_key="a/m|b/m", reason="pace")
    plain = Facet("a/m", "t", "deferrable", "outage", "x")
    both = plain._replace(wait_key="a/m|b/m", reason="pace")
    assert {plain: 2, plain._replace(tenant="y"): 1, both: 1} == {group.facet: group.n for group in house.groups()}
    assert ("a/m", "b/m") == both.breaker_keys
    house.release_by_hand("r0", "r2", "r3")
    assert {plain: 1} == {group.facet: group.n for group in house.groups()}


def test_too_many_groups_share_tenants_and_tags(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label that is different in each job must not make an index as large as the backlog; what a job is stays known."""
    monkeypatch.setattr("tideover.store.backlog.MOST_GROUPS", 10)
    ids = house.fetched(400)
    for i in ids:
        house.hold([i], tenant=f"tenant {i}", tag=f"tag {i}")
    assert len(house.groups()) < 100
    assert 400 == sum(group.n for group in house.groups())
    held = {facts.redis_id: (facts.tenant, facts.tag) for facts in house.backlog.browse(house.groups())}
    assert {i: (f"tenant {i}", f"tag {i}") for i in ids} == held


def test_all_come_when_groups_share_an_id(house: House, few_group_ids: None) -> None:
    """Two facets with one group id do not mix: the second takes another, also when both come at once."""
    ids = house.fetched(12)
    wait_keys = [f"a/m{n}" for n in ("123", "132", "213", "231", "312", "321", "124", "142", "214", "241", "412", "421")]
    facts = [house.facts(i, wait_key=wait_key) for i, wait_key in zip(ids, wait_keys, strict=True)]
    house.backlog.hold("w1", "default", facts[:8])
    house.backlog.hold("w1", "default", facts[8:])
    assert 10 == sum(1 for group in house.groups() if group.facet.salt)
    assert wait_keys == sorted((g.facet.wait_key for g in house.groups()), key=wait_keys.index)
    assert facts == sorted(house.backlog.browse(house.groups()), key=lambda held: ids.index(held.redis_id))


def test_held_jobs_go_in_the_order_of_their_deadlines(house: House) -> None:
    """The earliest deadline first; a job without one ages as if it had the longest wait."""
    house.fetched(3)
    for redis_id, expires_ms in (("r0", None), ("r1", 50_000), ("r2", 20_000)):
        house.hold([redis_id], held_ms=1000, expires_ms=expires_ms)
    assert ["r2", "r1", "r0"] == house.held()
    assert [20_000, 50_000, 61_000] == [facts.by_ms for facts in house.backlog.browse(house.groups())]


def test_the_order_is_one_over_all_groups(house: House) -> None:
    """Who waits for another breaker, or is another tenant's, still has its place among all."""
    house.fetched(6)
    for n, redis_id in enumerate(("r3", "r1", "r5", "r0", "r4", "r2")):
        house.hold([redis_id], held_ms=1000 + n, tenant=str(n % 2), wait_key=f"a/m{n % 3}")
    assert ["r3", "r1", "r5", "r0", "r4", "r2"] == house.held()
    (third,) = (facts for facts in house.backlog.browse(house.groups()) if facts.redis_id == "r5")
    assert 2 == house.backlog.ahead(third, house.groups())
    assert 1 == house.backlog.ahead(third, [group for group in house.groups() if group.facet.tenant == "1"])
    late = house.backlog.browse(house.groups(), until=third.order)
    assert ["r3", "r1", "r5"] == [facts.redis_id for facts in late]
    assert ["r0", "r4", "r2"] == [m.redis_id for m in house.backlog.facts_of(house.plan()[3:])]


def test_a_large_backlog_is_browsed_page_by_page(house: House) -> None:
    """Everything comes, once, in order, however it is spread over groups."""
    ids = house.accepted(4201)
    rank = {redis_id: (n * 7919) % 4201 for n, redis_id in enumerate(ids)}
    while jobs := house.backlog.fetch("w1", "default", 500)[0]:
        facts = [
            house.facts(job.redis_id, held_ms=rank[job.redis_id] // 2, tenant=str(rank[job.redis_id] % 150)) for job in jobs
        ]
        house.backlog.hold("w1", "default", facts)
    expected = sorted(ids, key=lambda i: (rank[i] // 2, i.ljust(17, "\0")))
    assert expected == house.held()
    groups = house.groups()
    assert (150, expected[:20]) == (len(groups), [f.redis_id for f in house.backlog.facts_of(house.backlog.page(groups, 20))])
    start = house.backlog.page(groups, 20)[-1].key
    assert expected[20:320] == [f.redis_id for f in house.backlog.facts_of(house.backlog.page(groups, 300, after=start))]


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
    assert not house.ledger.hand_over("w1", ("default", "r3"), ("default", "r3"), b"retry", "r3")
    house.backlog.begin("w1", "default", "r3", Mark(deaths=1, begun_by="w1"))
    assert "w1" not in (house.mark("r3") or "")
    assert before == house.ledger.read()
    assert all(house.settle(job.redis_id, worker="w2") for job in jobs)


def test_a_dead_worker_adopts_nothing(house: House) -> None:
    """It fetched a stranger's job, stalled, and another worker has ended it since: adopting it now would look like a loss."""
    house.put("x")
    house.backlog.fetch("w1", "default", 1)
    house.client.zadd(house.keys.heartbeats, {"w1": 1})
    house.backlog.recover("w1", "default", 15)
    house.backlog.fetch("w2", "default", 1)
    assert 1 == house.ledger.adopt("w2", "default", ["x"])
    assert house.ledger.settle("w2", "default", "x", "x", "succeeded")
    house.ledger.adopt("w1", "default", ["x"])
    assert 0 == house.ledger.read().lost


def test_the_living_keep_their_jobs(house: House) -> None:
    """Redis' clock decides who is dead, not the worker that asks."""
    house.fetched(1)
    assert -1 == house.backlog.recover("w1", "default", 15)
    assert (1, None) == (house.ledger.read().running, house.mark("r0"))


def die(house: House, worker: str, queue: str = "default") -> None:
    house.client.zadd(house.keys.heartbeats, {worker: 1})
    assert house.backlog.recover(worker, queue, 15) >= 0


def test_the_first_death_counts_for_all_aboard_and_later_ones_for_whom_had_begun(house: House) -> None:
    """Which of many jobs killed its worker is not known; the second time it is known who ran."""
    house.accepted(3)
    for worker in ("w1", "w2", "w3"):
        jobs, _ = house.backlog.fetch(worker, "default", 3)
        for job in jobs:
            if job.redis_id == "r1":
                house.backlog.begin(worker, "default", "r1", replace(job.mark, begun_by=worker))
        die(house, worker)
    jobs, _ = house.backlog.fetch("w4", "default", 3)
    assert {"r0": (1, ""), "r1": (3, ""), "r2": (1, "")} == {j.redis_id: (j.mark.deaths, j.mark.begun_by) for j in jobs}


def test_a_death_leaves_the_rest_of_a_mark_alone(house: House) -> None:
    """The permit is still good, and the time that a job was held is still no part of its age."""
    house.holding(1, holds=2, held_before_ms=5000, held_ms=0)
    assert ["r0"] == house.release(permit="a/m@3")
    (before,), _ = house.backlog.fetch("w1", "default", 1)
    die(house, "w1")
    (after,), _ = house.backlog.fetch("w2", "default", 1)
    assert replace(before.mark, deaths=1) == after.mark
    assert (Permit("a/m", 3), 2) == (after.mark.permit, after.mark.holds)


def test_a_hold_forgets_no_death(house: House) -> None:
    """Else a job that kills each worker that runs it would be safe from review, if it is held now and then."""
    house.holding(2, deaths=2)
    assert ["r0"] == house.release(burst=1.0, rate=1.0)
    house.release_by_hand("r1")
    jobs, _ = house.backlog.fetch("w1", "default", 2)
    assert {"r0": 2, "r1": 0} == {job.redis_id: job.mark.deaths for job in jobs}, "a human who releases a job begins anew"


def test_marks_go_along_with_a_retry(house: House) -> None:
    """How often and how long it was held, and deaths; not the permit, nor who began the attempt that is over."""
    house.holding(1, holds=2)
    house.release()
    (job,), _ = house.backlog.fetch("w1", "default", 1)
    house.backlog.begin("w1", "default", "r0", replace(job.mark, deaths=2, begun_by="w1"))
    assert house.ledger.hand_over("w1", ("default", "r0"), ("default.DQ", "r0"), b"retry", "r0")
    (later,), _ = house.backlog.fetch("w1", "default.DQ", 1)
    assert Mark(None, 2, job.mark.held_ms, 2, "") == later.mark
    die(house, "w1", "default.DQ")
    assert house.mark("r0") is None
    (again,), _ = house.backlog.fetch("w2", "default.DQ", 1)
    assert later.mark == again.mark


def test_a_dead_job_without_a_body_leaves_no_mark(house: House) -> None:
    """There is nothing to run, so there is nothing to remember."""
    house.holding(1)
    house.release()
    house.backlog.fetch("w1", "default", 1)
    house.client.delete(house.keys.msgs("default"))
    die(house, "w1")
    assert house.mark("r0") is None


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
    house.release_by_hand("r1", "r2")
    jobs, _ = house.backlog.fetch("w1", "default", 3)
    paced = Permit("a/m", 0)
    assert {"r0": paced, "r1": BY_HAND, "r2": BY_HAND} == {job.redis_id: job.mark.permit for job in jobs}
    house.hold(["r0"])
    house.settle("r1")
    assert [None, None] == [house.mark("r0"), house.mark("r1")]
    house.ledger.hand_over("w1", ("default", "r2"), ("default.DQ", "r2"), b"retry", "r2")
    (job,), _ = house.backlog.fetch("w1", "default.DQ", 1)
    assert job.mark.permit is None


def test_a_mark_tells_how_often_and_how_long_a_job_was_held(house: House) -> None:
    """All of its holds together; a hand that releases it forgives how often."""
    now_ms = redis_time(house.client) * 1000
    house.holding(2, holds=3, held_ms=int(now_ms) - 10_000, held_before_ms=50_000)
    house.release()
    house.release_by_hand("r1")
    jobs, _ = house.backlog.fetch("w1", "default", 2)
    assert {"r0": 3, "r1": 0} == {job.redis_id: job.mark.holds for job in jobs}
    most_ms = 50_000 + 10_000 + redis_time(house.client) * 1000 - now_ms + 1
    assert all(60_000 <= job.mark.held_ms <= most_ms for job in jobs)


def test_a_release_takes_who_is_named_and_says_how_far_it_came(house: House) -> None:
    """Who left meanwhile is passed over; who had no room is not looked at, so that the caller can go on there."""
    house.holding(5)
    members = [member.raw for member in house.plan()]
    house.release_by_hand("r0", "r3")
    house.client.hset(house.keys.bucket("a/m"), mapping={"tokens": "2", "at": "0"})
    allowed = Allowance(key="a/m", generation=None, rate=0.0, burst=9.0, calls_each=1.0, most_queued=99)
    released, looked_at, _ = house.backlog.release("default", members, Permit("a/m", 0), allowed)
    assert (["r1", "r2"], 3) == ([facts.redis_id for facts in released], looked_at)
    released, looked_at, _ = house.backlog.release("default", members[looked_at:], Permit("a/m", 0), allowed)
    assert ([], 0) == (released, looked_at)
    released, looked_at, _ = house.backlog.release("default", members[:1] + members[3:], BY_HAND)
    assert (["r4"], 3) == ([facts.redis_id for facts in released], looked_at)


def test_who_never_saw_a_group_can_tell_who_left_it_empty(house: House) -> None:
    """The last job of a group takes its facet along; its story is told all the same."""
    house.holding(1, tenant="acme")
    members = house.members("r0")
    released = type(house)(house.client, house.keys).backlog.release("default", members, BY_HAND).jobs
    assert [house.facts("r0", tenant="acme")] == released


def test_a_released_job_has_its_old_bytes(house: House) -> None:
    """What runs is what was sent."""
    house.holding(1)
    house.release()
    (job,), _ = house.backlog.fetch("w1", "default", 1)
    assert (b"body of r0", Permit("a/m", 0)) == (job.body, job.mark.permit)


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


def test_an_operator_releases_whom_he_names(house: House) -> None:
    """Only jobs that are held here, at the head of the queue in his order, once."""
    house.holding(3)
    house.accept("later")
    members = {i: house.groups()[0].id + house.facts(i).place for i in ("r1", "nobody", "later", "r2")}
    released, looked_at, _ = house.backlog.release("default", list(members.values()), BY_HAND)
    assert (["r1", "r2"], 4) == ([fact.redis_id for fact in released], looked_at)
    assert ([], 1, False) == house.backlog.release("default", [members["r1"]], BY_HAND)
    assert ["r1", "r2", "later"] == house.queued()
    assert {"holds": 3, "releases": 2} == house.registry.counters()


def test_ids_of_any_form_come_back_as_they_were(house: House) -> None:
    """The index packs ids; the queue has them as dramatiq made them."""
    uuid = str(uuid4())
    ids = [uuid, uuid.upper(), uuid.replace("-", ""), "x", "sixteen bytes id", "ünïcode", uuid[:-1] + "x", f"{{{uuid[:-2]}}}"]
    house.accept(*ids)
    house.backlog.fetch("w1", "default", 9)
    assert [True] * len(ids) == house.hold(ids)
    released = house.backlog.release("default", house.members(*ids), BY_HAND).jobs
    assert (ids, ids) == ([facts.redis_id for facts in released], house.queued())
    jobs, _ = house.backlog.fetch("w1", "default", 9)
    assert [BY_HAND] * len(ids) == [job.mark.permit for job in jobs]


# expiry


def test_a_held_job_past_its_expiry_becomes_a_dead_letter(house: House) -> None:
    """It ends in the account, once; its body can still be read; a job that was released in time is left alone."""
    house.holding(2, expires_ms=2000)
    due = list(house.backlog.browse(house.groups(), until=2000 * TICKS))
    house.release_by_hand("r1")
    assert [[True, False], [False, False]] == [house.backlog.expire("default", due), house.backlog.expire("default", due)]
    assert b"body of r0" == house.client.hget(house.keys.dead_msgs("default"), "r0")
    account = house.ledger.read()
    assert (1, 1, 0, 0) == (account.ends["expired"], account.queued, account.held, account.lost)
    assert house.backlog.place("r0", ["default"]) is None
    assert [] == house.groups()


def test_a_held_job_that_is_discarded_becomes_a_dead_letter(house: House) -> None:
    """A person's word is an end as good as any, and can be taken back."""
    house.holding(1)
    assert [True] == house.backlog.expire("default", [house.facts("r0")], "discarded")
    assert ["r0"] == list(house.dead())
    assert {"discarded": 1} == {end: n for end, n in house.ledger.read().ends.items() if n}


def test_what_ended_elsewhere_is_counted_once(house: House) -> None:
    """Of several who see that jobs are missing, one enters them: the number that it read is its ticket."""
    house.fetched(2)
    house.client.delete(house.keys.acks("w1", "default"), house.keys.msgs("default"))
    assert 2 == house.ledger.read().lost
    assert [True, False] == [house.registry.end_elsewhere(0, 2), house.registry.end_elsewhere(0, 2)]
    account = house.ledger.read()
    assert (0, 2) == (account.lost, account.ends["elsewhere"])


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


def test_a_dead_letter_is_restored_once(house: House) -> None:
    """As a new job with its old id: it was accepted, ended, and is accepted again; what lives already is no dead letter."""
    house.fetched(2)
    house.settle("r0", "failed")
    assert [True, True, False] == [
        house.letters.restore("default", "r0", "r0", b"again", "x"),
        house.letters.restore("default", "r0", "r0", b"again", "x"),  # as redis-py does when the reply was lost
        house.letters.restore("default", "r0", "r0", b"?", ""),
    ]
    assert not house.letters.restore("default", "r1", "r1", b"never died", "")
    (job,), _ = house.backlog.fetch("w1", "default", 1)
    assert (b"again", []) == (job.body, list(house.dead()))
    account = house.ledger.read()
    assert (3, 1, 2, 0) == (account.accepted, account.ends["failed"], account.running, account.lost)
    assert {b"x": b"1"} == house.client.hgetall(house.keys.tenants)


def test_a_dead_letter_of_a_job_that_lives_again_stays(house: House) -> None:
    """Its id is taken: restoring it would overwrite the body of the living."""
    house.fetched(1)
    house.settle("r0", "failed")
    house.accept("r0")
    assert not house.letters.restore("default", "r0", "r0", b"again", "")
    assert (["r0"], ["r0"]) == (list(house.dead()), house.queued())


def test_dead_letters_are_listed_page_by_page_the_first_to_end_first(house: House) -> None:
    """So they are restored in this order."""
    letters = {f"r{n:04}": 2000.0 - n for n in range(1101)}
    house.client.zadd(house.keys.dead("default"), letters)
    house.client.hset(house.keys.dead_msgs("default"), mapping=dict.fromkeys(letters, "body"))
    assert sorted(letters, reverse=True) == list(house.dead())
    assert [500, 500, 101] == [len(page) for page in house.letters.pages("default")]


# following one job


def test_a_job_is_found_wherever_it_is(house: House) -> None:
    """By its job id, which is its Redis id nearly always; once it has ended it is nowhere."""
    house.accepted(1)
    assert ("queued", None) == house.backlog.whereabouts("default", "r0")
    house.backlog.fetch("w1", "default", 1)
    assert ("running", None) == house.backlog.whereabouts("default", "r0")
    assert ("default", "r0") == house.backlog.place("r0", ["other", "default"])
    assert house.backlog.place("r0", ["other"]) is None
    house.hold(["r0"])
    assert ("default", "r0") == house.backlog.place("r0", ["default"])
    assert ("held", house.facts("r0")) == house.backlog.whereabouts("default", "r0")
    assert not house.backlog.is_running("default", "r0")
    house.release()
    house.backlog.fetch("w1", "default", 1)
    house.settle("r0")
    assert house.backlog.place("r0", ["default"]) is None
    assert (None, None) == house.backlog.whereabouts("default", "r0")


def test_a_job_with_another_redis_id_is_found_once_it_was_held(house: House) -> None:
    """A stranger's, or one that was enqueued twice; until it ends, however it ends."""
    for redis_id in ("x", "y"):
        house.put(redis_id)
    house.backlog.fetch("w1", "default", 2)
    house.ledger.adopt("w1", "default", ["x", "y"])
    assert [True, True] == house.backlog.hold("w1", "default", [house.facts(i, job_id=f"job-{i}") for i in ("x", "y")])
    assert [("default", "x"), ("default", "y")] == [house.backlog.place(f"job-{i}", []) for i in ("x", "y")]
    house.backlog.expire("default", [house.facts("x", job_id="job-x")])
    house.release()
    house.backlog.fetch("w1", "default", 1)
    house.ledger.settle("w1", "default", "y", "job-y", "succeeded")
    assert 0 == house.client.exists(house.keys.places)


def test_held_jobs_are_found_by_the_beginning_of_their_ids(house: House) -> None:
    """UUIDs from six digits on; other ids, and jobs whose Redis id is another, by their job id."""
    ids = ["0c4fe1d2-2a3b-4a5b-8d6f-5c2a2a5c2a5b", "0c4fe1d3-2a3b-4a5b-8d6f-5c2a2a5c2a5b", "0c4fe1d2-old", "2a2a5c2a-x"]
    house.accept(*ids)
    house.backlog.fetch("w1", "default", 4)
    house.hold(ids[:3])
    house.hold(ids[3:], job_id="0c4fe1d2-job")
    expected = {
        "0c4fe1d": {*ids[:3], "0c4fe1d2-job"},
        "0c4fe1d2": {ids[0], ids[2], "0c4fe1d2-job"},
        "0c4fe1d2-2a3b-4": {ids[0]},
        "0c4fe1d2-o": {ids[2]},
        "2a2a5c2a": set(),
        "0c4fe1d[": set(),
    }
    assert expected == {prefix: house.backlog.jobs_like(prefix, ["default", "other"]) for prefix in expected}
    assert 4 == sum(Counter(group.n for group in house.groups()).elements())
