# SPDX-License-Identifier: Apache-2.0
"""Frameworks that are given our client: their calls are rerouted as any, and nothing of them needs to know."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from tests.conformance.providers import Provider, serving

from tideover import aclaude, ai_task, claude
from tideover.testing import Fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.pipeline.conftest import Shop


class City(BaseModel):
    city: str


def asking(shop: Shop, dialect: str, run: Callable[[], Any]) -> Any:
    """The result of a job of the task that `run` declares, while the primary is down and `dialect` is the fallback's."""
    with serving(Provider("", {}, dialect)) as other:
        named = f'base_url = "{other.url}/v1"\nmodels = {{ "{shop.model}" = "m" }}'
        shop.configure(more=f'[routes.other]\nkind = "openai-compatible"\ndialect = "{dialect}"\n{named}')
        task = run()
        shop.work()
        shop.primary.fail(Fault.OVERLOADED)
        return shop.result(task.send("a"))


def options(shop: Shop) -> Any:
    return {"criticality": "critical", "expires_in": timedelta(minutes=2), "reroute": ["other"], **shop.quick}


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("dialect", ["openai", "mistral"])
def test_pydantic_ai(shop: Shop, typed: bool, dialect: str) -> None:
    """Texts and typed answers of an agent, by another provider than the one that it thinks it talks to."""

    def declare() -> Any:
        @ai_task(**options(shop))
        async def agent(tag: str) -> str:
            model = AnthropicModel(shop.model, provider=AnthropicProvider(anthropic_client=aclaude()))
            if typed:
                return (await Agent(model, output_type=City).run("Where?")).output.city
            return (await Agent(model, instructions="Be brief.").run("hi")).output

        return agent

    assert ("Ærø" if typed else "Hello.") == asking(shop, dialect, declare)


@pytest.mark.parametrize("dialect", ["openai", "mistral"])
def test_instructor(shop: Shop, dialect: str) -> None:
    """Where it is installed: what it pins would hold back the packages that the other tests run with."""
    instructor = pytest.importorskip("instructor")

    def declare() -> Any:
        @ai_task(**options(shop))
        def typed(tag: str) -> str:
            asked: Any = {"model": shop.model, "max_tokens": 100, "messages": [{"role": "user", "content": "Where?"}]}
            return str(instructor.from_anthropic(claude()).messages.create(response_model=City, max_retries=0, **asked).city)

        return typed

    assert asking(shop, dialect, declare) == "Ærø"
