# SPDX-License-Identifier: Apache-2.0
"""Routes that speak the Messages API: their clients, one attempt over them, and streams that may not end in silence.

One client for each process, route and event loop; a fork starts anew. In a job the SDK's own retries are off: waiting is ours.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Generic, TypeVar

import anthropic
import httpx2

from tideover import clock
from tideover.core.outcome import Outcome, of_answer, of_exception, of_stream_error
from tideover.settings import settings

NO_KEY = "none"
"""What a route without a credential sends, because the SDK sends something: never another route's key."""

CREDENTIAL_HEADERS = frozenset({"authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie", "proxy-authorization"})

CONNECT_TIMEOUT_S = 5.0

STOP = b"event: message_stop"
FAILED = b"event: error"
HEAD_BYTES = 1024
"""Where a stream's first event says how many tokens the request took."""

T = TypeVar("T")


class Made(Generic[T]):
    """The clients of one process or event loop, by route; one whose settings or key have changed is made anew."""

    def __init__(self, make: Callable[..., T]) -> None:
        self.make, self._lock = make, threading.Lock()
        self._clients: dict[str, tuple[dict[str, Any], T]] = {}
        self.retired: list[T] = []
        """Still open: their calls may be under way."""

    def client(self, route: str) -> T:
        options = options_of(route)
        with self._lock:
            known = self._clients.get(route)
            if known is None or known[0] != options:
                if known is not None:
                    self.retired.append(known[1])
                known = self._clients[route] = (options, self.make(**options))
            return known[1]

    def take_all(self) -> list[T]:
        """All clients, for closing; the next one asked for is new."""
        with self._lock:
            clients = [*self.retired, *(client for _, client in self._clients.values())]
            self.retired, self._clients = [], {}
            return clients


_sync: dict[int, Made[anthropic.Anthropic]] = {}
_async: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Made[anthropic.AsyncAnthropic]] = weakref.WeakKeyDictionary()


def sync_client(route: str) -> anthropic.Anthropic:
    """The client of a route for threads of this process; a fork starts anew."""
    return _sync.setdefault(os.getpid(), Made(anthropic.Anthropic)).client(route)


def async_client(route: str) -> anthropic.AsyncAnthropic:
    """The client of a route for the running event loop."""
    return _async.setdefault(asyncio.get_running_loop(), Made(anthropic.AsyncAnthropic)).client(route)


def close() -> None:
    """Closes this process's clients for threads."""
    for client in _sync.pop(os.getpid(), Made(anthropic.Anthropic)).take_all():
        client.close()


async def aclose() -> None:
    """Closes the running loop's clients."""
    for client in _async.pop(asyncio.get_running_loop(), Made(anthropic.AsyncAnthropic)).take_all():
        await client.close()


def options_of(route: str) -> dict[str, Any]:
    found = settings().route(route)
    timeout = httpx2.Timeout(found.timeout_s, connect=min(found.timeout_s, CONNECT_TIMEOUT_S))
    options: dict[str, Any] = {"api_key": settings().api_key(route) or NO_KEY, "timeout": timeout}
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

    again = client.with_options(middleware=[*client.middleware, tap], max_retries=0)
    try:
        again.request(request.cast_to, request.options, stream=request.stream, stream_cls=request.stream_cls)
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

    again = client.with_options(middleware=[*client.middleware, tap], max_retries=0)
    try:
        await again.request(request.cast_to, request.options, stream=request.stream, stream_cls=request.stream_cls)
    except Exception:
        if not seen:
            raise
    return seen[-1]


class EndWatch:
    """Watches the bytes of an event stream for the event that must end it, and reports the stream's fate, once."""

    def __init__(self, done: Callable[[Outcome], None]) -> None:
        self._done, self._head, self._tail, self._told = done, b"", b"", False

    def see(self, chunk: bytes) -> None:
        """Takes in a chunk. An error event counts as soon as its line is whole: the SDK reads no further."""
        window = self._tail + chunk
        if len(self._head) < HEAD_BYTES:
            self._head += chunk[:HEAD_BYTES]
        if FAILED in window:
            _, _, data = window.partition(FAILED)[2].partition(b"data: ")
            if b"\n" in data:
                self.tell(of_stream_error(data.partition(b"\n")[0]))
        elif STOP in window:
            self.tell(of_answer(self._head + window))
        self._tail = window[-4096:]

    def end(self) -> None:
        """The stream is over; one that just stopped is an error, not an answer."""
        if not self._told:
            self.tell(Outcome(kind="outage", scope="model", why="stream ended without message_stop"))
            raise httpx2.RemoteProtocolError("the provider's stream ended without message_stop; the answer is not complete")

    def failed(self, error: Exception) -> None:
        self.tell(of_exception(error, now=clock.now()))

    def tell(self, outcome: Outcome) -> None:
        if not self._told:
            self._told = True
            self._done(outcome)


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
