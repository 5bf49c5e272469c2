# SPDX-License-Identifier: Apache-2.0
"""Needs review instead of harm: held with the reason, burning nothing, and running once it is mended and released."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import dramatiq
import pytest

import tideover
from tideover import ai_task
from tideover import settings as tideover_settings
from tideover.core.route import NO_PERMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.pipeline.conftest import Shop

POISON = """
import os, signal
import dramatiq
from tideover import ai_task
from tideover import settings as tideover_settings

@ai_task(criticality="deferrable", max_retries=3)
def poison() -> None:
    os.kill(os.getpid(), 9)

@ai_task(criticality="deferrable")
def harmless(n: int) -> int:
    return n

dramatiq.Worker(dramatiq.get_broker(), worker_threads=1).start()
signal.pause()
"""


@pytest.fixture
def workers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def start(shop: Shop, workers: list[subprocess.Popen[bytes]]) -> None:
    """A worker process with one thread."""
    with (shop.folder / "worker.log").open("ab") as log:
        workers.append(subprocess.Popen([sys.executable, "-c", POISON], stdout=log, stderr=log, start_new_session=True))


def release(shop: Shop, job: dramatiq.Message[Any]) -> None:
    """An operator's `tideover release`."""
    facts = shop.facts(job)
    members = shop.backlog.members(facts.queue, [facts.redis_id])
    released = shop.backlog.release(facts.queue, list(members.values()), NO_PERMIT).jobs
    assert [job.message_id] == [fact.job_id for fact in released]


def why(shop: Shop, job: dramatiq.Message[Any]) -> tuple[str, tuple[str, ...], str]:
    facts = shop.facts(job)
    return facts.reason, facts.breaker_keys, facts.detail


def test_a_task_that_is_gone(shop: Shop) -> None:
    """Its jobs are held, not dead letters; once a worker knows the task again and they are released, they run."""

    @ai_task(criticality="deferrable", actor_name="renamed")
    def renamed(n: int) -> int:
        return n

    job = renamed.send(7)
    del shop.broker.actors["renamed"]
    shop.work()
    shop.until_all("held", [job])
    reason, waits_for, detail = why(shop, job)
    assert ("review", ()) == (reason, waits_for)
    assert "no AI task 'renamed'" in detail
    assert {"accepted": 1, "held": 1} == shop.books()
    shop.broker.actors["renamed"] = renamed
    release(shop, job)
    assert 7 == shop.result(job)
    assert {"accepted": 1, "succeeded": 1} == shop.books()


@pytest.mark.parametrize("kind", ["function", "coroutine"])
def test_a_signature_that_no_longer_fits(shop: Shop, kind: str) -> None:
    """No attempt is spent on a job whose arguments the function does not take any more."""
    if kind == "function":

        @ai_task(criticality="deferrable", actor_name="changed", **shop.quick)
        def changed(n: int) -> int:
            return n
    else:

        @ai_task(criticality="deferrable", actor_name="changed", **shop.quick)
        async def changed(n: int) -> int:
            return n

    job = changed.send_with_options(args=(1,), kwargs={"unknown": 2})
    fine = changed.send(3)
    shop.work()
    shop.until_all("held", [job])
    assert "do not fit" in shop.facts(job).detail
    assert 3 == shop.result(fine)
    body = shop.body(job)
    assert body is not None
    assert "retries" not in body.options


def test_a_type_error_inside_the_function_is_its_own(shop: Shop) -> None:
    """Only the call of the function itself says that the arguments do not fit."""

    @ai_task(criticality="deferrable", **{**shop.quick, "max_retries": 0})
    def buggy(n: Any) -> int:
        return n + "1"  # type: ignore[no-any-return]

    buggy.send(1)
    shop.work()
    shop.until_over()
    assert {"accepted": 1, "failed": 1} == shop.books()


