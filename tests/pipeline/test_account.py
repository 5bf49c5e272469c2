# SPDX-License-Identifier: Apache-2.0
"""The account: whatever happens to a job, it is in exactly one place, ends exactly once, and the sum is right."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import dramatiq
import pytest
from dramatiq.middleware import AsyncIO, CurrentMessage, GroupCallbacks, SkipMessage
from dramatiq.rate_limits.backends import RedisBackend as BarrierBackend
from dramatiq.results import ResultFailure

import tideover
from tideover import JobExpired, JobFailed, ai_task, claude, clock, text_of
from tideover.store.account import NewJob, Room
from tideover.testing import Fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.pipeline.conftest import Shop

SOON = timedelta(milliseconds=300)
NOW = timedelta(seconds=5)


def test_jobs_that_succeed(shop: Shop) -> None:
    """Each accepted job is counted once, and ends once as succeeded."""
    shop.work()
    jobs = [*shop.send(shop.summary, 10, "s"), *shop.send(shop.areply, 10, "r")]
    shop.until_over()
    assert {"accepted": 20, "succeeded": 20} == shop.books()
    assert 20 == len([shop.result(job) for job in jobs])


def test_jobs_that_wait(shop: Shop) -> None:
    """Without a worker, jobs are queued in two lanes, the delayed among them, and nowhere else."""
    shop.send(shop.summary, 2, "s")
    shop.send(shop.reply, 3, "r")
    shop.summary.send_with_options(args=("later",), delay=60_000)
    account = shop.ledger.read()
    assert {"accepted": 6, "queued": 6} == shop.books()
    assert (3, 1) == (account.queues["default"].queued, account.queues["default"].delayed)
    assert 3 == account.queues["default.critical"].queued


def test_jobs_that_fail(shop: Shop) -> None:
    """A job whose retries are spent ends once as failed, and dramatiq's dead letters have it."""

    @ai_task(criticality="deferrable", max_retries=0)
    def buggy() -> None:
        raise ValueError("a bug")

    shop.work()
    buggy.send()
    shop.until_over()
    assert {"accepted": 1, "failed": 1} == shop.books()
    assert 1 == shop.broker.client.zcard(shop.keys.dead("default"))
    assert 1 == shop.broker.client.hlen(shop.keys.dead_msgs("default"))


def test_a_retry_is_the_same_job(shop: Shop) -> None:
    """A job that fails twice and then succeeds was accepted once, and ends once."""

    @ai_task(criticality="deferrable", **shop.quick)
    def shaky() -> int:
        shop.ran.append("shaky")
        if len(shop.ran) < 3:
            raise ValueError("not yet")
        return len(shop.ran)

    shop.work()
    job = shaky.send()
    assert 3 == shop.result(job)
    shop.until_over()
    assert {"accepted": 1, "succeeded": 1} == shop.books()
    assert "failed" not in shop.events(job)
    assert tideover.status(job).end in (None, "succeeded")


def test_a_retry_that_waits_is_queued(shop: Shop) -> None:
    """Between two attempts a job is queued, and was accepted once."""

    @ai_task(criticality="deferrable", max_retries=3, min_backoff=60_000)
    def shaky() -> None:
        shop.ran.append("shaky")
        raise ValueError("not yet")

    shop.work()
    shaky.send()
    shop.until(lambda: shop.ran and not shop.ledger.read().running, "the first attempt is over")
    shop.until(lambda: shop.ledger.read().queues["default"].delayed == 1, "it waits for the second")
    assert {"accepted": 1, "queued": 1} == shop.books()


def test_a_retry_leaves_nothing_behind(shop: Shop) -> None:
    """A retry replaces its predecessor: no body, no id, no place of an earlier attempt stays in Redis."""

    @ai_task(criticality="deferrable", store_results=False, **shop.quick)
    def buggy() -> None:
        raise ValueError("a bug")

    shop.work()
    buggy.send()
    shop.until_over()
    client = shop.broker.client
    assert [0, 0] == [client.hlen(shop.keys.msgs(queue)) for queue in ("default", "default.DQ")]
    assert [0, 0, 0] == [
        client.hlen(shop.keys.places),
        client.hlen(shop.keys.facts("default")),
        client.scard(shop.keys.adopted),
    ]
    assert 1 == client.hlen(shop.keys.dead_msgs("default"))


