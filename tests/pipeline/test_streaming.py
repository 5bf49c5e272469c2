# SPDX-License-Identifier: Apache-2.0
"""A hang shows after the idle timeout, and a call that breaks before user code saw anything goes to another route."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anthropic
import pytest
from tests.pipeline.test_reassembly import event

from tideover import aclaude, ai_task, claude, text_of
from tideover.testing import Fault, Latency

if TYPE_CHECKING:
    from tests.pipeline.conftest import Shop

MESSAGE = {"id": "m", "type": "message", "role": "assistant", "model": "m", "content": [], "usage": {}}
HEAD = event("message_start", message=MESSAGE)
WHOLE = (
    HEAD
    + event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    + event("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hello."})
    + event("content_block_stop", index=0)
    + event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3})
    + event("message_stop")
)
BROKEN = [Fault.STREAM_CUT, Fault.STREAM_NO_STOP, Fault.STREAM_ERROR, Fault.STREAM_ERROR_FIRST, Fault.STREAM_STALL]


def plain(shop: Shop, tag: str) -> str:
    return text_of(claude().messages.create(**shop.question(tag)))


def helper(shop: Shop, tag: str) -> str:
    with claude().messages.stream(**shop.question(tag)) as stream:
        return stream.get_final_text()


def raw_stream(shop: Shop, tag: str) -> str:
    with claude().messages.create(**shop.question(tag), stream=True) as stream:
        return "".join(event.delta.text for event in stream if event.type == "content_block_delta")


async def aplain(shop: Shop, tag: str) -> str:
    return text_of(await aclaude().messages.create(**shop.question(tag)))


async def ahelper(shop: Shop, tag: str) -> str:
    async with aclaude().messages.stream(**shop.question(tag)) as stream:
        return await stream.get_final_text()


def task_of(shop: Shop, ask: Callable[[Shop, str], Any], **options: Any) -> Any:
    """A critical task that asks so, and notes the errors that its calls raised."""
    said = {"criticality": "critical", "expires_in": timedelta(minutes=2), "reroute": ["openai"], **shop.quick, **options}
    if asyncio.iscoroutinefunction(ask):

        @ai_task(**said)
        async def acall(tag: str) -> str:
            try:
                return await ask(shop, tag)
            except anthropic.AnthropicError as error:
                shop.ran.append(type(error).__name__)
                raise

        return acall

    @ai_task(**said)
    def call(tag: str) -> str:
        try:
            return ask(shop, tag)
        except anthropic.AnthropicError as error:
            shop.ran.append(type(error).__name__)
            raise

    return call


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("ask", [plain, aplain])
def test_a_plain_call_that_breaks_is_rerouted(shop: Shop, fault: Fault, ask: Callable[[Shop, str], Any]) -> None:
    """Wherever its stream breaks: the function sees only the fallback's whole answer, in one attempt."""
    shop.configure(timeout_s=0.5)
    task = task_of(shop, ask)
    shop.work()
    shop.primary.fail(fault)
    assert "openai" == shop.result(task.send("r")).partition(":")[0]
    assert [] == shop.ran
    assert (1, 1) == (len(shop.calls("r")), len(shop.calls("r", shop.fallback)))
    assert [True, True] == [call.stream for call in (*shop.calls("r"), *shop.calls("r", shop.fallback))]


@pytest.mark.parametrize("ask", [helper, raw_stream, ahelper])
@pytest.mark.parametrize("fault", [Fault.STREAM_ERROR_FIRST, Fault.HANG, Fault.OVERLOADED, Fault.OK_HTML, Fault.OK_EMPTY])
def test_a_stream_that_breaks_before_its_first_content_is_rerouted(
    shop: Shop, fault: Fault, ask: Callable[[Shop, str], Any]
) -> None:
    """Its reader sees the fallback's stream from the beginning."""
    shop.configure(timeout_s=0.5)
    task = task_of(shop, ask)
    shop.work()
    shop.primary.fail(fault)
    answer = shop.result(task.send("r"))
    assert ("openai", []) == (answer.partition(":")[0], shop.ran)
    assert 1 == len(shop.calls("r", shop.fallback))


