# SPDX-License-Identifier: Apache-2.0
"""Routes that speak the Messages API: their clients, and one attempt over them.

One client for each process, route and event loop; a fork starts anew. In a job the SDK's own retries are off: waiting is ours.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Mapping
from copy import copy
from functools import cache
from typing import Any

import anthropic
import httpx2
from anthropic.types import RawMessageStreamEvent

from tideover.providers.clouds import CONNECT_TIMEOUT_S, NO_KEY, make, options_of
from tideover.settings import settings

FOR_STRANGERS = ("anthropic-beta", "x-tideover-")
"""Which of a call's own headers may go to another provider than the caller's: others may hold a credential."""

STREAM = anthropic.Stream[RawMessageStreamEvent]
ASYNC_STREAM = anthropic.AsyncStream[RawMessageStreamEvent]


class Made:
    """The clients of one process or event loop, by route; one whose settings or key have changed is made anew."""

    def __init__(self, *, asynchronous: bool) -> None:
        self.asynchronous, self._lock = asynchronous, threading.Lock()
        self._clients: dict[str, tuple[dict[str, Any], Any]] = {}
        self.retired: list[Any] = []
        """Still open: their calls may be under way."""

    def client(self, route: str) -> Any:
        options = options_of(settings(), route)
        with self._lock:
            known = self._clients.get(route)
            if known is None or known[0] != options:
                if known is not None:
                    self.retired.append(known[1])
                made = make(settings(), route, options, asynchronous=self.asynchronous)
                known = self._clients[route] = (options, made)
            return known[1]

    def take_all(self) -> list[Any]:
        """All clients, for closing; the next one asked for is new."""
        with self._lock:
            clients = [*self.retired, *(client for _, client in self._clients.values())]
            self.retired, self._clients = [], {}
            return clients


_sync: dict[int, Made] = {}
_async: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Made] = weakref.WeakKeyDictionary()


def sync_client(route: str) -> Any:
    """The client of a route for threads of this process; a fork starts anew."""
    return _sync.setdefault(os.getpid(), Made(asynchronous=False)).client(route)


def async_client(route: str) -> Any:
    """The client of a route for the running event loop."""
    return _async.setdefault(asyncio.get_running_loop(), Made(asynchronous=True)).client(route)


def close() -> None:
    """Closes this process's clients for threads."""
    for client in _sync.pop(os.getpid(), Made(asynchronous=False)).take_all():
        client.close()


async def aclose() -> None:
    """Closes the running loop's clients."""
    for client in _async.pop(asyncio.get_running_loop(), Made(asynchronous=True)).take_all():
        await client.close()


def outgoing(request: Any, model: str, *, stream_cls: Any = None, idle_s: float | None = None, stranger: bool = False) -> Any:
    """The request as it goes to a route, under its name of the model.

    `stream_cls`: what reads its answer as a stream, where a plain call goes out as one; None: as the caller made it.
    `idle_s`: the most that it waits for bytes. `stranger`: to another provider than the caller's, so without what is private.
    """
    made = copy(request)
    said: dict[str, Any] = {"json_data": {**request.json, "model": model}}
    if idle_s is not None:
        said["timeout"] = patience(request.timeout, idle_s)
    if stranger:
        said["headers"] = for_strangers(request.headers)
        said["max_retries"] = 0
    if stream_cls is not None and not request.stream:
        said["json_data"]["stream"] = True
        said["post_parser"] = anthropic.NOT_GIVEN
        made.stream, made.stream_cls = True, stream_cls
    made.options = request.options.model_copy(update=said)
    return made


def for_strangers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """A call's own headers, as far as they may go to another provider than the caller's."""
    return {name: value for name, value in headers.items() if name.lower().startswith(FOR_STRANGERS)}


def patience(asked: Any, idle_s: float) -> httpx2.Timeout:
    """The caller's timeouts where they are shorter."""
    known = httpx2.Timeout(None if isinstance(asked, anthropic.NotGiven) else asked)
    most = {"connect": min(idle_s, CONNECT_TIMEOUT_S), "read": idle_s, "write": idle_s, "pool": idle_s}
    own = known.as_dict()
    return httpx2.Timeout(**{name: min(own[name] or s, s) for name, s in most.items()})


def over(client: Any, request: Any) -> httpx2.Response:
    """One HTTP attempt of a call on another client: its response, whatever the status."""
    try:
        response: httpx2.Response = client.request(httpx2.Response, request.options, stream=True, stream_cls=STREAM)
    except anthropic.APIStatusError as error:
        return error.response
    return response


async def aover(client: Any, request: Any) -> httpx2.Response:
    """As `over`, from an event loop."""
    try:
        response: httpx2.Response = await client.request(httpx2.Response, request.options, stream=True, stream_cls=ASYNC_STREAM)
    except anthropic.APIStatusError as error:
        return error.response
    return response


@cache
def reader() -> anthropic.Anthropic:
    """What reads answers for a caller's client, whichever cloud's it is. It never calls."""
    return anthropic.Anthropic(api_key=NO_KEY, base_url="http://localhost")


@cache
def async_reader() -> anthropic.AsyncAnthropic:
    """As `reader`, for event loops."""
    return anthropic.AsyncAnthropic(api_key=NO_KEY, base_url="http://localhost")


def as_response(http: httpx2.Response, request: Any) -> Any:
    """A response that no wire has seen in this form, as the SDK hands it to a middleware of a thread."""
    return anthropic.APIResponse(raw=http, client=reader(), **like(request))


def as_async_response(http: httpx2.Response, request: Any) -> Any:
    """The same for an event loop."""
    return anthropic.AsyncAPIResponse(raw=http, client=async_reader(), **like(request))


def like(request: Any) -> dict[str, Any]:
    names = ("cast_to", "stream", "stream_cls", "options")
    return {name: getattr(request, name) for name in names}