def test_a_delayed_job_is_the_same_job_when_its_time_comes(shop: Shop) -> None:
    """The end of a delay moves the job to its queue and accepts nothing new."""
    shop.work()
    job = shop.summary.send_with_options(args=("later",), delay=200)
    assert "anthropic" == shop.result(job).partition(":")[0]
    shop.until_over()
    assert {"accepted": 1, "succeeded": 1} == shop.books()


def test_a_skipped_job_is_discarded(shop: Shop) -> None:
    """User code that raises dramatiq's SkipMessage ends its job as discarded."""

    @ai_task(criticality="deferrable")
    def unwanted() -> None:
        raise SkipMessage("not wanted any more")

    shop.work()
    unwanted.send()
    shop.until_over()
    assert {"accepted": 1, "discarded": 1} == shop.books()


def test_a_job_that_expires_in_its_queue(shop: Shop) -> None:
    """A job past its expiry is ended before anything runs; no call is made, and whoever waits learns it."""

    @ai_task(criticality="critical", expires_in=SOON)
    def urgent(tag: str) -> str:
        shop.ran.append(tag)
        return text_of(claude().messages.create(**shop.question(tag)))

    job = urgent.send("late")
    shop.until(lambda: clock.now_ms() > job.message_timestamp + 350, "its time is over")
    shop.work()
    shop.until_over()
    assert {"accepted": 1, "expired": 1} == shop.books()
    assert ([], []) == (shop.ran, shop.calls("late"))
    with pytest.raises(JobExpired):
        tideover.wait_for_sync(job, timeout=NOW)
    assert ("ended", "expired") == (tideover.status(job).state, tideover.status(job).end)


def test_a_job_that_expires_while_held(shop: Shop) -> None:
    """Housekeeping ends held jobs at their expiry; the others stay held."""

    @ai_task(criticality="deferrable", expires_in=timedelta(seconds=1), models=[shop.model])
    def perishable(tag: str) -> None:
        shop.ran.append(tag)

    shop.work()
    shop.open_breaker()
    job = perishable.send("late")
    shop.until_all("held", [job])
    shop.until_all("ended", [job])
    assert {"accepted": 4, "held": 3, "expired": 1} == shop.books()
    with pytest.raises(JobExpired):
        tideover.wait_for_sync(job, timeout=NOW)
    assert [] == [tag for tag in shop.ran if tag == "late"]


def test_a_job_that_expires_before_its_next_call(shop: Shop) -> None:
    """A running job makes no call after its expiry: it ends as expired, and is not retried."""

    @ai_task(criticality="deferrable", expires_in=SOON, **shop.quick)
    def slow(tag: str) -> None:
        shop.ran.append(tag)
        sent_at = clock.now()
        shop.until(lambda: clock.now() > sent_at + 0.4, "its time is over")
        claude().messages.create(**shop.question(tag))

    shop.work()
    job = slow.send("late")
    shop.until_over()
    assert {"accepted": 1, "expired": 1} == shop.books()
    assert (["late"], []) == (shop.ran, shop.calls("late"))
    with pytest.raises(JobExpired):
        tideover.wait_for_sync(job, timeout=NOW)


def test_jobs_of_a_producer_without_tideover_are_adopted(shop: Shop) -> None:
    """They enter the account when a worker fetches them, once each, and are treated as their task says."""
    stranger = shop.new_broker(with_tideover=False)
    messages = [shop.summary.message(f"s{i}") for i in range(5)]
    for message in messages:
        stranger.enqueue(message.copy(options={"tideover": None}))
    shop.work()
    shop.until(lambda: shop.books().get("succeeded") == 5, "they have run")
    assert {"accepted": 5, "succeeded": 5} == shop.books()
    assert 5 == len([shop.result(message) for message in messages])


