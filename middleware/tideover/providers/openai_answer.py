# SPDX-License-Identifier: Apache-2.0
"""An answer of OpenAI's chat completions in the words of the Messages API: whole, or as a stream.

What is no complete answer is not made one. The one thing left out unsaid is the reasoning text that some servers add beside an
answer: it was not asked for. Pure functions; the calls are in `openai_compatible`, the way there is `openai_request`.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tideover.core.outcome import Kind, Outcome, of_stream_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal", "tool_calls": "tool_use"}
ERROR_TYPES: dict[Kind, str] = {
    "throttle": "rate_limit_error",
    "quota": "billing_error",
    "auth": "authentication_error",
    "model": "not_found_error",
    "caller": "invalid_request_error",
    "ambiguous": "timeout_error",
}
"""What the Messages dialect calls an outcome; an outage is an `api_error`, or at 529 an `overloaded_error`."""

GOOD_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""The ids of tool calls that the Messages API takes back."""


class NotAnAnswer(Exception):
    """A 2xx that holds no complete answer. To be treated as an outage of the route."""


def to_message(chat: Mapping[str, Any]) -> dict[str, Any]:
    """The Messages answer for a chat answer. Raises `NotAnAnswer` if it is not a complete one.

    A tool call that the limit of tokens cut off is left out, and `stop_reason` says `max_tokens`.
    """
    choice = first_choice(chat)
    if choice is None:
        raise NotAnAnswer("no choices")
    said = choice.get("message")
    if not isinstance(said, dict):
        raise NotAnAnswer("a choice without a message")
    refusal = said.get("refusal")
    text = chat_text(said.get("content")) if refusal is None else str(refusal)
    calls = calls_of(said)
    stop_reason = "refusal" if refusal is not None else stop_reason_of(choice.get("finish_reason"), calls=bool(calls))
    content = [{"type": "text", "text": text}] if text else []
    return {
        **message_head(chat),
        "content": [*content, *tool_uses(calls, cut_off=stop_reason == "max_tokens")],
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": usage_of(chat.get("usage")),
    }


def first_choice(chat: Mapping[str, Any]) -> dict[str, Any] | None:
    choices = chat.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return None
    return choices[0]


def stop_reason_of(finish_reason: object, *, calls: bool) -> str:
    """Why it ended. Gemini says `stop` where it calls tools. One that is not known, as `error` or `abort`, is no end."""
    stop_reason = STOP_REASONS.get(finish_reason) if isinstance(finish_reason, str) else None
    if stop_reason is None:
        raise NotAnAnswer("no finish_reason" if finish_reason is None else "an unknown finish_reason")
    if stop_reason == "tool_use" and not calls:
        raise NotAnAnswer("tool_calls without a call")
    return "tool_use" if calls and stop_reason == "end_turn" else stop_reason


def chat_text(content: object) -> str:
    """The text of a chat message or delta; as a list of parts (Mistral) its reasoning is left out."""
    if content is None or isinstance(content, str):
        return "" if content is None else content
    if not isinstance(content, list):
        raise NotAnAnswer("content that is not text")
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(str(part.get("text", "")) for part in parts)


