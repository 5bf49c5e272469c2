# SPDX-License-Identifier: Apache-2.0
"""A Messages stream, read as it comes: the message it amounts to, whether its content has begun, and how it ended. No I/O."""

from __future__ import annotations

import json
from typing import Any

import httpx2
from jiter import from_json

MOST_EVENT_BYTES = 64 * 1024 * 1024
"""Of one event: twice what the Messages API takes in a request."""

REPLACED = ("signature_delta", "compaction_delta")
"""Deltas that come once and whole; of others the texts are added up."""

CUT_SHORT = ("max_tokens", "model_context_window_exceeded", "refusal")
"""Stop reasons after which the JSON of a tool's input may stop in its middle."""


class Reassembly:
    """Takes in the bytes of a stream, in chunks of any size, and keeps what they amount to.

    What a stream of the API never holds raises `httpx2.RemoteProtocolError`, without its content. Events and kinds of deltas
    that are not known yet are no error: the first are left out, the second are added up as all others.

    Attributes:
      begun: some content has come, so that a reader has something to see.
      over: `message_stop` has come.
      error: the data of the error event that ended it; None: there was none.
    """

    def __init__(self) -> None:
        self.begun = self.over = False
        self.error: bytes | None = None
        self.message: dict[str, Any] | None = None
        self._inputs: dict[int, str] = {}
        """The JSON of tools' inputs so far, by the number of their block."""
        self._rest, self._data = b"", b""
        """A line that is not whole yet, and the data of an event that is not."""

    @property
    def ended(self) -> bool:
        return self.over or self.error is not None

    def push(self, chunk: bytes) -> None:
        """Takes in a chunk."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) + len(self._data) > MOST_EVENT_BYTES:
            raise broken(f"an event of more than {MOST_EVENT_BYTES:,} bytes")
        for line in lines:
            self._line(line.rstrip(b"\r"))

    def end(self) -> None:
        """There are no more bytes. A stream that just stopped is an error, not an answer."""
        self._line(self._rest)
        self._line(b"")
        if not self.ended:
            raise httpx2.RemoteProtocolError("the provider's stream ended without message_stop; the answer is not complete")

    def whole(self) -> dict[str, Any]:
        """The message, as a plain call would have answered it. Asked once, when it is over."""
        if self.message is None:
            raise broken("no message_start")
        for number, text in self._inputs.items():
            self.message["content"][number]["input"] = self._input_of(text)
        return self.message

    def _line(self, line: bytes) -> None:
        if line.startswith(b"data:"):
            self._data += line[5:] if not self._data else b"\n" + line[5:]
        elif not line and self._data:
            data, self._data = self._data, b""
            if not self.ended:
                self._take(data)

    def _take(self, data: bytes) -> None:
        try:
            event = json.loads(data)
            self._apply(event, data)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise broken(f"an event that makes no sense ({type(error).__name__})") from None

    def _apply(self, event: dict[str, Any], data: bytes) -> None:
        kind = event["type"]
        if kind == "error":
            self.error = data
        elif kind == "message_start" and self.message is None:
            self.message = {**event["message"], "content": [*event["message"]["content"]]}
        elif kind.startswith(("message_", "content_block_")):
            if self.message is None:
                raise ValueError(kind)
            self._apply_to(self.message, kind, event)

    def _apply_to(self, message: dict[str, Any], kind: str, event: dict[str, Any]) -> None:
        match kind:
            case "content_block_start":
                block = {**event["content_block"]}
                if event["index"] != len(message["content"]):
                    raise ValueError(kind)
                message["content"].append(block)
                self.begun = self.begun or block["type"] != "text" or bool(block["text"])
                if block["type"] == "fallback":  # the server went on with another model, which it names here
                    message["model"] = block["to"]["model"]
            case "content_block_delta":
                if not 0 <= event["index"] < len(message["content"]):
                    raise ValueError(kind)
                self._add(message["content"][event["index"]], event["index"], event["delta"])
                self.begun = True
            case "message_delta":
                merge(message, event["delta"])
                merge(message, {key: value for key, value in event.items() if key not in ("type", "delta", "usage")})
                merge(message.setdefault("usage", {}), event.get("usage") or {})
            case "message_stop":
                self.begun = self.over = True
            case _:
                pass

    def _add(self, block: dict[str, Any], number: int, delta: dict[str, Any]) -> None:
        match delta["type"]:
            case "input_json_delta":
                self._inputs[number] = self._inputs.get(number, "") + delta["partial_json"]
            case "citations_delta":
                block["citations"] = [*(block.get("citations") or []), delta["citation"]]
            case kind:
                for key, value in delta.items():
                    if key == "type":
                        continue
                    known = block.get(key)
                    add = isinstance(known, str) and kind not in REPLACED
                    block[key] = known + value if add else value

    def _input_of(self, text: str) -> Any:
        """A tool's input. One that the limit of tokens has cut off is what can be read of it, as in the SDK."""
        try:
            return json.loads(text or "{}")
        except ValueError:
            if self.message is None or self.message.get("stop_reason") not in CUT_SHORT:
                raise broken("a tool's input that is not JSON") from None
        try:
            return from_json(text.encode(), partial_mode=True)
        except ValueError:
            raise broken("a tool's input that is not JSON") from None


def merge(into: dict[str, Any], said: dict[str, Any]) -> None:
    """Takes over what was said; null says nothing."""
    into.update({key: value for key, value in said.items() if value is not None})


def broken(what: str) -> httpx2.RemoteProtocolError:
    return httpx2.RemoteProtocolError(f"the provider's stream is broken: it holds {what}")
