# SPDX-License-Identifier: Apache-2.0
"""The same table with the real SDKs on real bytes: what user code would be handed for each way a provider can fail."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import anthropic
import httpx2
import openai
import pytest

from tideover.core.outcome import Outcome, of_exception, of_message, of_response, of_task_error

if TYPE_CHECKING:
    from collections.abc import Iterator

ASK: dict[str, Any] = {"model": "claude-sonnet-5-5", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-sonnet-5-5",
    "content": [{"type": "text", "text": "hello"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 1},
}
HTML = b"<html><body>Bad gateway</body></html>"
HANG = b""
"""Answers nothing until the test is over."""


def http(status: int, body: bytes | dict[str, Any], *headers: str, length: int | None = None) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = "text/html" if content == HTML else "application/json"
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(content) if length is None else length}", *headers]
    if not any(line.startswith("content-type") for line in headers):
        lines.append(f"content-type: {kind}")
    return "\r\n".join([*lines, "connection: close", "", ""]).encode() + content


def error(status: int, kind: str, code: str | None = None, *headers: str, message: str = "x") -> bytes:
    details = {} if code is None else {"details": {"error_code": code}}
    return http(status, {"type": "error", "error": {"type": kind, "message": message, **details}}, *headers)


def sse(*events: tuple[str, dict[str, Any]], length: int | None = None) -> bytes:
    text = "".join(f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n" for name, data in events)
    return http(200, text.encode(), "content-type: text/event-stream", length=length)


START = ("message_start", {"message": {**MESSAGE, "content": [], "stop_reason": None}})
BLOCK = ("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}})
DELTA = ("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": "hel"}})
STOP_BLOCK = ("content_block_stop", {"index": 0})
END = ("message_delta", {"delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": {"output_tokens": 1}})
STOP: tuple[str, dict[str, Any]] = ("message_stop", {})


class Server(ThreadingHTTPServer):
    """Answers every request with the same bytes, then closes the connection."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = http(200, MESSAGE)
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.close_connection = True
        if self.server.reply is HANG:
            self.server.over.wait(30)
        else:
            self.wfile.write(self.server.reply)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        api_key="k", base_url=server.url, max_retries=0, http_client=httpx2.Client(trust_env=False)
    ) as sdk:
        yield sdk


@pytest.fixture(scope="module")
def gpt(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="k", base_url=server.url, max_retries=0, http_client=httpx2.Client(trust_env=False)) as sdk:
        yield sdk


@contextmanager
def judged() -> Iterator[list[Outcome]]:
    """The outcome of the exception that the block must raise, as the carrier and as the edge of a task see it."""
    found: list[Outcome] = []
    with pytest.raises(Exception) as caught:
        yield found
    found += [of_exception(caught.value), of_task_error(caught.value)]
    assert found[0] == found[1]


OWN_LIMIT = "You have reached your specified API usage limits. You will regain access on 2026-12-01 at 00:00 UTC."

PLAIN = {
    "400": (error(400, "invalid_request_error"), "caller", "job"),
    "400 own limit": (error(400, "invalid_request_error", message=OWN_LIMIT), "quota", "route"),
    "401": (error(401, "authentication_error"), "auth", "route"),
    "402": (error(402, "billing_error"), "quota", "route"),
    "403": (error(403, "permission_error"), "auth", "route"),
    "404": (error(404, "not_found_error"), "model", "model"),
    "408": (error(408, "timeout_error"), "ambiguous", "model"),
    "409": (error(409, "conflict_error"), "ambiguous", "model"),
    "413": (error(413, "invalid_request_error"), "caller", "job"),
    "422": (error(422, "invalid_request_error"), "caller", "job"),
    "429": (error(429, "rate_limit_error"), "throttle", "model"),
    "429 ramp": (error(429, "rate_limit_error", "ramp_limit_exceeded"), "throttle", "model"),
    "429 tier cap": (error(429, "rate_limit_error", "enforced_spend_limit_reached"), "quota", "route"),
    "500": (error(500, "api_error"), "outage", "model"),
    "501": (error(501, "invalid_request_error"), "caller", "job"),
    "502": (error(502, "api_error"), "outage", "model"),
    "503": (error(503, "api_error"), "outage", "model"),
    "503 cmek": (error(503, "api_error", "cmek_key_unreachable"), "outage", "route"),
    "504": (error(504, "timeout_error"), "ambiguous", "model"),
    "520": (error(520, "api_error"), "outage", "model"),
    "529": (error(529, "overloaded_error"), "outage", "model"),
    "502 html": (http(502, HTML), "outage", "route"),
    "403 html": (http(403, HTML), "outage", "route"),
    "404 html": (http(404, HTML), "outage", "route"),
    "200 html": (http(200, HTML, "content-type: application/json"), "outage", "route"),
    "200 empty": (http(200, b""), "outage", "route"),
    "cut": (http(200, MESSAGE, length=9999), "outage", "model"),
    "closed": (b"\r\n", "outage", "model"),
    "not http": (b"220 smtp ready\r\n", "outage", "model"),
}


