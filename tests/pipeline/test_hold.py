# SPDX-License-Identifier: Apache-2.0
"""A deferrable job waits out its provider's outage: held, not failed, nothing spent, and run with what it was sent with."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import dramatiq
import pytest
from dramatiq.results import ResultFailure, ResultMissing
from tests.pipeline.conftest import WITHIN_S

import tideover
from tideover import NotYet, aclaude, ai_task, claude, text_of
from tideover.core.route import Permit
from tideover.store.backlog import Backlog
from tideover.testing import Fault

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.pipeline.conftest import Shop

    from tideover.store.facts import HeldFacts

NOW = timedelta(seconds=3)
OUTAGES = [
    Fault.OVERLOADED,
    Fault.API_ERROR,
    Fault.BAD_GATEWAY,
    Fault.UNAVAILABLE,
    Fault.GATEWAY_TIMEOUT,
    Fault.EDGE_HTML,
    Fault.RESET,
    Fault.UNAUTHORIZED,
    Fault.FORBIDDEN,
    Fault.NOT_FOUND,
    Fault.QUOTA,
    Fault.STREAM_CUT,
    Fault.STREAM_NO_STOP,
    Fault.OK_HTML,
    Fault.OK_EMPTY,
    Fault.OK_ERROR_BODY,
]
"""What a plain call can meet that is not the caller's fault, a hang apart. `STREAM_NO_STOP` answers without a stop reason."""


@pytest.mark.parametrize("fault", OUTAGES)
def test_an_outage_holds(shop: Shop, fault: Fault) -> None:
    """Whatever way the provider fails, the job is held, not failed; when it works again, the job ends well, with its answer."""
    shop.work()
    canaries = shop.open_breaker(fault)
    assert {"accepted": 3, "held": 3} == shop.books()
    shop.heal()
    assert ["anthropic: The"] * 3 == [shop.result(job)[:14] for job in canaries]
    shop.until_over()
    assert {"accepted": 3, "succeeded": 3} == shop.books()


@pytest.mark.parametrize("kind", ["summary", "asummary"])
def test_a_hold_spends_nothing(shop: Shop, kind: str) -> None:
    """A held job waits as it was sent: no retry counted, no traceback, no result, the same arguments."""
    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    jobs = shop.send(getattr(shop, kind), 3, "job")
    shop.until_open()
    shop.until_all("held", jobs)
    bodies = [shop.body(job) for job in jobs]
    assert [job.args for job in jobs] == [body.args for body in bodies if body is not None]
    assert {"redis_message_id", "tideover"} == {name for body in bodies if body is not None for name in body.options}


def test_a_held_job_has_no_result(shop: Shop) -> None:
    """dramatiq's own question for the result of a held job is answered as for a job that still waits."""
    shop.work()
    job = shop.open_breaker()[0]
    with pytest.raises(ResultMissing):
        job.get_result()


def test_waiting_for_a_held_job_says_why(shop: Shop) -> None:
    """`wait_for_sync` does not wait out a hold unless asked to: it says that the job is held, why, and when to ask again."""
    shop.work()
    shop.open_breaker()
    job = shop.summary.send("late")
    shop.until_all("held", [job])
    with pytest.raises(NotYet) as caught:
        tideover.wait_for_sync(job, timeout=NOW)
    assert (job.message_id, "outage") == (caught.value.job_id, caught.value.reason)
    assert caught.value.retry_after_s is not None


async def wait_in_loop(job: Any) -> Any:
    return await tideover.wait_for(job, timeout=NOW)


def test_waiting_in_an_event_loop_says_why(shop: Shop) -> None:
    """`wait_for` gives the same answer."""
    shop.work()
    shop.open_breaker()
    job = shop.asummary.send("late")
    shop.until_all("held", [job])
    with pytest.raises(NotYet) as caught:
        asyncio.run(wait_in_loop(job))
    assert "outage" == caught.value.reason


