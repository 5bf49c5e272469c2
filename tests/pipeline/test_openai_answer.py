# SPDX-License-Identifier: Apache-2.0
"""An answer of chat completions in the words of the Messages API: what becomes a message, and what is no answer.

The referee is the anthropic SDK: it reads what comes out, whole or as a stream.
"""

from __future__ import annotations

import doctest
import json
import re
from itertools import pairwise
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from tideover.providers import openai_answer
from tideover.providers.openai_answer import EventBytes, NotAnAnswer, StreamTranslation, to_message

USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}
SPOKEN = "grüß\u2028Gott \x85 \U0001f30a"
"""With line ends that are none in a stream of events."""


def answer(content: Any = SPOKEN, finish_reason: str | None = "stop", **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **more}, "finish_reason": finish_reason}
    return {"id": "chatcmpl-1", "object": "chat.completion", "model": "gpt-x", "choices": [choice], "usage": USAGE}


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "model": "gpt-x", "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


CHUNKS = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": SPOKEN[:5]}),
    chunk({"content": SPOKEN[5:]}),
    chunk({}, "stop"),
    {"id": "chatcmpl-1", "model": "gpt-x", "choices": [], "usage": USAGE},
]


def wire(chunks: list[dict[str, Any]], done: bool = True) -> bytes:
    lines = [": keep-alive", *(f"data: {json.dumps(item, ensure_ascii=False)}" for item in chunks)]
    return "".join(f"{line}\n\n" for line in [*lines, *(["data: [DONE]"] if done else [])]).encode()


def events(raw: bytes) -> list[dict[str, Any]]:
    return [json.loads(block.split(b"\ndata: ")[1]) for block in raw.split(b"\n\n") if block]


@pytest.mark.parametrize(
    ("finish_reason", "stop_reason"), [("stop", "end_turn"), ("length", "max_tokens"), ("content_filter", "refusal")]
)
def test_an_answer_becomes_a_message(finish_reason: str, stop_reason: str) -> None:
    assert to_message(answer(finish_reason=finish_reason)) == {
        "id": "msg_chatcmpl-1",
        "type": "message",
        "role": "assistant",
        "model": "gpt-x",
        "content": [{"type": "text", "text": SPOKEN}],
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": {"input_tokens": 4, "output_tokens": 3, "cache_read_input_tokens": 8, "cache_creation_input_tokens": 0},
    }


def call(name: str = "weather", arguments: Any = '{"city": "X"}', **more: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def test_tool_calls_become_tool_uses() -> None:
    """Gemini gives no ids, and says `stop`; some servers send no text of arguments, but an object, or nothing."""
    calls = [call(), call(id="", arguments={"city": "Y"}), call("now", "", id="an odd id")]
    message = Message.model_validate(to_message(answer("I look.", "stop", tool_calls=calls)), strict=True)
    assert "tool_use" == message.stop_reason
    text, *uses = message.content
    assert "I look." == getattr(text, "text", "")
    assert [("weather", {"city": "X"}), ("weather", {"city": "Y"}), ("now", {})] == [
        (use.name, use.input) for use in uses if use.type == "tool_use"
    ]
    ids = [use.id for use in uses if use.type == "tool_use"]
    assert ("call_1", 3) == (ids[0], len(set(ids)))
    assert all(re.fullmatch("[a-zA-Z0-9_-]+", each) for each in ids)


def test_a_call_that_the_limit_cut_off_is_left_out() -> None:
    message = to_message(answer(None, "length", tool_calls=[call(), call(arguments='{"ci')]))
    assert ("max_tokens", 1) == (message["stop_reason"], len(message["content"]))


def test_odd_answers_are_read_too() -> None:
    refused = to_message(answer(None, refusal="I won't"))
    assert (refused["stop_reason"], refused["content"]) == ("refusal", [{"type": "text", "text": "I won't"}])
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "yes"}]
    assert to_message(answer(parts))["content"] == [{"type": "text", "text": "yes"}]
    assert to_message(answer(None, "length"))["content"] == []
    assert to_message({**answer(), "usage": None})["usage"]["input_tokens"] == 0


@pytest.mark.parametrize(
    "chat",
    [
        {},
        {"choices": []},
        {"choices": [{}]},
        answer(finish_reason=None),
        answer(finish_reason="error"),
        answer(content=3),
        answer(finish_reason="tool_calls"),
        answer(None, "tool_calls", tool_calls=[call(arguments="[1]")]),
        answer(None, "stop", tool_calls=[call(name="")]),
        answer(None, "stop", tool_calls=[{"id": "x"}]),
        answer(None, "stop", tool_calls={}),
    ],
)
def test_what_is_no_complete_answer_is_not_made_one(chat: dict[str, Any]) -> None:
    with pytest.raises(NotAnAnswer):
        to_message(chat)