def test_adopted_jobs_are_held_too(shop: Shop) -> None:
    """A job that came without a stamp is held in an outage, released, and counted once."""
    shop.work()
    shop.open_breaker()
    stranger = shop.new_broker(with_tideover=False)
    sent = stranger.enqueue(dramatiq.Message(queue_name="default", actor_name="summary", args=("s",), kwargs={}, options={}))
    shop.until(lambda: shop.books() == {"accepted": 4, "held": 4}, "it is held")
    shop.heal()
    assert "anthropic" == shop.result(sent).partition(":")[0]
    shop.until_over()
    assert {"accepted": 4, "succeeded": 4} == shop.books()


def test_adopted_jobs_retry_as_one_job(shop: Shop) -> None:
    """An adopted job that fails is retried as the job that it is: accepted once, failed once."""

    @ai_task(criticality="deferrable", **shop.quick)
    def buggy() -> None:
        shop.ran.append("buggy")
        raise ValueError("a bug")

    shop.work()
    stranger = shop.new_broker(with_tideover=False)
    stranger.enqueue(dramatiq.Message(queue_name="default", actor_name="buggy", args=(), kwargs={}, options={}))
    shop.until(lambda: shop.books().get("failed"), "it failed")
    assert {"accepted": 1, "failed": 1} == shop.books()
    assert ["buggy"] * 3 == shop.ran


def test_a_pipeline_through_an_outage(shop: Shop) -> None:
    """Step one is held; step two runs once, afterwards, with the answer; the pipeline's result is there."""

    @ai_task(criticality="deferrable")
    def length(answer: str) -> int:
        shop.ran.append("length")
        return len(answer)

    shop.work()
    shop.open_breaker()
    pipe = (shop.summary.message("first") | length.message()).run()
    shop.until(lambda: shop.books() == {"accepted": 4, "held": 4}, "step one is held")
    shop.heal()
    assert 32 == pipe.get_result(block=True, timeout=30_000)
    shop.until_over()
    assert {"accepted": 5, "succeeded": 5} == shop.books()
    assert 1 == shop.ran.count("length")


def test_a_pipeline_whose_second_step_is_held(shop: Shop) -> None:
    """The second step waits with the first one's answer, and step one runs once."""

    @ai_task(criticality="deferrable")
    def topic() -> str:
        shop.ran.append("topic")
        return "tides"

    shop.work()
    shop.open_breaker()
    pipe = (topic.message() | shop.summary.message()).run()
    shop.until(lambda: shop.books() == {"accepted": 5, "held": 4, "succeeded": 1}, "step two is held")
    shop.heal()
    assert "anthropic" == pipe.get_result(block=True, timeout=30_000).partition(":")[0]
    assert (1, 1) == (shop.ran.count("topic"), len(shop.calls("tides")))


def test_a_group_through_an_outage(shop: Shop) -> None:
    """The completion callback of a group runs once, when its held members have ended, and not before."""
    shop.broker.add_middleware(GroupCallbacks(BarrierBackend(client=shop.broker.client)))

    @dramatiq.actor
    def complete() -> None:
        shop.ran.append("complete")

    shop.work()
    shop.open_breaker()
    group = dramatiq.group(shop.summary.message(f"member{i}") for i in range(4))
    group.add_completion_callback(complete.message())
    group.run()
    shop.until(lambda: shop.books() == {"accepted": 7, "held": 7}, "all members are held")
    assert 0 == shop.ran.count("complete")
    shop.heal()
    shop.until(lambda: "complete" in shop.ran, "the group is complete")
    shop.until_over()
    assert {"accepted": 8, "succeeded": 8} == shop.books()
    assert 1 == shop.ran.count("complete")


def test_a_job_that_sends_itself_again_makes_a_new_job(shop: Shop) -> None:
    """An actor that enqueues its own message while it runs makes a second job; both end."""
    shop.broker.add_middleware(CurrentMessage())

    @ai_task(criticality="deferrable", store_results=False)
    def again() -> None:
        shop.ran.append("again")
        if len(shop.ran) < 3:
            shop.broker.enqueue(CurrentMessage.get_current_message())

    shop.work()
    again.send()
    shop.until(lambda: len(shop.ran) == 3, "it ran three times")
    shop.until_over()
    assert {"accepted": 3, "succeeded": 3} == shop.books()


