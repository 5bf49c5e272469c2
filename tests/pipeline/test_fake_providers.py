# SPDX-License-Identifier: Apache-2.0
"""The fake providers, asked by the real SDKs over HTTP: each fault gives what the real API would give."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import math
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from typing import TYPE_CHECKING, Any

import anthropic
import httpx2
import openai
import pytest

from tideover import clock
from tideover.testing import Call, FakeProvider, Fault, Latency, Phase, fault_named, phases_of_profile
from tideover.testing.faults import Schedule
from tideover.testing.serve import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NOW = Latency(base_s=0.0, per_output_token_s=0.0, jitter=0.0)
CALL: dict[str, Any] = {"model": "claude-opus-4-8", "max_tokens": 20, "messages": [{"role": "user", "content": "Low tide?"}]}


def until(fact: Callable[[], object], description: str, timeout_s: float = 5.0) -> None:
    """Return as soon as the fact holds."""
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while not fact():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {description}"
        pause.wait(0.005)


@pytest.fixture
def provider() -> Iterator[FakeProvider]:
    with FakeProvider("anthropic", latency=NOW) as provider:
        yield provider


@pytest.fixture
def claude(provider: FakeProvider) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(api_key="sk-tide", base_url=provider.base_url, max_retries=0, timeout=10) as client:
        yield client


@pytest.fixture
def gpt(provider: FakeProvider) -> Iterator[openai.OpenAI]:
    url = f"{provider.root_url}/any/prefix/v1"
    with openai.OpenAI(api_key="sk-tide", base_url=url, max_retries=0, timeout=10) as client:
        yield client


def final_message(client: anthropic.Anthropic) -> anthropic.types.Message:
    with client.messages.stream(**CALL) as stream:
        return stream.get_final_message()


def last(provider: FakeProvider) -> Call:
    return provider.calls()[-1]


class TestHealth:
    def test_message(self, provider: FakeProvider, claude: anthropic.Anthropic) -> None:
        """A plain call gives a whole message and one row."""
        reply = claude.messages.create(**CALL, extra_headers={"x-tideover-job": "job-1"})
        assert (reply.type, reply.role, reply.model, reply.stop_reason) == ("message", "assistant", CALL["model"], "end_turn")
        assert reply.content[0].type == "text"
        assert reply.content[0].text.startswith("anthropic: ")
        assert (reply.usage.input_tokens, reply.usage.output_tokens) == (3, 20)
        assert reply._request_id == "req_fake0000000000000001"
        row = last(provider)
        assert (row.n, row.outcome, row.status, row.job, row.stream) == (1, "ok", 200, "job-1", False)
        assert row.finished_at is not None
        assert row.finished_at >= row.at

    def test_message_stream(self, provider: FakeProvider, claude: anthropic.Anthropic) -> None:
        """A stream has the events of the real one, in their order, and the same text as a plain answer."""
        with claude.messages.create(**CALL, stream=True) as stream:
            kinds = [event.type for event in stream]
        ends = ["content_block_stop", "message_delta", "message_stop"]
        starts = ["message_start", "content_block_start", "content_block_delta"]
        assert [kind for kind, _ in itertools.groupby(kinds)] == [*starts, *ends]
        streamed, plain = final_message(claude).content[0], claude.messages.create(**CALL).content[0]
        assert (streamed.type, plain.type) == ("text", "text")
        assert streamed.text == plain.text
        assert [call.stream for call in provider.calls()] == [True, True, False]

    def test_chat_completion(self, provider: FakeProvider, gpt: openai.OpenAI) -> None:
        """The same provider speaks chat completions, on any path prefix."""
        reply = gpt.chat.completions.create(**CALL)
        assert (reply.object, reply.choices[0].finish_reason) == ("chat.completion", "stop")
        assert reply.usage is not None
        assert reply.usage.total_tokens == 23
        assert last(provider).path == "/any/prefix/v1/chat/completions"

    def test_chat_completion_stream(self, gpt: openai.OpenAI) -> None:
        """A chat-completions stream carries the same text, and the usage when asked for."""
        with gpt.chat.completions.create(**CALL, stream=True, stream_options={"include_usage": True}) as stream:
            *chunks, usage = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == gpt.chat.completions.create(**CALL).choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert usage.usage is not None
        assert usage.usage.completion_tokens == 20

    def test_asides(self, provider: FakeProvider, claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
        """Models and token counts are told even in an outage, and are no calls."""
        provider.fail(Fault.OVERLOADED)
        assert "claude-opus-4-8" in [model.id for model in claude.models.list()]
        assert claude.messages.count_tokens(model=CALL["model"], messages=CALL["messages"]).input_tokens == 3
        assert provider.calls() == []
        assert gpt.models.list().data[0].object == "model"

    def test_base_urls(self) -> None:
        """Each SDK is given the base URL that it wants; before the first start there is none."""
        with FakeProvider("o", dialect="openai-compatible", prefix="/tenant/") as provider:
            assert provider.base_url == f"http://127.0.0.1:{provider.port}/tenant/v1"
            with openai.OpenAI(api_key="k", base_url=provider.base_url, max_retries=0) as client:
                assert client.chat.completions.create(**CALL).model == CALL["model"]
        with pytest.raises(RuntimeError, match="start it first"):
            _ = FakeProvider("p").base_url

    def test_many_at_once(self, provider: FakeProvider) -> None:
        """150 concurrent calls of both SDKs are all answered, and the ledger has each once."""

        async def call_all() -> None:
            async with (
                anthropic.AsyncAnthropic(api_key="k", base_url=provider.base_url, max_retries=0) as claude,
                openai.AsyncOpenAI(api_key="k", base_url=f"{provider.root_url}/v1", max_retries=0) as gpt,
            ):
                messages = (claude.messages.create(**CALL, extra_headers={"x-tideover-job": f"m{i}"}) for i in range(100))
                chats = (gpt.chat.completions.create(**CALL, extra_headers={"x-tideover-job": f"c{i}"}) for i in range(50))
                await asyncio.gather(*messages, *chats)

        asyncio.run(call_all())
        jobs = Counter((call.job, call.outcome) for call in provider.calls())
        assert jobs == Counter((f"{kind}{i}", "ok") for kind, count in (("m", 100), ("c", 50)) for i in range(count))


ANTHROPIC_ERRORS = [
    (Fault.OVERLOADED, anthropic.InternalServerError, 529, "overloaded_error"),
    (Fault.API_ERROR, anthropic.InternalServerError, 500, "api_error"),
    (Fault.BAD_GATEWAY, anthropic.InternalServerError, 502, "api_error"),
    (Fault.UNAVAILABLE, anthropic.InternalServerError, 503, "api_error"),
    (Fault.GATEWAY_TIMEOUT, anthropic.InternalServerError, 504, "timeout_error"),
    (Fault.EDGE_HTML, anthropic.InternalServerError, 502, None),
    (Fault.UNAUTHORIZED, anthropic.AuthenticationError, 401, "authentication_error"),
    (Fault.FORBIDDEN, anthropic.PermissionDeniedError, 403, "permission_error"),
    (Fault.NOT_FOUND, anthropic.NotFoundError, 404, "not_found_error"),
    (Fault.BAD_REQUEST, anthropic.BadRequestError, 400, "invalid_request_error"),
    (Fault.RATE_LIMITED, anthropic.RateLimitError, 429, "rate_limit_error"),
    (Fault.QUOTA, anthropic.APIStatusError, 402, "billing_error"),
]
OPENAI_ERRORS = [
    (Fault.OVERLOADED, openai.InternalServerError, 503, "server_error", "server_overloaded"),
    (Fault.API_ERROR, openai.InternalServerError, 500, "server_error", None),
    (Fault.BAD_GATEWAY, openai.InternalServerError, 502, "server_error", None),
    (Fault.UNAVAILABLE, openai.InternalServerError, 503, "server_error", None),
    (Fault.GATEWAY_TIMEOUT, openai.InternalServerError, 504, "server_error", None),
    (Fault.EDGE_HTML, openai.InternalServerError, 502, None, None),
    (Fault.UNAUTHORIZED, openai.AuthenticationError, 401, "invalid_request_error", "invalid_api_key"),
    (Fault.FORBIDDEN, openai.PermissionDeniedError, 403, "request_forbidden", "unsupported_country_region_territory"),
    (Fault.NOT_FOUND, openai.NotFoundError, 404, "invalid_request_error", "model_not_found"),
    (Fault.BAD_REQUEST, openai.BadRequestError, 400, "invalid_request_error", "empty_array"),
    (Fault.RATE_LIMITED, openai.RateLimitError, 429, "requests", "rate_limit_exceeded"),
    (Fault.QUOTA, openai.RateLimitError, 429, "insufficient_quota", "insufficient_quota"),
]


class TestErrors:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(("fault", "error_class", "status", "kind"), ANTHROPIC_ERRORS)
    def test_messages(
        self, fault: Fault, error_class: type[anthropic.APIStatusError], status: int, kind: str | None, stream: bool,
        provider: FakeProvider, claude: anthropic.Anthropic,
    ) -> None:  # fmt: skip
        """The SDK raises the real API's error, for plain calls and streams, and the body is the real one."""
        provider.fail(fault)
        with pytest.raises(error_class) as caught:
            claude.messages.create(**CALL, stream=stream)
        assert (caught.value.status_code, caught.value.type) == (status, kind)
        if kind is not None:
            body = caught.value.body
            assert isinstance(body, dict)
            assert body == {
                "type": "error",
                "error": {"type": kind, "message": body["error"]["message"]},
                "request_id": caught.value.request_id,
            }
        assert (last(provider).outcome, last(provider).status, last(provider).stream) == (fault, status, stream)

    @pytest.mark.parametrize(("fault", "error_class", "status", "kind", "code"), OPENAI_ERRORS)
    def test_chat_completions(
        self, fault: Fault, error_class: type[openai.APIStatusError], status: int, kind: str | None, code: str | None,
        provider: FakeProvider, gpt: openai.OpenAI,
    ) -> None:  # fmt: skip
        """So does OpenAI's."""
        provider.fail(fault)
        with pytest.raises(error_class) as caught:
            gpt.chat.completions.create(**CALL)
        assert (caught.value.status_code, caught.value.type, caught.value.code) == (status, kind, code)
        assert (caught.value.request_id is None) == (kind is None)
        assert (last(provider).outcome, last(provider).status) == (fault, status)

    def test_rate_limit_headers(self, provider: FakeProvider, claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
        """A 429 says when to come back and what the limits are, in the headers of each dialect."""
        provider.fail("429", retry_after_s=7)
        with pytest.raises(anthropic.RateLimitError) as caught:
            claude.messages.create(**CALL)
        headers = caught.value.response.headers
        assert headers["retry-after"] == "7"
        assert headers["anthropic-ratelimit-requests-remaining"] == "0"
        assert headers["anthropic-ratelimit-output-tokens-reset"].endswith("Z")
        with pytest.raises(openai.RateLimitError) as limited:
            gpt.chat.completions.create(**CALL)
        assert limited.value.response.headers["x-ratelimit-reset-requests"] == "7s"
        assert limited.value.response.headers["x-ratelimit-remaining-requests"] == "0"

    def test_reset(self, provider: FakeProvider, claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
        """A reset is a connection error, caused by a RST and not by a close in good order."""
        provider.fail("connect")
        with pytest.raises(anthropic.APIConnectionError) as caught:
            claude.messages.create(**CALL)
        assert isinstance(caught.value.__cause__, httpx2.ReadError)
        with pytest.raises(openai.APIConnectionError):
            gpt.chat.completions.create(**CALL)
        assert [(call.outcome, call.status) for call in provider.calls()] == [("reset", None)] * 2

    def test_success_that_is_none(self, provider: FakeProvider, claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
        """The three false 200s pass the SDKs as research/reroute.md §1.5 says: a page, a decoding error, an empty Message."""
        provider.fail(Fault.OK_HTML)
        assert str(claude.messages.create(**CALL)).startswith("<!DOCTYPE html>")
        assert str(gpt.chat.completions.create(**CALL)).startswith("<!DOCTYPE html>")
        provider.fail(Fault.OK_EMPTY)
        with pytest.raises(json.JSONDecodeError):
            claude.messages.create(**CALL)
        provider.fail(Fault.OK_ERROR_BODY)
        reply = claude.messages.create(**CALL)
        assert (reply.type, reply.content) == ("error", None)
        assert [call.status for call in provider.calls()] == [200] * 4


class TestStreamFaults:
    def test_cut(self, provider: FakeProvider, claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
        """A cut is a protocol error in the middle of the stream; a plain body is shorter than promised."""
        provider.fail(Fault.STREAM_CUT)
        with pytest.raises(httpx2.RemoteProtocolError, match="incomplete chunked read"):
            final_message(claude)
        with pytest.raises(anthropic.APIConnectionError):
            claude.messages.create(**CALL)
        with pytest.raises(openai.APIConnectionError), gpt.chat.completions.create(**CALL, stream=True) as stream:
            list(stream)
        assert [call.outcome for call in provider.calls()] == ["stream_cut"] * 3

    def test_error_event(self, provider: FakeProvider, claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
        """An error event comes after tokens, with status 200; on a plain call it is a 529."""
        provider.fail(Fault.STREAM_ERROR)
        seen: list[str] = []
        with claude.messages.create(**CALL, stream=True) as stream, pytest.raises(anthropic.APIStatusError) as caught:
            seen.extend(event.type for event in stream)
        assert (caught.value.status_code, caught.value.type) == (200, "overloaded_error")
        assert seen[-1] == "content_block_delta"
        with pytest.raises(anthropic.InternalServerError, match="529"):
            claude.messages.create(**CALL)
        with pytest.raises(openai.APIError, match="overloaded"), gpt.chat.completions.create(**CALL, stream=True) as chunks:
            list(chunks)

    def test_no_stop(self, provider: FakeProvider, claude: anthropic.Anthropic, gpt: openai.OpenAI) -> None:
        """A stream that ends without its end raises nothing: the message merely has no stop reason."""
        provider.fail(Fault.STREAM_NO_STOP)
        assert final_message(claude).stop_reason is None
        assert claude.messages.create(**CALL).stop_reason is None
        with gpt.chat.completions.create(**CALL, stream=True) as stream:
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] is None

    def test_async_cut(self, provider: FakeProvider) -> None:
        """The async SDKs see the same."""
        provider.fail(Fault.STREAM_CUT)

        async def both() -> None:
            async with anthropic.AsyncAnthropic(api_key="k", base_url=provider.base_url, max_retries=0) as claude:
                with pytest.raises(httpx2.RemoteProtocolError):
                    async with claude.messages.stream(**CALL) as stream:
                        await stream.get_final_message()
            async with openai.AsyncOpenAI(api_key="k", base_url=f"{provider.root_url}/v1", max_retries=0) as gpt:
                with pytest.raises(openai.APIConnectionError):
                    async for _ in await gpt.chat.completions.create(**CALL, stream=True):
                        pass

        asyncio.run(both())


class TestHang:
    def test_client_leaves(self, provider: FakeProvider, claude: anthropic.Anthropic) -> None:
        """A hang answers nothing; the ledger says what was drawn and that the client left."""
        provider.fail("timeout")
        with pytest.raises(anthropic.APITimeoutError):
            claude.with_options(timeout=0.1).messages.create(**CALL)
        until(lambda: last(provider).outcome == "client_gone", "the provider has seen the client leave")
        assert (last(provider).fault, last(provider).status) == ("hang", None)

    def test_heal_does_not_release(self, provider: FakeProvider, claude: anthropic.Anthropic) -> None:
        """What hangs goes on hanging when the provider is well, while new calls are answered."""
        provider.fail(Fault.HANG)
        with hanging(provider):
            provider.heal()
            claude.messages.create(**CALL)
            assert [call.outcome for call in provider.calls()] == ["pending", "ok"]

    def test_release(self) -> None:
        """With release_hangs, the call is answered once the provider is well."""
        with FakeProvider("anthropic", latency=NOW, release_hangs=True) as provider:
            provider.fail(Fault.HANG)
            with hanging(provider) as connection:
                provider.heal()
                assert connection.getresponse().status == 200
            assert (last(provider).fault, last(provider).outcome) == ("hang", "ok")

    def test_client_leaves_a_stream(self) -> None:
        """A client that leaves between two tokens is seen too."""
        with FakeProvider("anthropic", latency=Latency(0.0, per_output_token_s=60.0)) as provider:
            connection = http.client.HTTPConnection("127.0.0.1", provider.port)
            connection.request("POST", "/v1/messages", json.dumps({**CALL, "stream": True}))
            response = connection.getresponse()
            assert response.readline() == b"event: message_start\n"
            response.close()
            connection.close()
            until(lambda: last(provider).outcome == "client_gone", "the provider has seen the client leave")

    def test_stop(self, provider: FakeProvider) -> None:
        """Stopping does not wait for hangs; the port then refuses, and the provider can be started again."""
        provider.fail(Fault.HANG)
        threads = threading.active_count()
        with hanging(provider) as connection:
            port = provider.port
            provider.stop()
            with pytest.raises((ConnectionError, http.client.BadStatusLine)):
                connection.getresponse()
        assert threading.active_count() == threads - 1
        assert last(provider).outcome == "stopped"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        provider.stop()
        provider.heal()
        provider.start()
        assert provider.port == port
        assert post(provider, json.dumps(CALL))[0] == 200
        with pytest.raises(RuntimeError, match="started already"):
            provider.start()


@contextlib.contextmanager
def hanging(provider: FakeProvider) -> Iterator[http.client.HTTPConnection]:
    """A call that has arrived and is not answered."""
    connection = http.client.HTTPConnection("127.0.0.1", provider.port, timeout=5)
    connection.request("POST", "/v1/messages", json.dumps(CALL))
    until(lambda: provider.calls() and last(provider).outcome == "pending", "the call has arrived")
    yield connection
    connection.close()


def post(provider: FakeProvider, body: Any, path: str = "/v1/messages", **headers: str) -> tuple[int, Any]:
    """Status and JSON of one POST without an SDK."""
    connection = http.client.HTTPConnection("127.0.0.1", provider.port, timeout=5)
    try:
        connection.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")
    finally:
        connection.close()


class TestRequests:
    @pytest.mark.parametrize(
        ("path", "body", "message"),
        [
            ("/v1/messages", "{", "The request body is not valid JSON."),
            ("/v1/messages", "[]", "The request body is not valid JSON."),
            ("/v1/messages", '{"max_tokens": 5, "messages": [{}]}', "model: Field required"),
            ("/v1/messages", '{"model": "m", "max_tokens": 5}', "messages: Field required"),
            ("/v1/messages", '{"model": "m", "messages": [{}]}', "max_tokens: Field required"),
            ("/v1/chat/completions", "{", "We could not parse the JSON body of your request."),
            ("/v1/chat/completions", '{"model": "m"}', "Missing required parameter: 'messages'."),
        ],
    )
    def test_caller_errors(self, path: str, body: str, message: str, provider: FakeProvider) -> None:
        """A request that the API would refuse is refused with its 400, whatever else goes wrong."""
        provider.fail(Fault.OVERLOADED)
        status, answer = post(provider, body, path)
        assert (status, answer["error"]["type"], answer["error"]["message"]) == (400, "invalid_request_error", message)
        assert (last(provider).outcome, last(provider).status) == ("bad_request", 400)

    def test_key(self) -> None:
        """Only the right key is let in, as a bearer token or as x-api-key; the ledger keeps no key and no prompt."""
        with FakeProvider("anthropic", api_key="sk-right", latency=NOW) as provider:
            with anthropic.Anthropic(api_key="sk-right", base_url=provider.base_url, max_retries=0) as claude:
                claude.messages.create(**CALL)
            with anthropic.Anthropic(api_key="sk-wrong", base_url=provider.base_url, max_retries=0) as claude:
                with pytest.raises(anthropic.AuthenticationError):
                    claude.messages.create(**CALL)
                with pytest.raises(anthropic.AuthenticationError):
                    claude.models.list()
            assert post(provider, json.dumps(CALL), x_api_key="sk-right")[0] == 200
            assert post(provider, json.dumps(CALL))[0] == 401
            assert [call.key_ok for call in provider.calls()] == [True, False, True, False]
            kept = repr(provider.calls())
            assert not [secret for secret in ("sk-right", "sk-wrong", "Low tide?") if secret in kept]

    def test_chunked_body(self, provider: FakeProvider) -> None:
        """A request body may come in chunks, and several requests on one connection."""
        connection = http.client.HTTPConnection("127.0.0.1", provider.port, timeout=5)
        whole = json.dumps(CALL).encode()
        for _ in range(3):
            connection.request("POST", "/v1/messages?beta=true", iter([whole[:9], whole[9:]]), encode_chunked=True)
            assert json.loads(connection.getresponse().read())["type"] == "message"
        connection.close()
        assert [call.path for call in provider.calls()] == ["/v1/messages"] * 3

    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            (b"nonsense\r\n\r\n", 400),
            (b"POST /v1/messages HTTP/1.1\r\ncontent-length: many\r\n\r\n", 400),
            (b"POST /v1/messages HTTP/1.1\r\ncontent-length: 99999999\r\n\r\n", 413),
            (b"POST /v1/messages HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nfffffff\r\n", 413),
            (b"GET /v1/nothing HTTP/1.1\r\nconnection: close\r\n\r\n", 404),
            (b"GET /v1/messages HTTP/1.1\r\nconnection: close\r\n\r\n", 404),
            (b"DELETE /__phase HTTP/1.1\r\nconnection: close\r\n\r\n", 405),
        ],
    )
    def test_bad_http(self, sent: bytes, status: int, provider: FakeProvider) -> None:
        """What is no request for a model gets an answer, ends the connection, and is no call."""
        with socket.create_connection(("127.0.0.1", provider.port), timeout=5) as client:
            client.sendall(sent)
            with client.makefile("rb") as answer:
                assert int(answer.read().split(b" ")[1]) == status
        assert provider.calls() == []

    def test_client_leaves_before_the_request_is_whole(self, provider: FakeProvider) -> None:
        """Half a request is no call."""
        with socket.create_connection(("127.0.0.1", provider.port), timeout=5) as client:
            client.sendall(b"POST /v1/messages HTTP/1.1\r\ncontent-length: 500\r\n\r\n{")
        assert post(provider, json.dumps(CALL))[0] == 200
        assert len(provider.calls()) == 1


class TestLatency:
    def test_formula(self) -> None:
        """First token by input, the rest by output, both within the jitter."""
        latency = Latency(base_s=1.0, per_input_token_s=0.01, per_output_token_s=0.1, jitter=0.5, factor=2.0)
        usual = latency.of(100, 10, luck=0.5)
        assert (usual.first_s, usual.rest_s) == pytest.approx((4.0, 2.0))
        assert latency.of(100, 10, luck=0.0).first_s == pytest.approx(2.0)
        assert latency.of(100, 10, luck=1.0, slower=10).rest_s == pytest.approx(30.0)
        with pytest.raises(ValueError, match="jitter"):
            Latency(jitter=1.5)

    def test_from_the_request(self) -> None:
        """The tokens are those that the request's headers name; the call then takes as long as they say."""
        latency = Latency(base_s=0.0, per_input_token_s=0.001, per_output_token_s=0.002, jitter=0.0)
        with FakeProvider("anthropic", latency=latency, speed=10.0) as provider:
            status, answer = post(provider, json.dumps(CALL), x_fake_input_tokens="1000", x_fake_output_tokens="500")
            assert (status, answer["usage"]["input_tokens"], answer["usage"]["output_tokens"]) == (200, 1000, 500)
            call = last(provider)
            assert call.finished_at is not None
            assert call.finished_at - call.at >= 0.2

    @pytest.mark.parametrize("arguments", [{"speed": 0}, {"dialect": "bedrock"}])
    def test_arguments(self, arguments: dict[str, Any]) -> None:
        """An argument that cannot work is refused."""
        with pytest.raises(ValueError, match=next(iter(arguments))):
            FakeProvider("anthropic", **arguments)


class TestSchedule:
    def test_phases_follow_each_other(self) -> None:
        """Each phase lasts as long as it says, then the next, then health."""
        phases = (Phase("down", 10.0, 1.0, {"529": 1}), Phase("better", 20.0, 0.8, {"500": 1}, p_error_end=0.0))
        schedule = Schedule(phases, 100.0)
        seen = [(now.phase.name, now.p_error, now.remaining_s) for t in (100, 109, 110, 125) if (now := schedule.at(t))]
        assert seen == [("down", 1.0, 10), ("down", 1.0, 1), ("better", 0.8, 20), ("better", pytest.approx(0.2), 5)]
        assert schedule.at(130.0) is None

    def test_mix(self) -> None:
        """Faults come in their shares, and as often as p_error says."""
        phase = Phase("mixed", 1.0, 0.5, {"529": 3, Fault.HANG: 1})
        drawn = Counter(phase.draw(0.0, fails=f / 100, which=w / 100) for f in range(100) for w in range(100))
        assert drawn == {None: 5000, Fault.OVERLOADED: 3750, Fault.HANG: 1250}

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"duration_s": 0}, "duration_s"),
            ({"p_error": 1.1}, "0 to 1"),
            ({"p_error_end": -1}, "0 to 1"),
            ({"mix": {}}, "mix"),
            ({"mix": {"529": 0}}, "mix"),
            ({"mix": {"meteor": 1}}, "no fault 'meteor'"),
            ({"models": "opus"}, "list of words"),
            ({"colour": "red"}, "no colour"),
        ],
    )
    def test_bad_phases(self, values: dict[str, Any], message: str) -> None:
        """A phase that makes no sense says what is wrong."""
        with pytest.raises(ValueError, match=message):
            Phase.of({"name": "x", "duration_s": 1, "p_error": 0.5, "mix": {"529": 1}, **values})
        with pytest.raises(ValueError, match="not a phase"):
            Phase.of({"name": "x"})

    def test_over_time(self, provider: FakeProvider, claude: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch) -> None:
        """The provider walks through the phases as time goes, and only the named models feel them."""
        began_at = clock.monotonic()
        provider.play([Phase("opus-down", 60, 1.0, {"529": 1}, models=["opus"]), Phase("auth", 60, 1.0, {"401": 1})])
        with pytest.raises(anthropic.InternalServerError):
            claude.messages.create(**CALL)
        claude.messages.create(**{**CALL, "model": "claude-sonnet-5-5"})
        monkeypatch.setattr(clock, "monotonic", lambda: began_at + 90)
        with pytest.raises(anthropic.AuthenticationError):
            claude.messages.create(**{**CALL, "model": "claude-sonnet-5-5"})
        monkeypatch.setattr(clock, "monotonic", lambda: began_at + 200)
        claude.messages.create(**CALL)
        assert [call.outcome for call in provider.calls()] == ["overloaded", "ok", "unauthorized", "ok"]

    def test_ends_by_itself(self, provider: FakeProvider) -> None:
        """After the last phase the provider is well."""
        provider.play([Phase("blip", 0.02, 1.0, {"529": 1})])
        until(lambda: provider.phase is None, "the blip is over")
        assert post(provider, json.dumps(CALL))[0] == 200

    def test_same_seed_same_fate(self) -> None:
        """The same calls in the same order meet the same faults."""

        def outcomes(seed: int) -> list[str]:
            with FakeProvider("anthropic", seed=seed, latency=NOW) as provider:
                provider.play([Phase("mixed", math.inf, 0.6, {"529": 1, "500": 1, "429": 1})])
                for _ in range(30):
                    post(provider, json.dumps(CALL))
                return [call.outcome for call in provider.calls()]

        assert outcomes(1) == outcomes(1)
        assert outcomes(1) != outcomes(2)

    def test_fault_names(self) -> None:
        """A fault goes by its value, its status code or its class in the profiles."""
        assert [fault_named(name) for name in ("hang", "timeout", "529", "429_false", "stream_abort")] == [
            Fault.HANG, Fault.HANG, Fault.OVERLOADED, Fault.FALSE_LIMITED, Fault.STREAM_CUT,
        ]  # fmt: skip


