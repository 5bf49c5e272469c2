# SPDX-License-Identifier: Apache-2.0
"""dramatiq's middlewares, and an application's own, are right about a job that was held; priorities, delays and queues hold."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any

import dramatiq
import pytest
from dramatiq.errors import RateLimitExceeded, Retry
from dramatiq.middleware import AgeLimit, CurrentMessage, Middleware, SkipMessage, TimeLimit
from dramatiq.middleware.prometheus import Prometheus
from dramatiq.results import ResultFailure

import tideover
from tideover import Tideover, ai_task, clock
from tideover.testing import Fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.pipeline.conftest import Shop

PATIENCE = timedelta(seconds=20)


# age and time limits


def test_held_time_is_no_age_wherever_the_limit_stands(shop: Shop) -> None:
    """`max_age` of the job, of its task or of the middleware: what was held for longer than that runs all the same."""
    limit = next(m for m in shop.broker.middleware if isinstance(m, AgeLimit))
    limit.max_age = 3000

    @ai_task(criticality="deferrable", models=[shop.model], max_age=3000)
    def young(tag: str) -> str:
        return tag

    shop.work()
    shop.open_breaker()
    jobs = [young.send("task"), shop.summary.send("middleware")]
    jobs.append(shop.summary.send_with_options(args=("job",), max_age=3000))
    shop.until_all("held", jobs)
    held_ms = max(shop.facts(job).held_ms for job in jobs)
    shop.until(lambda: clock.now_ms() > held_ms + 3200, "they were held for longer than their age")
    shop.heal()
    shop.until_over()
    assert {"accepted": 6, "succeeded": 6} == shop.books()


def test_a_young_job_runs_after_a_hold(shop: Shop) -> None:
    """A job that is far from its age limit is not touched by it."""
    shop.work()
    shop.open_breaker()
    job = shop.summary.send_with_options(args=("young",), max_age=60_000)
    shop.until_all("held", [job])
    shop.heal()
    assert "anthropic" == shop.result(job).partition(":")[0]


@pytest.mark.parametrize("held", [False, True])
def test_held_time_extends_max_age(shop: Shop, held: bool) -> None:
    """A job that is too old without the time it was held ends as stock dramatiq ends it: a dead letter, without a call."""
    shop.work()
    if held:
        shop.open_breaker()
    old = shop.summary.message_with_options(args=("old",), max_age=60_000)
    job = shop.broker.enqueue(old.copy(message_timestamp=clock.now_ms() - 3_600_000))
    if held:
        shop.until_all("held", [job])
        shop.heal()
    shop.until_over()
    others = {"succeeded": 3} if held else {}
    assert {"accepted": 4 if held else 1, "failed": 1, **others} == shop.books()
    assert [] == shop.calls("old")
    with pytest.raises(ResultFailure, match="age limit"):
        tideover.wait_for_sync(job, timeout=PATIENCE)
    assert 1 == shop.broker.client.zcard(shop.keys.dead("default"))


def guard(shop: Shop) -> None:
    """Starts the watch over functions' time limits, as the dramatiq command does in its processes."""
    next(m for m in shop.broker.middleware if isinstance(m, TimeLimit)).after_process_boot(shop.broker)


def test_a_time_limit_does_not_count_a_hold(shop: Shop) -> None:
    """Neither the hold nor the attempt that met the outage counts; that attempt's timer does not strike its thread later."""

    @ai_task(criticality="deferrable", models=[shop.model], time_limit=4000, max_retries=0)
    def limited(tag: str) -> str:
        return tideover.text_of(tideover.claude().messages.create(**shop.question(tag)))

    guard(shop)
    shop.work(threads=2)
    shop.primary.fail(Fault.OVERLOADED)
    jobs = shop.send(limited, 3, "job")
    shop.until_open()
    shop.until_all("held", jobs)
    held_ms = max(shop.facts(job).held_ms for job in jobs)
    shop.until(lambda: clock.now_ms() > held_ms + 4200, "they were held for longer than the limit")
    shop.heal()
    shop.until_over()
    assert {"accepted": 3, "succeeded": 3} == shop.books()


