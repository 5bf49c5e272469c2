# SPDX-License-Identifier: Apache-2.0
"""All critical traffic moves at once: the fallback is paced by its own cap, and not knocked over."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from tideover import aclaude, ai_task, claude, text_of
from tideover.testing import Latency

if TYPE_CHECKING:
    from tests.pipeline.conftest import Shop


@pytest.mark.parametrize("coroutine", [False, True])
def test_a_hundred_jobs_at_one_instant(shop: Shop, coroutine: bool) -> None:
    """A fallback that bears ten calls at once gets no more, answers all of them, and its breaker stays closed."""
    shop.configure(fallback_options="max_in_flight = 10", timeout_s=30)
    said = {"criticality": "critical", "expires_in": timedelta(minutes=5), "reroute": ["openai"], **shop.quick}
    if coroutine:

        @ai_task(**said)
        async def crowd(tag: str) -> str:
            return text_of(await aclaude().messages.create(**shop.question(tag)))

    else:

        @ai_task(**said)
        def crowd(tag: str) -> str:
            return text_of(claude().messages.create(**shop.question(tag)))

    shop.fallback.latency = Latency(base_s=0.3, per_output_token_s=0.0, jitter=0.0)
    shop.work(threads=32)
    shop.open_breaker()
    before = len(shop.primary.calls())
    jobs = shop.send(crowd, 100, "herd")
    assert ["openai"] * 100 == [shop.result(job).partition(":")[0] for job in jobs]
    calls = [call for call in shop.fallback.calls() if call.job]
    assert ({"ok"}, 100) == ({call.outcome for call in calls}, len(calls))
    assert [] == [call for call in shop.primary.calls()[before:] if call.job]
    key = f"openai/{shop.model}"
    assert ("closed", 0) == (shop.breakers.read([key])[key].state, shop.breakers.read([key])[key].generation)
    most = max(sum(other.at <= call.at < (other.finished_at or 0) for other in calls) for call in calls)
    assert most <= 10
