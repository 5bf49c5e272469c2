# SPDX-License-Identifier: Apache-2.0
"""A critical job for which no route is usable is answered without a model, if its task says how; that is always marked."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from dramatiq.results import ResultFailure

import tideover
from tideover import LastGood, aclaude, ai_task, claude, last_served, ops, text_of
from tideover.testing import Fault

if TYPE_CHECKING:
    from tests.pipeline.conftest import Shop

    from tideover.ops import Operator


def task_of(shop: Shop, degrade: Any, *, coroutine: bool = False, **options: Any) -> Any:
    said: dict[str, Any] = {"criticality": "critical", "expires_in": timedelta(minutes=2), "degrade": degrade, **shop.quick}
    if coroutine:

        @ai_task(**{**said, **options})
        async def answer(tag: str, tone: str = "") -> str:
            shop.ran.append(tag)
            return text_of(await aclaude().messages.create(**shop.question(tag)))

    else:

        @ai_task(**{**said, **options})
        def answer(tag: str, tone: str = "") -> str:
            shop.ran.append(tag)
            return text_of(claude().messages.create(**shop.question(tag)))

    return answer


@pytest.mark.parametrize("coroutine", [False, True])
@pytest.mark.parametrize("reroute", [[], ["openai"]])
def test_without_a_usable_route_it_is_answered_at_once(
    shop: Shop, operator: Operator, coroutine: bool, reroute: list[str]
) -> None:
    """By the function of its arguments; while the breaker is open no call is made. Status, story and account tell."""
    served: list[Any] = []

    def known(tag: str, tone: str = "") -> str:
        served.append(last_served())
        return f"sorry, {tag} {tone}"

    task = task_of(shop, known, coroutine=coroutine, reroute=reroute)
    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    shop.fallback.fail(Fault.OVERLOADED)
    assert "sorry, a " == shop.result(task.send("a"))
    shop.until_open()
    before = len(shop.primary.calls())
    job = task.send("b", tone="kind")
    assert "sorry, b kind" == shop.result(job)
    shop.until_over()
    assert {"accepted": 2, "succeeded": 2} == shop.books()
    shop.until(lambda: shop.registry.counters().get("degraded") == 2, "both are counted")
    shop.until(lambda: tideover.status(job).degraded, "its story is told")
    assert [] == [call for call in shop.primary.calls()[before:] if call.job]
    ended = tideover.status(job)
    assert ("ended", "succeeded", True) == (ended.state, ended.end, ended.degraded)
    assert [(True, "")] * 2 == [(s.degraded, s.route) for s in served]
    assert "with its task's degraded answer: no route was usable" in str(ops.explain(operator, job.message_id).story)


@pytest.mark.parametrize("answer", [None, "we are back soon", {"a": [1]}])
def test_a_constant(shop: Shop, answer: Any) -> None:
    task = task_of(shop, answer)
    shop.work()
    shop.open_breaker()
    assert answer == shop.result(task.send("a"))


def test_an_awaitable_answer(shop: Shop) -> None:
    async def known(tag: str) -> str:
        return f"awaited {tag}"

    task = task_of(shop, known, coroutine=True)
    shop.work()
    shop.open_breaker()
    assert "awaited a" == shop.result(task.send("a"))


@pytest.mark.parametrize("coroutine", [False, True])
@pytest.mark.parametrize("by", ["key", "arguments"])
def test_the_last_good_answer(shop: Shop, operator: Operator, coroutine: bool, by: str) -> None:
    """Of the same tenant and the same key, or the same arguments; whose age is told. Where there is none the job is held."""
    task = task_of(shop, LastGood(), coroutine=coroutine, **({"key": lambda tag, tone="": tag} if by == "key" else {}))
    shop.work()
    good = shop.result(task.send_with_options(args=("a",), tenant="t"))
    shop.until_over()
    shop.open_breaker()
    shop.ran.clear()
    again = task.send_with_options(args=("a",), tenant="t")
    assert good == shop.result(again)
    shop.until(lambda: tideover.status(again).degraded, "its story is told")
    assert "s old" in str(ops.explain(operator, again.message_id).story)
    others = [
        task.send_with_options(args=("a",), tenant="other"),
        task.send_with_options(args=("b",), tenant="t"),
        *([task.send_with_options(args=("a",), kwargs={"tone": "kind"}, tenant="t")] if by == "arguments" else []),
    ]
    shop.until_all("held", others)
    shop.heal()
    assert all(shop.result(job).startswith("anthropic") for job in others)


def test_an_old_answer_is_none(shop: Shop) -> None:
    """After `max_age` the job waits as if there were no degraded answer."""
    task = task_of(shop, LastGood(max_age=timedelta(milliseconds=1)))
    shop.work()
    shop.result(task.send("a"))
    shop.open_breaker()
    shop.until_all("held", [task.send("a")])


def test_a_degraded_answer_is_not_the_last_good_one(shop: Shop) -> None:
    """Its age is that of the model's answer, however often it was given."""
    task = task_of(shop, LastGood())
    shop.work()
    shop.result(task.send("a"))
    (key,) = shop.until(lambda: list(shop.broker.client.scan_iter(shop.keys.answer("*"))), "it is kept")
    kept = shop.broker.client.get(key)
    shop.open_breaker()
    shop.result(task.send("a"))
    shop.until(lambda: shop.registry.counters().get("degraded"), "the second job is over")
    assert kept == shop.broker.client.get(key)


@pytest.mark.parametrize("coroutine", [False, True])
def test_what_makes_the_answer_may_not_call(shop: Shop, coroutine: bool) -> None:
    """A call there is an error, and the job fails with it."""

    async def acall(tag: str) -> str:
        return text_of(await aclaude().messages.create(**shop.question(tag)))

    def known(tag: str) -> Any:
        if coroutine:
            return acall(tag)
        return text_of(claude().messages.create(**shop.question(tag)))

    task = task_of(shop, known, coroutine=coroutine, max_retries=0)
    shop.work()
    shop.open_breaker()
    with pytest.raises(ResultFailure, match=r"ProviderError: .* may not call a model"):
        shop.result(task.send("a"))


def test_a_deferrable_job_waits(shop: Shop) -> None:
    """It has time; only past its expiry, and if its task says so, it is answered without a model."""
    task = task_of(shop, "degraded", criticality="deferrable")
    shop.work()
    shop.open_breaker()
    job = task.send("a")
    shop.until_all("held", [job])
    shop.heal()
    assert "anthropic" == shop.result(job).partition(":")[0]


def test_a_hold_that_somebody_swallowed(shop: Shop) -> None:
    """User code that catches everything does not turn the missing answer into one of its own."""

    @ai_task(criticality="critical", expires_in=None, degrade="degraded", **shop.quick)
    def careless(tag: str) -> str:
        try:
            return text_of(claude().messages.create(**shop.question(tag)))
        except BaseException:
            return "nonsense"

    shop.work()
    shop.open_breaker()
    assert "degraded" == shop.result(careless.send("a"))


def test_the_end_says_it_in_the_log(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    task = task_of(shop, "degraded")
    shop.work()
    shop.open_breaker()
    shop.result(task.send("a"))
    assert "job_degraded" in caplog.text