PROFILE = {
    "schema": "tideover-outage-profiles/1",
    "profiles": [
        {
            "id": "p99",
            "phases": [
                {"name": "a", "duration_s": 120, "scope": {"models": ["opus-new"]}, "p_error": 0.9, "mix": {"timeout": 1.0}},
                {"name": "b", "duration_s": 60, "scope": {"models": ["*"]}, "p_error": 0.3, "p_error_end": 0.1,
                 "mix": {"429_false": 1.0}, "ok_latency_factor": 3.0, "retry_after_s": 5},
            ],
        }
    ],
}  # fmt: skip


class TestProfiles:
    def test_load(self, tmp_path: Path) -> None:
        """A recorded outage becomes phases, faster if wished, with the models that the caller has."""
        path = tmp_path / "profiles.json"
        path.write_text(json.dumps(PROFILE))
        first, second = phases_of_profile(path, "p99", speed=60, model_of={"opus-new": "opus-4-8"})
        assert (first.duration_s, first.mix, first.models) == (2.0, {Fault.HANG: 1.0}, ("opus-4-8",))
        assert [first.touches(model) for model in ("claude-opus-4-8", "claude-opus-4-6")] == [True, False]
        assert (second.latency_factor, second.p_error_end, second.retry_after_s) == (3.0, 0.1, 5)
        assert phases_of_profile(path, "p99")[0].models == ("opus-new",)
        with pytest.raises(ValueError, match="no profile 'p00'; it has p99"):
            phases_of_profile(path, "p00")