@pytest.mark.parametrize("ask", [helper, ahelper])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault.STREAM_CUT, "APIConnectionError"),
        (Fault.STREAM_NO_STOP, "APIConnectionError"),
        (Fault.STREAM_STALL, "APITimeoutError"),
        (Fault.STREAM_ERROR, "APIStatusError"),
    ],
)
def test_a_stream_that_breaks_later_fails_honestly(
    shop: Shop, fault: Fault, error: str, ask: Callable[[Shop, str], Any]
) -> None:
    """What was read cannot be taken back: the reader gets an error of the SDK, and the job another attempt."""
    shop.configure(timeout_s=0.5)
    task = task_of(shop, ask)
    shop.work()
    shop.primary.fail(fault)
    job = task.send("r")
    shop.until(lambda: shop.ran, "the reader saw an error")
    assert error == shop.ran[0]
    shop.heal()
    assert shop.result(job).partition(":")[0] in ("anthropic", "openai")


def test_a_long_answer_is_no_hang(shop: Shop) -> None:
    """A plain call may take longer than the idle timeout, as long as its answer comes along."""
    shop.configure(timeout_s=0.5)
    shop.primary.latency = Latency(base_s=0.0, per_output_token_s=0.25, jitter=0.0)
    task = task_of(shop, plain)
    shop.work()
    assert "anthropic" == shop.result(task.send("long")).partition(":")[0]
    (call,) = shop.calls("long")
    assert call.finished_at is not None
    assert call.finished_at - call.at > 1


def test_first_tokens_are_learned_of_plain_calls_too(shop: Shop) -> None:
    """How long they take says sooner than whole answers that a provider is in trouble."""
    shop.primary.latency = Latency(base_s=0.0, per_output_token_s=0.25, jitter=0.0)
    task = task_of(shop, plain)
    shop.work()
    shop.result(task.send("long"))
    key = f"anthropic/{shop.model}"
    shop.until(lambda: shop.breakers.latencies(key), "it was noted")
    assert all(int(bucket) < 0 for bucket in shop.breakers.latencies(key))


@pytest.mark.parametrize("ask", [plain, aplain, helper, ahelper])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_stream_may_come_compressed(shop: Shop, serving: Any, ask: Callable[[Shop, str], Any], zipped: bool) -> None:
    """A proxy's compression changes nothing."""
    head = {"content-type": "text/event-stream"} | ({"content-encoding": "gzip"} if zipped else {})
    shop.configure(primary=serving(head, gzip.compress(WHOLE) if zipped else WHOLE))
    task = task_of(shop, ask)
    shop.work()
    assert "Hello." == shop.result(task.send("r"))


@pytest.mark.parametrize("ask", [plain, aplain])
def test_a_server_that_cannot_stream(shop: Shop, serving: Any, ask: Callable[[Shop, str], Any]) -> None:
    """One that answers with the whole message is understood."""
    content = [{"type": "text", "text": "Hello."}]
    message = json.dumps({**MESSAGE, "content": content, "stop_reason": "end_turn"}).encode()
    shop.configure(primary=serving({"content-type": "application/json"}, message))
    task = task_of(shop, ask)
    shop.work()
    assert "Hello." == shop.result(task.send("r"))


@pytest.mark.parametrize("ask", [plain, aplain, helper, ahelper])
def test_signs_of_life_are_no_answer(shop: Shop, serving: Any, ask: Callable[[Shop, str], Any]) -> None:
    """A provider that sends nothing but pings is given up, too, only later."""
    shop.configure(primary=serving({"content-type": "text/event-stream"}, HEAD, again=event("ping")), timeout_s=0.2)
    task = task_of(shop, ask)
    shop.work()
    assert "openai" == shop.result(task.send("r")).partition(":")[0]


@pytest.mark.parametrize("ask", [plain, aplain, helper, ahelper])
@pytest.mark.parametrize("bad", [b"data: {\n\n", event("content_block_delta", index=4, delta={"type": "text_delta"})])
def test_events_that_make_no_sense_are_an_outage(shop: Shop, serving: Any, ask: Callable[[Shop, str], Any], bad: bytes) -> None:
    shop.configure(primary=serving({"content-type": "text/event-stream"}, HEAD + bad))
    task = task_of(shop, ask)
    shop.work()
    assert ("openai", []) == (shop.result(task.send("r")).partition(":")[0], shop.ran)


def test_a_bypass_leaves_calls_as_they_are(shop: Shop) -> None:
    """With tideover switched off a plain call goes out as one."""
    shop.configure(mode="bypass")
    task = task_of(shop, plain)
    shop.work()
    shop.result(task.send("r"))
    assert [False] == [call.stream for call in shop.calls("r")]
