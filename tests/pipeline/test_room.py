# SPDX-License-Identifier: Apache-2.0
"""Room for jobs: who makes way, what a full Redis still does, and sending what was sent before."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import dramatiq
import pytest
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import RedisBackend as Barriers
from dramatiq.results import ResultFailure

import tideover
from tideover import ai_task, send_many
from tideover.core.route import Permit
from tideover.store.backlog import Backlog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.pipeline.conftest import Job, Shop

OFFLINE: dict[str, Any] = {"criticality": "deferrable", "models": ["no-such-model"]}
MOST = 5


@pytest.fixture
def full(shop: Shop, swift_restarts: None) -> Iterator[Callable[[], None]]:
    """Makes Redis full; it has room again after the test."""
    yield lambda: shop.broker.client.config_set("maxmemory", "1")
    shop.broker.client.config_set("maxmemory", "0")


def holding(shop: Shop, n: int = MOST, tenant: str = "acme") -> list[Job]:
    """A tenant's jobs are held, and it has no room for more, if that makes others expire."""
    shop.configure(more=f'[capacity]\nmax_jobs_per_tenant = {n}\noverflow = "expire_oldest"\n')
    shop.work()
    shop.open_breaker()
    held = [shop.summary.send_with_options(args=(f"a{i}",), tenant=tenant) for i in range(n)]
    shop.until_all("held", held)
    return held


# who makes way


def test_a_critical_job_makes_way_last(shop: Shop) -> None:
    """Its expiry comes first, and it stays all the same; who waits for the one that went learns that it expired."""
    shop.configure(more='[capacity]\nmax_jobs = 5\noverflow = "expire_oldest"\n')
    soon: dict[str, Any] = {"criticality": "critical", "expires_in": timedelta(minutes=5), "actor_name": "urgent"}
    critical = ai_task(**soon, **shop.quick)(shop.summary.fn)
    shop.work()
    canaries = shop.open_breaker()
    urgent = critical.send("urgent")
    shop.until_all("held", [urgent])
    shop.until_all("held", [shop.summary.send("one")])
    shop.summary.send("two")
    [gone] = [job for job in canaries if tideover.status(job).state == "ended"]
    assert ("held", "expired") == (tideover.status(urgent).state, tideover.status(gone).end)
    with pytest.raises(ResultFailure, match="JobExpired"):
        gone.get_result()


def test_many_senders_find_room_at_once(shop: Shop) -> None:
    """Each finds a job to end, and each of these is told once to have expired."""
    held = holding(shop, 40)
    with ThreadPoolExecutor(8) as pool:
        sends = [pool.submit(shop.summary.send_with_options, args=(f"n{i}",), tenant="acme") for i in range(24)]
        new = [send.result() for send in sends]
    assert {40} == {int(n) for n in shop.broker.client.hvals(shop.keys.tenants)}
    told = Counter(n for job in [*held, *new] if (n := shop.events(job).count("expired")))
    assert {1: 24} == told


