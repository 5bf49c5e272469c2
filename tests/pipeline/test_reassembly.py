# SPDX-License-Identifier: Apache-2.0
"""A stream amounts to the message that a plain call would have answered; the SDK itself is the referee."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tideover.providers import reassembly
from tideover.providers.reassembly import Reassembly

CALL: Any = {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": "?"}]}

texts = st.text(max_size=30)
ids = st.text("abc123_", min_size=1, max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
citations = st.fixed_dictionaries(
    {
        "type": st.just("char_location"),
        "cited_text": texts,
        "document_index": st.integers(0, 9),
        "document_title": texts,
        "start_char_index": st.integers(0, 9),
        "end_char_index": st.integers(10, 99),
        "file_id": st.none(),
    }
)
blocks = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": texts, "citations": st.none() | st.lists(citations, min_size=1)}),
    st.fixed_dictionaries({"type": st.just("thinking"), "thinking": texts, "signature": ids}),
    st.fixed_dictionaries({"type": st.just("redacted_thinking"), "data": ids}),
    st.fixed_dictionaries(
        {"type": st.just("tool_use"), "id": ids, "name": ids, "input": st.dictionaries(texts, values, max_size=3)}
    ),
)
messages = st.fixed_dictionaries(
    {
        "id": ids,
        "type": st.just("message"),
        "role": st.just("assistant"),
        "model": st.just("m"),
        "content": st.lists(blocks, max_size=4),
        "stop_reason": st.sampled_from(["end_turn", "tool_use", "max_tokens", "stop_sequence"]),
        "stop_sequence": st.none() | texts,
        "usage": st.fixed_dictionaries({"input_tokens": st.integers(0, 99), "output_tokens": st.integers(0, 99)}),
    }
)


def event(kind: str, **said: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **said})}\n\n".encode()


def cut(text: str, at: int) -> list[str]:
    return [text[:at], text[at:]]


def events_of(message: dict[str, Any], at: int = 3) -> list[bytes]:
    """The stream that amounts to a message, its texts cut in two."""
    begun = {**message, "content": [], "stop_reason": None, "stop_sequence": None}
    events = [event("message_start", message={**begun, "usage": {**message["usage"], "output_tokens": 1}}), event("ping")]
    for index, block in enumerate(message["content"]):
        empty, deltas = parts_of(block, at)
        events.append(event("content_block_start", index=index, content_block=empty))
        events += [event("content_block_delta", index=index, delta=delta) for delta in deltas]
        events.append(event("content_block_stop", index=index))
    ended = {name: message[name] for name in ("stop_reason", "stop_sequence")}
    events.append(event("message_delta", delta=ended, usage={"output_tokens": message["usage"]["output_tokens"]}))
    return [*events, event("message_stop")]


def parts_of(block: dict[str, Any], at: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A block as it begins, and what is added to it."""
    match block["type"]:
        case "text":
            deltas = [{"type": "text_delta", "text": part} for part in cut(block["text"], at)]
            deltas += [{"type": "citations_delta", "citation": citation} for citation in block["citations"] or []]
            return {"type": "text", "text": "", "citations": None}, deltas
        case "thinking":
            deltas = [{"type": "thinking_delta", "thinking": part} for part in cut(block["thinking"], at)]
            deltas.append({"type": "signature_delta", "signature": block["signature"]})
            return {**block, "thinking": "", "signature": ""}, deltas
        case "tool_use":
            pieces = cut(json.dumps(block["input"]), at)
            return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
        case _:
            return block, []


def read(stream: bytes, size: int = 1 << 20) -> Reassembly:
    read = Reassembly()
    for start in range(0, len(stream), size):
        read.push(stream[start : start + size])
    read.end()
    return read


def by_sdk(stream: bytes) -> dict[str, Any]:
    """What the SDK makes of a stream."""
    headers = {"content-type": "text/event-stream"}
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, headers=headers, content=stream))
    claude = anthropic.Anthropic(api_key="k", http_client=httpx2.Client(transport=transport))
    with claude.messages.stream(**CALL) as answer:
        return answer.get_final_message().to_dict(mode="json")


@given(message=messages, at=st.integers(0, 40), size=st.integers(1, 400), crlf=st.booleans())
def test_a_stream_is_read_to_its_message(message: dict[str, Any], at: int, size: int, crlf: bool) -> None:
    """In chunks of any size: nothing is lost and nothing is added."""
    stream = b"".join(events_of(message, at))
    assert message == read(stream.replace(b"\n", b"\r\n") if crlf else stream, size).whole()