ARGUMENTS: list[Any] = ["text\x00\u2028é🌊", 2**53 + 1, -0.5, True, None, [[], {}], {"deep": [{"a": [1, 2.5, None]}]}]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_released_job_runs_with_exactly_its_arguments(shop: Shop, asynchronous: bool) -> None:
    """After the outage the function gets what was sent, positional and by name, down to the last bit."""
    got: list[Any] = []

    if asynchronous:

        @ai_task(criticality="deferrable", models=[shop.model])
        async def keep(*args: Any, **kwargs: Any) -> None:
            got.append([list(args), kwargs])
    else:

        @ai_task(criticality="deferrable", models=[shop.model])
        def keep(*args: Any, **kwargs: Any) -> None:
            got.append([list(args), kwargs])

    shop.work()
    shop.open_breaker()
    job = keep.send(*ARGUMENTS, name=ARGUMENTS)
    shop.until_all("held", [job])
    shop.heal()
    shop.until_all("ended", [job])
    assert [[ARGUMENTS, {"name": ARGUMENTS}]] == got


@pytest.mark.parametrize("kind", ["summary", "asummary"])
def test_an_open_breaker_stops_jobs_at_the_gate(shop: Shop, kind: str) -> None:
    """Jobs that arrive while the breaker is open are held before a function body runs or a call is made."""
    shop.work()
    if kind == "asummary":  # what a task calls is learned from its first call
        shop.result(shop.asummary.send("first"))
    shop.open_breaker()
    shop.ran.clear()
    jobs = shop.send(getattr(shop, kind), 20, "late")
    shop.until_all("held", jobs)
    assert [] == shop.ran
    assert [] == [call.job for call in shop.primary.calls() if call.job and call.job.startswith("late")]
    assert {"outage"} == {shop.facts(job).reason for job in jobs}
    assert [["enqueued", "held"]] * 20 == [shop.events(job) for job in jobs]


def test_prefetched_jobs_are_stopped_too(shop: Shop) -> None:
    """What a worker had fetched ahead when the breaker opened is held without a run, too."""

    together = threading.Barrier(3)  # of four places one is kept for critical jobs

    @ai_task(criticality="deferrable", models=[shop.model])
    def slow(tag: str) -> str:
        shop.ran.append(tag)
        together.wait(WITHIN_S)
        try:
            return text_of(claude().messages.create(**shop.question(tag)))
        except BaseException:
            shop.until(lambda: shop.seen().state != "closed", "this worker sees the breaker open")
            raise

    jobs = shop.send(slow, 8, "slow")
    shop.primary.fail(Fault.OVERLOADED)
    shop.work(threads=4)
    shop.until_all("held", jobs)
    assert 3 == len(shop.ran)
    assert {call.job for call in shop.primary.calls()} - {None} <= set(shop.ran)


def test_prefetched_coroutines_are_stopped_too(shop: Shop) -> None:
    """The same for coroutines: those in flight when the breaker opens pay for it, those behind them never start."""
    started: list[str] = []
    gate: list[bool] = []

    @ai_task(criticality="deferrable", models=[shop.model])
    async def slow(tag: str) -> str:
        started.append(tag)
        while not gate:
            await asyncio.sleep(0.01)
        return text_of(await aclaude().messages.create(**shop.question(tag)))

    shop.work()
    jobs = shop.send(slow, 3, "slow")
    shop.until(lambda: len(started) == 3, "three are in flight")
    shop.primary.fail(Fault.OVERLOADED)
    gate.append(True)
    shop.until_open()
    late = shop.send(slow, 10, "late")
    shop.until_all("held", [*jobs, *late])
    assert [] == [tag for tag in started if tag.startswith("late")]


def test_a_broad_except_is_no_way_around_a_hold(shop: Shop) -> None:
    """`except Exception` around the call does not see the hold; the job is held, and its fallback value is no result."""

    @ai_task(criticality="deferrable", models=[shop.model])
    def careless(tag: str) -> str:
        try:
            return text_of(claude().messages.create(**shop.question(tag)))
        except Exception:
            return "sorry"

    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    jobs = shop.send(careless, 3, "job")
    shop.until_all("held", jobs)
    shop.heal()
    assert ["anthropic"] * 3 == [shop.result(job).partition(":")[0] for job in jobs]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_swallowing_everything_is_no_way_around_a_hold(shop: Shop, asynchronous: bool) -> None:
    """`except BaseException: pass` swallows the signal, not the hold."""

    if asynchronous:

        @ai_task(criticality="deferrable", models=[shop.model])
        async def reckless(tag: str) -> str:
            with suppress(BaseException):
                return text_of(await aclaude().messages.create(**shop.question(tag)))
            return "sorry"
    else:

        @ai_task(criticality="deferrable", models=[shop.model])
        def reckless(tag: str) -> str:
            with suppress(BaseException):
                return text_of(claude().messages.create(**shop.question(tag)))
            return "sorry"

    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    jobs = shop.send(reckless, 3, "job")
    shop.until_all("held", jobs)
    shop.heal()
    assert ["anthropic"] * 3 == [shop.result(job).partition(":")[0] for job in jobs]