def test_a_job_that_sends_others(shop: Shop) -> None:
    """What a job sends while it runs is accepted as new."""

    @ai_task(criticality="deferrable")
    async def fan_out() -> None:
        for i in range(3):
            await shop.summary.send_async(f"child{i}")

    shop.work()
    fan_out.send()
    shop.until(lambda: shop.books().get("succeeded") == 4, "all have run")
    assert {"accepted": 4, "succeeded": 4} == shop.books()


def test_a_plain_actor_works_as_ever(shop: Shop) -> None:
    """An actor that is no AI task keeps its results and its retries, and is in the account."""

    @dramatiq.actor(store_results=True, **shop.quick)
    def add(a: int, b: int) -> int:
        shop.ran.append("add")
        if len(shop.ran) == 1:
            raise ValueError("not yet")
        return a + b

    shop.work()
    job = add.send(1, 2)
    assert 3 == job.get_result(block=True, timeout=30_000)
    shop.until_over()
    assert {"accepted": 1, "succeeded": 1} == shop.books()
    assert ["add"] * 2 == shop.ran


def test_a_plain_actor_s_failure_is_a_dead_letter(shop: Shop) -> None:
    """A plain actor's failure is dramatiq's: retried, then among its dead letters."""

    @dramatiq.actor(**shop.quick)
    def buggy() -> None:
        shop.ran.append("buggy")
        raise ValueError("a bug")

    shop.work()
    buggy.send()
    shop.until_over()
    assert {"accepted": 1, "failed": 1} == shop.books()
    assert (3, 1) == (len(shop.ran), shop.broker.client.zcard(shop.keys.dead("default")))


def test_a_job_for_an_unknown_actor_is_a_dead_letter(shop: Shop) -> None:
    """A job whose actor this worker does not know goes to the dead letters, and the account says failed."""
    shop.work()
    unknown: Any = dramatiq.Message(queue_name="default", actor_name="nobody", args=(), kwargs={}, options={})
    shop.broker.enqueue(unknown)
    shop.until_over()
    assert {"accepted": 1, "failed": 1} == shop.books()


@pytest.mark.parametrize("ours", [False, True])
def test_a_job_that_nobody_can_read_needs_review(shop: Shop, ours: bool) -> None:
    """A body that is no message is held as it is, and was accepted once, whoever sent it."""
    body = b'{"options": {"tideover": {"sent_ms": 1}}, "args": ["cut' if ours else b"\x80\x04pickled by a stranger"
    if ours:
        shop.ledger.accept("default", [NewJob(redis_id="odd-id", body=body)], Room())
    else:
        shop.broker.client.hset(shop.keys.msgs("default"), "odd-id", body)
        shop.broker.client.rpush(shop.keys.queue("default"), "odd-id")
    shop.work()
    shop.until(lambda: shop.books() == {"accepted": 1, "held": 1}, "it is held")
    assert body == shop.broker.client.hget(shop.keys.msgs("default"), "odd-id")
    assert ["review"] == [group.facet.reason for group in shop.backlog.groups("default")]


def test_the_status_of_a_job_all_its_life(shop: Shop) -> None:
    """`tideover.status` says queued, running, held with reason and breaker, queued for a retry, and how it ended."""
    running = []

    @ai_task(criticality="deferrable", models=[shop.model], max_retries=1, min_backoff=10, max_backoff=10)
    def watched(tag: str) -> None:
        running.append(tideover.status(job).state)
        raise ValueError(tag)

    job = watched.send("w")
    assert ("queued", None, None) == state_of(job)
    shop.work()
    shop.until_all("ended", [job])
    assert ["running", "running"] == running
    shop.until(lambda: state_of(job) == ("ended", "failed", None), "its end is told")


def test_the_status_of_a_held_job(shop: Shop) -> None:
    """It says why, what it waits for, since when, and when it expires."""

    @ai_task(criticality="deferrable", models=[shop.model], expires_in=timedelta(hours=1))
    def patient() -> None: ...

    shop.work()
    shop.open_breaker()
    before = clock.now()
    job = patient.send()
    shop.until_all("held", [job])
    held = tideover.status(job)
    assert ("held", "outage", (f"anthropic/{shop.model}",)) == (held.state, held.reason, held.waits_for)
    assert held.since is not None
    assert before - 0.1 <= held.since <= clock.now()
    assert held.expires_at is not None
    assert 3599 < held.expires_at - before < 3601


