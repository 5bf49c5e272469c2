# SPDX-License-Identifier: Apache-2.0
"""Redis goes away in the middle of an operator's act: it says with how many jobs it was done, and can be done again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from tests.pipeline.test_backlog import Desk

from tideover import ops
from tideover.errors import StoreUnavailable
from tideover.ops.acts import AT_ONCE
from tideover_worker import embedded

BEYOND = 20
JOBS = AT_ONCE + BEYOND

Act = Callable[..., Any]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """One whose server the test stops."""
    server = embedded.start(tmp_path / "valkey")
    with redis.Redis.from_url(server.url) as client:
        yield Desk(client, server.url, "shop", tmp_path)
    embedded.stop(tmp_path / "valkey")


@pytest.mark.parametrize(
    ("act", "done", "first"),
    [
        (partial(ops.release, who="me", why=None, force=True), "released", BEYOND),  # the last go first, to the queue's head
        (partial(ops.discard, who="me", because="not needed"), "discarded", AT_ONCE),
    ],
    ids=["release", "discard"],
)
def test_it_says_how_many_and_the_rest_can_follow(desk: Desk, tmp_path: Path, act: Act, done: str, first: int) -> None:
    """Nothing is done twice, and nothing is lost."""
    desk.hold(JOBS)
    with closing(desk.operator()) as operator:
        chosen = ops.choose(operator)
        with pytest.raises(StoreUnavailable, match=rf"^{first} of {JOBS} jobs are {done}\. "):
            act(operator, chosen, progress=lambda _: embedded.stop(tmp_path / "valkey"))
        embedded.start(tmp_path / "valkey")
        left = act(operator, ops.choose(operator))
    assert (JOBS - first, 0) == (len(left.jobs), desk.space.backlog.size("default"))
    account = desk.space.ledger.read()
    assert (0, JOBS) == (account.lost, account.queued + account.ends["discarded"])
