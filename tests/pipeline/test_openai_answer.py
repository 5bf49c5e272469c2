# SPDX-License-Identifier: Apache-2.0
"""Messages in the words of chat completions, and back: what is carried, what is lost, what is refused, what is no answer."""

from __future__ import annotations

import doctest
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tideover.providers import openai_chat
from tideover.providers.openai_chat import EventBytes, NotAnAnswer, StreamTranslation, Untranslatable, to_chat, to_message

ASK: dict[str, Any] = {"model": "claude-sonnet-5-5", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
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


# --- what is sent


def test_a_conversation_of_text_is_carried_whole() -> None:
    body = {
        **ASK,
        "system": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "c", "citations": None}]},
            {"role": "user", "content": "d"},
        ],
        "metadata": {"user_id": "u-1"},
        "temperature": 0.0,
        "tools": [],
    }
    chat, losses = to_chat(body, "gpt-x")
    assert losses == ()
    assert chat == {
        "model": "gpt-x",
        "messages": [
            {"role": "system", "content": "Be brief.\n\nBe kind."},
            {"role": "user", "content": "a\n\nb"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ],
        "max_tokens": 9,
        "user": "u-1",
        "temperature": 0.0,
    }


CACHED = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize(
    ("more", "losses"),
    [
        ({"stop_sequences": ["END"]}, ("stop_sequence",)),
        ({"system": [CACHED]}, ("cache_control",)),
        ({"cache_control": {"type": "ephemeral"}, "thinking": {"type": "disabled"}}, ("cache_control", "thinking")),
        ({"stream": True}, ()),
        ({"stop_sequences": [], "cache_control": None}, ()),
    ],
)
def test_a_loss_is_named(more: dict[str, Any], losses: tuple[str, ...]) -> None:
    assert losses == to_chat({**ASK, **more}, "gpt-x")[1]


def said(*blocks: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}, {"role": "user", "content": "and?"}]}


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "auto"}}, ("tool_choice", "tools")),
        ({"tools": [{"type": "web_search_20260209", "name": "web_search"}]}, ("server tools", "tools")),
        (said({"type": "image", "source": {}}, {"type": "document", "source": {}}), ("document", "image")),
        (said({"type": "thinking", "thinking": "hm", "signature": "s"}, role="assistant"), ("thinking",)),
        (said({"type": "tool_use", "id": "t", "name": "f", "input": {}}, role="assistant"), ("tool_use",)),
        (said({"type": "text", "text": "x", "new": 1}), ("text.new",)),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "{"}]}, ("prefill",)),
        ({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]}, ("role system",)),
        ({"output_config": {"effort": "low"}}, ("output_config",)),
        ({"thinking": {"type": "adaptive"}}, ("thinking",)),
        ({"metadata": {"team": "x"}}, ("metadata.team",)),
        ({"stop_sequences": list("abcde")}, ("more than 4 stop_sequences",)),
        ({"inference_geo": "eu", "top_k": 3}, ("inference_geo", "top_k")),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(more: dict[str, Any], what: tuple[str, ...]) -> None:
    with pytest.raises(Untranslatable) as caught:
        to_chat({**ASK, **more}, "gpt-x")
    assert what == caught.value.what


# --- what comes back


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


def test_odd_answers_are_read_too() -> None:
    refused = to_message(answer(None, refusal="I won't"))
    assert (refused["stop_reason"], refused["content"]) == ("refusal", [{"type": "text", "text": "I won't"}])
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "yes"}]
    assert to_message(answer(parts))["content"] == [{"type": "text", "text": "yes"}]
    assert to_message(answer(None, "length"))["content"] == []
    assert to_message({**answer(), "usage": None})["usage"]["input_tokens"] == 0


@pytest.mark.parametrize(
    "chat",
    [{}, {"choices": []}, {"choices": [{}]}, answer(finish_reason=None), answer(finish_reason="error"), answer(content=3)],
)
def test_what_is_no_complete_answer_is_not_made_one(chat: dict[str, Any]) -> None:
    with pytest.raises(NotAnAnswer):
        to_message(chat)


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
    assert doctest.testmod(openai_chat).failed == 0
