# SPDX-License-Identifier: Apache-2.0
"""Servers shaped like providers: they refuse what the real ones refuse, and answer as the real ones do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

from openai.types.chat import ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
from pydantic import TypeAdapter

from tideover.testing.clouds import BEDROCK, VERTEX, framed

REFEREE: TypeAdapter[Any] = TypeAdapter(CompletionCreateParamsStreaming)


@dataclass(frozen=True)
class Provider:
    """A row of the page. `settings`: its route's table; `shape`: how its server behaves."""

    name: str
    settings: dict[str, Any]
    shape: str = "messages"


KEY = {"api_key_env": "CONFORMANCE_KEY"}
PROVIDERS = (
    Provider("Claude API, and Anthropic-compatible endpoints", {"kind": "anthropic"}),
    Provider("Claude on Amazon Bedrock", {"kind": "bedrock", "region": "us-east-1"}),
    Provider("Claude on Google Vertex AI", {"kind": "vertex", "region": "us-east5", "project": "p"}),
    Provider("Claude in Microsoft Foundry", {"kind": "foundry"}),
    Provider("Claude Platform on AWS", {"kind": "anthropic-aws", "region": "us-east-1", "workspace": "w"}),
    Provider("ChatGPT (OpenAI)", {"kind": "openai-compatible", "dialect": "openai"}, "openai"),
    Provider("Gemini (Google)", {"kind": "openai-compatible", "dialect": "gemini"}, "gemini"),
    Provider("Grok (xAI)", {"kind": "openai-compatible", "dialect": "grok"}, "grok"),
    Provider("Mistral", {"kind": "openai-compatible", "dialect": "mistral"}, "mistral"),
    Provider("vLLM, Ollama, llama.cpp, OpenRouter", {"kind": "openai-compatible"}, "compatible"),
)


def refusal(shape: str, body: dict[str, Any]) -> str:
    """What a chat endpoint has against a request; empty: nothing. See `providers/dialects.py` for the sources."""
    calls = [call for message in body["messages"] for call in message.get("tool_calls") or []]
    roles = [message["role"] for message in body["messages"]]
    if shape == "openai" and "max_tokens" in body:
        return "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    if shape == "grok" and "stop" in body:
        return "Model does not support parameter stop."
    if shape == "gemini" and any("thought_signature" not in json.dumps(call) for call in calls):
        return "Function call is missing a thought_signature"
    if shape == "gemini" and body.keys() & {"user", "parallel_tool_calls"}:
        return "Invalid JSON payload received. Unknown name"
    if shape == "mistral" and body.keys() & {"max_completion_tokens", "stream_options", "user"}:
        return "Extra inputs are not permitted"
    if shape == "mistral" and any(not (len(call["id"]) == 9 and call["id"].isalnum()) for call in calls):
        return "Tool call id has to be 9 characters of a-z, A-Z, 0-9"
    if shape == "mistral" and ("tool", "user") in pairwise(roles):
        return "Unexpected role 'user' after role 'tool'"
    return ""


def chat_events(shape: str, body: dict[str, Any]) -> bytes:
    """A streamed answer in chat completions: a call of the first tool, if there is one."""
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
    names = [tool["function"]["name"] for tool in body.get("tools", [])]
    asked = body["messages"][-1]["role"] == "user"
    function = {"name": names[0], "arguments": '{"city": "Ærø"}'} if names else None
    delta: dict[str, Any] = {"role": "assistant", "content": "Hello."}
    ends = "stop"
    if function is not None and asked:
        delta = {
            "role": "assistant",
            "tool_calls": [{"index": 0, "id": "" if shape == "gemini" else "abc123XYZ", "function": function}],
        }
        delta["tool_calls"][0]["type"] = "function"
        ends = "stop" if shape == "gemini" else "tool_calls"
    chunks = [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
        {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": ends}]},
        {**head, "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}},
    ]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    return b"".join(f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks) + b"data: [DONE]\n\n"


def message_events(body: dict[str, Any]) -> bytes:
    """The same in the Messages API."""
    tools = [tool["name"] for tool in body.get("tools", []) if "input_schema" in tool]
    calls = bool(tools) and "tool_result" not in json.dumps(body["messages"][-1])
    block: dict[str, Any] = {"type": "text", "text": ""}
    delta: dict[str, Any] = {"type": "text_delta", "text": "Hello."}
    if calls:
        block = {"type": "tool_use", "id": "toolu_1", "name": tools[0], "input": {}}
        delta = {"type": "input_json_delta", "partial_json": '{"city": "Ærø"}'}
    message = {"id": "m", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None}
    ended = {"stop_reason": "tool_use" if calls else "end_turn", "stop_sequence": None}
    events = [
        {
            "type": "message_start",
            "message": {**message, "stop_sequence": None, "usage": {"input_tokens": 9, "output_tokens": 1}},
        },
        {"type": "content_block_start", "index": 0, "content_block": block},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": ended, "usage": {"output_tokens": 3}},
        {"type": "message_stop"},
    ]
    return b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append(body)
        chat = self.path.endswith("/chat/completions")
        if chat and not is_known(body):
            self.answer(400, b'{"error": {"message": "the openai SDK knows no such request", "type": "invalid_request_error"}}')
        elif chat and (why := refusal(self.server.shape, body)):
            self.answer(400, json.dumps({"error": {"message": why, "type": "invalid_request_error"}}).encode())
        elif chat:
            self.answer(200, chat_events(self.server.shape, body), "text/event-stream")
        elif BEDROCK.fullmatch(self.path):
            self.answer(200, framed(message_events(body)), "application/vnd.amazon.eventstream")
        elif VERTEX.fullmatch(self.path) or "/v1/messages" in self.path:
            self.answer(200, message_events(body), "text/event-stream")
        else:
            self.answer(404, b"{}")

    def answer(self, status: int, content: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """One provider; `seen` holds the bodies that it was sent."""

    def __init__(self, shape: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.shape = shape
        self.seen: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def is_known(body: dict[str, Any]) -> bool:
    """Whether the openai SDK has types for all of a request, Google's own extension of it apart."""
    known = json.loads(json.dumps(body))
    for message in known["messages"]:
        for call in message.get("tool_calls") or []:
            call.pop("extra_content", None)
    return bool(plain(REFEREE.validate_python(known)) == known)


def plain(value: Any) -> Any:
    """Without pydantic's lazy lists."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, Iterable) and not isinstance(value, str) else value


@contextmanager
def serving(provider: Provider) -> Iterator[Server]:
    with Server(provider.shape) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