def test_a_job_that_goes_just_then_is_not_told_to_have_expired(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is released between being chosen and being ended: another one makes way."""
    held = holding(shop)
    plain: Any = Backlog.expire
    chosen: list[str] = []

    def late(backlog: Backlog, queue: str, jobs: Any, end: Any = "expired") -> list[bool]:
        if not chosen:
            chosen.append(jobs[0].job_id)
            shop.backlog.release(queue, list(shop.backlog.members(queue, [jobs[0].redis_id]).values()), Permit("*", 0))
        return list(plain(backlog, queue, jobs, end))

    monkeypatch.setattr(Backlog, "expire", late)
    shop.summary.send_with_options(args=("n",), tenant="acme")
    released = next(job for job in held if job.message_id == chosen[0])
    assert "expired" not in shop.events(released)
    assert 1 == sum("expired" in shop.events(job) for job in held)


def test_tenants_that_share_a_group_make_room_of_their_own(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are too many for a group each, a job of that very tenant makes way."""
    monkeypatch.setattr("tideover.store.backlog.MOST_GROUPS", 2)
    shop.configure(more='[capacity]\nmax_jobs_per_tenant = 2\noverflow = "expire_oldest"\n')
    shop.work()
    shop.open_breaker()
    jobs = {f"t{t}": [shop.summary.send_with_options(args=(f"{t}-{i}",), tenant=f"t{t}") for i in range(2)] for t in range(8)}
    shop.until_all("held", [job for held in jobs.values() for job in held])
    for tenant in jobs:
        shop.summary.send_with_options(args=("new",), tenant=tenant)
    assert dict.fromkeys(jobs, 1) == {
        tenant: sum("expired" in shop.events(job) for job in held) for tenant, held in jobs.items()
    }


# a full Redis


def test_results_are_stored_while_redis_is_full(shop: Shop, full: Callable[[], None]) -> None:
    """Else the jobs that would give room by ending would wait for it."""
    go_on = threading.Event()

    @ai_task(**OFFLINE)
    def answer(n: int) -> str:
        shop.ran.append(str(n))
        go_on.wait(30)
        return f"answer {n}"

    jobs = [answer.send(n) for n in range(12)]
    shop.work()
    shop.until(lambda: len(shop.ran) == 3, "all threads that it may have are busy")
    full()
    go_on.set()
    shop.until_over()
    assert [f"answer {n}" for n in range(12)] == [job.get_result() for job in jobs]


def test_a_group_completes_that_ended_while_redis_was_full(shop: Shop, full: Callable[[], None]) -> None:
    """Its callback is a new job, for which there is no room before; it runs once."""
    shop.broker.add_middleware(GroupCallbacks(Barriers(client=shop.broker.client)))  # type: ignore[no-untyped-call]
    go_on = threading.Event()

    @dramatiq.actor
    def complete() -> None:
        shop.ran.append("complete")

    @ai_task(**OFFLINE)
    def member(n: int) -> None:
        go_on.wait(30)
        shop.ran.append(f"member {n}")

    shop.work()
    group = dramatiq.group([member.message(n) for n in range(2)])
    group.add_completion_callback(complete.message())
    group.run()
    shop.until_all("running", group.children)
    full()
    go_on.set()
    shop.until(lambda: len(shop.ran) >= 2, "the members ran")
    shop.broker.client.config_set("maxmemory", "0")
    shop.until(lambda: "complete" in shop.ran, "the group is complete")
    shop.until_over()
    assert 1 == shop.ran.count("complete")


# what was sent before


def test_what_is_enqueued_again_counts_for_its_tenant(shop: Shop) -> None:
    """A message that was sent already and is enqueued by hand: two jobs, both of the tenant."""
    job = shop.summary.send_with_options(args=("a",), tenant="acme")
    shop.broker.enqueue(job)
    assert ({b"acme": b"2"}, {"accepted": 2, "queued": 2}) == (shop.broker.client.hgetall(shop.keys.tenants), shop.books())


def test_what_was_sent_with_a_key_is_not_sent_again(shop: Shop) -> None:
    """Not from what the first send returned either, one by one or many."""
    first = send_many(shop.summary.message_with_options(args=("x",), idempotency_key="k") for _ in range(3))
    again = send_many(first.accepted + first.duplicate)
    shop.broker.enqueue(first.accepted[0])
    assert (0, 3, {"accepted": 1, "queued": 1}) == (len(again.accepted), len(again.duplicate), shop.books())


def test_a_key_holds_as_long_as_its_job_is_held(shop: Shop) -> None:
    """After two days the key is forgotten; the job is still there."""
    shop.work()
    shop.open_breaker()
    job = shop.summary.send_with_options(args=("once",), idempotency_key="k")
    shop.until_all("held", [job])
    for key in shop.broker.client.scan_iter(f"{shop.namespace}*once:*"):
        shop.broker.client.delete(key)
    again = shop.summary.send_with_options(args=("once",), idempotency_key="k")
    assert (job.message_id, {"accepted": 4, "held": 4}) == (again.message_id, shop.books())


# ages


def test_a_hold_spends_no_age_of_what_comes_after(shop: Shop) -> None:
    """A pipeline's next step and a group's callback were built before the hold, and are not too old after it."""
    shop.broker.add_middleware(GroupCallbacks(Barriers(client=shop.broker.client)))  # type: ignore[no-untyped-call]

    @ai_task(max_age=2000, **OFFLINE)
    def length(answer: str) -> int:
        shop.ran.append("length")
        return len(answer)

    @dramatiq.actor(max_age=2000)
    def complete() -> None:
        shop.ran.append("complete")

    shop.work()
    shop.open_breaker()
    first = (shop.summary.message("first") | length.message()).run().messages[0]
    group = dramatiq.group([shop.summary.message("member")])
    group.add_completion_callback(complete.message())
    group.run()
    shop.until_all("held", [first, *group.children])
    sent_ms = first.message_timestamp
    shop.until(lambda: tideover.clock.now_ms() - sent_ms > 2500, "they were held for longer than they may be old")
    shop.heal()
    shop.until(lambda: {"length", "complete"} <= set(shop.ran), "both run")
    shop.until_over()
    assert {"accepted": 7, "succeeded": 7} == shop.books()