def state_of(job: Any) -> tuple[str, str | None, str | None]:
    status = tideover.status(job)
    return status.state, status.end, status.reason


def test_the_status_of_a_job_that_succeeded(shop: Shop) -> None:
    """It has ended; a result is there."""
    shop.work()
    job = shop.summary.send("s")
    shop.result(job)
    shop.until_all("ended", [job])
    assert ("ended", None, None) == state_of(job)


def test_waiting_for_a_job_without_a_result(shop: Shop) -> None:
    """A job that stores no result cannot be waited for: the wait ends with the reason when the job has ended."""

    @ai_task(criticality="deferrable", store_results=False)
    def quiet() -> None: ...

    shop.work()
    with pytest.raises(JobFailed, match="stores no result"):
        tideover.wait_for_sync(quiet.send(), timeout=NOW)


@pytest.fixture
def full(shop: Shop, swift_restarts: None) -> Iterator[Callable[[], None]]:
    """Makes Redis refuse writes, as one does that is full; `refusals` counts. It has room again after the test."""
    yield lambda: shop.broker.client.config_set("maxmemory", "1")
    make_room(shop)


def make_room(shop: Shop) -> None:
    shop.broker.client.config_set("maxmemory", "0")


def refusals(shop: Shop) -> int:
    found = shop.broker.client.info("errorstats").get("errorstat_OOM")
    return int(found["count"]) if found else 0


def until_refused(shop: Shop) -> None:
    """Waits until Redis has refused whatever the shop tried."""
    until = refusals(shop) + 20
    shop.until(lambda: refusals(shop) >= until, "Redis refuses")


def test_a_retry_while_redis_is_full(shop: Shop, full: Callable[[], None]) -> None:
    """While Redis is full a failed job runs again, and ends once."""

    @ai_task(criticality="deferrable", store_results=False, **shop.quick)
    def shaky() -> None:
        shop.ran.append("shaky")
        if len(shop.ran) == 1:
            full()
            raise ValueError("not yet")

    shop.work()
    shaky.send()
    shop.until(lambda: shop.books() == {"accepted": 1, "succeeded": 1}, "it has run again")
    make_room(shop)
    assert ["shaky"] * 2 == shop.ran


def test_a_next_step_that_redis_refuses(shop: Shop, full: Callable[[], None]) -> None:
    """The same for the next step of a pipeline: the first runs again rather than the second never."""

    @ai_task(criticality="deferrable")
    def first() -> str:
        shop.ran.append("first")
        if len(shop.ran) == 1:
            full()
        return "tides"

    @ai_task(criticality="deferrable")
    def second(topic: str) -> str:
        return f"about {topic}"

    shop.work()
    pipe = (first.message() | second.message()).run()
    shop.until(lambda: shop.ran, "step one ran")
    until_refused(shop)
    make_room(shop)
    assert "about tides" == pipe.get_result(block=True, timeout=30_000)
    shop.until_over()
    assert {"accepted": 2, "succeeded": 2} == shop.books()


def test_a_hold_while_redis_is_full(shop: Shop, full: Callable[[], None]) -> None:
    """While Redis is full a job whose call fails is held, and it runs when there is room for its result."""

    @ai_task(criticality="deferrable", models=[shop.model], **shop.quick)
    def unlucky(tag: str) -> str:
        shop.ran.append(tag)
        if len(shop.ran) == 1:
            full()
        return text_of(claude().messages.create(**shop.question(tag)))

    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    job = unlucky.send("x")
    shop.until(lambda: shop.calls("x"), "its call failed")
    shop.until_all("held", [job])
    shop.heal()
    make_room(shop)
    assert "anthropic" == shop.result(job).partition(":")[0]
    shop.until_over()
    assert {"accepted": 1, "succeeded": 1} == shop.books()


def test_an_acknowledgement_while_redis_is_full(shop: Shop, full: Callable[[], None]) -> None:
    """A job that ends while Redis is full is acknowledged."""

    @ai_task(criticality="deferrable", store_results=False)
    def last_straw() -> None:
        shop.ran.append("ran")
        if len(shop.ran) == 1:
            full()

    shop.work()
    last_straw.send()
    shop.until(lambda: shop.ran, "it ran")
    shop.until_over()
    make_room(shop)
    assert {"accepted": 1, "succeeded": 1} == shop.books()


