# SPDX-License-Identifier: Apache-2.0
"""What dramatiq offers its senders survives a hold: waiting for results, pipelines, groups and their callbacks."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import dramatiq
import pytest
from dramatiq.middleware import GroupCallbacks, Middleware, Retries
from dramatiq.rate_limits.backends import RedisBackend as BarrierBackend
from dramatiq.results import ResultMissing, ResultTimeout

import tideover
from tideover import NotYet, Tideover, ai_task, clock
from tideover.testing import Fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dramatiq.brokers.redis import RedisBroker
    from dramatiq.message import Message
    from tests.pipeline.conftest import Shop

PATIENCE = timedelta(seconds=20)
DAYS_29_MS = 29 * 86_400_000
Ask = Any


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads of processes that wait for results."""
    with ThreadPoolExecutor(8) as made:
        yield made


# waiting for results


def poll(job: Message[Any]) -> Any:
    """`get_result` without blocking, many times a second."""
    give_up_at, pause = clock.monotonic() + PATIENCE.total_seconds(), threading.Event()
    while True:
        try:
            return job.get_result()
        except ResultMissing:
            assert clock.monotonic() < give_up_at
            pause.wait(0.002)


def ask_dramatiq(job: Message[Any]) -> Any:
    """`get_result(block=True)`, again and again, as a web process does whose patience is short."""
    give_up_at = clock.monotonic() + PATIENCE.total_seconds()
    while True:
        try:
            return job.get_result(block=True, timeout=2000)
        except ResultTimeout:
            assert clock.monotonic() < give_up_at


def ask_tideover(job: Message[Any]) -> Any:
    return tideover.wait_for_sync(job, timeout=PATIENCE, through_holds=True)


def ask_in_a_loop(job: Message[Any]) -> Any:
    async def wait() -> Any:
        return await tideover.wait_for(job, timeout=PATIENCE, through_holds=True)

    return asyncio.run(wait())


@pytest.mark.parametrize("ask", [poll, ask_dramatiq, ask_tideover, ask_in_a_loop])
def test_who_waits_gets_the_answer(shop: Shop, pool: ThreadPoolExecutor, ask: Ask) -> None:
    """Whoever waited before the outage hears nothing while the job is held, no `None` either, and then the answer."""
    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    jobs = [*shop.send(shop.summary, 2, "function"), *shop.send(shop.asummary, 2, "coroutine")]
    waiting = [pool.submit(ask, job) for job in jobs]
    shop.until_open()
    jobs.append(shop.summary.send("late"))
    waiting.append(pool.submit(ask, jobs[-1]))
    shop.until_all("held", jobs)
    assert [False] * 5 == [answer.done() for answer in waiting]
    shop.heal()
    assert ["anthropic"] * 5 == [answer.result(timeout=30).partition(":")[0] for answer in waiting]


def test_who_does_not_wait_through_holds_is_told(shop: Shop, pool: ThreadPoolExecutor) -> None:
    """A wait that began while the job was queued ends with `NotYet` and the reason as soon as it is held."""
    shop.primary.fail(Fault.OVERLOADED)
    jobs = shop.send(shop.summary, 3, "job")
    waiting = [pool.submit(tideover.wait_for_sync, job, timeout=PATIENCE) for job in jobs]
    shop.work()
    told = [answer.exception(timeout=30) for answer in waiting]
    assert [job.message_id for job in jobs] == [later.job_id for later in told if isinstance(later, NotYet)]
    assert {later.reason for later in told if isinstance(later, NotYet)} <= {"failed", "outage"}


def test_what_is_held_is_not_complete(shop: Shop) -> None:
    """A pipeline and a group count no held member among those that are completed."""
    length = declare_length(shop)
    shop.work()
    shop.open_breaker()
    pipe = (shop.summary.message("first") | length.message()).run()
    group = dramatiq.group([shop.summary.message("a"), shop.asummary.message("b"), length.message("c")]).run()
    shop.until(lambda: shop.books() == {"accepted": 7, "held": 6, "succeeded": 1}, "all but one are held")
    assert (False, 0, False, 1) == (pipe.completed, pipe.completed_count, group.completed, group.completed_count)
    shop.heal()
    shop.until_over()
    assert [32, 1] == [len(next(iter(pipe.get_results()))), list(group.get_results())[2]]
    assert (True, 2, True, 3) == (pipe.completed, pipe.completed_count, group.completed, group.completed_count)