class Served:
    """A serve process and what its first line said."""

    def __init__(self, config: Path) -> None:
        command = [sys.executable, "-m", "tideover.testing.serve", "--config", str(config)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.said = json.loads(self.process.stdout.readline())

    def ask(self, name: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(self.said["control_urls"][name] + path, data, timeout=5) as answer:
            return json.load(answer)

    def stop(self) -> int:
        self.process.terminate()
        with self.process:
            return self.process.wait(timeout=5)


class TestServe:
    @pytest.fixture
    def served(self, tmp_path: Path) -> Iterator[Served]:
        providers = [
            {"name": "anthropic", "seed": 3, "latency": {"base_s": 0.0, "per_output_token_s": 0.0}},
            {"name": "openai", "dialect": "openai-compatible"},
        ]
        (tmp_path / "fakes.json").write_text(json.dumps({"providers": providers}))
        (tmp_path / "profiles.json").write_text(json.dumps(PROFILE))
        served = Served(tmp_path / "fakes.json")
        try:
            yield served
        finally:
            served.stop()

    def test_told_and_asked(self, served: Served, tmp_path: Path) -> None:
        """Several providers in one process: each has its own address, orders and ledger; SIGTERM stops them."""
        assert served.said["base_urls"]["openai"].endswith("/v1")
        url = served.said["base_urls"]["anthropic"]
        with anthropic.Anthropic(api_key="k", base_url=url, max_retries=0) as claude:
            claude.messages.create(**CALL)
            served.ask("anthropic", "/__control", {"fail": "529"})
            with pytest.raises(anthropic.InternalServerError):
                claude.messages.create(**CALL)
            served.ask("anthropic", "/__control", {"fail": {"fault": "401", "models": ["sonnet"], "p": 1.0}})
            claude.messages.create(**CALL)
            served.ask("anthropic", "/__control", {"play": [{"name": "w", "duration_s": 60, "p_error": 1, "mix": {"500": 1}}]})
            with pytest.raises(anthropic.InternalServerError):
                claude.messages.create(**CALL)
            assert served.ask("anthropic", "/__phase")["phase"] == "w"
            profile = {"path": str(tmp_path / "profiles.json"), "id": "p99", "speed": 2, "model_of": {"opus-new": "opus"}}
            now = served.ask("anthropic", "/__control", {"profile": profile})
            assert (now["phase"], now["index"], now["p_error"]) == ("a", 0, 0.9)
            assert 30 < now["remaining_s"] <= 60
            assert served.ask("anthropic", "/__control", {"heal": True})["phase"] is None
        rows = served.ask("anthropic", "/__ledger")
        assert [(row["n"], row["outcome"]) for row in rows] == [(1, "ok"), (2, "overloaded"), (3, "ok"), (4, "api_error")]
        assert [row["n"] for row in served.ask("anthropic", "/__ledger?since=3")] == [4]
        assert served.ask("openai", "/__ledger") == []
        assert served.stop() == 0

    @pytest.mark.parametrize("order", [{}, {"fail": "meteor"}, {"explode": 1}, [], {"fail": "529", "heal": True}])
    def test_bad_orders(self, order: object, provider: FakeProvider) -> None:
        """An order that makes no sense is refused and changes nothing."""
        provider.fail(Fault.QUOTA)
        status, answer = post(provider, json.dumps(order), "/__control")
        assert (status, list(answer)) == (400, ["error"])
        assert provider.phase is not None
        assert provider.phase.phase.name == Fault.QUOTA

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ("{", "line 1"),
            ("{}", "providers"),
            ('{"providers": [{"name": "a", "colour": "red"}]}', "colour"),
            ('{"providers": [{"name": "a"}, {"name": "a"}]}', "same name"),
        ],
    )
    def test_bad_config(self, config: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A configuration that cannot work ends with code 2 and the reason."""
        (tmp_path / "fakes.json").write_text(config)
        assert main(["--config", str(tmp_path / "fakes.json")]) == 2
        assert message in capsys.readouterr().err

    def test_port_taken(self, provider: FakeProvider, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A port that is taken is said, by the command and by the thread."""
        (tmp_path / "fakes.json").write_text(json.dumps({"providers": [{"name": "b", "port": provider.port}]}))
        assert main(["--config", str(tmp_path / "fakes.json")]) == 2
        assert "cannot listen" in capsys.readouterr().err
        with pytest.raises(OSError, match="address already in use"):
            FakeProvider("b", port=provider.port).start()
