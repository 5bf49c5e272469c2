# SPDX-License-Identifier: Apache-2.0
"""`tideover routes test`: which way a job would go, as things are or as if a route were in trouble."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from tideover import ai_task, ops
from tideover.ops import Misasked, Operator
from tideover.testing import Fault
from tideover_worker.cli import main

if TYPE_CHECKING:
    from tests.pipeline.conftest import Shop

BEDROCK = """
[routes.bedrock]
kind = "bedrock"
region = "us-east-1"
models = { "claude-opus-4-8" = "anthropic.claude-opus-4-8-v1:0" }
[prices."gpt-5.5"]
input = 1.25
output = 10
[tenants.acme]
routes = ["anthropic", "bedrock"]
"""


@pytest.fixture
def task(shop: Shop) -> str:
    """A task with three routes that a worker has made known."""
    shop.configure(more=BEDROCK)
    said: Any = {"criticality": "critical", "expires_in": timedelta(minutes=1), "reroute": ["bedrock", "openai"]}
    ai_task(actor_name="draft", models=[shop.model], **said)(lambda: None)
    ai_task(actor_name="canned", models=[shop.model], degrade="sorry", **{**said, "reroute": []})(lambda: None)
    ai_task(actor_name="unknown", **said)(lambda: None)
    ai_task(actor_name="near", models=[shop.model], **{**said, "reroute": ["openai"]})(lambda: None)
    shop.work()
    return "draft"


def asked(operator: Operator, task: str, **more: Any) -> ops.RouteTest:
    assume = dict(ops.assumptions(more.pop("assume", ())))
    (found,) = ops.try_routes(operator, task, assume=assume, **more)
    return found


@pytest.mark.parametrize(
    ("assume", "verdict", "serving"),
    [
        ([], "run", ["anthropic", "bedrock", "openai"]),
        (["anthropic=suspect"], "run", ["anthropic", "bedrock", "openai"]),
        (["anthropic=down"], "reroute", ["bedrock", "openai"]),
        (["anthropic=parked", "bedrock=down"], "reroute", ["openai"]),
        (["anthropic=throttled"], "reroute", ["bedrock", "openai"]),
        (["anthropic=down", "bedrock=down", "openai=down"], "hold", []),
    ],
)
def test_the_chain_is_told_hop_by_hop(
    shop: Shop, task: str, operator: Operator, assume: list[str], verdict: str, serving: list[str]
) -> None:
    """By the very table that decides; what was assumed is marked, and nothing is changed."""
    found = asked(operator, task, assume=assume)
    assert (verdict, serving) == (found.verdict, [hop.route for hop in found.hops if hop.serves])
    assert [name.partition("=")[0] for name in assume] == [hop.route for hop in found.hops if hop.assumed]
    assert ["anthropic", "bedrock", "openai"] == [hop.route for hop in found.hops]
    assert [shop.model, "anthropic.claude-opus-4-8-v1:0", "gpt-5.5"] == [hop.model for hop in found.hops]
    assert [None, None, (1.25, 10.0)] == [hop.price for hop in found.hops]
    assert ["", ""] == [hop.loses for hop in found.hops[:2]]
    assert "refuses documents" in found.hops[2].loses
    assert [] == [*shop.primary.calls(), *shop.fallback.calls()]


def test_as_it_is(shop: Shop, task: str, operator: Operator) -> None:
    """Without assumptions the breakers say it."""
    shop.open_breaker()
    found = asked(operator, task)
    assert ("reroute", "open", "it is open") == (found.verdict, found.hops[0].state, found.hops[0].why)
    assert f"a critical job of draft that calls {shop.model} is rerouted to bedrock" == found.sentence


def test_who_may_go_where(task: str, operator: Operator) -> None:
    """A tenant's settings narrow the chain; a deferrable job waits; a degraded answer is one; a model that no route has."""
    assert ["anthropic", "bedrock"] == [hop.route for hop in asked(operator, task, tenant="acme").hops]
    deferrable = asked(operator, task, criticality="deferrable", assume=["anthropic=down"])
    assert ("hold", "deferrable jobs wait for their primary") == (deferrable.verdict, deferrable.hops[1].why)
    assert "degrade" == asked(operator, "canned", assume=["anthropic=down"]).verdict
    odd = asked(operator, task, models=["claude-x"], assume=["anthropic=down"])
    assert ("hold", "it has no model for claude-x") == (odd.verdict, odd.hops[1].why)


@pytest.mark.parametrize(
    ("name", "more", "why"),
    [
        ("drafd", {}, "there is no task 'drafd'; did you mean draft"),
        ("unknown", {}, "name one with --model"),
        ("draft", {"assume": ["anthropc=down"]}, "there is no route 'anthropc'"),
        ("draft", {"assume": ["anthropic=gone"]}, "with one of up, down"),
        ("draft", {"assume": ["anthropic"]}, "with one of up, down"),
    ],
)
def test_what_makes_no_sense_is_said(task: str, operator: Operator, name: str, more: dict[str, Any], why: str) -> None:
    with pytest.raises(Misasked, match=why):
        asked(operator, name, **more)


def test_live(shop: Shop, task: str, operator: Operator) -> None:
    """One token over each route: what it came to, whatever the breakers say."""
    shop.fallback.fail(Fault.OVERLOADED)
    told = {hop.route: hop.live or "" for hop in asked(operator, "near", live=True).hops}
    assert told["anthropic"].startswith("answered in ")
    assert "503" in told["openai"]


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_the_command(shop: Shop, task: str, how: list[str]) -> None:
    """Lines for a pipe, JSON for a program; a mistake is one line and exit code 2."""
    run = CliRunner().invoke(main, ["routes", "test", "draft", "--assume", "anthropic=down", "-n", shop.namespace, *how])
    assert 0 == run.exit_code, run.output
    if how:
        assert "reroute" == json.loads(run.output)["tests"][0]["verdict"]
    else:
        header, first, *_ = run.output.splitlines()
        row = dict(zip(header.split("\t"), first.split("\t"), strict=True))
        assert ("anthropic", "open", "reroute") == (row["route"], row["state"], row["verdict"])
    wrong = CliRunner().invoke(main, ["routes", "test", "drafd", "-n", shop.namespace])
    assert (2, True) == (wrong.exit_code, "did you mean draft" in wrong.output)