@pytest.mark.parametrize(
    "message",
    [
        {"content": [{"type": "text", "text": "Hello", "citations": None}], "stop_reason": "end_turn"},
        {
            "content": [{"type": "tool_use", "id": "t", "name": "n", "input": {"a": [1, {"b": None}]}}],
            "stop_reason": "tool_use",
        },
        {"content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}], "stop_reason": "max_tokens"},
        {"content": [], "stop_reason": "refusal"},
    ],
)
def test_the_sdk_reads_the_same(message: dict[str, Any]) -> None:
    """What a plain call gets equals what the SDK's own stream helper makes of the same bytes."""
    whole = {"id": "i", "type": "message", "role": "assistant", "model": "m", "stop_sequence": None, **message}
    stream = b"".join(events_of({**whole, "usage": {"input_tokens": 3, "output_tokens": 5}}))
    assert comparable(by_sdk(stream)) == comparable(read(stream).whole())


def comparable(message: dict[str, Any]) -> dict[str, Any]:
    """As the SDK's plain call gives it, without what only its stream helper adds."""
    for block in message["content"]:
        block.pop("parsed_output", None)
    return anthropic.types.Message.model_validate(message).to_dict(mode="json", exclude_none=True)


def test_a_tool_s_input_that_was_cut_off() -> None:
    """At the limit of tokens it is what can be read of it, as in the SDK; anywhere else it is an error."""
    block = {"type": "tool_use", "id": "t", "name": "n", "input": {}}
    delta = {"type": "input_json_delta", "partial_json": '{"a": 1, "b": "tw'}
    start = event("message_start", message={"type": "message", "content": [], "usage": {}})
    start += event("content_block_start", index=0, content_block=block) + event("content_block_delta", index=0, delta=delta)
    cut_short = read(start + event("message_delta", delta={"stop_reason": "max_tokens"}) + event("message_stop"))
    assert {"a": 1} == {name: value for name, value in cut_short.whole()["content"][0]["input"].items() if name == "a"}
    odd = read(start + event("message_delta", delta={"stop_reason": "tool_use"}) + event("message_stop"))
    with pytest.raises(httpx2.RemoteProtocolError, match="not JSON"):
        odd.whole()


def test_what_is_not_known_yet_is_kept() -> None:
    """New events are left out, new deltas added up, new fields taken over: an older tideover must not break a newer API."""
    stream = event("message_start", message={"type": "message", "content": [], "usage": {"input_tokens": 1}, "new": 1})
    stream += event("weather", sky="blue") + event("content_block_start", index=0, content_block={"type": "poem", "line": "a"})
    stream += event("content_block_delta", index=0, delta={"type": "poem_delta", "line": "b", "rhyme": 2})
    stream += event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 2, "poems": 1}, newer={"x": 1})
    whole = read(stream + event("message_stop")).whole()
    usage = {"input_tokens": 1, "output_tokens": 2, "poems": 1}
    content = [{"type": "poem", "line": "ab", "rhyme": 2}]
    told = {"type": "message", "content": content, "usage": usage, "new": 1, "stop_reason": "end_turn", "newer": {"x": 1}}
    assert told == whole


def test_compaction_and_a_server_side_fallback() -> None:
    """Of compaction the last word counts; a fallback block names the model that went on."""
    stream = event("message_start", message={"type": "message", "model": "a", "content": [], "usage": {}})
    stream += event("content_block_start", index=0, content_block={"type": "compaction", "content": None})
    stream += event("content_block_delta", index=0, delta={"type": "compaction_delta", "content": "gist"})
    stream += event("content_block_start", index=1, content_block={"type": "fallback", "to": {"model": "b"}})
    whole = read(stream + event("message_stop")).whole()
    assert ("b", "gist") == (whole["model"], whole["content"][0]["content"])


@pytest.mark.parametrize(
    ("first", "begun"),
    [
        (event("ping"), False),
        (event("content_block_start", index=0, content_block={"type": "text", "text": ""}), False),
        (event("content_block_start", index=0, content_block={"type": "tool_use", "id": "t", "name": "n", "input": {}}), True),
        (event("content_block_start", index=0, content_block={"type": "thinking", "thinking": ""}), True),
        (event("message_stop"), True),
    ],
)
def test_when_content_has_begun(first: bytes, begun: bool) -> None:
    """An empty text is nothing to see; that the model calls a tool or thinks is."""
    stream = Reassembly()
    stream.push(event("message_start", message={"type": "message", "content": [], "usage": {}}))
    assert not stream.begun
    stream.push(first)
    assert begun == stream.begun


@pytest.mark.parametrize(
    "odd",
    [
        b"data: no JSON\n\n",
        b"data: [1]\n\n",
        b"data: {}\n\n",
        b"data: " + b"[" * 100_000 + b"\n\n",
        b"data: \xff\n\n",
        event("content_block_start", index=1, content_block={"type": "text", "text": ""}),
        event("content_block_delta", index=0, delta={"type": "text_delta", "text": "x"}),
        event("content_block_delta", index=-1, delta={"type": "text_delta", "text": "x"}),
        event("message_delta", delta=7),
    ],
)
def test_what_makes_no_sense_is_an_error_without_content(odd: bytes) -> None:
    stream = Reassembly()
    stream.push(event("message_start", message={"type": "message", "content": [], "usage": {}}))
    with pytest.raises(httpx2.RemoteProtocolError, match="makes no sense"):
        stream.push(odd)


def test_an_endless_event_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is not for a hostile server to fill."""
    monkeypatch.setattr(reassembly, "MOST_EVENT_BYTES", 1000)
    stream = Reassembly()
    stream.push(b"data: " + b"x" * 900)
    with pytest.raises(httpx2.RemoteProtocolError, match="more than 1,000 bytes"):
        stream.push(b"x" * 200)


@given(message=messages, start=st.integers(0, 2000), length=st.integers(0, 300), other=st.binary(max_size=60))
def test_no_bytes_crash_it(message: dict[str, Any], start: int, length: int, other: bytes) -> None:
    """A stream of which any part was lost or replaced is an error of the transport, or still a whole message."""
    stream = b"".join(events_of(message))
    broken = stream[:start] + other + stream[start + length :]
    try:
        whole = read(broken).whole()
    except httpx2.RemoteProtocolError:
        return
    assert b"message_stop" in broken or b'"error"' in broken
    assert isinstance(whole["content"], list)


@given(st.binary(max_size=300))
def test_no_rubbish_crashes_it(rubbish: bytes) -> None:
    with pytest.raises(httpx2.RemoteProtocolError):
        read(rubbish)