def piece(index: int | None, arguments: str | None = None, name: str | None = None, given: str | None = None) -> dict[str, Any]:
    """A piece of a tool call in a stream."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return chunk({"tool_calls": [{"index": index, "id": given, "type": "function", "function": function}]})


def read(chunks: list[dict[str, Any]]) -> Message:
    """What the SDK makes of a translated stream."""
    source = EventBytes()
    raw = source.push(wire(chunks)) + source.end()
    answers = httpx2.MockTransport(lambda _: httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=raw))
    with (
        httpx2.Client(transport=answers) as http,
        anthropic.Anthropic(api_key="sk-tide", http_client=http) as claude,
        claude.messages.stream(model="m", max_tokens=9, messages=[{"role": "user", "content": "hi"}]) as stream,
    ):
        return stream.get_final_message()


TEXT = chunk({"content": "I look."})
TWO = [("weather", {"city": "X"}), ("now", {})]
STREAMS = {
    "openai": [
        TEXT, piece(0, "", "weather", "call_1"), piece(0, '{"city"'), piece(0, ': "X"}'), piece(1, "", "now", "call_2"),
        piece(1, "{}"), chunk({}, "tool_calls"),
    ],
    "mixed": [
        TEXT, piece(0, "", "weather", "call_1"), piece(1, "", "now", "call_2"), piece(0, '{"city": "X"'), piece(1, "{}"),
        piece(0, "}"), chunk({}, "tool_calls"),
    ],
    "gemini: all are number 0": [
        TEXT, piece(0, '{"city": "X"}', "weather", "a"), piece(0, "{}", "now", "b"), chunk({"content": ""}, "stop"),
    ],
    "no numbers": [TEXT, piece(None, '{"city": "X"}', "weather", "a"), piece(None, None, "now", "b"), chunk({}, "stop")],
    "an end in each chunk": [
        chunk({"content": "I look."}, "stop"), piece(0, '{"city": "X"}', "weather", "a"), piece(1, "", "now", "b"),
        chunk({}, "stop"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("stream", STREAMS.values(), ids=list(STREAMS))
def test_streams_of_tool_calls_are_read_as_messages(stream: list[dict[str, Any]]) -> None:
    message = read(stream)
    assert "tool_use" == message.stop_reason
    assert [("text", "I look.")] == [(block.type, block.text) for block in message.content if block.type == "text"]
    assert TWO == [(block.name, block.input) for block in message.content if block.type == "tool_use"]


def test_a_text_after_a_tool_call_comes_after_it() -> None:
    message = read([piece(0, "{}", "now", "a"), chunk({"content": "there"}), chunk({"content": " it is"}, "stop")])
    assert ["tool_use", "text"] == [block.type for block in message.content]
    assert "there it is" == getattr(message.content[1], "text", "")


def test_a_stream_whose_calls_are_broken_ends_in_an_error() -> None:
    for broken in ([piece(0, '{"ci', "now", "a"), chunk({}, "stop")], [piece(0, "{}")], [chunk({}, "tool_calls")]):
        source = EventBytes()
        assert "error" == events(source.push(wire(broken)) + source.end())[-1]["type"]
    cut_off = read([piece(0, '{"ci', "now", "a"), chunk({}, "length")])
    assert ("max_tokens", ["tool_use"]) == (cut_off.stop_reason, [block.type for block in cut_off.content])


def test_a_stream_that_just_ends_ends_in_an_error() -> None:
    translation = StreamTranslation()
    told = events(b"".join(map(translation.feed, CHUNKS[:3])) + translation.finish())
    assert [event["type"] for event in told][-2:] == ["content_block_delta", "error"]
    assert (told[-1]["error"]["type"], translation.finish()) == ("api_error", b"")


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        ({"error": {"message": "x", "type": "server_error"}}, "api_error"),
        ({"error": {"message": "x", "type": "insufficient_quota"}}, "billing_error"),
        ({"error": {"message": "x", "code": "rate_limit_exceeded"}}, "rate_limit_error"),
        (chunk({}, "abort"), "api_error"),
        (chunk({"content": 3}), "api_error"),
    ],
)
def test_an_error_within_a_stream_ends_it(broken: dict[str, Any], kind: str) -> None:
    told = events(b"".join(map(StreamTranslation().feed, [CHUNKS[0], broken, CHUNKS[1]])))
    assert [event["type"] for event in told] == ["message_start", "error"]
    assert kind == told[1]["error"]["type"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, len(wire(CHUNKS))), max_size=12).map(sorted), st.booleans())
def test_how_the_bytes_are_cut_does_not_matter(cuts: list[int], carriage_returns: bool) -> None:
    raw = wire(CHUNKS).replace(b"\n", b"\r\n") if carriage_returns else wire(CHUNKS)
    edges = [0, *cuts, len(raw)]
    source = EventBytes()
    told = events(b"".join(source.push(raw[start:end]) for start, end in pairwise(edges)) + source.end())
    assert "".join(event["delta"]["text"] for event in told if event["type"] == "content_block_delta") == SPOKEN
    assert (told[0]["type"], told[-1]["type"], told[-2]["usage"]["input_tokens"]) == ("message_start", "message_stop", 4)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(openai_answer).failed == 0
