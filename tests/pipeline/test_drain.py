# SPDX-License-Identifier: Apache-2.0
"""How a real worker brings the backlog home: at a pace that it learns, and that operators may overrule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tideover import ai_task, clock
from tideover.core.route import breaker_key
from tideover.store.paces import ALL, Paces
from tideover.testing import Fault

if TYPE_CHECKING:
    from tests.pipeline.conftest import Shop

FOR_EVER: dict[str, Any] = {"who": "me", "why": "why", "since_ms": 0, "until_ms": None}


@pytest.fixture
def paces(shop: Shop) -> Paces:
    return Paces(shop.broker.client, shop.keys)


def key_of(shop: Shop) -> str:
    return breaker_key("anthropic", shop.model)


def test_a_paused_drain_releases_nothing_until_it_is_resumed(shop: Shop, paces: Paces) -> None:
    """Live critical jobs go on meanwhile, and the pace is computed beneath the pause."""
    paces.order(ALL, {**FOR_EVER, "max_rate": 0.0})
    shop.work()
    held = shop.open_breaker()
    shop.heal()
    shop.until(lambda: shop.breaker().state == "recovering", "it recovers")
    shop.until(lambda: shop.breaker().pace > 0, "its pace is known")
    assert "anthropic" == shop.result(shop.reply.send("live"))
    assert len(held) == shop.books()["held"]
    assert "releases" not in shop.registry.counters()
    assert paces.countermand(ALL)
    for job in held:
        assert shop.result(job)


def test_a_pause_ends_by_itself(shop: Shop, paces: Paces) -> None:
    """At the time that it names, by Redis' clock."""
    paces.order(key_of(shop), {**FOR_EVER, "max_rate": 0.0, "until_ms": clock.now_ms() + 3000})
    shop.work()
    held = shop.open_breaker()
    shop.heal()
    for job in held:
        assert shop.result(job)


def test_the_pace_hears_of_every_call(shop: Shop, paces: Paces) -> None:
    """Of released jobs and of live ones, from the beginning of the recovery."""
    shop.work()
    held = shop.open_breaker()
    paces.order(ALL, {**FOR_EVER, "max_rate": 0.0})
    shop.heal()
    shop.until(lambda: shop.breaker().state == "recovering", "it recovers")
    shop.until(lambda: shop.seen().state == "recovering", "the worker knows")
    for n in range(4):
        shop.result(shop.reply.send(f"live{n}"))
    shop.until(lambda: 4 <= paces.read(key_of(shop), clock.now()).felt.ok, "they are heard of")
    paces.countermand(ALL)
    for job in held:
        assert shop.result(job)


def test_a_429_in_the_drain_slows_it_and_costs_nobody_an_attempt(shop: Shop) -> None:
    """It asks for quiet, and everything comes home all the same."""
    shop.work()
    held = shop.open_breaker()
    shop.primary.fail(Fault.RATE_LIMITED, p=0.3, retry_after_s=0.2)
    for job in held:
        assert shop.result(job)
    shop.until_over()
    assert {"accepted": len(held), "succeeded": len(held)} == shop.books()


def test_a_backlog_larger_than_a_worker_comes_home(shop: Shop) -> None:
    """Everything once, and the progress is told."""

    @ai_task(criticality="deferrable", models=[shop.model])
    def bulk(tag: str) -> str:
        return "done"

    shop.work()
    shop.open_breaker()
    shop.send(bulk, 60, "b")
    shop.until(lambda: shop.ledger.read().held >= 60, "they are held")
    shop.heal()
    shop.until_over()
    paces = Paces(shop.broker.client, shop.keys)

    def is_told() -> bool:
        progress = paces.read(key_of(shop), clock.now()).progress
        return progress is not None and (0, progress.most) == (progress.held, progress.released) and progress.most >= 60

    shop.until(is_told, "what went and what ever waited are the same")