def test_a_time_limit_ends_a_function(shop: Shop) -> None:
    """A function that goes on for too long fails, as ever: it is not held, and the outage has nothing to do with it."""

    @ai_task(criticality="deferrable", models=["no-such-model"], time_limit=100, max_retries=0)
    def endless() -> None:
        pause = threading.Event()
        while True:
            pause.wait(0.01)

    guard(shop)
    shop.work()
    shop.open_breaker()
    job = endless.send()
    shop.until(lambda: shop.books() == {"accepted": 4, "held": 3, "failed": 1}, "it fails")
    with pytest.raises(ResultFailure, match="TimeLimitExceeded"):
        tideover.wait_for_sync(job, timeout=PATIENCE)


def test_a_call_that_began_late_says_nothing_of_its_provider(shop: Shop) -> None:
    """A coroutine that spent its time elsewhere is cut as ever, and its call is not held against the provider."""

    @ai_task(criticality="deferrable", models=[shop.model], time_limit=500, max_retries=0)
    async def limited(tag: str) -> str:
        await asyncio.sleep(0.3)
        return tideover.text_of(await tideover.aclaude().messages.create(**shop.question(tag)))

    shop.work()
    shop.primary.fail(Fault.HANG)
    jobs = shop.send(limited, 3, "job")
    shop.until_over()
    assert {"accepted": 3, "failed": 3} == shop.books()
    assert "closed" == shop.breaker().state
    with pytest.raises(ResultFailure, match="TimeLimitExceeded"):
        tideover.wait_for_sync(jobs[0], timeout=PATIENCE)


# callbacks, the current message, other people's signals


def test_a_rerouted_job_has_its_callback(shop: Shop) -> None:
    """In the outage a critical job ends over another route, and `on_success` runs; a held coroutine has none before its end."""

    @dramatiq.actor
    def succeeded(message: Any, result: Any) -> None:
        shop.ran.append(f"{message['args'][0]} succeeded")

    @dramatiq.actor
    def failed(message: Any, error: Any) -> None:
        shop.ran.append(f"{message['args'][0]} failed")

    shop.work()
    shop.open_breaker()
    options = {"on_success": succeeded, "on_failure": failed}
    shop.areply.send_with_options(args=("critical",), **options)
    shop.asummary.send_with_options(args=("deferrable",), **options)
    shop.until(lambda: "critical succeeded" in shop.ran, "the critical job has ended")
    shop.until(lambda: shop.books() == {"accepted": 6, "held": 4, "succeeded": 2}, "the deferrable one is held")
    assert ["critical succeeded"] == [ran for ran in shop.ran if ran.endswith("ed")]
    shop.heal()
    shop.until_over()
    shop.until(lambda: "deferrable succeeded" in shop.ran, "its callback runs")
    shop.until_over()
    assert ["critical succeeded", "deferrable succeeded"] == [ran for ran in shop.ran if ran.endswith("ed")]


