# SPDX-License-Identifier: Apache-2.0
"""What rerouted calls cost: a route or a task that has spent its hour's budget costs no more, and the decision table holds."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from tests.pipeline.test_health import health

from tideover import ai_task, claude, clock, text_of
from tideover.core.outcome import OK
from tideover.errors import ConfigurationError
from tideover.settings import settings
from tideover.store.spending import Spending
from tideover.testing import Fault

if TYPE_CHECKING:
    from tests.pipeline.conftest import Shop

PRICES = '[prices."gpt-5.5"]\ninput = {input}\noutput = {output}'


def task_of(shop: Shop, **options: Any) -> Any:
    @ai_task(criticality="critical", expires_in=timedelta(minutes=5), reroute=["openai"], **{**shop.quick, **options})
    def spend(tag: str) -> str:
        return text_of(claude().messages.create(**shop.question(tag)))

    return spend


def spent(shop: Shop) -> dict[str, float]:
    return Spending(shop.broker.client, shop.keys).read(clock.now())


def configure(shop: Shop, *, budget: str = "", input_: float = 0.0, output: float = 1_000_000.0) -> None:
    shop.configure(fallback_options=budget, more=PRICES.format(input=input_, output=output))


@pytest.mark.parametrize("prices", [(1_000_000.0, 0.0), (0.0, 1_000_000.0)])
def test_what_calls_cost_is_counted(shop: Shop, prices: tuple[float, float]) -> None:
    """Of routes whose models have a price: by tokens in and out, for the route, and for a task that was rerouted."""
    configure(shop, input_=prices[0], output=prices[1])
    task = task_of(shop)
    shop.work()
    shop.result(task.send("at home"))
    shop.primary.fail(Fault.OVERLOADED)
    shop.result(task.send("away"))
    shop.until(lambda: len(spent(shop)) > 1, "it is counted")
    assert spent(shop).keys() == {"route:openai", "task:spend"}
    assert len(set(spent(shop).values())) == 1
    assert min(spent(shop).values()) >= 3


def test_a_route_that_has_spent_its_budget_is_parked(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """Until the hour is over: jobs wait for their primary meanwhile, and an event says so."""
    configure(shop, budget="budget_per_hour = 20")
    task = task_of(shop)
    shop.work()
    shop.open_breaker()
    jobs = [task.send("0"), task.send("1"), task.send("2")]
    assert ["openai"] * 3 == [shop.result(job).partition(":")[0] for job in jobs]
    parked = lambda: shop.breakers.read(["openai/*"])["openai/*"]  # noqa: E731
    shop.until(lambda: parked().parked == "quota", "its budget is spent")
    shop.until(lambda: health(shop).view(f"openai/{shop.model}").is_down, "the worker knows")
    assert "its budget_per_hour (20) is spent" in parked().why
    assert 0 < parked().probe_at - clock.now() <= 3600
    assert "budget_spent" in caplog.text
    late = task.send("late")
    shop.until_all("held", [late])
    before = len(shop.fallback.calls())
    shop.heal()
    assert "anthropic" == shop.result(late).partition(":")[0]
    assert before == len(shop.fallback.calls())


def test_a_task_that_has_spent_its_budget_waits(shop: Shop) -> None:
    """Others go on; its jobs are held for their primary alone, or degrade."""
    configure(shop)
    task, other = task_of(shop, budget_per_hour=5), task_of(shop, actor_name="other")
    degrading = task_of(shop, budget_per_hour=0, degrade="degraded", actor_name="degrading")
    shop.work()
    shop.open_breaker()
    assert "openai" == shop.result(task.send("first")).partition(":")[0]
    shop.until(lambda: not health(shop).budgets.left("spend", 5), "its budget is spent")
    second = task.send("second")
    shop.until_all("held", [second])
    assert f"anthropic/{shop.model}" == shop.facts(second).wait_key
    assert "openai" == shop.result(other.send("third")).partition(":")[0]
    assert "degraded" == shop.result(degrading.send("fourth"))
    shop.heal()
    assert "anthropic" == shop.result(second).partition(":")[0]


def test_an_hour_later_there_is_money_again(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was spent belongs to the hour of the clock in which it was."""
    sums = Spending(shop.broker.client, shop.keys)
    assert {"route:a": 2.5} == sums.add({"route:a": 2.5}, 7199.0)
    assert {"route:a": 3.0} == sums.add({"route:a": 0.5}, 7199.9)
    assert ({"route:a": 3.0}, {}) == (sums.read(7000.0), sums.read(7200.0))


def test_a_full_redis_is_told_later(private_shop: Shop) -> None:
    """What calls cost waits until there is room; breakers, which go on, do not suffer for it."""
    shop = private_shop
    configure(shop)
    task_of(shop)
    shop.work()
    mine = health(shop)
    flight = mine.begin("openai", shop.model, "job", task="spend")
    shop.broker.client.config_set("maxmemory", "1")
    try:
        mine.end(flight, replace(OK, tokens=(0, 3)))
        mine.flush()
        assert {} == spent(shop)
    finally:
        shop.broker.client.config_set("maxmemory", "0")
    shop.until(lambda: {"route:openai": 3.0, "task:spend": 3.0} == spent(shop), "it is told")


@pytest.mark.parametrize("wrong", [-1, "5"])
def test_a_budget_is_a_number(shop: Shop, wrong: Any) -> None:
    with pytest.raises(TypeError, match="budget_per_hour"):
        task_of(shop, budget_per_hour=wrong)


@pytest.mark.parametrize(
    ("budget", "prices", "why"),
    [
        ("budget_per_hour = 5", "", "needs the price of gpt-5.5"),
        ("budget_per_hour = -1", "", "budget_per_hour"),
        ("", '[prices."gpt-5.5"]\ninput = 1', "output"),
        ("", '[prices."gpt-5.5"]\ninput = 1\noutput = 2\ncache = 1', "unknown key"),
    ],
)
def test_a_budget_without_a_price_is_an_error(shop: Shop, budget: str, prices: str, why: str) -> None:
    shop.configure(fallback_options=budget, more=prices)
    with pytest.raises(ConfigurationError, match=why):
        settings()
