# SPDX-License-Identifier: Apache-2.0
"""Routes that speak the Messages API: their clients, and one attempt over them.

One client for each process, route and event loop; a fork starts anew. In a job the SDK's own retries are off: waiting is ours.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable
from copy import copy
from typing import Any, Generic, TypeVar

import anthropic
import httpx2
from anthropic.types import RawMessageStreamEvent

from tideover.settings import settings

NO_KEY = "none"
"""What a route without a credential sends, because the SDK sends something: never another route's key."""

CREDENTIAL_HEADERS = frozenset({"authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie", "proxy-authorization"})

CONNECT_TIMEOUT_S = 5.0

STREAM = anthropic.Stream[RawMessageStreamEvent]
ASYNC_STREAM = anthropic.AsyncStream[RawMessageStreamEvent]

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


def outgoing(request: Any, model: str, *, stream_cls: Any = None, idle_s: float | None = None, stranger: bool = False) -> Any:
    """The request as it goes to a route, under its name of the model.

    `stream_cls`: what reads its answer as a stream, where a plain call goes out as one; None: as the caller made it.
    `idle_s`: the most that it waits for bytes. `stranger`: to another provider than the caller's, so without any credential.
    """
    made = copy(request)
    said: dict[str, Any] = {"json_data": {**request.json, "model": model}}
    if idle_s is not None:
        said["timeout"] = patience(request.timeout, idle_s)
    if stranger:
        said["headers"] = {name: value for name, value in request.headers.items() if name.lower() not in CREDENTIAL_HEADERS}
    if stream_cls is not None and not request.stream:
        said["json_data"]["stream"] = True
        said["post_parser"] = anthropic.NOT_GIVEN
        made.stream, made.stream_cls = True, stream_cls
    made.options = request.options.model_copy(update=said)
    return made


def patience(asked: Any, idle_s: float) -> httpx2.Timeout:
    """The caller's timeouts where they are shorter."""
    known = httpx2.Timeout(None if isinstance(asked, anthropic.NotGiven) else asked)
    most = {"connect": min(idle_s, CONNECT_TIMEOUT_S), "read": idle_s, "write": idle_s, "pool": idle_s}
    own = known.as_dict()
    return httpx2.Timeout(**{name: min(own[name] or s, s) for name, s in most.items()})


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


def as_response(http: httpx2.Response, client: anthropic.Anthropic, request: Any) -> Any:
    """A response that no wire has seen in this form, as the SDK hands it to a middleware of a thread."""
    return anthropic.APIResponse(raw=http, client=client, **like(request))


def as_async_response(http: httpx2.Response, client: anthropic.AsyncAnthropic, request: Any) -> Any:
    """The same for an event loop."""
    return anthropic.AsyncAPIResponse(raw=http, client=client, **like(request))


def like(request: Any) -> dict[str, Any]:
    names = ("cast_to", "stream", "stream_cls", "options")
    return {name: getattr(request, name) for name in names}