def test_an_error_raised_over_a_swallowed_hold_is_no_failure(shop: Shop) -> None:
    """What goes wrong in user code after it swallowed the hold is no failure of the job: it is held."""

    @ai_task(criticality="deferrable", models=[shop.model], **shop.quick)
    def reckless(tag: str) -> str:
        reply = None
        with suppress(BaseException):
            reply = claude().messages.create(**shop.question(tag))
        return text_of(reply)

    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    jobs = shop.send(reckless, 3, "job")
    shop.until_open()
    shop.until_all("held", jobs)
    assert {"accepted": 3, "held": 3} == shop.books()


@pytest.mark.parametrize("how", ["gather", "task group"])
def test_many_calls_of_one_job_hold_it_once(shop: Shop, how: str) -> None:
    """A gather or a task group whose calls all meet the outage is one hold of one job."""

    @ai_task(criticality="deferrable", models=[shop.model], **shop.quick)
    async def many(tag: str) -> list[str]:
        if how == "gather":
            replies = await asyncio.gather(*(aclaude().messages.create(**shop.question(tag)) for _ in range(5)))
            return [text_of(reply) for reply in replies]
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(aclaude().messages.create(**shop.question(tag))) for _ in range(5)]
        return [text_of(call.result()) for call in calls]

    shop.work()
    shop.open_breaker()
    shop.heal()
    shop.until(shop.is_up, "the primary is back")
    shop.until_over()
    shop.primary.fail(Fault.OVERLOADED)
    job = many.send("many")
    shop.until(lambda: "held" in shop.events(job), "the job is held")
    shop.heal()
    assert 5 == len(shop.result(job))
    holds = [line.facts["generation"] for line in shop.story(job) if line.event == "held"]
    assert sorted(set(holds)) == holds
    shop.until_over()
    assert {"accepted": 4, "succeeded": 4} == shop.books()


def test_a_second_outage_holds_again(shop: Shop) -> None:
    """When the outage returns while the backlog drains, jobs are held again, once for each outage and never twice in one."""
    shop.configure(probe_after_s=0.3, probe_max_s=0.5)
    shop.work()
    shop.open_breaker()
    jobs = shop.send(shop.summary, 60, "job")
    shop.until_all("held", jobs)
    shop.heal()
    shop.until(lambda: any(shop.calls(job.args[0]) for job in jobs), "the backlog drains")
    shop.primary.fail(Fault.OVERLOADED)
    first = shop.breaker().generation
    shop.until(lambda: shop.breaker().generation > first, "the breaker opens again")
    shop.heal()
    shop.until_over()
    assert {"accepted": 63, "succeeded": 63} == shop.books()
    stories = [[line.facts["generation"] for line in shop.story(job) if line.event == "held"] for job in jobs]
    assert [sorted(set(holds)) for holds in stories] == stories
    assert any(len(holds) > 1 for holds in stories)


def test_a_job_s_own_bug_is_a_failure(shop: Shop) -> None:
    """A ValueError of the function is retried as dramatiq retries, and then fails, though the provider is healthy or not."""

    @ai_task(criticality="deferrable", **shop.quick)
    def buggy(tag: str) -> None:
        shop.ran.append(tag)
        claude().messages.create(**shop.question(tag))
        raise ValueError("a bug")

    shop.work()
    job = buggy.send("bug")
    shop.until_over()
    assert {"accepted": 1, "failed": 1} == shop.books()
    assert ["bug"] * 3 == shop.ran
    assert "held" not in shop.events(job)
    with pytest.raises(ResultFailure, match="a bug"):
        job.get_result(block=True, timeout=2000)