class Witness(Middleware):
    """Notes what a middleware that comes early sees of the current message, before CurrentMessage sets it."""

    def __init__(self) -> None:
        self.seen: list[str | None] = []

    def before_process_message(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
        message_now = CurrentMessage.get_current_message()
        self.seen.append(None if message_now is None else message_now.message_id)


def test_a_held_message_is_not_the_current_one_any_more(shop: Shop) -> None:
    """After a hold, the thread does not go on with the held message as the current one."""
    witness = Witness()
    shop.broker.add_middleware(witness, before=TimeLimit)
    shop.broker.add_middleware(CurrentMessage())
    shop.work(threads=1)
    shop.open_breaker()
    shop.heal()
    shop.until_over()
    assert len(witness.seen) > 3  # one at least was held by its run, and somebody ran after it
    assert [None] * len(witness.seen) == witness.seen


@pytest.mark.parametrize("signal", [Retry("later", delay=10), RateLimitExceeded("enough for now")])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_dramatiq_s_own_signals_are_retries(shop: Shop, signal: Exception, asynchronous: bool) -> None:
    """A task that asks for a retry, or runs into a limiter of the application, is retried, not held."""

    def once() -> str:
        shop.ran.append("once")
        if len(shop.ran) == 1:
            raise signal
        return "done"

    if asynchronous:

        @ai_task(criticality="deferrable", **shop.quick)
        async def task() -> str:
            return once()
    else:

        @ai_task(criticality="deferrable", **shop.quick)
        def task() -> str:
            return once()

    shop.work()
    job = task.send()
    assert "done" == shop.result(job)
    shop.until_over()
    assert {"accepted": 1, "succeeded": 1} == shop.books()
    assert "held" not in shop.events(job)


class Picky(Middleware):
    """Somebody else's middleware, which skips jobs; where told so, it fails them, too, as dramatiq's AgeLimit does."""

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails

    def before_process_message(self, broker: dramatiq.Broker, message: dramatiq.MessageProxy) -> None:
        if message.args[0].startswith("unwanted"):
            if self.fails:
                message.fail()
            raise SkipMessage("not wanted any more")


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_what_another_middleware_skips_is_discarded(shop: Shop, early: bool, fails: bool) -> None:
    """Added before or after tideover; function or coroutine; held before or not. *Failed*, where that middleware fails it."""
    shop.broker.add_middleware(Picky(fails=fails), **({"before": Tideover} if early else {}))
    shop.work()
    fresh = [shop.summary.send("unwanted0"), shop.asummary.send("unwanted1"), shop.reply.send("unwanted2")]
    shop.result(shop.asummary.send("wanted"))  # what a task calls is learned from its first call
    shop.until_over()
    shop.open_breaker()
    held = [shop.summary.send("unwanted3"), shop.asummary.send("unwanted4")]
    shop.until_all("held", held)
    shop.heal()
    shop.until_over()
    assert {"accepted": 9, "succeeded": 4, "failed" if fails else "discarded": 5} == shop.books()
    assert [[]] * 5 == [shop.calls(job.args[0]) for job in (*fresh, *held)]


# priorities, delays, queues


def test_priorities_hold_among_released_jobs(shop: Shop) -> None:
    """Of jobs that were held and wait for a thread, those of the actor with the better priority go first."""
    go_on, order = threading.Event(), []

    @dramatiq.actor
    def block() -> None:
        go_on.wait(30)

    @ai_task(criticality="deferrable", models=[shop.model], priority=10)
    def low(n: int) -> None:
        order.append(f"low {n}")

    @ai_task(criticality="deferrable", models=[shop.model], priority=-10)
    def high(n: int) -> None:
        order.append(f"high {n}")

    shop.work(threads=1)
    shop.open_breaker()
    jobs = [*(low.send(n) for n in range(3)), *(high.send(n) for n in range(3))]
    shop.until_all("held", jobs)
    shop.until_all("running", [block.send()])
    shop.heal()
    shop.until_all("running", jobs)
    go_on.set()
    shop.until_over()
    assert ["high"] * 3 + ["low"] * 3 == [ran.partition(" ")[0] for ran in order]


def test_a_delay_that_ends_in_an_outage(shop: Shop) -> None:
    """A delayed job waits for its eta, is held then, and runs once when it is released; one whose eta is later waits on."""
    shop.work()
    shop.open_breaker()
    soon = shop.summary.send_with_options(args=("soon",), delay=300)
    shop.asummary.send_with_options(args=("late",), delay=3_600_000)
    shop.until_all("held", [soon])
    assert shop.facts(soon).held_ms >= soon.message_timestamp + 300 - 20, "but for what two clocks may differ by"
    assert 1 == shop.books()["queued"]
    shop.heal()
    assert "anthropic" == shop.result(soon).partition(":")[0]
    shop.until(lambda: shop.books() == {"accepted": 5, "succeeded": 4, "queued": 1}, "all but the late one have ended")
    assert (1, 0) == (len(shop.calls("soon")), len(shop.calls("late")))


def test_a_job_that_waits_for_its_eta_is_queued(shop: Shop) -> None:
    """As the account says it; in the memory of a worker, too."""
    shop.work()
    job = shop.summary.send_with_options(args=("late",), delay=3_600_000)
    in_memory = shop.broker.client.smembers
    shop.until(lambda: in_memory(shop.keys.acks(shop.broker.broker_id, "default.DQ")), "a worker has fetched it")
    assert {"accepted": 1, "queued": 1} == shop.books()
    assert "queued" == tideover.status(job).state


def test_a_worker_of_some_queues(shop: Shop) -> None:
    """`-Q tickets` works off that queue, its critical lane and what is held of it; other jobs wait for their own workers."""

    @ai_task(criticality="deferrable", models=[shop.model], queue_name="tickets")
    def tag(name: str) -> str:
        shop.ran.append(name)
        return name

    shop.work()
    shop.open_breaker()
    theirs = shop.summary.send("theirs")
    ours = [tag.send("ours"), tag.send_with_options(args=("urgent",), criticality="critical", expires_in=None)]
    shop.until_all("held", [theirs, *ours])
    shop.stop_working()
    shop.work(queues={"tickets"})
    shop.heal()
    assert ["ours", "urgent"] == [shop.result(job) for job in ours]
    assert [] == shop.calls("theirs")
    assert tideover.status(theirs).state in ("held", "queued")
    shop.stop_working()
    shop.work()
    shop.until_over()
    assert {"accepted": 6, "succeeded": 6} == shop.books()
    assert (1, 1, 1) == (shop.ran.count("theirs"), shop.ran.count("ours"), shop.ran.count("urgent"))


# dramatiq's Prometheus


class Metrics:
    """What dramatiq's Prometheus middleware counts in this process."""

    def __init__(self, shop: Shop, **where: Any) -> None:
        self.middleware = Prometheus()
        shop.broker.add_middleware(self.middleware, **where)
        self.middleware.after_process_boot(shop.broker)  # the dramatiq command says it

    def read(self, name: str) -> float:
        """A metric over all queues and actors."""
        samples = [sample for metric in getattr(self.middleware, name).collect() for sample in metric.samples]
        return sum(sample.value for sample in samples if not sample.name.endswith("_created"))


@pytest.fixture
def metrics(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Metrics]:
    """Puts the middleware on the shop's broker. It counts in memory: nothing speaks of several processes at the import."""
    import_module("prometheus_client")
    for name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"):
        monkeypatch.setenv(name, str(shop.folder))
    monkeypatch.setattr("dramatiq.middleware.prometheus.DB_PATH", str(shop.folder))
    return lambda **where: Metrics(shop, **where)


@pytest.mark.parametrize("where", [{}, {"before": Tideover}], ids=["after tideover", "before tideover"])
def test_no_job_is_in_progress_that_is_held(shop: Shop, metrics: Callable[..., Metrics], where: dict[str, Any]) -> None:
    """The gauge of jobs in progress never falls below zero, is zero when all are held, and zero in the end."""
    read, seen = metrics(**where).read, []

    def all_are_held() -> bool:
        seen.append(read("inprogress_messages"))
        return {tideover.status(job).state for job in jobs} == {"held"}

    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    jobs = [*shop.send(shop.summary, 3, "function"), *shop.send(shop.asummary, 3, "coroutine")]
    shop.until_open()
    jobs += shop.send(shop.summary, 5, "late")
    shop.until(all_are_held, "all are held")
    shop.until(lambda: read("inprogress_messages") == 0, "none is in progress")
    shop.heal()
    shop.until_over()
    shop.until(lambda: read("inprogress_messages") == 0, "none is in progress in the end")
    assert min(seen) >= 0
    assert (0, 0, 0) == tuple(
        read(name) for name in ("total_errored_messages", "total_retried_messages", "total_rejected_messages")
    )


def test_a_hold_is_not_counted_as_processed(shop: Shop, metrics: Callable[..., Metrics]) -> None:
    """A job whose own call met the outage is counted when it has ended, once; its duration, too."""
    read = metrics().read
    shop.work()
    shop.open_breaker()
    assert 0 == read("total_messages")
    shop.heal()
    shop.until_over()
    shop.until(lambda: read("inprogress_messages") == 0, "none is in progress in the end")
    assert 3 == read("total_messages")
