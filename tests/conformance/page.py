# SPDX-License-Identifier: Apache-2.0
"""Runs the conformance suite and writes docs/reference/routes.md: `python -m tests.conformance.page`."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
from tests.conformance.features import FEATURES
from tests.conformance.providers import PROVIDERS, Provider, Server, serving

from tideover import settings as tideover_settings
from tideover.call import answer
from tideover.errors import ProviderError
from tideover.plan import Try

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "routes.md"
MODEL = "claude-opus-4-8"
ASK: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}
HEAD = """\
# What each provider can carry

A critical job whose primary is down goes to a route that can carry what it asked, exactly. This page is what the conformance
suite found (`python -m tests.conformance.page` writes it, a test keeps it true): requests of the official anthropic SDK, sent
as a rerouted call to a server that is shaped like the provider and refuses what the real one is known to refuse. Every
translated request, and every chunk of an answer, is checked with the official openai SDK's own types (Google's `extra_content`
apart). No provider itself was called.

*Loses*: it is carried, and `last_served().losses` names what is lost; with `on_loss="refuse"` the route is passed over instead.
*Refuses*: the route is passed over by name, and the job goes to the next one or waits. Signed thinking, uploaded files and
containers stay with the provider that made them, whatever the route. To Claude on a cloud a request goes as it is: what that
cloud lacks (server tools, for instance) it answers with a 400, and then it is passed over for that request.

Plain calls, streams and coroutines get the same.

| provider | carries | loses | refuses |
|---|---|---|---|
"""


@dataclass
class Row:
    """What came of all features with one provider. `loses`: feature → what it lost."""

    carries: list[str] = field(default_factory=list)
    loses: dict[str, str] = field(default_factory=dict)
    refuses: list[str] = field(default_factory=list)


def use(provider: Provider, server: Server) -> None:
    """Lets this process's settings know the route `other`."""
    version = "/v1" if provider.settings["kind"] == "openai-compatible" else ""
    said = {**provider.settings, "base_url": f"{server.url}{version}", "api_key_env": "CONFORMANCE_KEY"}
    os.environ |= {f"TIDEOVER_ROUTES__OTHER__{name.upper()}": value for name, value in said.items()}
    os.environ |= {"TIDEOVER_ROUTES__OTHER__MODELS": f'{{"{MODEL}": "its-model"}}', "CONFORMANCE_KEY": "key"}
    os.environ["TIDEOVER_ROUTES__ANTHROPIC__KIND"] = "anthropic"
    tideover_settings.forget()


def forget() -> None:
    for name in [name for name in os.environ if name.startswith("TIDEOVER_ROUTES__")]:
        del os.environ[name]
    tideover_settings.forget()


def ask(feature: dict[str, Any], *, stream: bool = False) -> tuple[anthropic.types.Message, tuple[str, ...]]:
    """The answer of the route `other` to a call of the SDK, and what was lost; `ProviderError`: it was refused."""
    from tideover.providers import wire

    losses: list[str] = []

    def carry(request: Any, call_next: Any) -> Any:
        tried = wire.call(Try("other", "its-model", began=lambda: None, reroutes=True), request, None)
        losses.extend(tried.losses)
        return answer(tried)

    with anthropic.Anthropic(api_key="sk-primary", base_url="http://127.0.0.1:1", max_retries=0, middleware=[carry]) as claude:
        if not stream:
            return claude.messages.create(**{**ASK, **feature}), tuple(losses)
        with claude.messages.stream(**{**ASK, **feature}) as answered:
            return answered.get_final_message(), tuple(losses)


async def aask(feature: dict[str, Any]) -> anthropic.types.Message:
    """As `ask`, from an event loop."""
    from tideover.providers import wire

    async def carry(request: Any, call_next: Any) -> Any:
        return answer(await wire.acall(Try("other", "its-model", began=lambda: None, reroutes=True), request, None))

    try:
        async with anthropic.AsyncAnthropic(
            api_key="sk-primary", base_url="http://127.0.0.1:1", max_retries=0, middleware=[carry]
        ) as claude:
            return await claude.messages.create(**{**ASK, **feature})
    finally:
        await wire.aclose()


def row_of(provider: Provider) -> Row:
    """Asks a provider for everything."""
    row = Row()
    with serving(provider) as server:
        use(provider, server)
        try:
            for name, feature in FEATURES.items():
                try:
                    plain, losses = ask(feature)
                except ProviderError:
                    row.refuses.append(name)
                    continue
                assert shown(plain) == shown(ask(feature, stream=True)[0]) == shown(asyncio.run(aask(feature)))
                if losses:
                    row.loses[name] = ", ".join(losses)
                else:
                    row.carries.append(name)
        finally:
            forget()
    return row


def shown(message: anthropic.types.Message) -> tuple[Any, ...]:
    """What an answer says, whichever way it came."""
    blocks = tuple((block.type, getattr(block, "text", None), getattr(block, "input", None)) for block in message.content)
    return message.stop_reason, blocks, message.usage.input_tokens, message.usage.output_tokens


def line_of(provider: Provider) -> str:
    row = row_of(provider)
    cells = (provider.name, " · ".join(row.carries), lost(row), " · ".join(row.refuses))
    return f"| {' | '.join(cells)} |\n"


def lost(row: Row) -> str:
    return " · ".join(f"{name} ({what})" for name, what in row.loses.items())


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(HEAD + "".join(map(line_of, PROVIDERS)), encoding="utf-8")
