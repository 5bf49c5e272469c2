# SPDX-License-Identifier: Apache-2.0
"""The Messages dialect in the words of OpenAI's chat completions, and back: text only, and nothing dropped in silence.

What has no words there is refused by name (`Untranslatable`) or named as a loss. The one thing left out unsaid is the reasoning
text that some servers add beside an answer: it was not asked for. Pure functions; the calls are in `openai_compatible`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tideover.core.outcome import Kind, Outcome, of_stream_error

if TYPE_CHECKING:
    from collections.abc import Mapping

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal"}
ERROR_TYPES: dict[Kind, str] = {
    "throttle": "rate_limit_error",
    "quota": "billing_error",
    "auth": "authentication_error",
    "model": "not_found_error",
    "caller": "invalid_request_error",
    "ambiguous": "timeout_error",
}
"""What the Messages dialect calls an outcome; an outage is an `api_error`, or at 529 an `overloaded_error`."""

MAX_STOPS = 4


class Untranslatable(Exception):
    """The request uses something that an OpenAI-compatible endpoint cannot be given.

    Attributes:
      what: the names of it all, sorted.
    """

    def __init__(self, what: tuple[str, ...]) -> None:
        self.what = what
        super().__init__(f"an OpenAI-compatible route cannot carry: {', '.join(what)}")


class NotAnAnswer(Exception):
    """A 2xx that holds no complete answer. To be treated as an outage of the route."""


@dataclass(frozen=True, slots=True)
class Notes:
    """What is lost and what refuses to be carried, gathered while a request is translated."""

    losses: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)


def to_chat(body: Mapping[str, Any], model: str, *, limit_field: str = "max_tokens") -> tuple[dict[str, Any], tuple[str, ...]]:
    """The chat request for a Messages request, and the names of what it loses. Raises `Untranslatable`.

    >>> to_chat({"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], "stop_sequences": ["END"]}, "gpt")
    ({'model': 'gpt', 'messages': [{'role': 'user', 'content': 'hi'}], 'max_tokens': 9, 'stop': ['END']}, ('stop_sequence',))
    """
    notes = Notes()
    turns = list(body.get("messages", ()))
    chat: dict[str, Any] = {"model": model, "messages": [*system_turn(body.get("system"), notes)]}
    chat["messages"] += [chat_turn(turn, notes) for turn in turns]
    if turns and turns[-1].get("role") == "assistant":
        notes.refused.add("prefill")
    for name, value in body.items():
        chat |= chat_field(name, value, limit_field, notes)
    if notes.refused:
        raise Untranslatable(tuple(sorted(notes.refused)))
    return chat, tuple(sorted(notes.losses))


def chat_field(name: str, value: Any, limit_field: str, notes: Notes) -> dict[str, Any]:
    match name, value:
        case ("model" | "messages" | "system", _) | ("tools" | "stop_sequences", []) | (_, None):
            return {}
        case "max_tokens", _:
            return {limit_field: value}
        case (("temperature" | "top_p"), _):
            return {name: value}
        case "stream", _:
            return {"stream": True, "stream_options": {"include_usage": True}} if value else {}
        case "stop_sequences", _:
            notes.losses.add("stop_sequence")  # which one ended the answer is not told, nor that one did
            if len(value) > MAX_STOPS:
                notes.refused.add(f"more than {MAX_STOPS} stop_sequences")
            return {"stop": list(value)}
        case "metadata", _:
            notes.refused.update(f"metadata.{key}" for key in value if key != "user_id")
            return {"user": value["user_id"]} if value.get("user_id") is not None else {}
        case ("thinking", {"type": "disabled"}) | ("cache_control" | "service_tier", _):
            notes.losses.add(name)
            return {}
        case _:
            notes.refused.add(name)
            if name == "tools" and any(tool.get("type", "custom") != "custom" for tool in value):
                notes.refused.add("server tools")
            return {}


def system_turn(system: Any, notes: Notes) -> list[dict[str, str]]:
    text = "" if system is None else text_of(system, "\n\n", notes)
    return [{"role": "system", "content": text}] if text else []


def chat_turn(turn: Mapping[str, Any], notes: Notes) -> dict[str, str]:
    role = str(turn.get("role"))
    if role not in ("user", "assistant"):
        notes.refused.add(f"role {role}")
    return {"role": role, "content": text_of(turn.get("content"), "" if role == "assistant" else "\n\n", notes)}


def text_of(content: Any, separator: str, notes: Notes) -> str:
    """The text of a turn. Some compatible servers take no list of parts, so its blocks become one string."""
    if isinstance(content, str):
        return content
    blocks = list(content) if isinstance(content, list | tuple) else [{"type": "content"}]
    texts = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else "content"
        if kind != "text":
            notes.refused.add(str(kind))
            continue
        for name in block.keys() - {"type", "text"}:
            if name not in ("cache_control", "citations"):
                notes.refused.add(f"text.{name}")
            elif block[name]:
                notes.losses.add(name)
        texts.append(str(block.get("text", "")))
    return separator.join(texts)


def to_message(chat: Mapping[str, Any]) -> dict[str, Any]:
    """The Messages answer for a chat answer. Raises `NotAnAnswer` if it is not a complete one."""
    choice = first_choice(chat)
    if choice is None:
        raise NotAnAnswer("no choices")
    said = choice.get("message")
    if not isinstance(said, dict):
        raise NotAnAnswer("a choice without a message")
    refusal = said.get("refusal")
    text = chat_text(said.get("content")) if refusal is None else str(refusal)
    stop_reason = "refusal" if refusal is not None else stop_reason_of(choice.get("finish_reason"))
    return {
        **message_head(chat),
        "content": [{"type": "text", "text": text}] if text else [],
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": usage_of(chat.get("usage")),
    }


def first_choice(chat: Mapping[str, Any]) -> dict[str, Any] | None:
    choices = chat.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return None
    return choices[0]


def stop_reason_of(finish_reason: object) -> str:
    """A finish reason that is not known, as `error` or `abort` of some servers, is no end of an answer."""
    stop_reason = STOP_REASONS.get(finish_reason) if isinstance(finish_reason, str) else None
    if stop_reason is None:
        raise NotAnAnswer("no finish_reason" if finish_reason is None else "an unknown finish_reason")
    return stop_reason


def chat_text(content: object) -> str:
    """The text of a chat message or delta; as a list of parts (Mistral) its reasoning is left out."""
    if content is None or isinstance(content, str):
        return "" if content is None else content
    if not isinstance(content, list):
        raise NotAnAnswer("content that is not text")
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(str(part.get("text", "")) for part in parts)


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


class StreamTranslation:
    """Turns the chunks of a chat stream into the events of a Messages stream, which always ends in `message_stop` or `error`.

    Attributes:
      over: an error has ended the stream; nothing follows it.
    """

    def __init__(self) -> None:
        self.over = False
        self.started = self.in_block = False
        self.stop_reason: str | None = None
        self.usage: object = None

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
            return events + self.take(choice)
        except NotAnAnswer as error:
            return events + self.fail(str(error))

    def start(self, chunk: Mapping[str, Any]) -> bytes:
        self.started = True
        message = {**message_head(chunk), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage_of(None)}
        return frame("message_start", message=message)

    def take(self, choice: Mapping[str, Any]) -> bytes:
        delta = choice.get("delta")
        said = delta if isinstance(delta, dict) else {}
        refusal = said.get("refusal")
        text = chat_text(said.get("content")) if refusal is None else str(refusal)
        events = self.text(text) if text else b""
        if refusal is not None:
            self.stop_reason = "refusal"
        elif choice.get("finish_reason") is not None and self.stop_reason is None:
            self.stop_reason = stop_reason_of(choice["finish_reason"])
        return events

    def text(self, text: str) -> bytes:
        events = b""
        if not self.in_block:
            self.in_block = True
            events = frame("content_block_start", index=0, content_block={"type": "text", "text": ""})
        return events + frame("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

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
        if self.stop_reason is None:
            return self.fail("it ended without a finish_reason")
        self.over = True
        closing = frame("content_block_stop", index=0) if self.in_block else b""
        delta = {"stop_reason": self.stop_reason, "stop_sequence": None}
        return closing + frame("message_delta", delta=delta, usage=usage_of(self.usage)) + frame("message_stop")


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