def test_a_model_s_bad_json_is_the_job_s_own_failure(shop: Shop) -> None:
    """`json.loads` on an answer that is no JSON says nothing about the provider: a failure, retried, never a hold."""

    @ai_task(criticality="deferrable", **shop.quick)
    async def parse(tag: str) -> Any:
        return json.loads(text_of(await aclaude().messages.create(**shop.question(tag))))

    shop.work()
    job = parse.send("json")
    shop.until_over()
    assert {"accepted": 1, "failed": 1} == shop.books()
    assert 3 == len(shop.calls("json"))
    assert "held" not in shop.events(job)
    assert "closed" == shop.breaker().state


def test_a_bug_during_an_outage_is_a_failure(shop: Shop) -> None:
    """A bug before the first call of a job is a failure even while the provider is down."""

    @ai_task(criticality="deferrable", **shop.quick)
    def buggy(tag: str) -> None:
        raise ValueError(tag)

    shop.work()
    shop.open_breaker()
    buggy.send("bug")
    shop.until(lambda: shop.books().get("failed") == 1, "the job fails")
    assert {"accepted": 4, "held": 3, "failed": 1} == shop.books()


@pytest.mark.parametrize("kind", ["summary", "reply"])
def test_the_caller_s_own_error_is_a_failure(shop: Shop, kind: str) -> None:
    """A 400 fails the job, deferrable or critical: no hold, no reroute, and the breaker stays closed."""
    shop.work()
    shop.primary.fail(Fault.BAD_REQUEST)
    shop.send(getattr(shop, kind), 5, "bad")
    shop.until_over()
    assert {"accepted": 5, "failed": 5} == shop.books()
    assert ("closed", 0) == (shop.breaker().state, shop.breaker().generation)
    assert [] == shop.fallback.calls()


@pytest.mark.parametrize("kind", ["summary", "asummary"])
def test_throttling_holds_for_the_pace(shop: Shop, kind: str) -> None:
    """A 429 with a retry-after holds deferrable jobs until then, with the reason `pace`; the breaker stays closed."""
    shop.work()
    shop.primary.fail(Fault.RATE_LIMITED, retry_after_s=1.5)
    task = getattr(shop, kind)
    job = task.send("first")
    shop.until_all("held", [job])
    later = shop.send(task, 5, "later")
    shop.until_all("held", later)
    shop.heal()
    assert ["pace"] * 5 == [shop.facts(held).reason for held in later]
    assert ("closed", 0) == (shop.breaker().state, shop.breaker().generation)
    assert [] == [tag for tag in shop.ran if tag.startswith("later")]
    shop.until_over()
    assert {"accepted": 6, "succeeded": 6} == shop.books()
    assert ("closed", 0) == (shop.breaker().state, shop.breaker().generation)


def test_the_job_that_was_throttled_is_held_for_the_pace(shop: Shop) -> None:
    """The job whose own call got the 429 is held for the pace, too, and not for an outage."""
    shop.work()
    shop.primary.fail(Fault.RATE_LIMITED, retry_after_s=1.5)
    job = shop.summary.send("first")
    shop.until_all("held", [job])
    assert "pace" == shop.facts(job).reason


@pytest.mark.parametrize("kind", ["summary", "asummary"])
def test_a_hang_holds(shop: Shop, kind: str) -> None:
    """A provider that says nothing until the timeout is down: jobs are held."""
    shop.configure(timeout_s=0.5)
    shop.work()
    shop.primary.fail(Fault.HANG)
    jobs = shop.send(getattr(shop, kind), 3, "hang")
    shop.until_open()
    shop.until_all("held", jobs)
    assert {"accepted": 3, "held": 3} == shop.books()


@pytest.mark.parametrize("fault", [Fault.STREAM_NO_STOP, Fault.STREAM_CUT, Fault.STREAM_ERROR])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_incomplete_stream_holds(shop: Shop, fault: Fault, asynchronous: bool) -> None:
    """A stream that does not end as it must raises where it is read, so no half of an answer is taken for the whole."""
    ends: list[str] = []

    if asynchronous:

        @ai_task(criticality="deferrable", **shop.quick)
        async def read(tag: str) -> str:
            async with aclaude().messages.stream(**shop.question(tag)) as stream:
                answer = await stream.get_final_text()
            ends.append(tag)
            return answer
    else:

        @ai_task(criticality="deferrable", **shop.quick)
        def read(tag: str) -> str:
            with claude().messages.stream(**shop.question(tag)) as stream:
                answer = stream.get_final_text()
            ends.append(tag)
            return answer

    shop.work()
    shop.primary.fail(fault)
    jobs = shop.send(read, 3, "stream")
    shop.until_open()
    shop.until_all("held", jobs)
    assert [] == ends
    shop.heal()
    assert {"anthropic"} == {shop.result(job).partition(":")[0] for job in jobs}