@pytest.mark.parametrize("case", PLAIN)
def test_what_a_plain_call_raises_is_judged_as_the_table_says(server: Server, claude: anthropic.Anthropic, case: str) -> None:
    server.reply, kind, scope = PLAIN[case]
    with judged() as found:
        claude.messages.create(**ASK)
    assert (kind, scope) == (found[0].kind, found[0].scope)


@pytest.mark.parametrize("case", PLAIN)
def test_a_middleware_and_the_caller_judge_alike(server: Server, claude: anthropic.Anthropic, case: str) -> None:
    """The carrier sees bytes where user code sees exceptions; they may not disagree."""
    seen: list[Outcome] = []

    def watch(request: Any, call_next: Any) -> Any:
        try:
            response = call_next(request)
        except Exception as raised:
            seen.append(of_exception(raised))
            raise
        seen.append(of_response(response.status_code, response.headers, response.http_response.read()))
        return response

    server.reply = PLAIN[case][0]
    with judged() as found:
        claude.with_options(middleware=[watch]).messages.create(**ASK)
    assert [found[0].kind, found[0].scope] == [seen[0].kind, seen[0].scope]


def test_an_answer_that_the_sdk_takes_for_a_message_is_judged_by_its_bytes(server: Server, claude: anthropic.Anthropic) -> None:
    """The SDK makes a message of Nones of an error body, and a finished one of a truncated one."""
    for body, kind in (
        (MESSAGE, "ok"),
        ({**MESSAGE, "stop_reason": None}, "outage"),
        ({"type": "error", "error": {"type": "overloaded_error"}}, "outage"),
    ):
        server.reply = http(200, body)
        raw = claude.messages.with_raw_response.create(**ASK)
        assert raw.parse() is not None
        assert kind == of_message(raw.http_response.content).kind


def test_retry_after_comes_through(server: Server, claude: anthropic.Anthropic) -> None:
    server.reply = error(429, "rate_limit_error", None, "retry-after: 30")
    with judged() as found:
        claude.messages.create(**ASK)
    assert found[0].retry_after_s == 30.0


STREAMS = {
    "overloaded": (sse(START, BLOCK, DELTA, ("error", {"error": {"type": "overloaded_error"}})), "outage", "model"),
    "api error": (sse(START, ("error", {"error": {"type": "api_error"}})), "outage", "model"),
    "timeout": (sse(START, ("error", {"error": {"type": "timeout_error"}})), "ambiguous", "model"),
    "rate limit": (sse(START, ("error", {"error": {"type": "rate_limit_error"}})), "throttle", "model"),
    "invalid": (sse(("error", {"error": {"type": "invalid_request_error"}})), "caller", "job"),
    "cut": (sse(START, BLOCK, DELTA, length=99999), "outage", "model"),
    "529": (error(529, "overloaded_error"), "outage", "model"),
}


@pytest.mark.parametrize("case", STREAMS)
def test_what_a_stream_raises_is_judged_as_the_table_says(server: Server, claude: anthropic.Anthropic, case: str) -> None:
    server.reply, kind, scope = STREAMS[case]
    with judged() as found, claude.messages.stream(**ASK) as stream:
        stream.get_final_message()
    assert (kind, scope) == (found[0].kind, found[0].scope)


def test_a_whole_stream_raises_nothing(server: Server, claude: anthropic.Anthropic) -> None:
    server.reply = sse(START, BLOCK, DELTA, STOP_BLOCK, END, STOP)
    with claude.messages.stream(**ASK) as stream:
        assert stream.get_final_message().stop_reason == "end_turn"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hang_is_ambiguous(server: Server, claude: anthropic.Anthropic, streaming: bool) -> None:
    server.reply = HANG
    with judged() as found:
        claude.messages.create(**ASK, stream=streaming, timeout=httpx2.Timeout(5, read=0.1))
    assert (found[0].kind, found[0].scope, found[0].why) == ("ambiguous", "model", "ReadTimeout")


def test_nobody_there_is_an_outage_of_the_route(claude: anthropic.Anthropic) -> None:
    with judged() as found:
        claude.with_options(base_url="http://127.0.0.1:1").messages.create(**ASK)
    assert (found[0].kind, found[0].scope, found[0].why) == ("outage", "route", "ConnectError")


