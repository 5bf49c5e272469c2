# SPDX-License-Identifier: Apache-2.0
"""A private Valkey for each test process, and the patience to wait for facts.

Hypothesis runs the same examples every time. To look further: `pytest --hypothesis-profile=explore --hypothesis-seed=7`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

import pytest
import redis
from hypothesis import settings as hypothesis_settings

from tideover import clock
from tideover.store import keys as keys_module
from tideover.store.keys import NAMESPACES, Keys
from tideover_worker import embedded

hypothesis_settings.register_profile("same", derandomize=True, deadline=None)
hypothesis_settings.register_profile("explore", derandomize=False, deadline=None, max_examples=1000, print_blob=True)
hypothesis_settings.load_profile("same")

POLL_S, MOST_POLL_S, POLL_GROWTH = 0.005, 0.1, 1.3
"""How often a fact is looked for: less and less, because looking takes time from the others."""


class WaitUntil(Protocol):
    def __call__(self, fact: Callable[[], Any], *, within_s: float, description: str) -> Any: ...


@pytest.fixture(scope="session")
def wait_until() -> WaitUntil:
    """Waits for a fact and returns it; fails with the description when it does not come true in time."""

    def wait(fact: Callable[[], Any], *, within_s: float, description: str) -> Any:
        give_up_at, pause, poll_s = clock.monotonic() + within_s, threading.Event(), POLL_S
        while not (found := fact()):
            assert clock.monotonic() < give_up_at, f"after {within_s} s still not true: {description}"
            pause.wait(poll_s)
            poll_s = min(MOST_POLL_S, poll_s * POLL_GROWTH)
        return found

    return wait


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A private server for this test process. Without a server program the tests fail, and the error says what to install."""
    folder = tmp_path_factory.mktemp("valkey")
    server = embedded.start(folder)
    yield server.url
    embedded.stop(folder)


@pytest.fixture
def client(valkey_url: str) -> Iterator[redis.Redis]:
    """A client of the private server, with nothing in it."""
    with redis.Redis.from_url(valkey_url) as made:
        made.flushall()
        made.config_resetstat()
        yield made


@pytest.fixture
def keys() -> Keys:
    """A namespace of its own."""
    return Keys(f"test-{uuid4().hex[:8]}")


# The table of keys

NAMES = {
    "queue": r"[^:]+",
    "worker": r"[^:]+",
    "day": r"\d{8}|today",
    "group": r"[^:]+",
    "key": r".+",
    "name": r"[a-z]+",
    "digest": r"[0-9a-f]+",
    "hour": r"\d+",
    "route": r"[^:]+",
}
ANY_NAMESPACE = r"[^:]+"
MOST_SECONDS = {
    "2 min": 120,
    "1 h": 3600,
    "2 h": 7200,
    "2 days": 2 * 86_400,
    "8 days": 8 * 86_400,
    "seconds": 60,
    "30 days": 30 * 86_400,
}
"""The lifetimes that Redis itself ends, and how long they are at most."""
AS_ASKED = "as asked"
OF_DRAMATIQ = {
    "a result; its name is an MD5 of the job's": r"[0-9a-f]{32}",
    "a result, where names were asked to be readable": r"dramatiq-results:[^:]+:[^:]+:[^:]+",
    "the barrier of a group": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(@events)?",
}
"""Keys that are not ours: dramatiq makes them, and gives each a time to live."""


@dataclass(frozen=True)
class Documented:
    """A row of the table at the top of `store/keys.py`."""

    name: str
    kind: str
    lives: str

    def matches(self, key: str, namespace: str) -> bool:
        parts = re.split(r"<([a-z ]+)>", self.name)
        known = {**NAMES, "ns": namespace}
        pattern = "".join(f"(?:{known[part]})" if i % 2 else re.escape(part) for i, part in enumerate(parts))
        return re.fullmatch(pattern, key) is not None

    def allows(self, ttl_s: int) -> bool:
        """Whether a key may go by itself after this time (-1: never)."""
        if self.lives == AS_ASKED:
            return True
        return 0 <= ttl_s <= MOST_SECONDS[self.lives] if self.lives in MOST_SECONDS else ttl_s == -1


class KeyTable:
    """What `store/keys.py` says of each key."""

    def __init__(self) -> None:
        rows = []
        for row in re.findall(r"^\| (`.*) \|$", keys_module.__doc__ or "", re.MULTILINE):
            names, kinds, _, lives = (cell.strip() for cell in row.split(" | "))
            whole: list[str] = []
            for name in re.findall(r"`([^`]+)`", names):
                whole.append(whole[0].removesuffix(".XQ") + name if name.startswith(".") else name)
            for name, kind in zip(whole, kinds.split(", "), strict=True):
                ours = "" if name.startswith("<ns>:") or name == NAMESPACES else "<ns>:__tideover__:"
                rows.append(Documented(ours + name, kind, lives))
        self.rows = sorted(rows, key=lambda row: -len(re.sub(r"<[a-z ]+>", "", row.name)))
        """The most particular names first."""

    def row_of(self, key: str, namespace: str | None = None) -> Documented | None:
        """The row that documents a key, of this namespace or of any."""
        known = ANY_NAMESPACE if namespace is None else re.escape(namespace)
        return next((row for row in self.rows if row.matches(key, known)), None)

    def faults(self, client: redis.Redis) -> list[str]:
        """What a server holds against the table: undocumented keys, and those of another type or lifetime."""
        names = sorted(key.decode(errors="backslashreplace") for key in client.scan_iter(count=1000))
        with client.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.type(name)
                pipe.ttl(name)
            told = pipe.execute()
        there = zip(names, told[::2], told[1::2], strict=True)
        found = (self.fault(name, kind.decode(), ttl_s) for name, kind, ttl_s in there if kind != b"none")
        return [fault for fault in found if fault]

    def fault(self, name: str, kind: str, ttl_s: int) -> str:
        row = self.row_of(name)
        if row is None:
            foreign = any(re.fullmatch(pattern, name) for pattern in OF_DRAMATIQ.values())
            return "" if foreign and ttl_s >= 0 else f"{name} ({kind}, for {ttl_s} s) is not in the table of store/keys.py"
        if row.kind != kind:
            return f"{name} is a {kind}; the table of store/keys.py says {row.kind}"
        return "" if row.allows(ttl_s) else f"{name} goes after {ttl_s} s; the table of store/keys.py says: {row.lives}"


@pytest.fixture(scope="session")
def key_table() -> KeyTable:
    return KeyTable()


@pytest.fixture(autouse=True)
def own_clock() -> Iterator[None]:
    """What a worker in this process has learned of Redis' time, or was made to believe, ends with its test."""
    yield
    clock._ahead, clock._error = None, 0.0


@pytest.fixture(autouse=True)
def no_leaked_keys(request: pytest.FixtureRequest, key_table: KeyTable) -> Iterator[None]:
    """After each test on the private server, or on one of its own: every key is documented, with its type and lifetime."""
    url = request.getfixturevalue("valkey_url") if "valkey_url" in request.fixturenames else None
    shop = request.getfixturevalue("private_shop") if "private_shop" in request.fixturenames else None
    yield
    if shop is not None:
        url = embedded.start(shop.folder / "valkey").url
    if url is not None:
        with redis.Redis.from_url(url) as client:
            assert [] == key_table.faults(client)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests first: whatever is begun last is waited for by all other processes."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
