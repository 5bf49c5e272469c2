# SPDX-License-Identifier: Apache-2.0
"""A job's time, dramatiq's `time_limit`, is one budget over all its calls and routes; an outage that eats it spends nothing."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from dramatiq.middleware import TimeLimit

from tideover import AITask, aclaude, ai_task, claude, text_of
from tideover.testing import Fault, Latency

if TYPE_CHECKING:
    from tests.pipeline.conftest import Serving, Shop

LIMIT_MS = 8000


def guard(shop: Shop) -> None:
    """Starts the watch over functions' time limits, as the dramatiq command does in its processes."""
    next(m for m in shop.broker.middleware if isinstance(m, TimeLimit)).after_process_boot(shop.broker)


def limited(shop: Shop, coroutine: bool, **options: Any) -> AITask[Any, Any]:
    """A task whose attempts have eight seconds, and that a failure ends."""
    said = {"time_limit": LIMIT_MS, "max_retries": 0, "models": [shop.model], **options}
    if coroutine:

        @ai_task(**said)
        async def alimited(tag: str) -> str:
            return text_of(await aclaude().messages.create(**shop.question(tag)))

        return alimited

    @ai_task(**said)
    def limited(tag: str) -> str:
        return text_of(claude().messages.create(**shop.question(tag)))

    return limited


def critical(shop: Shop, coroutine: bool) -> AITask[Any, Any]:
    return limited(shop, coroutine, criticality="critical", expires_in=timedelta(minutes=5), reroute=["openai"])


@pytest.mark.parametrize("coroutine", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_hang_that_eats_a_job_s_time_spends_no_attempt(shop: Shop, coroutine: bool, n: int) -> None:
    """Whether one runs or many: its call is given up before the job is cut, its breaker hears of it, and the job is held."""
    task = limited(shop, coroutine, criticality="deferrable")
    guard(shop)
    shop.work()
    shop.primary.fail(Fault.HANG)
    jobs = shop.send(task, n, "job")
    shop.until_open()
    shop.until_all("held", jobs)
    shop.heal()
    shop.until_over()
    assert {"accepted": n, "succeeded": n} == shop.books()


@pytest.mark.parametrize("coroutine", [False, True])
def test_half_of_the_time_is_left_for_another_route(shop: Shop, coroutine: bool) -> None:
    """A route that stays silent is replaced in time, though its own `timeout_s` is far longer than the job's time."""
    task = critical(shop, coroutine)
    guard(shop)
    shop.work()
    shop.primary.fail(Fault.HANG)
    assert "openai" == shop.result(task.send("job")).partition(":")[0]
    assert (1, 1) == (len(shop.calls("job")), len(shop.calls("job", shop.fallback)))


@pytest.mark.parametrize("coroutine", [False, True])
def test_all_routes_share_the_time(shop: Shop, coroutine: bool) -> None:
    """When all of them hang the job is held, and spends no attempt."""
    task = critical(shop, coroutine)
    guard(shop)
    shop.work()
    shop.primary.fail(Fault.HANG)
    shop.fallback.fail(Fault.HANG)
    job = task.send("job")
    shop.until_all("held", [job])
    assert {"accepted": 1, "held": 1} == shop.books()
    shop.heal()
    shop.result(job)
    shop.until(lambda: {"accepted": 1, "succeeded": 1} == shop.books(), "it has ended once")


@pytest.mark.parametrize("coroutine", [False, True])
def test_a_route_that_was_asked_late_is_not_held_to_be_down(shop: Shop, coroutine: bool) -> None:
    """A fallback that needs more than what a hang has left of the time answers once the hang is known."""
    task = critical(shop, coroutine)
    shop.fallback.latency = Latency(base_s=4.5, per_output_token_s=0.0, jitter=0.0)
    guard(shop)
    shop.work()
    shop.primary.fail(Fault.HANG)
    assert "openai" == shop.result(task.send("job")).partition(":")[0]
    assert ("closed", 0) == (shop.breaker("openai", shop.model).state, shop.breaker("openai", shop.model).generation)
    shop.until(lambda: {"accepted": 1, "succeeded": 1} == shop.books(), "it has ended once")


@pytest.mark.parametrize("coroutine", [False, True])
def test_signs_of_life_do_not_make_it_longer(shop: Shop, serving: Serving, coroutine: bool) -> None:
    """A provider that only pings is given up with the job's time, however patient its route is."""
    shop.primary.stop()
    pings = serving({"content-type": "text/event-stream"}, b"", again=b'event: ping\ndata: {"type": "ping"}\n\n')
    shop.configure(primary=pings, timeout_s=60)
    task = limited(shop, coroutine, criticality="deferrable")
    guard(shop)
    shop.work()
    job = task.send("job")
    shop.until_all("held", [job])
    assert {"accepted": 1, "held": 1} == shop.books()
