# SPDX-License-Identifier: Apache-2.0
"""Answer a Messages request from an OpenAI-compatible endpoint.

What cannot be carried is refused by name before anything is sent (`Untranslatable`); what is carried with a loss is named in
`Carried.losses` and in the response header `x-tideover-losses`.

The answer is a response in the Messages dialect that no wire has seen; the anthropic SDK parses it as its own. It is tied to a
request without prompt or credential, so an exception that is logged or pickled holds neither.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx2

from tideover import clock
from tideover.core.blame import BY_NAME, Said, read_error
from tideover.core.outcome import OK, Outcome, of_response
from tideover.providers.dialects import dialect_of
from tideover.providers.openai_answer import ERROR_TYPES, EventBytes, NotAnAnswer, to_message
from tideover.providers.openai_request import Untranslatable, to_chat

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from tideover.tables import DialectName

__all__ = ["Carried", "Untranslatable", "acarry", "carry"]

SECRETS = frozenset({"authorization", "x-api-key", "cookie", "proxy-authorization"})
KEPT_HEADERS = ("retry-after", "x-ratelimit-")
CONNECT_TIMEOUT_S = 5.0
"""The SDK's own; an address that does not answer by then will not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """What came of a call.

    `response` is for the anthropic SDK: a message, a stream of events, or an error with the provider's status. Of a stream
    `outcome` says only that it began; how it ends shows as its last event, `message_stop` or `error`.
    """

    response: httpx2.Response
    outcome: Outcome
    losses: tuple[str, ...]


class Events(httpx2.SyncByteStream):
    """A Messages stream read from a chat response; closing it closes the response."""

    def __init__(self, upstream: httpx2.Response) -> None:
        self.upstream = upstream

    def __iter__(self) -> Iterator[bytes]:
        events = EventBytes()
        for piece in self.upstream.iter_bytes():
            if translated := events.push(piece):
                yield translated
            if events.translation.over:
                return
        yield events.end()

    def close(self) -> None:
        self.upstream.close()


class AsyncEvents(httpx2.AsyncByteStream):
    """As `Events`, for an event loop."""

    def __init__(self, upstream: httpx2.Response) -> None:
        self.upstream = upstream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        events = EventBytes()
        async for piece in self.upstream.aiter_bytes():
            if translated := events.push(piece):
                yield translated
            if events.translation.over:
                return
        yield events.end()

    async def aclose(self) -> None:
        await self.upstream.aclose()


def carry(
    client: httpx2.Client,
    *,
    base_url: str,
    api_key: str | None,
    model: str,
    body: Mapping[str, Any],
    stream: bool,
    timeout_s: float,
    headers: Mapping[str, str],
    dialect: DialectName | None = None,
    refuses_loss: bool = False,
) -> Carried:
    """Make the call. Raises `Untranslatable` before anything is sent, and httpx2's own exceptions.

    `timeout_s` bounds each wait for bytes, not the whole call. `refuses_loss`: what would be carried with a loss is refused.
    Of `client` only the transport is used: none of its headers, cookies or credentials is sent, and of `headers` none that
    could hold one.
    """
    request, losses = translated_request(base_url, api_key, model, body, stream, timeout_s, headers, dialect, refuses_loss)
    upstream = client.send(request, stream=True, auth=None, follow_redirects=False)
    if stream and is_event_stream(upstream):
        return streamed(upstream, Events(upstream), losses)
    try:
        upstream.read()
    finally:
        upstream.close()
    return finished(upstream, losses)


async def acarry(
    client: httpx2.AsyncClient,
    *,
    base_url: str,
    api_key: str | None,
    model: str,
    body: Mapping[str, Any],
    stream: bool,
    timeout_s: float,
    headers: Mapping[str, str],
    dialect: DialectName | None = None,
    refuses_loss: bool = False,
) -> Carried:
    """As `carry`, for an event loop."""
    request, losses = translated_request(base_url, api_key, model, body, stream, timeout_s, headers, dialect, refuses_loss)
    upstream = await client.send(request, stream=True, auth=None, follow_redirects=False)
    if stream and is_event_stream(upstream):
        return streamed(upstream, AsyncEvents(upstream), losses)
    try:
        await upstream.aread()
    finally:
        await upstream.aclose()
    return finished(upstream, losses)


def translated_request(
    base_url: str,
    api_key: str | None,
    model: str,
    body: Mapping[str, Any],
    stream: bool,
    timeout_s: float,
    headers: Mapping[str, str],
    dialect: DialectName | None,
    refuses_loss: bool,
) -> tuple[httpx2.Request, tuple[str, ...]]:
    """The request as it goes out. Built by hand, as a client would add its own headers and cookies."""
    url = httpx2.URL(f"{base_url.rstrip('/')}/chat/completions")
    chat, losses = to_chat({**body, "stream": stream}, model, dialect=dialect_of(url.host, dialect))
    if losses and refuses_loss:
        raise Untranslatable(losses)
    sent = {name: value for name, value in headers.items() if not is_secret(name)}
    sent |= {
        "content-type": "application/json",
        "accept": "text/event-stream" if stream else "application/json",
        "user-agent": "tideover",  # some firewalls turn a client without a name away
    }
    if api_key is not None:
        sent["authorization"] = f"Bearer {api_key}"
    timeout = httpx2.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))
    extensions = {"timeout": timeout.as_dict()}
    return httpx2.Request("POST", url, headers=sent, content=json.dumps(chat).encode(), extensions=extensions), losses


def is_secret(name: str) -> bool:
    return name.lower() in SECRETS or name.lower().startswith("anthropic-")


def is_event_stream(upstream: httpx2.Response) -> bool:
    return upstream.is_success and "text/event-stream" in upstream.headers.get("content-type", "text/event-stream")


def streamed(upstream: httpx2.Response, events: Events | AsyncEvents, losses: tuple[str, ...]) -> Carried:
    headers = answer_headers(upstream, losses) | {"content-type": "text/event-stream; charset=utf-8"}
    response = httpx2.Response(200, headers=headers, stream=events, request=bare_request(upstream))
    return Carried(response=response, outcome=OK, losses=losses)


def finished(upstream: httpx2.Response, losses: tuple[str, ...]) -> Carried:
    """What a response that was read to its end comes to. A 2xx without an answer becomes a 502, which is what it is."""
    status, content = upstream.status_code, upstream.content
    outcome = of_response(status, upstream.headers, content, now=clock.now())
    if outcome.kind == "ok":
        try:
            answer = to_message(upstream.json())
        except NotAnAnswer as error:
            outcome = Outcome(kind="outage", scope="route", why=f"{status} with {error}")
        else:
            return Carried(response=plain(upstream, 200, answer, losses), outcome=OK, losses=losses)
    if upstream.is_success:
        return Carried(response=plain(upstream, 502, error_body(502, Said(), outcome), losses), outcome=outcome, losses=losses)
    said = read_error(upstream.headers, content)
    error_answer = content if said is None else error_body(status, said, outcome)
    return Carried(response=plain(upstream, status, error_answer, losses), outcome=outcome, losses=losses)


def plain(upstream: httpx2.Response, status: int, answer: dict[str, Any] | bytes, losses: tuple[str, ...]) -> httpx2.Response:
    """A response that is all there. Bytes are no API's error body, and pass as they came: the SDK must see that too."""
    headers = answer_headers(upstream, losses)
    headers["content-type"] = upstream.headers.get("content-type", "") if isinstance(answer, bytes) else "application/json"
    content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    response = httpx2.Response(status, headers=headers, content=content, request=bare_request(upstream))
    with suppress(RuntimeError):  # a transport that is no network may not have measured it
        response.elapsed = upstream.elapsed
    return response


def answer_headers(upstream: httpx2.Response, losses: tuple[str, ...]) -> dict[str, str]:
    headers = {name: value for name, value in upstream.headers.items() if name.lower().startswith(KEPT_HEADERS)}
    if "x-request-id" in upstream.headers:
        headers["request-id"] = upstream.headers["x-request-id"]
    if losses:
        headers["x-tideover-losses"] = ", ".join(losses)
    return headers


def bare_request(upstream: httpx2.Response) -> httpx2.Request:
    return httpx2.Request("POST", upstream.request.url)


def error_body(status: int, said: Said, outcome: Outcome) -> dict[str, Any]:
    """The same error in the Messages dialect. A name that decides is kept as the code, so it decides the same again."""
    kind = ERROR_TYPES.get(outcome.kind, "overloaded_error" if status == 529 else "api_error")
    error: dict[str, Any] = {"type": kind, "message": said.message if said.message else f"tideover: {outcome.why}"}
    deciding = [name for name in (said.code, said.type) if name in BY_NAME]
    if deciding:
        error["details"] = {"error_code": deciding[0]}
    return {"type": "error", "error": error}