def declare_length(shop: Shop) -> tideover.AITask[[str], int]:
    """A task that calls no model."""

    @ai_task(criticality="deferrable", models=["no-such-model"])
    def length(answer: str) -> int:
        shop.ran.append(f"length {len(answer)}")
        return len(answer)

    return length


# pipelines and groups


def test_a_pipeline_whose_own_call_fails(shop: Shop) -> None:
    """A first step that met the outage itself is no end of its step: the second runs once, with the answer, afterwards."""
    length = declare_length(shop)
    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    pipes = [(task.message("step") | length.message()).run() for task in (shop.summary, shop.asummary, shop.summary)]
    shop.until_open()
    shop.until(lambda: shop.books() == {"accepted": 3, "held": 3}, "the first steps are held")
    shop.heal()
    shop.until_over()
    assert {"accepted": 6, "succeeded": 6} == shop.books()
    assert [32] * 3 == [pipe.get_result() for pipe in pipes]
    assert ["length 32"] * 3 == [ran for ran in shop.ran if ran.startswith("length")]


def test_a_pipeline_with_a_delay(shop: Shop) -> None:
    """A delayed step that is held, of three: each runs once, the result of the last is the pipeline's."""
    length = declare_length(shop)
    shop.work()
    shop.open_breaker()
    again = shop.summary.message_with_options(args=("again",), pipe_ignore=True, delay=50)
    pipe = (shop.summary.message("first") | again | length.message()).run(delay=50)
    shop.until(lambda: shop.books() == {"accepted": 4, "held": 4}, "the first step is held")
    shop.heal()
    shop.until_over()
    assert {"accepted": 6, "succeeded": 6} == shop.books()
    assert ["again", "first", "length 32"] == sorted(set(shop.ran) - {"canary0", "canary1", "canary2"})
    assert 32 == pipe.get_result()


def complete(shop: Shop) -> dramatiq.Actor[[], None]:
    """The completion callback of a group."""

    @dramatiq.actor
    def complete() -> None:
        shop.ran.append("complete")

    return complete


def callbacks(broker: RedisBroker, ttl: int = 800) -> GroupCallbacks:
    return GroupCallbacks(BarrierBackend(client=broker.client), barrier_ttl=ttl)


def add_before_tideover(shop: Shop) -> None:
    """A new broker, on which the middleware stands before tideover."""
    shop.broker = shop.new_broker(with_tideover=False)
    shop.broker.add_middleware(callbacks(shop.broker))
    shop.broker.add_middleware(Tideover())
    dramatiq.set_broker(shop.broker)
    shop.declare()


def add_after_tideover(shop: Shop) -> None:
    """The same, but after it."""
    shop.broker = shop.new_broker()
    shop.broker.add_middleware(callbacks(shop.broker))
    dramatiq.set_broker(shop.broker)
    shop.declare()


def add_after_the_tasks(shop: Shop) -> None:
    """Last of all, when tasks have been declared."""
    shop.broker.add_middleware(callbacks(shop.broker))


@pytest.mark.parametrize("add", [add_before_tideover, add_after_tideover, add_after_the_tasks])
def test_a_group_that_is_held_for_longer_than_its_barrier_was_to_live(shop: Shop, add: Callable[[Shop], None]) -> None:
    """Its callback runs once, when the last member has ended, whatever `barrier_ttl` the application asked for."""
    add(shop)
    group = dramatiq.group([shop.summary.message("member0"), shop.summary.message("member1")])
    group.add_completion_callback(complete(shop).message())
    shop.work()
    shop.open_breaker()
    group.run()
    shop.until_all("held", group.children)
    held_ms = max(shop.facts(child).held_ms for child in group.children)
    shop.until(lambda: clock.now_ms() > held_ms + 1200, "they were held for longer than 800 ms")
    assert [] == [ran for ran in shop.ran if ran == "complete"]
    shop.heal()
    shop.until_over()
    shop.until(lambda: "complete" in shop.ran, "the group is complete")
    shop.until_over()
    assert {"accepted": 6, "succeeded": 6} == shop.books()
    assert 1 == shop.ran.count("complete")


