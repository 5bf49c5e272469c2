# SPDX-License-Identifier: Apache-2.0
"""A private Valkey for each test process, and the patience to wait for facts.

Hypothesis runs the same examples every time. To look further: `pytest --hypothesis-profile=explore --hypothesis-seed=7`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol
from uuid import uuid4

import pytest
import redis
from hypothesis import settings as hypothesis_settings

from tideover import clock
from tideover.store.keys import Keys
from tideover_worker import embedded

hypothesis_settings.register_profile("same", derandomize=True, deadline=None)
hypothesis_settings.register_profile("explore", derandomize=False, deadline=None, max_examples=1000, print_blob=True)
hypothesis_settings.load_profile("same")

POLL_S = 0.01


class WaitUntil(Protocol):
    def __call__(self, fact: Callable[[], Any], *, within_s: float, description: str) -> Any: ...


@pytest.fixture(scope="session")
def wait_until() -> WaitUntil:
    """Waits for a fact and returns it; fails with the description when it does not come true in time."""

    def wait(fact: Callable[[], Any], *, within_s: float, description: str) -> Any:
        give_up_at, pause = clock.monotonic() + within_s, threading.Event()
        while not (found := fact()):
            assert clock.monotonic() < give_up_at, f"after {within_s} s still not true: {description}"
            pause.wait(POLL_S)
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