def test_user_code_may_handle_a_broken_stream(shop: Shop) -> None:
    """The error of a broken stream is an ordinary one: user code that catches it has the say."""

    @ai_task(criticality="deferrable", **shop.quick)
    def read(tag: str) -> str:
        parts: list[str] = []
        try:
            with claude().messages.stream(**shop.question(tag)) as stream:
                parts.extend(stream.text_stream)
        except Exception as error:
            return f"after {len(''.join(parts))} characters: {type(error).__name__}"
        return "".join(parts)

    shop.work()
    shop.primary.fail(Fault.STREAM_NO_STOP)
    job = read.send("stream")
    assert "after 32 characters" == shop.result(job).partition(":")[0]


@pytest.mark.parametrize("streams", [False, True])
def test_a_lone_job_spends_no_attempt(shop: Shop, streams: bool) -> None:
    """Where one job alone meets the outage, a probe opens the breaker: it costs no attempt, however its call fails."""

    @ai_task(criticality="deferrable", **shop.quick)
    async def lone(tag: str) -> str:
        shop.ran.append(tag)
        if not streams:
            return text_of(await aclaude().messages.create(**shop.question(tag)))
        async with aclaude().messages.stream(**shop.question(tag)) as stream:
            return await stream.get_final_text()

    shop.work()
    shop.primary.fail(Fault.STREAM_CUT)
    job = lone.send("lone")
    shop.until(
        lambda: shop.generations(job) == [0, 1], "it was held, tried again, and held behind a breaker that a probe opened"
    )
    assert 2 == len(shop.calls("lone"))
    body = shop.body(job)
    assert body is not None
    assert {"redis_message_id", "tideover"} == set(body.options)
    shop.heal()
    assert "anthropic" == shop.result(job).partition(":")[0]


def test_held_time_is_no_age(shop: Shop) -> None:
    """dramatiq's `max_age` does not count the time that a job was held: an outage burns no age limit."""

    @ai_task(criticality="deferrable", models=[shop.model], max_age=700)
    def young(tag: str) -> str:
        return text_of(claude().messages.create(**shop.question(tag)))

    shop.work()
    shop.open_breaker()
    job = young.send("young")
    shop.until_all("held", [job])
    held_at = shop.facts(job).held_ms
    shop.until(
        lambda: tideover.status(job).state == "held" and now_ms() - held_at > 1000, "it was held for longer than its age"
    )
    shop.heal()
    assert "anthropic" == shop.result(job).partition(":")[0]


def now_ms() -> int:
    from tideover import clock

    return clock.now_ms()


def test_a_plain_actor_is_never_held(shop: Shop) -> None:
    """An actor that is no AI task runs through the outage."""

    @dramatiq.actor
    def plain(tag: str) -> None:
        shop.ran.append(tag)

    shop.work()
    shop.open_breaker()
    plain.send("plain")
    shop.until(lambda: "plain" in shop.ran, "the actor runs")


def test_a_job_that_is_fetched_again_while_its_hold_is_on_its_way_back(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis has held it, the drain released it, and this worker fetched it, all before its thread heard of the hold."""
    monkeypatch.setattr("tideover.consumer.RECLAIM_S", 3600.0)
    plain: Any = Backlog.hold
    held: list[str] = []

    def slow(backlog: Backlog, worker: str, queue: str, jobs: Iterable[HeldFacts]) -> list[bool]:
        facts = list(jobs)
        done = list(plain(backlog, worker, queue, facts))
        if facts and not held:
            held.extend(fact.redis_id for fact in facts)
            shop.heal()
            shop.backlog.release(queue, list(shop.backlog.members(queue, held).values()), Permit("*", 0))
            shop.until(lambda: shop.backlog.fetched(worker, [queue]) == len(held), "it is fetched again")
        return done

    monkeypatch.setattr(Backlog, "hold", slow)
    shop.primary.fail(Fault.OVERLOADED)
    shop.work()
    job = shop.summary.send("x")
    shop.until_over()
    assert ([job.message_id], ["x", "x"], {"accepted": 1, "succeeded": 1}) == (held, shop.ran, shop.books())