def calls_of(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tool calls of a chat message or delta, each with its function."""
    calls = said.get("tool_calls")
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise NotAnAnswer("tool_calls that are no list")
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
            raise NotAnAnswer("a tool call without a function")
    return calls


def tool_uses(calls: Iterable[Mapping[str, Any]], *, cut_off: bool) -> list[dict[str, Any]]:
    blocks = []
    for n, call in enumerate(calls):
        name, arguments = call["function"].get("name"), call["function"].get("arguments")
        given = input_of(arguments)
        if given is None and cut_off:
            break
        if given is None or not isinstance(name, str) or not name:
            raise NotAnAnswer("a tool call without a name" if given is not None else "arguments that are no JSON object")
        blocks.append(
            {"type": "tool_use", "id": use_id(call.get("id"), n, name, json.dumps(given)), "name": name, "input": given}
        )
    return blocks


def input_of(arguments: object) -> dict[str, Any] | None:
    """The arguments of a call; some servers send an object instead of its text, or nothing for no arguments."""
    if isinstance(arguments, dict) or arguments in (None, ""):
        return dict(arguments) if isinstance(arguments, dict) else {}
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def use_id(given: object, n: int, *parts: str) -> str:
    """The id of a tool call; where there is none, or one that the Messages API would not take back, one is made.

    >>> use_id("call_1", 0), use_id("", 0, "search", "{}") == use_id("", 1, "search", "{}")
    ('call_1', False)
    """
    if isinstance(given, str) and GOOD_ID.fullmatch(given):
        return given
    return "toolu_" + hashlib.sha256("\0".join((str(given), str(n), *parts)).encode()).hexdigest()[:24]


def message_head(chat: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": f"msg_{chat.get('id', 'unnamed')}",
        "type": "message",
        "role": "assistant",
        "model": str(chat.get("model", "")),
    }


def usage_of(usage: object) -> dict[str, int]:
    """Tokens as Messages counts them: `input_tokens` without those read from a cache. Zeros where none are told."""
    told = usage if isinstance(usage, dict) else {}
    details = told.get("prompt_tokens_details")
    cached = count(details.get("cached_tokens")) if isinstance(details, dict) else 0
    return {
        "input_tokens": max(0, count(told.get("prompt_tokens")) - cached),
        "output_tokens": count(told.get("completion_tokens")),
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
    }


def count(value: object) -> int:
    return value if isinstance(value, int) else 0


def frame(event: str, **data: Any) -> bytes:
    return f"event: {event}\ndata: {json.dumps({'type': event, **data})}\n\n".encode()


@dataclass(slots=True)
class Block:
    """A block of a stream's content, and its pieces that have not gone out. `call`: the provider's id of a tool call."""

    kind: str
    call: str = ""
    name: str = ""
    arguments: str = ""
    waiting: list[str] = field(default_factory=list)
    opened: bool = False


class StreamTranslation:
    """Turns the chunks of a chat stream into the events of a Messages stream, which always ends in `message_stop` or `error`.

    Messages sends block after block. A text is over when a tool is called; of several tool calls, whose pieces may come mixed,
    the first goes out as it comes and the others after it.

    Attributes:
      over: an error has ended the stream; nothing follows it.
    """

    def __init__(self) -> None:
        self.over = False
        self.started = False
        self.finish_reason: object = None
        self.refused = False
        self.usage: object = None
        self.blocks: list[Block] = []
        self.live = 0
        """The number of the block that goes out as it comes."""
        self.slots: dict[int, Block] = {}
        """The tool calls by the provider's numbers for them."""

    def feed(self, chunk: Mapping[str, Any]) -> bytes:
        """The events for one chunk, possibly none."""
        if self.over:
            return b""
        if chunk.get("error") is not None:
            return self.fail_as(of_stream_error(chunk))
        if chunk.get("usage") is not None:
            self.usage = chunk["usage"]
        choice = first_choice(chunk)
        if choice is None:  # the usage alone, or what Azure's filters say of the prompt
            return b""
        events = b"" if self.started else self.start(chunk)
        try:
            self.take(choice)
            return events + self.flow()
        except NotAnAnswer as error:
            return events + self.fail(str(error))

    def start(self, chunk: Mapping[str, Any]) -> bytes:
        self.started = True
        message = {**message_head(chunk), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage_of(None)}
        return frame("message_start", message=message)

    def take(self, choice: Mapping[str, Any]) -> None:
        delta = choice.get("delta")
        said = delta if isinstance(delta, dict) else {}
        refusal = said.get("refusal")
        text = chat_text(said.get("content")) if refusal is None else str(refusal)
        if text:
            if not self.blocks or self.blocks[-1].kind != "text":
                self.blocks.append(Block("text"))
            self.blocks[-1].waiting.append(text)
        for call in calls_of(said):
            self.take_call(call)
        self.refused = self.refused or refusal is not None
        if choice.get("finish_reason") is not None:
            self.finish_reason = choice["finish_reason"]
            stop_reason_of(self.finish_reason, calls=True)

    def take_call(self, call: Mapping[str, Any]) -> None:
        """A piece of a tool call. A new id is a new call, too: Gemini numbers all of them 0."""
        number, given, function = count(call.get("index")), call.get("id"), call["function"]
        block = self.slots.get(number)
        if block is None or (given and given != block.call):
            if not isinstance(function.get("name"), str) or not function["name"]:
                raise NotAnAnswer("a tool call without a name")
            block = Block("tool_use", str(given) if given else "", function["name"])
            self.blocks.append(block)
            self.slots[number] = block
        arguments = function.get("arguments")
        piece = json.dumps(arguments) if isinstance(arguments, dict) else arguments
        if isinstance(piece, str) and piece:
            block.arguments += piece
            block.waiting.append(piece)

    def flow(self) -> bytes:
        """What can go out now: the live block's pieces; a text that another block follows is over."""
        events = b""
        while self.live < len(self.blocks):
            events += self.pieces()
            if self.blocks[self.live].kind == "tool_use" or self.live + 1 == len(self.blocks):
                break
            events += self.close()
        return events

    def pieces(self) -> bytes:
        block, events = self.blocks[self.live], b""
        if not block.opened:
            block.opened = True
            begun: dict[str, Any] = {"type": "text", "text": ""}
            if block.kind == "tool_use":
                begun = {"type": "tool_use", "id": use_id(block.call, self.live, block.name), "name": block.name, "input": {}}
            events = frame("content_block_start", index=self.live, content_block=begun)
        for piece in block.waiting:
            delta = {"type": "text_delta", "text": piece}
            if block.kind == "tool_use":
                delta = {"type": "input_json_delta", "partial_json": piece}
            events += frame("content_block_delta", index=self.live, delta=delta)
        block.waiting.clear()
        return events

    def close(self) -> bytes:
        self.live += 1
        return frame("content_block_stop", index=self.live - 1)

    def fail(self, why: str) -> bytes:
        """The event that says that the stream broke off; a fault of the route."""
        self.over = True
        return frame("error", error={"type": "api_error", "message": f"tideover: the route's stream is broken: {why}"})

    def fail_as(self, outcome: Outcome) -> bytes:
        self.over = True
        error = {"type": ERROR_TYPES.get(outcome.kind, "api_error"), "message": f"tideover: the route says: {outcome.why}"}
        return frame("error", error=error)

    def finish(self) -> bytes:
        """The last events. Without a finish reason the answer was cut off, which must not look like an answer."""
        if self.over:
            return b""
        try:
            stop_reason = self.stop_reason()
        except NotAnAnswer as error:
            return self.fail(str(error))
        self.over = True
        closing = b""
        while self.live < len(self.blocks):
            closing += self.pieces() + self.close()
        delta = {"stop_reason": stop_reason, "stop_sequence": None}
        return closing + frame("message_delta", delta=delta, usage=usage_of(self.usage)) + frame("message_stop")

    def stop_reason(self) -> str:
        """Why the stream ended, if it ended well. Arguments of a tool that the limit of tokens cut off are left as they are."""
        ended = "refusal" if self.refused else stop_reason_of(self.finish_reason, calls=bool(self.slots))
        whole = all(block.kind == "text" or input_of(block.arguments) is not None for block in self.blocks)
        if not whole and ended != "max_tokens":
            raise NotAnAnswer("arguments that are no JSON object")
        return ended


class EventBytes:
    """The same from bytes to bytes. Lines end in LF only: text may hold any other character that Python calls a line end."""

    def __init__(self) -> None:
        self.translation = StreamTranslation()
        self.rest = b""

    def push(self, piece: bytes) -> bytes:
        *lines, self.rest = (self.rest + piece).split(b"\n")
        return b"".join(self.line(line) for line in lines)

    def line(self, line: bytes) -> bytes:
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or not data:
            return b""  # a comment that keeps the connection alive, an event's name, a blank line
        if data == b"[DONE]":
            return self.translation.finish()
        try:
            chunk = json.loads(data)
        except ValueError:
            chunk = None
        return self.translation.feed(chunk) if isinstance(chunk, dict) else self.translation.fail("a chunk that is not JSON")

    def end(self) -> bytes:
        return self.line(self.rest) + self.translation.finish()
