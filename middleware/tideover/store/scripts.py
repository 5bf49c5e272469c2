# SPDX-License-Identifier: Apache-2.0
"""The Lua files: how they are run, and what they take and give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib.resources import files
from typing import Any

from redis.commands.core import Script
from redis.lock import Lock

from tideover.store.client import FAILED, Client, text


@cache
def source(name: str) -> str:
    return (files("tideover.store") / "lua" / f"{name}.lua").read_text(encoding="utf-8")


class Scripts:
    """The Lua files on one client; each is sent once and then called by its hash."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._registered: dict[str, Script] = {}

    def run(self, name: str, keys: Sequence[str], args: Sequence[Any] = ()) -> Any:
        return self._script(name)(keys=keys, args=args)

    def run_each(self, name: str, keys: Sequence[str], requests: Iterable[Sequence[Any]]) -> Iterator[Any]:
        """The answers of one script to each of many requests, in order: the next one is made while Redis works on one.

        The script must be idempotent: what is not answered so is asked again by `run`, which repeats and says what is wrong.
        """
        ahead = Ahead(self.client)
        asked: list[Sequence[Any]] = []
        try:
            for args in requests:
                yield from (ahead.answer(partial(self.run, name, keys, last)) for last in asked)
                ahead.send("EVALSHA", self._script(name).sha, len(keys), *keys, *args)
                asked = [args]
            yield from (ahead.answer(partial(self.run, name, keys, last)) for last in asked)
        finally:
            ahead.drop()

    def _script(self, name: str) -> Script:
        script = self._registered.get(name)
        if script is None:
            script = self._registered[name] = self.client.register_script(source(name))
        return script


class Ahead:
    """A command that is sent now, and its answer read later. A cluster has no such thing: there all is asked later."""

    def __init__(self, client: Client) -> None:
        self.pool: Any = getattr(client, "connection_pool", None)
        self.connection: Any = None
        """Of the pool, while an answer is awaited."""

    def send(self, *command: Any) -> None:
        """Sends a command, if that can be done just now."""
        if self.pool is not None:
            try:
                self.connection = self.pool.get_connection()
                self.connection.send_command(*command)
            except FAILED:
                self.drop()

    def answer(self, otherwise: Callable[[], Any]) -> Any:
        """What Redis answered to what was sent; if there is no answer, what the other way gives."""
        if self.connection is not None:
            with suppress(*FAILED):
                answered = self.connection.read_response()
                self.pool.release(self.connection)
                self.connection = None
                return answered
            self.drop()
        return otherwise()

    def drop(self) -> None:
        """Waits for no answer any more."""
        if self.connection is not None:
            self.connection.disconnect()
            self.pool.release(self.connection)
            self.connection = None


def apart(sizes: bytes, whole: bytes) -> list[bytes | None]:
    """What a script put into one answer, because redis-py takes long over each part of one: sizes (-1: none), and all of it.

    >>> apart(b"2 -1 1", b"abc")
    [b'ab', None, b'c']
    """
    parts: list[bytes | None] = []
    at = 0
    for size in map(int, sizes.split()):
        parts.append(whole[at : at + size] if size >= 0 else None)
        at += max(0, size)
    return parts


def pairs(flat: Sequence[Any]) -> dict[str, str]:
    """A hash that a script returned: RESP2 gives a flat list."""
    return {text(flat[i]): text(flat[i + 1]) for i in range(0, len(flat), 2)}


class ScriptedLock(Lock):
    """redis-py's lock, which can be taken on a full Redis, too."""

    def do_acquire(self, token: str) -> bool:
        return bool(Scripts(self.redis).run("lease-1", [self.name], [token, int((self.timeout or 0) * 1000)]))


def lease(client: Client, key: str, seconds: float) -> Lock:
    """A lease that one process holds at a time: `acquire(blocking=False)`, then `reacquire()` while it works."""
    return ScriptedLock(client, key, timeout=seconds, blocking=False, thread_local=False)
