# SPDX-License-Identifier: Apache-2.0
"""`observe` decides without acting, `bypass` switches tideover off at run time; the account goes on in every mode."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest

import tideover
from tideover import ai_task, claude, text_of
from tideover.testing import Fault

if TYPE_CHECKING:
    from tests.pipeline.conftest import Job, Shop

FACTS = {"who": "a test", "why": None, "since_ms": 0, "until_ms": None}


def bypass(shop: Shop) -> None:
    shop.registry.set_bypass(FACTS, None)
    shop.until(lambda: mode(shop) == "bypass", "the worker knows that it is switched off")


def act(shop: Shop) -> None:
    shop.registry.clear_bypass()
    shop.until(lambda: mode(shop) == "act", "the worker knows that it is switched on")


def mode(shop: Shop) -> str:
    node: Any = next(m.node for m in shop.broker.middleware if isinstance(m, tideover.Tideover))
    return str(node.gate.health.mode)


def verdicts(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "verdict_observed" in record.getMessage()]


def open_without_holding(shop: Shop) -> list[Job]:
    """In observe mode the breaker opens, too; jobs that paid for it fail as stock dramatiq lets them fail."""
    shop.primary.fail(Fault.OVERLOADED)
    jobs = shop.send(shop.summary, 3, "canary")
    shop.until_open()
    shop.until_over()
    return jobs


def test_observe_lets_jobs_fail_as_stock(shop: Shop) -> None:
    """A job whose provider is down spends its retries and fails, and nothing is held; the breaker opens all the same."""
    shop.configure(mode="observe")
    shop.work()
    open_without_holding(shop)
    assert {"accepted": 3, "failed": 3} == shop.books()
    assert 3 == len(shop.calls("canary0"))


def test_observe_says_what_it_would_have_held(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """A deferrable job runs while the breaker is open, and the log says that it would have been held."""
    shop.configure(mode="observe")
    shop.work()
    open_without_holding(shop)
    caplog.clear()
    with caplog.at_level(logging.INFO, "tideover"):
        job = shop.summary.send("observed")
        shop.until(lambda: shop.calls("observed"), "its call is made")
        shop.until_over()
    assert any(job.message_id in line and "hold" in line for line in verdicts(caplog))
    assert "held" not in shop.events(job)


def test_observe_says_what_it_would_have_rerouted(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """A critical job calls the primary only; the log says that it would have been rerouted."""
    shop.configure(mode="observe")
    shop.work()
    open_without_holding(shop)
    caplog.clear()
    with caplog.at_level(logging.INFO, "tideover"):
        job = shop.reply.send("observed")
        shop.until_over()
    assert any(job.message_id in line and "reroute to openai" in line for line in verdicts(caplog))
    assert ([], 3) == (shop.fallback.calls(), len(shop.calls("observed")))


def test_observe_answers_as_usual(shop: Shop) -> None:
    """While the provider is well, jobs run as in any mode, and the sum is right."""
    shop.configure(mode="observe")
    shop.work()
    jobs = [*shop.send(shop.asummary, 3, "s"), *shop.send(shop.areply, 3, "r")]
    assert 6 == len([shop.result(job) for job in jobs])
    shop.until_over()
    assert {"accepted": 6, "succeeded": 6} == shop.books()


def test_bypass_releases_what_is_held(shop: Shop) -> None:
    """Switched off in the middle of an outage: held jobs go back, at the pace, and meet the provider as stock jobs would."""
    shop.configure(more="", probe_after_s=60, probe_max_s=60)
    shop.work()
    shop.open_breaker()
    jobs = shop.send(shop.summary, 40, "job")
    shop.until_all("held", jobs)
    bypass(shop)
    shop.until_over()
    assert {"accepted": 43, "failed": 43} == shop.books()
    first = sorted(min(call.at for call in shop.calls(job.args[0])) for job in jobs)
    assert first[-1] - first[0] > 0.25  # 40 jobs at 50 a second, half a second's worth of them at once


def test_bypass_stops_deciding(shop: Shop) -> None:
    """Jobs sent while it is switched off run over the primary, whatever its breaker says; critical ones are not rerouted."""
    shop.work()
    shop.open_breaker()
    bypass(shop)
    jobs = [shop.summary.send("s"), shop.reply.send("r")]
    shop.until_over()
    assert [("ended", "failed")] * 2 == [(tideover.status(job).state, tideover.status(job).end) for job in jobs]
    assert (3, 3, []) == (len(shop.calls("s")), len(shop.calls("r")), shop.fallback.calls())


def test_bypass_answers_as_stock(shop: Shop) -> None:
    """With a healthy provider, jobs end well and are counted."""
    shop.work()
    bypass(shop)
    jobs = [*shop.send(shop.asummary, 3, "s"), *shop.send(shop.areply, 3, "r"), *shop.send(shop.reply, 3, "t")]
    shop.until(lambda: shop.books().get("accepted") == 9, "they are accepted")
    shop.until_over()
    assert [("anthropic")] * 9 == [shop.result(job).partition(":")[0] for job in jobs]
    assert {"accepted": 9, "succeeded": 9} == shop.books()


def test_back_to_act(shop: Shop) -> None:
    """Switched on again, it holds in the next outage as ever, without a restart."""
    shop.work()
    bypass(shop)
    act(shop)
    canaries = shop.open_breaker()
    job = shop.summary.send("late")
    shop.until_all("held", [*canaries, job])
    shop.heal()
    assert ["anthropic"] * 4 == [shop.result(held).partition(":")[0] for held in [*canaries, job]]


def test_a_bypass_ends_by_itself(shop: Shop) -> None:
    """One with a time to live needs nobody to remember it."""
    shop.work()
    shop.registry.set_bypass(FACTS, 0.5)
    shop.until(lambda: mode(shop) == "bypass", "it is switched off")
    shop.until(lambda: mode(shop) == "act", "it is switched on again")
    assert shop.registry.bypass() is None


def test_the_stricter_of_the_two_wins(shop: Shop) -> None:
    """A worker in observe mode that is switched off and on again observes, and does not act."""
    shop.configure(mode="observe")
    shop.work()
    bypass(shop)
    shop.registry.clear_bypass()
    assert shop.until(lambda: mode(shop) == "observe", "it observes again")


def test_a_mode_that_does_not_act_holds_no_hang(shop: Shop) -> None:
    """User code in observe mode sees the SDK's own error, as without tideover."""
    shop.configure(mode="observe")

    @ai_task(criticality="deferrable", max_retries=0)
    def ask(tag: str) -> str:
        try:
            return text_of(claude().messages.create(**shop.question(tag)))
        except Exception as error:
            return type(error).__name__

    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    assert "OverloadedError" == shop.result(ask.send("x"))