@pytest.mark.parametrize(
    ("stamp", "said"),
    [
        ({"criticality": "urgent", "sent_ms": 1}, "criticality"),
        ({"criticality": "deferrable", "sent_ms": 1, "expires_ms": "soon"}, "expiry"),
        ({"criticality": "deferrable", "sent_ms": 1, "tenant": 7}, "tenant"),
    ],
)
def test_a_stamp_that_cannot_be_read(shop: Shop, stamp: dict[str, Any], said: str) -> None:
    """A job whose intent is unclear waits for a human."""
    message: dramatiq.Message[Any] = dramatiq.Message("default", "summary", ("x",), {}, {"tideover": stamp})
    job = shop.broker.enqueue(message)
    shop.work()
    shop.until(lambda: shop.books() == {"accepted": 1, "held": 1}, "it is held")
    [group] = shop.backlog.groups("default")
    assert "review" == group.facet.reason
    [facts] = list(shop.backlog.browse([group]))
    assert (job.message_id, True) == (facts.job_id, said in facts.detail)
    assert [] == shop.ran


def test_a_job_that_was_held_too_often(shop: Shop) -> None:
    """After `max_holds` holds only a human lets it go on; then it may be held as often again."""
    (shop.folder / "tideover.toml").write_text("max_holds = 2\n" + (shop.folder / "tideover.toml").read_text())
    tideover_settings.forget()
    shop.work()
    shop.open_breaker()
    job = shop.summary.send("often")
    shop.until_all("held", [job])
    for held in range(2):
        assert (held + 1, "outage") == (shop.facts(job).holds, shop.facts(job).reason)
        hold_again(shop, job)
    assert "review" == shop.facts(job).reason
    assert "2 times" in shop.facts(job).detail
    release(shop, job)
    shop.until(lambda: shop.facts_if_held(job) is not None, "it is held again")
    assert (1, "outage") == (shop.facts(job).holds, shop.facts(job).reason)


def hold_again(shop: Shop, job: dramatiq.Message[Any]) -> None:
    """Lets a job go as the drain does, into a gate that is still shut."""
    facts = shop.facts(job)
    members = shop.backlog.members(facts.queue, [facts.redis_id])
    released = shop.backlog.release(facts.queue, list(members.values()), NO_PERMIT, shop.pace()).jobs
    assert 1 == len(released)
    shop.until(lambda: (found := shop.facts_if_held(job)) is not None and found.holds == facts.holds + 1, "it is held again")


def test_a_poison_job_cannot_kill_workers_for_ever(shop: Shop, workers: list[subprocess.Popen[bytes]]) -> None:
    """Three workers die with it; then it is held for review, and what was aboard with it runs."""
    shop.configure(shutdown_grace_s=1, heartbeat_timeout_s=2)

    @ai_task(criticality="deferrable", max_retries=3)
    def poison() -> None: ...

    @ai_task(criticality="deferrable")
    def harmless(n: int) -> int:
        return n

    bad = poison.send()
    good = [harmless.send(n) for n in range(3)]

    def looked_after() -> bool:
        if not workers or workers[-1].poll() is not None:
            start(shop, workers)
        return tideover.status(bad).state == "held" and all(tideover.status(job).state == "ended" for job in good)

    shop.until(looked_after, "it is held, and the others have run", within_s=90)
    assert 4 == len(workers), "three died, the fourth lives"
    assert workers[-1].poll() is None
    assert "3 workers died" in shop.facts(bad).detail
    assert {"accepted": 4, "succeeded": 3, "held": 1} == shop.books()
    body = shop.body(bad)
    assert body is not None
    assert "retries" not in body.options


@pytest.mark.parametrize("enters", [False, True], ids=["never called", "called"])
def test_arguments_that_a_decorated_function_does_not_take(shop: Shop, enters: bool) -> None:
    """A decorator stands between the call and the function; a `TypeError` of the function itself is its own failure."""

    def traced(fn: Any) -> Any:
        @functools.wraps(fn)
        def wrapper(*args: Any) -> Any:
            return fn(*args[:1]) if enters else fn(*args)

        return wrapper

    def new(text: str) -> str:
        return text + 1  # type: ignore[operator]  # the failure of its own

    mail = ai_task(criticality="deferrable", models=["no-such-model"], max_retries=0, actor_name="mail")(traced(new))
    mail.send("a", "b")
    shop.work()
    shop.until(lambda: shop.books() == {"accepted": 1, "failed" if enters else "held": 1}, "it has failed, or is held")
