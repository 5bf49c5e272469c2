# SPDX-License-Identifier: Apache-2.0
"""Routes that speak the Messages API: their clients, one attempt over them, and streams that may not end in silence.

One client for each process, route and event loop; a fork starts anew. The SDK's own retries are off: waiting is ours.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anthropic
import httpx2

from tideover import clock
from tideover.core.outcome import OK, Outcome, of_exception, of_stream_error
from tideover.settings import settings

NO_KEY = "none"
"""What a route without a credential sends, because the SDK sends something: never another route's key."""

CREDENTIAL_HEADERS = frozenset({"authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie", "proxy-authorization"})

CONNECT_TIMEOUT_S = 5.0

STOP = b"event: message_stop"
FAILED = b"event: error"

_sync: dict[tuple[int, str], anthropic.Anthropic] = {}
_async: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[int, str], anthropic.AsyncAnthropic]] = (
    weakref.WeakKeyDictionary()
)


def sync_client(route: str) -> anthropic.Anthropic:
    """The client of a route for threads of this process."""
    key = (os.getpid(), route)
    if key not in _sync:
        _sync[key] = anthropic.Anthropic(**options_of(route))
    return _sync[key]


def async_client(route: str) -> anthropic.AsyncAnthropic:
    """The client of a route for the running event loop."""
    clients = _async.setdefault(asyncio.get_running_loop(), {})
    key = (os.getpid(), route)
    if key not in clients:
        clients[key] = anthropic.AsyncAnthropic(**options_of(route))
    return clients[key]


def options_of(route: str) -> dict[str, Any]:
    found = settings().route(route)
    timeout = httpx2.Timeout(found.timeout_s, connect=min(found.timeout_s, CONNECT_TIMEOUT_S))
    options: dict[str, Any] = {"api_key": settings().api_key(route) or NO_KEY, "max_retries": 0, "timeout": timeout}
    if found.base_url is not None:
        options["base_url"] = found.base_url
    return options


def with_model(request: Any, model: str) -> Any:
    """The request for another name of the model; the same request where the name is the same."""
    return request if request.json.get("model") == model else request.copy(body={**request.json, "model": model})


def for_stranger(request: Any, model: str) -> Any:
    """The request as it may go to another provider: its name of the model, none of the caller's credentials."""
    headers = {name: value for name, value in request.headers.items() if name.lower() not in CREDENTIAL_HEADERS}
    return request.copy(body={**request.json, "model": model}, headers=headers)


def over(client: anthropic.Anthropic, request: Any) -> Any:
    """One HTTP attempt of `request` on another client: its `APIResponse`, whatever the status."""
    seen: list[Any] = []

    def tap(inner: Any, call_next: Any) -> Any:
        seen.append(call_next(inner))
        return seen[-1]

    try:
        client.with_middleware(tap).request(
            request.cast_to, request.options, stream=request.stream, stream_cls=request.stream_cls
        )
    except Exception:
        if not seen:
            raise
    return seen[-1]


async def aover(client: anthropic.AsyncAnthropic, request: Any) -> Any:
    """One HTTP attempt of `request` on another client: its `AsyncAPIResponse`, whatever the status."""
    seen: list[Any] = []

    async def tap(inner: Any, call_next: Any) -> Any:
        seen.append(await call_next(inner))
        return seen[-1]

    again = client.with_middleware(tap)
    try:
        await again.request(request.cast_to, request.options, stream=request.stream, stream_cls=request.stream_cls)
    except Exception:
        if not seen:
            raise
    return seen[-1]


class EndWatch:
    """Watches the bytes of an event stream for the event that must end it."""

    def __init__(self, done: Callable[[Outcome], None]) -> None:
        self.done, self.tail = done, b""
        self.outcome: Outcome | None = None

    def see(self, chunk: bytes) -> None:
        window = self.tail + chunk
        if FAILED in window:
            _, _, after = window.partition(FAILED)
            _, _, data = after.partition(b"data: ")
            self.outcome = of_stream_error(data.partition(b"\n")[0])
        elif STOP in window:
            self.outcome = OK
        self.tail = window[-4096:]

    def end(self) -> None:
        """Reports the fate of the stream, once; one that just stopped is an error, not an answer."""
        outcome = self.outcome or Outcome(kind="outage", scope="model", why="stream ended without message_stop")
        self.done(outcome)
        if self.outcome is None:
            raise httpx2.RemoteProtocolError("the provider's stream ended without message_stop; the answer is not complete")

    def failed(self, error: Exception) -> None:
        self.done(self.outcome or of_exception(error, now=clock.now()))


class WatchedStream(httpx2.SyncByteStream):
    def __init__(self, inner: Any, watch: EndWatch) -> None:
        self.inner, self.watch = inner, watch

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in self.inner:
                self.watch.see(chunk)
                yield chunk
        except httpx2.TransportError as error:
            self.watch.failed(error)
            raise
        self.watch.end()

    def close(self) -> None:
        self.inner.close()


class AsyncWatchedStream(httpx2.AsyncByteStream):
    def __init__(self, inner: Any, watch: EndWatch) -> None:
        self.inner, self.watch = inner, watch

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self.inner:
                self.watch.see(chunk)
                yield chunk
        except httpx2.TransportError as error:
            self.watch.failed(error)
            raise
        self.watch.end()

    async def aclose(self) -> None:
        await self.inner.aclose()


def watch_stream(http: Any, done: Callable[[Outcome], None]) -> None:
    """Lets a user's stream pass as it comes, and reports how it ended."""
    watch = EndWatch(done)
    if isinstance(http.stream, httpx2.SyncByteStream):
        http.stream = WatchedStream(http.stream, watch)
    else:
        http.stream = AsyncWatchedStream(http.stream, watch)


def as_response(http: httpx2.Response, route: str, request: Any) -> Any:
    """A response that no wire has seen, as the SDK hands it to a middleware of a thread."""
    return anthropic.APIResponse(raw=http, client=sync_client(route), **like(request))


def as_async_response(http: httpx2.Response, route: str, request: Any) -> Any:
    """The same for an event loop."""
    return anthropic.AsyncAPIResponse(raw=http, client=async_client(route), **like(request))


def like(request: Any) -> dict[str, Any]:
    names = ("cast_to", "stream", "stream_cls", "options")
    return {name: getattr(request, name) for name in names}
