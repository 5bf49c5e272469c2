# SPDX-License-Identifier: Apache-2.0
"""What the fake providers do at their front door and with their limits, asked by the real SDKs over HTTP."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import anthropic
import openai
import pytest

from tideover import clock
from tideover.core.outcome import of_exception
from tideover.testing import FakeProvider, Fault, Latency, Phase

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW = Latency(base_s=0.0, per_output_token_s=0.0, jitter=0.0)
CALL: dict[str, Any] = {"model": "claude-opus-4-8", "max_tokens": 20, "messages": [{"role": "user", "content": "Low tide?"}]}


@pytest.fixture
def provider() -> Iterator[FakeProvider]:
    with FakeProvider("anthropic", latency=NOW) as provider:
        yield provider


@pytest.fixture
def claude(provider: FakeProvider) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(api_key="sk-tide", base_url=provider.base_url, max_retries=0, timeout=10) as client:
        yield client


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault.UNAUTHORIZED, anthropic.AuthenticationError),
        (Fault.FORBIDDEN, anthropic.PermissionDeniedError),
        (Fault.EDGE_HTML, anthropic.InternalServerError),
        (Fault.RESET, anthropic.APIConnectionError),
    ],
)
def test_a_front_door_that_is_shut(provider: FakeProvider, claude: anthropic.Anthropic, fault: Fault, error: type) -> None:
    """The list of models fails as the models do: what everybody passes is broken."""
    provider.fail(fault)
    with pytest.raises(error):
        claude.models.list()
    provider.heal()
    assert claude.models.list().data


@pytest.mark.parametrize(
    ("fault", "models"), [(Fault.OVERLOADED, ["*"]), (Fault.HANG, ["*"]), (Fault.UNAUTHORIZED, ["claude-*"])]
)
def test_a_front_door_that_is_open(
    provider: FakeProvider, claude: anthropic.Anthropic, fault: Fault, models: list[str]
) -> None:
    """Where the models are down, or only some of them, the list of models says nothing of it."""
    provider.fail(fault, models=models)
    assert claude.models.list().data
    assert [] == provider.calls()


def test_a_429_that_cannot_be_ours(provider: FakeProvider, claude: anthropic.Anthropic) -> None:
    """It says itself that most of the limit is left; an honest one says that nothing is."""
    said = []
    for fault in (Fault.FALSE_LIMITED, Fault.RATE_LIMITED):
        provider.fail(fault, retry_after_s=7)
        with pytest.raises(anthropic.RateLimitError) as refused:
            claude.messages.create(**CALL)
        outcome = of_exception(refused.value)
        said.append((outcome.kind, outcome.retry_after_s, outcome.headroom is not None and outcome.headroom > 0.5))
    assert [("throttle", 7.0, True), ("throttle", 7.0, False)] == said


def until_refused(claude: anthropic.Anthropic) -> anthropic.RateLimitError:
    """Calls again and again, until the limit is reached."""
    while True:
        try:
            claude.messages.create(**CALL)
        except anthropic.RateLimitError as refused:
            return refused


def test_a_limit_lets_so_many_in_and_refuses_the_others(provider: FakeProvider, claude: anthropic.Anthropic) -> None:
    """Counted over five seconds, as buckets of real limits hold some: of a burst the first ones pass."""
    provider.play([Phase("limited", math.inf, 0.0, {}, limit_per_s=1, retry_after_s=3)])
    began_at = clock.monotonic()
    assert "3" == until_refused(claude).response.headers["retry-after"]
    calls = Counter(call.outcome for call in provider.calls())
    assert {"ok", "rate_limited"} == set(calls)
    assert 5 <= calls["ok"] <= 5 + (clock.monotonic() - began_at)


def test_chat_completions_meet_the_same_limit(provider: FakeProvider) -> None:
    """In the words of their own dialect."""
    provider.play([Phase("limited", math.inf, 0.0, {}, limit_per_s=0.2, retry_after_s=3)])
    with openai.OpenAI(api_key="sk-tide", base_url=f"{provider.root_url}/v1", max_retries=0, timeout=10) as gpt:
        gpt.chat.completions.create(**CALL)
        with pytest.raises(openai.RateLimitError) as refused:
            gpt.chat.completions.create(**CALL)
    assert ("0", "3") == tuple(
        refused.value.response.headers[name] for name in ("x-ratelimit-remaining-requests", "retry-after")
    )


def test_a_capacity_that_nobody_is_told(provider: FakeProvider, claude: anthropic.Anthropic) -> None:
    """Of a burst it bears the first ones; what it cannot bear is overloaded, and no header had said so."""
    provider.play([Phase("weak", math.inf, 0.0, {}, capacity_per_s=0.5)])
    reply = claude.messages.with_raw_response.create(**CALL)
    assert not [name for name in reply.headers if "ratelimit" in name]
    for _ in range(3):
        with pytest.raises(anthropic.APIStatusError, match="529"):
            claude.messages.create(**CALL)
    assert {"ok": 1, "overloaded": 3} == Counter(call.outcome for call in provider.calls())


@pytest.mark.parametrize("stream", [False, True])
def test_good_answers_tell_the_limit(provider: FakeProvider, claude: anthropic.Anthropic, stream: bool) -> None:
    """Per minute, and how many are left."""
    provider.play([Phase("limited", math.inf, 0.0, {}, limit_per_s=2)])
    with claude.messages.with_streaming_response.create(**CALL, stream=stream) as reply:
        told = reply.headers
        reply.read()
    assert ("120", "9") == tuple(told[f"anthropic-ratelimit-requests-{name}"] for name in ("limit", "remaining"))


@pytest.mark.parametrize("capacity", [0, -1, [1], [1, 0], [1, 2, 3]])
def test_a_capacity_that_is_none(capacity: Any) -> None:
    """It says which phase, and what is allowed."""
    with pytest.raises(ValueError, match="phase 'weak': capacity_per_s is a number above 0 or a pair"):
        Phase("weak", 1.0, 0.0, {}, capacity_per_s=capacity)


def test_a_capacity_grows_over_its_phase() -> None:
    """Linearly."""
    phase = Phase("ramp", 60.0, 0.0, {}, capacity_per_s=[5, 15])
    assert [5, 10, 15] == [phase.capacity_at(progress) for progress in (0, 0.5, 1)]
