# SPDX-License-Identifier: Apache-2.0
"""Limits per minute of a route, over all processes: calls wait their turn, and who cannot is rerouted or held."""

from __future__ import annotations

from typing import TYPE_CHECKING

import redis
from tests.pipeline.test_health import health

from tideover.store.limiter import FIRST_TOKENS, Limiter

if TYPE_CHECKING:
    import pytest
    from tests.pipeline.conftest import Shop

WITHOUT_ROOM = "its limits per minute have no room"


def test_a_crowd_is_let_through_evenly(shop: Shop) -> None:
    """A fallback with a limit of five calls a second answers thirty jobs, one after the other."""
    shop.configure(fallback_options="max_requests_per_minute = 300")
    shop.work(threads=32)
    shop.open_breaker()
    jobs = shop.send(shop.reply, 30, "crowd")
    assert ["openai"] * 30 == [shop.result(job) for job in jobs]
    calls = sorted(call.at for call in shop.fallback.calls() if call.job)
    assert 30 == len(calls)
    assert calls[-1] - calls[0] > 2.5  # at the full limit it is 5 s
    assert "closed" == shop.breaker("openai", shop.model).state


def test_live_deferrable_jobs_beyond_the_limit_are_held_and_released_at_its_pace(shop: Shop) -> None:
    """Once: they block no worker, and spend no attempt."""
    shop.configure(primary_options="max_requests_per_minute = 120")
    shop.work(threads=16)
    jobs = shop.send(shop.summary, 16, "beyond")
    held = shop.until(lambda: [facts for job in jobs if (facts := shop.facts_if_held(job))], "some are held")
    assert {"pace"} == {facts.reason for facts in held}
    for job in jobs:
        shop.result(job)
    calls = sorted(call.at for call in shop.primary.calls() if call.job)
    assert (16, {"ok"}) == (len(calls), {call.outcome for call in shop.primary.calls() if call.job})
    assert calls[-1] - calls[0] > 3.5  # at the full limit it is 7 s
    shop.until(lambda: {"accepted": 16, "succeeded": 16} == shop.books(), "each has ended once")


def test_a_critical_job_goes_elsewhere_rather_than_wait_for_long(shop: Shop) -> None:
    """And its story says why."""
    shop.configure(primary_options="max_requests_per_minute = 1")
    shop.work()
    assert ["anthropic", "openai"] == [shop.result(shop.reply.send(tag)) for tag in ("first", "second")]
    assert not shop.calls("second")


def test_what_calls_take_is_learned(shop: Shop) -> None:
    """From what providers tell of their answers; it is set right within a second."""
    shop.configure(primary_options="max_tokens_per_minute = 1e6")
    shop.work()
    limiter = Limiter(shop.broker.client, shop.keys)
    shop.result(shop.summary.send("first"))
    shop.until(lambda: shop.broker.client.hexists(limiter.keys.limiter("anthropic"), "each"), "it is told")
    found = limiter.allow("anthropic", None, 1e6, 0.0)
    assert found is not None
    assert 0 < found[1] < FIRST_TOKENS


def test_nobody_waits_while_redis_is_full_or_gone(private_shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that cannot be asked stops no call."""
    shop = private_shop
    shop.configure(primary_options="max_requests_per_minute = 1", fallback_options="max_requests_per_minute = 1")
    shop.work()
    rates = health(shop).rates
    assert [(0.0, FIRST_TOKENS), None] == [rates.allow("anthropic", 1.0) for _ in range(2)]
    shop.broker.client.config_set("maxmemory", "1")
    try:
        assert [(0.0, 0)] * 2 == [rates.allow("openai", 1.0) for _ in range(2)]
    finally:
        shop.broker.client.config_set("maxmemory", "0")
    monkeypatch.setattr(rates, "limiter", Limiter(redis.Redis(port=1), shop.keys))
    assert (0.0, 0) == rates.allow("anthropic", 1.0)