def test_our_own_faults_are_local(server: Server, claude: anthropic.Anthropic) -> None:
    """A bug in the credentials callable is wrapped as a connection error by the SDK; a missing key is a TypeError."""
    server.reply = http(200, MESSAGE)

    def broken(**_: object) -> Any:
        return 1 / 0

    mistakes = [
        lambda: claude.with_options(credentials=broken, api_key=None).messages.create(**ASK),
        lambda: claude.with_options(base_url="ftp://127.0.0.1").messages.create(**ASK),
        lambda: claude.messages.create(**{**ASK, "max_tokens": 60000}),
    ]
    for mistake in mistakes:
        with judged() as found:
            mistake()
        assert (found[0].kind, found[0].scope) == ("local", "job")


def test_a_wrapped_error_is_judged_by_its_cause(server: Server, claude: anthropic.Anthropic) -> None:
    server.reply = error(529, "overloaded_error")
    with judged() as found:
        try:
            claude.messages.create(**ASK)
        except anthropic.APIError as overloaded:
            raise RuntimeError("no answer") from overloaded
    assert found[0].why == "529 overloaded_error"


def test_a_tasks_own_http_call_says_nothing_about_a_provider() -> None:
    with pytest.raises(httpx2.ConnectError) as caught, httpx2.Client(trust_env=False) as client:
        client.get("http://127.0.0.1:1")
    assert (of_task_error(caught.value).kind, of_exception(caught.value).kind) == ("local", "outage")


async def awaited(server: Server, reply: bytes, streaming: bool) -> None:
    client = httpx2.AsyncClient(trust_env=False)
    async with anthropic.AsyncAnthropic(api_key="k", base_url=server.url, max_retries=0, http_client=client) as claude:
        server.reply = reply
        if streaming:
            async with claude.messages.stream(**ASK) as stream:
                await stream.get_final_message()
        else:
            await claude.messages.create(**ASK)


@pytest.mark.parametrize("case", ["529", "502 html", "200 html", "cut", "closed"])
def test_the_async_sdk_raises_the_same(server: Server, case: str) -> None:
    reply, kind, scope = PLAIN[case]
    with judged() as found:
        asyncio.run(awaited(server, reply, streaming=False))
    assert (kind, scope) == (found[0].kind, found[0].scope)


@pytest.mark.parametrize("case", ["overloaded", "cut"])
def test_the_async_sdks_streams_raise_the_same(server: Server, case: str) -> None:
    reply, kind, scope = STREAMS[case]
    with judged() as found:
        asyncio.run(awaited(server, reply, streaming=True))
    assert (kind, scope) == (found[0].kind, found[0].scope)


GPT_ASK: dict[str, Any] = {"model": "gpt", "messages": [{"role": "user", "content": "hi"}]}


def gpt_error(status: int, kind: str | None, code: str | None = None) -> bytes:
    return http(status, {"error": {"message": "x", "type": kind, "param": None, "code": code}})


GPT = {
    "400": (gpt_error(400, "invalid_request_error"), "caller", "job"),
    "401": (gpt_error(401, "invalid_request_error", "invalid_api_key"), "auth", "route"),
    "404": (gpt_error(404, "invalid_request_error", "model_not_found"), "model", "model"),
    "429": (gpt_error(429, "tokens", "rate_limit_exceeded"), "throttle", "model"),
    "429 quota": (gpt_error(429, "insufficient_quota", "insufficient_quota"), "quota", "route"),
    "500": (gpt_error(500, "server_error"), "outage", "model"),
    "502 html": (http(502, HTML), "outage", "route"),
    "200 html": (http(200, HTML, "content-type: application/json"), "outage", "route"),
    "cut": (http(200, b"{}", length=99), "outage", "model"),
}


@pytest.mark.parametrize("case", GPT)
def test_the_openai_sdk_raises_the_same(server: Server, gpt: openai.OpenAI, case: str) -> None:
    server.reply, kind, scope = GPT[case]
    with judged() as found:
        gpt.chat.completions.create(**GPT_ASK)
    assert (kind, scope) == (found[0].kind, found[0].scope)


def test_the_openai_sdks_error_within_a_stream(server: Server, gpt: openai.OpenAI) -> None:
    data = json.dumps({"error": {"message": "x", "type": "server_error", "code": None}})
    server.reply = http(200, f"data: {data}\n\n".encode(), "content-type: text/event-stream")
    with judged() as found:
        list(gpt.chat.completions.create(**GPT_ASK, stream=True))
    assert (found[0].kind, found[0].why) == ("outage", "stream server_error")
