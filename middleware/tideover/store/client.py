# SPDX-License-Identifier: Apache-2.0
"""The connection, the scripts, and what counts as Redis being gone."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import Any, TypeAlias

import redis
from redis.commands.core import Script
from redis.exceptions import BusyLoadingError, LockNotOwnedError, ReadOnlyError, RedisError
from redis.lock import Lock

from tideover.errors import StoreUnavailable

Client: TypeAlias = Any
"""A `redis.Redis`. redis-py types each answer as "this, or an awaitable of it"; we say the type where we read it."""

GONE = (redis.ConnectionError, redis.TimeoutError, ReadOnlyError, BusyLoadingError)
"""Redis cannot be asked just now; asking again later may work."""

FAILED = RedisError

LEASE_LOST = LockNotOwnedError
"""A lease cannot be prolonged: it ran out, and another process may have it."""

SOCKET_TIMEOUT_S = 10.0
"""Said, because redis-py 8 made 5 s its silent default."""


def connect(url: str) -> Client:
    """A client for a `redis://`, `rediss://` or `unix://` URL. Connects at the first command."""
    return redis.Redis.from_url(url, socket_timeout=SOCKET_TIMEOUT_S, socket_connect_timeout=SOCKET_TIMEOUT_S)


@cache
def source(name: str) -> str:
    return (files("tideover.store") / "lua" / f"{name}.lua").read_text(encoding="utf-8")


class Scripts:
    """The Lua files on one client; each is sent once and then called by its hash."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._registered: dict[str, Any] = {}

    def run(self, name: str, keys: Sequence[str], args: Sequence[Any] = ()) -> Any:
        script = self._registered.get(name)
        if script is None:
            script = self._registered[name] = self.client.register_script(source(name))
        return script(keys=keys, args=args)


@contextmanager
def store_errors(doing: str) -> Iterator[None]:
    """Turns what redis-py raises into `StoreUnavailable`, which says what failed and what to do."""
    try:
        yield
    except RedisError as error:
        raise StoreUnavailable(
            f"{doing}: Redis did not answer or refused ({type(error).__name__}: {str(error)[:200]}). "
            "Nothing was accepted. Check that it runs, the URL, its maxmemory and that it is no replica; then try again"
        ) from error


def lease(client: Client, key: str, seconds: float) -> Lock:
    """A lease that one process holds at a time: `acquire(blocking=False)`, then `reacquire()` while it works."""
    return Lock(client, key, timeout=seconds, blocking=False, thread_local=False)


def text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def starting(prefix: str) -> str:
    """The pattern of SCAN for what begins so.

    >>> starting("0c4f")
    '0c4f*'
    """
    return re.sub(r"([*?\[\\])", r"\\\1", prefix) + "*"


def pairs(flat: Sequence[Any]) -> dict[str, str]:
    """A hash that a script returned: RESP2 gives a flat list."""
    return {text(flat[i]): text(flat[i + 1]) for i in range(0, len(flat), 2)}


class LazyClient:
    """A client that asks for its URL, and connects, when it is first used; a fork starts anew."""

    def __init__(self, url: Callable[[], str]) -> None:
        self._url = url
        self._made: tuple[int, Client] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._client(), name)

    def register_script(self, script: bytes | str) -> Script:
        """dramatiq's broker registers its scripts when it is made, which is when the tasks are declared: that needs no URL."""
        return Script(self, script)  # type: ignore[arg-type]  # it asks a client's methods of it, and we have them all

    def _client(self) -> Client:
        if self._made is None or self._made[0] != os.getpid():
            self._made = (os.getpid(), connect(self._url()))
        return self._made[1]


def lazy_client(url: Callable[[], str]) -> Client:
    """See `LazyClient`."""
    return LazyClient(url)
