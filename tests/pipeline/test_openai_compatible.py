# SPDX-License-Identifier: Apache-2.0
"""A Messages request answered by an OpenAI-compatible endpoint, through the real anthropic SDK."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import anthropic
import httpx2
import pytest
from pydantic import BaseModel

from tideover.core.outcome import of_exception
from tideover.providers.openai_compatible import (
    Carried,
    Untranslatable,
    acarry,
    carry,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

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


class Server(ThreadingHTTPServer):
    """Answers with `reply`: JSON, or a list of chunks for a stream; or bytes, as they are. `None` hangs."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.over = threading.Event()
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.answer(answer())

    def answer(self, reply: Any, status: int = 200, length: int | None = None, **headers: str) -> None:
        stream = isinstance(reply, list)
        content = wire(reply) if stream else reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        head = {"content-type": "text/event-stream" if stream else "application/json", "x-request-id": "req_1"}
        head["content-length"] = str(len(content) if length is None else length)
        self.status, self.head = status, head | {name.replace("_", "-"): value for name, value in headers.items()}
        self.content = None if reply is None else content
        self.seen.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        if self.server.content is None:
            self.server.over.wait(30)
            self.close_connection = True
            return
        self.send_response_only(self.server.status)
        for name, value in self.server.head.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.server.content)
        self.close_connection = int(self.server.head["content-length"]) != len(self.server.content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def server(running: Server) -> Server:
    running.answer(answer())
    return running


class Rerouting:
    """A client whose every call is carried to the server; `carried` is what the last came to."""

    def __init__(self, server: Server, **clients: Any) -> None:
        self.server = server
        self.carried: Carried | None = None
        self.how = {"api_key": "sk-alt", "model": "gpt-x", "timeout_s": 5.0, "headers": {"x-tideover-job": "j1"}}
        self.clients = clients

    def arguments(self, request: Any) -> dict[str, Any]:
        return {"base_url": self.server.url, "body": request.json, "stream": request.stream, **self.how}

    def wrapped(self, request: Any, client: Any, kind: Any) -> Any:
        assert self.carried is not None
        return kind(
            raw=self.carried.response,
            client=client,
            cast_to=request.cast_to,
            stream=request.stream,
            stream_cls=request.stream_cls,
            options=request.options,
        )

    @contextmanager
    def sync(self) -> Iterator[anthropic.Anthropic]:
        def middleware(request: Any, call_next: Any) -> Any:
            self.carried = carry(client, **self.arguments(request))
            return self.wrapped(request, claude, anthropic.APIResponse)

        options: dict[str, Any] = {"base_url": "http://127.0.0.1:1", "max_retries": 0, "middleware": [middleware]}
        plain = httpx2.Client(trust_env=False)
        with (
            httpx2.Client(trust_env=False, headers={"x-own": "1"}, cookies={"c": "1"}) as client,
            anthropic.Anthropic(api_key="sk-ant", http_client=plain, **options) as claude,
        ):
            yield claude

    def run(self, use: Any) -> Any:
        """The result of `await use(claude)` with an async client."""
        return asyncio.run(self.running(use))

    async def running(self, use: Any) -> Any:
        async def middleware(request: Any, call_next: Any) -> Any:
            self.carried = await acarry(client, **self.arguments(request))
            return self.wrapped(request, claude, anthropic.AsyncAPIResponse)

        options: dict[str, Any] = {"base_url": "http://127.0.0.1:1", "max_retries": 0, "middleware": [middleware]}
        plain = httpx2.AsyncClient(trust_env=False)
        async with (
            httpx2.AsyncClient(trust_env=False) as client,
            anthropic.AsyncAnthropic(api_key="sk-ant", http_client=plain, **options) as claude,
        ):
            return await use(claude)


@pytest.fixture
def route(server: Server) -> Rerouting:
    return Rerouting(server)


def test_create(route: Rerouting) -> None:
    with route.sync() as claude:
        message = claude.messages.create(**ASK, stop_sequences=["END"])
    assert (message.content[0].text, message.stop_reason, message.usage.input_tokens) == (SPOKEN, "end_turn", 4)
    assert route.carried is not None
    assert (route.carried.outcome.kind, route.carried.losses) == ("ok", ("stop_sequence",))


def test_create_streaming(server: Server, route: Rerouting) -> None:
    server.answer(CHUNKS)
    with route.sync() as claude:
        told = list(claude.messages.create(**ASK, stream=True))
    assert "".join(event.delta.text for event in told if event.type == "content_block_delta") == SPOKEN
    assert told[-1].type == "message_stop"


def test_stream(server: Server, route: Rerouting) -> None:
    server.answer(CHUNKS)
    with route.sync() as claude, claude.messages.stream(**ASK) as stream:
        message = stream.get_final_message()
    assert (message.content[0].text, message.stop_reason) == (SPOKEN, "end_turn")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (4, 3)
    assert server.seen[0][2]["stream_options"] == {"include_usage": True}


def test_raw_responses(server: Server, route: Rerouting) -> None:
    with route.sync() as claude:
        raw = claude.messages.with_raw_response.create(**ASK, thinking={"type": "disabled"})
        assert (raw.parse().content[0].text, raw.request_id) == (SPOKEN, "req_1")
        assert raw.headers["x-tideover-losses"] == "thinking"
        assert raw.elapsed.total_seconds() >= 0
        server.answer(CHUNKS)
        with claude.messages.with_streaming_response.create(**ASK, stream=True) as streaming:
            assert list(streaming.parse())[-1].type == "message_stop"


def test_async_create(route: Rerouting) -> None:
    async def use(claude: anthropic.AsyncAnthropic) -> Any:
        raw = await claude.messages.with_raw_response.create(**ASK)
        return (await claude.messages.create(**ASK)).content[0].text, (await raw.parse()).stop_reason

    assert route.run(use) == (SPOKEN, "end_turn")


def test_async_streams(server: Server, route: Rerouting) -> None:
    async def use(claude: anthropic.AsyncAnthropic) -> Any:
        told = [event.type async for event in await claude.messages.create(**ASK, stream=True)]
        async with claude.messages.stream(**ASK) as stream:
            return told[-1], (await stream.get_final_message()).content[0].text

    server.answer(CHUNKS)
    assert route.run(use) == ("message_stop", SPOKEN)


def test_only_the_routes_own_credential_is_sent(server: Server, route: Rerouting) -> None:
    """Not the anthropic key, not what a client adds by itself, and not what a caller's headers could hold."""
    route.how["headers"] = {
        "x-tideover-job": "j1",
        "Authorization": "Bearer sk-ant",
        "X-Api-Key": "sk-ant",
        "anthropic-beta": "b",
    }
    with route.sync() as claude:
        claude.messages.create(**ASK, extra_headers={"x-secret": "sk-ant"})
        route.how["api_key"] = None
        claude.messages.create(**ASK)
    (path, first, _), (_, second, _) = server.seen
    assert path == "/v1/chat/completions"
    assert "sk-ant" not in str(server.seen)
    assert first.pop("authorization") == "Bearer sk-alt"
    sent = {"host", "content-type", "content-length", "accept", "user-agent", "x-tideover-job"}
    assert set(first) == set(second) == sent


ERRORS = [
    (429, {"error": {"message": "slow", "type": "tokens", "code": "rate_limit_exceeded"}}, "throttle"),
    (429, {"error": {"message": "no money", "type": "insufficient_quota", "code": None}}, "quota"),
    (401, {"error": {"message": "bad key", "type": "invalid_request_error", "code": "invalid_api_key"}}, "auth"),
    (404, {"error": {"message": "what?", "type": "invalid_request_error", "code": "model_not_found"}}, "model"),
    (400, {"error": {"message": "bad", "type": "invalid_request_error", "code": None}}, "caller"),
    (500, {"error": {"message": "oops", "type": "server_error", "code": None}}, "outage"),
    (502, b"<html>Bad gateway</html>", "outage"),
    (302, b"", "outage"),
]


@pytest.mark.parametrize(("status", "reply", "kind"), ERRORS)
@pytest.mark.parametrize("streaming", [False, True])
def test_an_error_is_raised_by_the_sdk_as_its_own_and_judged_the_same(
    server: Server, route: Rerouting, status: int, reply: Any, kind: str, streaming: bool
) -> None:
    server.answer(reply, status, retry_after="30", location="http://127.0.0.1:1/")
    with route.sync() as claude, pytest.raises(anthropic.APIStatusError) as caught:
        claude.messages.create(**ASK, stream=streaming)
    assert route.carried is not None
    assert (caught.value.status_code, caught.value.request_id) == (status, "req_1")
    assert (kind, 30.0) == (route.carried.outcome.kind, route.carried.outcome.retry_after_s)
    again = of_exception(caught.value)
    assert (again.kind, again.scope, again.retry_after_s) == (kind, route.carried.outcome.scope, 30.0)
    assert "sk-alt" not in str(pickle.dumps(caught.value))
    assert isinstance(reply, bytes) or caught.value.api_message == reply["error"]["message"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("reply", [b"<html>", b"", {"choices": []}, {"error": {"type": "server_error"}}])
def test_a_200_without_an_answer_is_an_outage(server: Server, route: Rerouting, reply: Any, streaming: bool) -> None:
    server.answer(reply)
    with route.sync() as claude, pytest.raises(anthropic.InternalServerError) as caught:
        claude.messages.create(**ASK, stream=streaming)
    assert route.carried is not None
    assert (caught.value.status_code, route.carried.outcome.kind, route.carried.outcome.scope) == (502, "outage", "route")


def test_a_truncated_stream_is_never_silent(server: Server, route: Rerouting) -> None:
    server.answer(wire(CHUNKS[:3], done=False), content_type="text/event-stream")
    with route.sync() as claude, pytest.raises(anthropic.APIStatusError) as caught, claude.messages.stream(**ASK) as stream:
        stream.get_final_message()
    assert (of_exception(caught.value).kind, of_exception(caught.value).scope) == ("outage", "model")


def test_a_cut_stream_and_a_hang_raise_what_httpx2_raises(server: Server, route: Rerouting) -> None:
    with route.sync() as claude:
        server.answer(wire(CHUNKS[:3], done=False), length=9999, content_type="text/event-stream")
        with pytest.raises(httpx2.RemoteProtocolError), claude.messages.stream(**ASK) as stream:
            stream.get_final_message()
        server.answer(None)
        route.how["timeout_s"] = 0.1
        with pytest.raises(httpx2.ReadTimeout):
            claude.messages.create(**ASK)


def test_a_stream_that_is_left_is_closed(server: Server, route: Rerouting) -> None:
    server.answer(CHUNKS)
    with route.sync() as claude:
        with claude.messages.stream(**ASK) as stream:
            next(iter(stream))
        assert route.carried is not None
        assert route.carried.response.stream.upstream.is_closed  # type: ignore[attr-defined]


def test_an_async_stream_that_is_left_is_closed(server: Server, route: Rerouting) -> None:
    async def use(claude: anthropic.AsyncAnthropic) -> Any:
        async with claude.messages.stream(**ASK) as stream:
            await anext(aiter(stream))
        assert route.carried is not None
        return route.carried.response.stream.upstream.is_closed  # type: ignore[attr-defined]

    server.answer(CHUNKS)
    assert route.run(use) is True


def test_tools_through_the_sdk(server: Server, route: Rerouting) -> None:
    """A tool that the other provider calls is a `tool_use` of the SDK, whole and as a stream; its result goes back."""
    tool: Any = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "X"}'}}
    for streaming in (False, True):
        server.answer(
            [chunk({"tool_calls": [{"index": 0, **call}]}), chunk({}, "tool_calls")]
            if streaming
            else answer(None, "tool_calls", tool_calls=[call])
        )
        with route.sync() as claude:
            if streaming:
                with claude.messages.stream(**ASK, tools=[tool]) as stream:
                    said = stream.get_final_message()
            else:
                said = claude.messages.create(**ASK, tools=[tool])
            (use,) = said.content
            assert ("tool_use", "tool_use", {"city": "X"}) == (said.stop_reason, use.type, getattr(use, "input", None))
            server.answer(answer("rain"))
            result: Any = {"type": "tool_result", "tool_use_id": "call_1", "content": "rain"}
            turns: Any = [{"role": "assistant", "content": said.content}, {"role": "user", "content": [result]}]
            claude.messages.create(**{**ASK, "messages": [*ASK["messages"], *turns]}, tools=[tool])
        ((_, _, body),) = server.seen
        assert [call] == body["messages"][1]["tool_calls"]
        assert {"role": "tool", "tool_call_id": "call_1", "content": "rain"} == body["messages"][2]


def test_parsed_answers_through_the_sdk(server: Server, route: Rerouting) -> None:
    class City(BaseModel):
        name: str

    server.answer(answer('{"name": "X"}'))
    with route.sync() as claude:
        said = claude.messages.parse(**ASK, output_format=City)
    assert said.parsed_output == City(name="X")
    assert route.carried is not None
    assert () == route.carried.losses
    ((_, _, body),) = server.seen
    assert (True, "json_schema") == (body["response_format"]["json_schema"]["strict"], body["response_format"]["type"])


def test_what_cannot_be_carried_sends_nothing(server: Server, route: Rerouting) -> None:
    with route.sync() as claude, pytest.raises(Untranslatable):
        claude.messages.create(**ASK, tools=[{"type": "web_search_20250305", "name": "web_search"}])
    assert server.seen == []


def test_the_host_says_the_dialect_or_the_settings_do() -> None:
    def take(request: httpx2.Request) -> httpx2.Response:
        sent.append(json.loads(request.content))
        return httpx2.Response(200, json=answer())

    sent: list[dict[str, Any]] = []
    with httpx2.Client(transport=httpx2.MockTransport(take)) as client:
        for host, dialect in (("api.openai.com", None), ("api.mistral.ai", None), ("notopenai.com", None), ("proxy", "grok")):
            how: dict[str, Any] = {"base_url": f"https://{host}/v1/", "dialect": dialect}
            carry(client, api_key="k", model="m", body=ASK, stream=False, timeout_s=1.0, headers={}, **how)
    newer, older = "max_completion_tokens", "max_tokens"
    assert [newer, older, older, newer] == [next(name for name in body if name.startswith("max_")) for body in sent]
