# SPDX-License-Identifier: Apache-2.0
"""The steps of a process: each thing that it sends to Redis. A tap on the wire counts them, and strikes at one of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha1
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import redis
from dramatiq.brokers.redis import _scripts as of_dramatiq
from redis.backoff import NoBackoff
from redis.lock import Lock
from redis.retry import Retry

HANDSHAKE = {"HELLO", "AUTH", "CLIENT", "SELECT", "PING"}
READS = {
    "GET", "HGET", "HGETALL", "HMGET", "HLEN", "HEXISTS", "SMEMBERS", "SCARD", "SISMEMBER", "ZRANGE", "ZCARD", "ZSCORE", "LLEN",
    "INFO", "CONFIG", "TIME", "HSCAN", "SSCAN", "ZSCAN", "MULTI", "EXEC",
    "heads-1", "account-n",
}  # fmt: skip
MADE_UP = re.compile("[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{32}")
"""Ids, and the keys of results."""


class Diary:
    """What happened, outside Redis: lines of JSON in a file, each there before the next thing happens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes = 0

    def note(self, event: str, *facts: object) -> None:
        self.notes += 1
        to = os.open(self.path, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
        os.write(to, json.dumps([event, *facts]).encode() + b"\n")
        os.close(to)

    def read(self) -> list[list[Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def tags(self, event: str) -> list[str]:
        """What the notes of one kind are about, in order."""
        return [facts[0] for noted, *facts in self.read() if noted == event]


@cache
def scripts() -> dict[str, str]:
    """The name of each script that may run → its source."""
    ours = {entry.name.removesuffix(".lua"): entry.read_text() for entry in (files("tideover.store") / "lua").iterdir()}
    theirs = {f"dramatiq's {name}": source.decode() for name, source in of_dramatiq.items()}
    return ours | theirs | {"lock-release": Lock.LUA_RELEASE_SCRIPT, "lock-reacquire": Lock.LUA_REACQUIRE_SCRIPT}


@cache
def names_by_hash() -> dict[bytes, str]:
    return {sha1(source.encode()).hexdigest().encode(): name for name, source in scripts().items()}


def load_scripts(client: redis.Redis) -> None:
    """Lets the server know all scripts, so that the first run of one takes no more steps than the others."""
    for source in scripts().values():
        client.script_load(source)


def commands_in(packed: Any) -> list[list[bytes]]:
    """The commands that redis-py is about to send."""
    raw = packed if isinstance(packed, bytes) else b"".join(packed)
    found: list[list[bytes]] = []
    at = 0

    def number() -> int:
        nonlocal at
        end = raw.index(b"\r\n", at)
        n, at = int(raw[at + 1 : end]), end + 2
        return n

    while at < len(raw):
        parts = []
        for _ in range(number()):
            size = number()
            parts.append(raw[at : at + size])
            at += size + 2
        found.append(parts)
    return found


def name_of(command: Sequence[bytes]) -> str:
    """A script by its file's name, a command by its own and the end of its key, in which ids are left out."""
    if command[0] == b"EVALSHA":
        return names_by_hash().get(command[1], "an unknown script")
    key = command[1].decode(errors="replace").rsplit(":", 1)[-1] if len(command) > 1 else ""
    return f"{command[0].decode()} {MADE_UP.sub('...', key)}".strip()


def only_reads(step: str) -> bool:
    """Whether a step leaves no trace in Redis."""
    return all(name.split()[0] in READS for name in step.split(" + "))


class Tap:
    """Counts the steps of one process, and strikes at `times` of them: `before` Redis hears of it, or when it has done it.

    `befores` and `afters` say, for each step, what is known outside the process then: how much it has written, in Redis and in
    the diary. Where that is the same, it is the same for whoever comes after its death.
    """

    def __init__(
        self, diary: Diary, at: int = -1, strike: Callable[[], object] | None = None, *, before: bool = False, times: int = 1
    ) -> None:
        self.diary, self.strike, self.before, self.struck_at = diary, strike, before, range(at, at + times)
        self.names: list[str] = []
        self.befores: list[tuple[int, int]] = []
        self.afters: list[tuple[int, int]] = []
        self.writes = 0
        self.counting = False

    def count(self, commands: Sequence[Sequence[bytes]]) -> None:
        if self.counting:
            self.names.append(" + ".join(dict.fromkeys(map(name_of, commands))))
            self.befores.append((self.writes, self.diary.notes))
            if self.before:
                self.reach()

    def done(self) -> None:
        if self.counting:
            self.writes += not only_reads(self.names[-1])
            self.afters.append((self.writes, self.diary.notes))
            if not self.before:
                self.reach()

    def reach(self) -> None:
        if self.strike is not None and len(self.names) - 1 in self.struck_at:
            self.diary.note("struck", self.names[-1])
            self.strike()


class Tapped(redis.UnixDomainSocketConnection):
    """redis-py's connection, with a tap on it. What goes out in one piece is one step, a transaction too."""

    tap: ClassVar[Tap]
    awaited = 0
    """Replies of a step that have not been read yet."""

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        commands = commands_in(command)
        self.awaited = 0
        shakes_hands = commands[0][0].decode() in HANDSHAKE
        if not shakes_hands:
            self.tap.count(commands)
        super().send_packed_command(command, check_health)  # type: ignore[no-untyped-call]
        self.awaited = 0 if shakes_hands else len(commands)

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)
        finally:
            self.awaited -= 1
            if self.awaited == 0:
                self.tap.done()


def tapped_client(url: str, tap: Tap, repeats: int) -> redis.Redis:
    """A client whose connections are tapped. `repeats`: how often redis-py sends a command again whose reply was lost."""
    connection = type("Connection", (Tapped,), {"tap": tap})
    return redis.Redis.from_url(url, connection_class=connection, retry=Retry(NoBackoff(), repeats))