@pytest.mark.parametrize("add", [add_before_tideover, add_after_tideover, add_after_the_tasks])
def test_a_producer_makes_barriers_that_outlive_a_hold(shop: Shop, add: Callable[[Shop], None]) -> None:
    """In a process that never starts a worker, too, and for the first group that it runs."""
    add(shop)
    group = dramatiq.group([shop.summary.message("member")])
    group.add_completion_callback(complete(shop).message())
    group.run()
    body = shop.body(group.children[0])
    assert body is not None
    assert shop.broker.client.pttl(body.options["group_completion_uuid"]) > DAYS_29_MS


def test_a_longer_barrier_stays_as_long_as_it_is(shop: Shop) -> None:
    """Who asked for more than tideover needs gets what was asked for."""
    longer = callbacks(shop.broker, ttl=10 * DAYS_29_MS)
    shop.broker.add_middleware(longer)
    assert 10 * DAYS_29_MS == longer.barrier_ttl


def test_a_group_of_pipelines_and_a_callback_that_is_held(shop: Shop) -> None:
    """A pipeline, a member whose first attempt fails, a callback that is an AI task: each runs as often as it must."""
    shop.broker.add_middleware(callbacks(shop.broker))
    length = declare_length(shop)

    @ai_task(criticality="deferrable", models=[shop.model], **shop.quick)
    def shaky(text: str) -> str:
        shop.ran.append("shaky")
        if shop.ran.count("shaky") == 1:
            raise ValueError("the first attempt")
        return text

    shop.work()
    group = dramatiq.group([length.message("0"), shop.summary.message("1") | length.message(), shaky.message("2")])
    group.add_completion_callback(shop.summary.message("all done"))
    shop.open_breaker()
    group.run()
    shop.until(lambda: shop.books() == {"accepted": 6, "held": 5, "succeeded": 1}, "two members are held")
    shop.heal()
    shop.until(lambda: shop.calls("all done"), "the group is complete")
    shop.until_over()
    assert {"accepted": 8, "succeeded": 8} == shop.books()
    assert (1, 2, 2) == (shop.ran.count("all done"), shop.ran.count("shaky"), len([r for r in shop.ran if "length" in r]))


# retries


class Dawdler(Middleware):
    """A middleware that takes its time after an attempt: until the attempt's retry has been fetched by the same worker."""

    def __init__(self, shop: Shop) -> None:
        self.shop, self.late = shop, 0

    def after_process_message(
        self, broker: dramatiq.Broker, message: dramatiq.MessageProxy, *, result: Any = None, exception: Any = None
    ) -> None:
        if exception is not None and not self.late:
            self.late += 1
            self.shop.until(lambda: len(self.shop.ran) == 2, "the retry runs")


def test_a_retry_that_overtakes_the_end_of_its_attempt(shop: Shop) -> None:
    """An attempt whose acknowledgement comes after its retry has begun does not end the job in the retry's place."""
    go_on = threading.Event()

    @ai_task(criticality="deferrable", models=["no-such-model"], **shop.quick)
    def shaky() -> str:
        shop.ran.append("shaky")
        if len(shop.ran) == 1:
            raise ValueError("the first attempt")
        go_on.wait(30)
        return "done"

    shop.broker.add_middleware(Dawdler(shop), before=Retries)
    shop.work()
    job = shaky.send()
    shop.until(lambda: len(shop.ran) == 2, "the retry runs")
    shop.until(lambda: not shop.workers[0].work_queue.unfinished_tasks > 1, "the first attempt is acknowledged")
    assert {"accepted": 1, "running": 1} == shop.books()
    go_on.set()
    assert "done" == shop.result(job)
    shop.until_over()
    assert {"accepted": 1, "succeeded": 1} == shop.books()