def test_a_failure_while_redis_is_full(shop: Shop, full: Callable[[], None]) -> None:
    """A job that fails for good while Redis is full ends as failed."""

    @ai_task(criticality="deferrable", max_retries=0, store_results=False)
    def buggy() -> None:
        full()
        raise ValueError("a bug")

    shop.work()
    buggy.send()
    shop.until(lambda: shop.books() == {"accepted": 1, "failed": 1}, "it has failed")
    make_room(shop)


def test_the_current_message_is_known_in_function_and_coroutine(shop: Shop) -> None:
    """dramatiq's CurrentMessage works in both."""
    shop.broker.add_middleware(CurrentMessage())

    def whoami() -> str:
        message = CurrentMessage.get_current_message()
        return "nobody" if message is None else str(message.message_id)

    @ai_task(criticality="deferrable")
    def function() -> str:
        return whoami()

    @ai_task(criticality="deferrable")
    async def coroutine() -> str:
        return whoami()

    shop.work()
    jobs = [function.send(), coroutine.send()]
    assert [job.message_id for job in jobs] == [shop.result(job) for job in jobs]


def test_a_time_limit_ends_a_coroutine(shop: Shop) -> None:
    """dramatiq's `time_limit` fails a coroutine, too, though no thread can be interrupted for it."""

    @ai_task(criticality="deferrable", max_retries=0, time_limit=200)
    async def endless() -> None:
        await asyncio.Event().wait()

    shop.work()
    job = endless.send()
    shop.until_over()
    assert {"accepted": 1, "failed": 1} == shop.books()
    with pytest.raises(ResultFailure, match="TimeLimitExceeded"):
        job.get_result(block=True, timeout=2000)


def test_callbacks_see_ends_and_no_holds(shop: Shop) -> None:
    """dramatiq's `on_success` and `on_failure` run once, at the end, and not for a hold."""

    @dramatiq.actor
    def succeeded(message: Any, result: Any) -> None:
        shop.ran.append("succeeded")

    @dramatiq.actor
    def failed(message: Any, error: Any) -> None:
        shop.ran.append("failed")

    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    jobs = [shop.summary.send_with_options(args=(f"job{i}",), on_success="succeeded", on_failure="failed") for i in range(3)]
    shop.until_open()
    shop.until_all("held", jobs)
    assert (0, 0) == (shop.ran.count("succeeded"), shop.ran.count("failed"))
    shop.heal()
    shop.until(lambda: shop.ran.count("succeeded") == 3, "the callbacks run")
    shop.until_over()
    assert (3, 0) == (shop.ran.count("succeeded"), shop.ran.count("failed"))
    assert {"accepted": 6, "succeeded": 6} == shop.books()


def test_a_plain_coroutine_actor_works_as_ever(shop: Shop) -> None:
    """A coroutine that is no AI task runs on dramatiq's own loop."""
    shop.broker.add_middleware(AsyncIO())

    @dramatiq.actor(store_results=True)
    async def add(a: int, b: int) -> int:
        await asyncio.sleep(0)
        return a + b

    shop.work()
    assert 3 == add.send(1, 2).get_result(block=True, timeout=30_000)
    shop.until_over()
    assert {"accepted": 1, "succeeded": 1} == shop.books()


def test_every_key_is_known(shop: Shop) -> None:
    """After hold, reroute, failure and success, each key of the namespace is dramatiq's or in our own corner."""
    shop.work()
    shop.result(shop.reply.send("r"))
    shop.open_breaker(Fault.API_ERROR)
    shop.result(shop.reply.send("rerouted"))
    shop.heal()
    shop.until_over()
    corner = f"{shop.namespace}:__tideover__:"
    names = {name.decode() for name in shop.broker.client.scan_iter(f"{shop.namespace}:*")}
    stock = {name for name in names if not name.startswith(corner)}
    assert {
        name for name in stock if not name.startswith((f"{shop.namespace}:__heartbeats__", f"{shop.namespace}:__acks__"))
    } == set()
    assert corner + "account" in names
