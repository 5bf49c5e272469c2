# SPDX-License-Identifier: Apache-2.0
"""A job's word and its tenant's may leave it fewer routes than its task: its prompt goes nowhere else."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anthropic
import pytest

from tideover import InvalidJob, aclaude, ai_task, claude, text_of, wrap
from tideover.errors import ConfigurationError
from tideover.settings import settings
from tideover.testing import Fault

if TYPE_CHECKING:
    from tests.pipeline.conftest import Shop

TENANT = '[tenants."acme inc"]\nroutes = {routes}'


def tasks_of(shop: Shop) -> list[Any]:
    """One task for each way to get a client; all allow the primary and the fallback."""
    said: Any = {"criticality": "critical", "expires_in": timedelta(minutes=2), "reroute": ["openai"], **shop.quick}

    @ai_task(**said)
    def given(tag: str) -> str:
        return text_of(claude().messages.create(**shop.question(tag)))

    @ai_task(**said)
    async def agiven(tag: str) -> str:
        return text_of(await aclaude().messages.create(**shop.question(tag)))

    @ai_task(**said)
    def own(tag: str) -> str:
        mine = anthropic.Anthropic(api_key=shop.primary_key, base_url=shop.primary.base_url)
        return text_of(wrap(mine).messages.create(**shop.question(tag)))

    return [given, agiven, own]


@pytest.mark.parametrize("by", ["tenant", "job"])
def test_a_primary_that_is_not_allowed_is_never_asked(shop: Shop, by: str) -> None:
    """Although it works, and also where user code brings a client of it."""
    if by == "tenant":
        shop.configure(more=TENANT.format(routes='["openai"]'))
    how: Any = {"tenant": "acme inc"} if by == "tenant" else {"routes": ["openai"]}
    tasks = tasks_of(shop)
    shop.work()
    jobs = [task.send_with_options(args=(f"job{n}",), **how) for n, task in enumerate(tasks)]
    assert ["openai"] * 3 == [shop.result(job).partition(":")[0] for job in jobs]
    assert [] == shop.primary.calls()
    others = [task.send(f"other{n}") for n, task in enumerate(tasks)]
    assert ["anthropic"] * 3 == [shop.result(job).partition(":")[0] for job in others]


@pytest.mark.parametrize("by", ["tenant", "job"])
def test_a_fallback_that_is_not_allowed_is_never_asked(shop: Shop, by: str) -> None:
    """The job waits for its only route; others are rerouted meanwhile."""
    if by == "tenant":
        shop.configure(more=TENANT.format(routes='["anthropic"]'))
    how: Any = {"tenant": "acme inc"} if by == "tenant" else {"routes": ["anthropic"]}
    tasks = tasks_of(shop)
    shop.work()
    shop.open_breaker()
    jobs = [task.send_with_options(args=(f"job{n}",), **how) for n, task in enumerate(tasks)]
    shop.until_all("held", jobs)
    assert "openai" == shop.result(tasks[0].send("other")).partition(":")[0]
    assert ["other"] == [call.job for call in shop.fallback.calls() if call.job]
    shop.heal()
    assert ["anthropic"] * 3 == [shop.result(job).partition(":")[0] for job in jobs]


@pytest.mark.parametrize("routes", ["openai", [], ["bedrock"], ["anthropic", "bedrock"]])
def test_a_job_cannot_be_given_other_routes(shop: Shop, routes: Any) -> None:
    """What its task allows is the most."""
    (task, *_) = tasks_of(shop)
    with pytest.raises(InvalidJob, match="routes must name some of those of task given: anthropic, openai"):
        task.send_with_options(args=("a",), routes=routes)


def test_a_job_without_any_route_left_is_refused(shop: Shop) -> None:
    shop.configure(more=TENANT.format(routes='["openai"]'))
    (task, *_) = tasks_of(shop)
    with pytest.raises(InvalidJob, match="no route is left for this job"):
        task.send_with_options(args=("a",), tenant="acme inc", routes=["anthropic"])
    assert {} == shop.books()


def test_one_that_lost_its_last_route_needs_review(shop: Shop) -> None:
    """Its tenant's list changed after it was sent: it is held for a human, and no provider sees its prompt."""
    (task, *_) = tasks_of(shop)
    job = task.send_with_options(args=("a",), tenant="acme inc", routes=["anthropic"])
    shop.configure(more=TENANT.format(routes='["openai"]'))
    shop.work()
    shop.until_all("held", [job])
    assert "no route is left for it" in shop.facts(job).detail
    assert [] == [*shop.primary.calls(), *shop.fallback.calls()]


@pytest.mark.parametrize("fault", [Fault.OVERLOADED, Fault.HANG])
def test_the_order_is_the_tasks(shop: Shop, fault: Fault) -> None:
    """Whatever the order in which a job or tenant names its routes."""
    shop.configure(timeout_s=0.5)
    (task, *_) = tasks_of(shop)
    shop.work()
    assert "anthropic" == shop.result(task.send_with_options(args=("a",), routes=["openai", "anthropic"])).partition(":")[0]
    shop.primary.fail(fault)
    assert "openai" == shop.result(task.send_with_options(args=("b",), routes=["openai", "anthropic"])).partition(":")[0]


@pytest.mark.parametrize(
    ("routes", "why"),
    [
        ('["opnai"]', "there is no route 'opnai'; did you mean openai"),
        ("[]", "at least 1 item"),
        ('"openai"', "must be a valid tuple"),
        ('["openai"]\nx = 1', "unknown key"),
    ],
)
def test_a_tenant_s_table_is_checked(shop: Shop, routes: str, why: str) -> None:
    shop.configure(more=TENANT.format(routes=routes))
    with pytest.raises(ConfigurationError, match=why):
        settings()
