# SPDX-License-Identifier: Apache-2.0
"""Jobs that wait for a place in a worker."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tideover import ai_task, clock

if TYPE_CHECKING:
    from tests.pipeline.conftest import Shop


@pytest.mark.parametrize("kind", ["function", "coroutine"])
def test_the_place_of_a_job_that_is_anothers_by_now_goes_to_the_next(shop: Shop, kind: str) -> None:
    """A worker that was silent lost a job while it waited here for a place; those behind it do not wait for ever."""
    go_on = threading.Event()
    task: dict[str, Any] = {"criticality": "deferrable", "models": ["no-such-model"], "broker": shop.broker}

    def work(tag: str) -> None:
        shop.ran.append(tag)
        go_on.wait(30)

    async def awork(tag: str) -> None:
        shop.ran.append(tag)
        await asyncio.to_thread(go_on.wait, 30)

    shop.monkeypatch.setenv("TIDEOVER_WORKER__CONCURRENCY", "2")
    waits = ai_task(actor_name="waits", **task)(work if kind == "function" else awork)
    worker = shop.work(threads=2)  # one place is for others
    waits.send("first")
    shop.until(lambda: shop.ran == ["first"], "the first job runs")
    taken, _ = waits.send("taken"), waits.send("last")
    shop.until(lambda: shop.backlog.fetched(shop.broker.broker_id, ["default"]) == 3, "three jobs are fetched")
    shop.until(lambda: worker.work_queue.empty(), "two of them wait for a place")
    acks = [shop.keys.acks(name, "default") for name in (shop.broker.broker_id, "another")]
    assert shop.broker.client.smove(*acks, taken.message_id)
    gate = worker.workers[0].gate  # type: ignore[attr-defined]  # it is our runner
    gate.note_beat(clock.monotonic() + gate.longest_silence_s + 1)
    go_on.set()
    shop.until(lambda: shop.ran == ["first", "last"], "the last job runs")
    assert 1 == shop.backlog.give_back("another", "default", [taken.message_id])
    shop.until_over()
    assert (["first", "last", "taken"], {"accepted": 3, "succeeded": 3}) == (shop.ran, shop.books())
