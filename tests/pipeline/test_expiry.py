# SPDX-License-Identifier: Apache-2.0
"""What becomes of a job that is past its expiry: discarded or degraded, visible in every place, and restorable."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from dramatiq.results import ResultFailure

import tideover
from tideover import JobExpired, ai_task, claude, clock, text_of
from tideover.store.letters import Letters

if TYPE_CHECKING:
    from tests.pipeline.conftest import Shop

SOON = timedelta(milliseconds=300)


def degrading(shop: Shop, kind: str) -> Any:
    """A task that answers with what was known before once its answer would come too late."""

    def known(tag: str) -> str:
        shop.ran.append(f"degraded {tag}")
        return f"as of yesterday: {tag}"

    options: Any = {"criticality": "deferrable", "models": [shop.model], "on_expiry": "degrade", "degrade": known}
    if kind == "function":

        @ai_task(expires_in=SOON, **options)
        def answer(tag: str) -> str:
            return text_of(claude().messages.create(**shop.question(tag)))
    else:

        @ai_task(expires_in=SOON, **options)
        async def answer(tag: str) -> str:
            return text_of(await tideover.aclaude().messages.create(**shop.question(tag)))

    return answer


@pytest.mark.parametrize("kind", ["function", "coroutine"])
def test_a_held_job_degrades(shop: Shop, kind: str) -> None:
    """Its result is the degraded answer, marked as such; the account says expired; no call was made."""
    task = degrading(shop, kind)
    shop.work()
    shop.open_breaker()
    job = task.send("h")
    assert "as of yesterday: h" == shop.result(job)
    shop.until(lambda: shop.books() == {"accepted": 4, "held": 3, "expired": 1}, "it is in the account")
    ended = tideover.status(job)
    assert ("ended", "expired", True) == (ended.state, ended.end, ended.degraded)
    assert [] == shop.calls("h")


@pytest.mark.parametrize("kind", ["function", "coroutine"])
def test_a_queued_job_degrades_when_a_worker_reaches_it(shop: Shop, kind: str) -> None:
    task = degrading(shop, kind)
    job = task.send("q")
    shop.until(lambda: tideover.status(job).overdue, "it is overdue")
    shop.work()
    assert "as of yesterday: q" == shop.result(job)
    shop.until(lambda: shop.books() == {"accepted": 1, "expired": 1}, "it is in the account")
    assert [] == shop.calls("q")


def test_a_degraded_answer_may_not_call(shop: Shop) -> None:
    """A call in the function that makes it raises `JobExpired`, and the job expires without an answer."""

    def known(tag: str) -> str:
        return text_of(claude().messages.create(**shop.question(tag)))

    @ai_task(criticality="deferrable", expires_in=SOON, on_expiry="degrade", degrade=known, models=[shop.model])
    def answer(tag: str) -> str:
        return tag

    job = answer.send("late")
    shop.until(lambda: tideover.status(job).overdue, "it is overdue")
    shop.work()
    with pytest.raises(JobExpired):
        shop.result(job)
    shop.until(lambda: shop.books() == {"accepted": 1, "expired": 1}, "it is in the account")
    assert [] == shop.calls("late")


@pytest.mark.parametrize(
    "wrong",
    [{"on_expiry": "degrade"}, {"on_expiry": "vanish"}],
)
def test_degrading_takes_both(shop: Shop, wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="on_expiry"):
        ai_task(criticality="deferrable", **wrong)(lambda: None)


@pytest.mark.parametrize("where", ["held", "queued"])
def test_the_result_of_an_expired_job_is_an_error(shop: Shop, where: str) -> None:
    """For who asks dramatiq, too: it is `JobExpired` at once, and no time-out."""

    @ai_task(criticality="deferrable", expires_in=SOON, models=[shop.model])
    def answer() -> str:
        return "late"

    if where == "held":
        shop.work()
        shop.open_breaker()
        job = answer.send()
    else:
        job = answer.send()
        shop.until(lambda: tideover.status(job).overdue, "it is overdue")
        shop.work()
    with pytest.raises(ResultFailure) as caught:
        job.get_result(block=True, timeout=20_000)
    assert "JobExpired" == caught.value.orig_exc_type


def test_a_held_job_expires_within_a_second(shop: Shop) -> None:
    """Neither early nor more than about a second late, by Redis' clock."""

    @ai_task(criticality="deferrable", expires_in=timedelta(seconds=2), models=[shop.model])
    def answer() -> None: ...

    shop.work()
    shop.open_breaker()
    job = answer.send()
    shop.until_all("held", [job])
    expires_at = tideover.status(job).expires_at
    assert expires_at is not None
    shop.until_all("ended", [job])
    [told] = [line.at for line in shop.story(job) if line.event == "expired"]
    assert expires_at <= told
    assert clock.now() - expires_at < shop.within_s


def test_an_expired_job_can_be_restored(shop: Shop) -> None:
    """Its body is kept; put back it is a new job of the account."""

    @ai_task(criticality="deferrable", expires_in=SOON, models=[shop.model])
    def answer(tag: str) -> str:
        return tag

    job = answer.send_with_options(args=("back",), tenant="acme")
    shop.until(lambda: tideover.status(job).overdue, "it is overdue")
    shop.work()
    shop.until(lambda: shop.books() == {"accepted": 1, "expired": 1}, "it has expired")
    letters = Letters(shop.broker.client, shop.keys)
    [[letter]] = letters.pages("default")
    assert job.message_id == letter.redis_id
    shop.stop_working()
    renewed = letter.body.replace(str(job.options["tideover"]["expires_ms"]).encode(), b"null")
    restored = ("default", letter.redis_id, job.message_id, renewed, "acme")
    assert [True, True] == [letters.restore(*restored) for _ in range(2)]  # as when the first reply was lost
    assert not letters.restore("default", letter.redis_id, job.message_id, letter.body, "acme")
    assert 2 == shop.books()["accepted"]
    shop.work()
    shop.until(lambda: shop.books() == {"accepted": 2, "expired": 1, "succeeded": 1}, "it ran")
    assert {} == shop.broker.client.hgetall(shop.keys.tenants)


def test_whoever_sends_goes_by_the_clock_of_redis(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own clock is five minutes behind: a job with two of them does not expire at once."""
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() - 300)
    job = shop.summary.send_with_options(args=("x",), expires_in=timedelta(minutes=2))
    assert 110 < job.options["tideover"]["expires_ms"] / 1000 - right() < 130
