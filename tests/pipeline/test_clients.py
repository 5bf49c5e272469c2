# SPDX-License-Identifier: Apache-2.0
"""The SDK clients behind `claude()` and `aclaude()`: one for each process, event loop and route, and closed when it is over."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tideover import aclaude, claude
from tideover.providers import wire
from tideover.providers.anthropic import async_client, sync_client

if TYPE_CHECKING:
    from tests.pipeline.conftest import Shop

FORKS = """
import os
from tideover import claude
from tideover.providers import wire
from tideover.providers.anthropic import sync_client

def ask(tag):
    said = {"role": "user", "content": "A word, please."}
    claude().messages.create(model="claude-opus-4-8", max_tokens=8, messages=[said], extra_headers={"x-tideover-job": tag})

first = sync_client("anthropic")
ask("before")
child = os.fork()
if child == 0:
    assert sync_client("anthropic") is not first
    ask("child")
    wire.close()
    os._exit(0)
assert 0 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert sync_client("anthropic") is first and not first.is_closed()
ask("after")
wire.close()
assert first.is_closed()
"""


def test_a_fork_gets_a_client_of_its_own(shop: Shop) -> None:
    """Parent and child share no connection, and one that closes its client leaves the other's alone."""
    command = [sys.executable, "-W", "error", "-c", FORKS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (0, "") == (done.returncode, done.stderr)
    assert ["before", "child", "after"] == [call.job for call in shop.primary.calls()]


def test_each_event_loop_has_a_client_of_its_own(shop: Shop) -> None:
    """However many tasks run on it; it is closed with the loop's work, and the next loop's works."""

    async def work(tag: str) -> tuple[Any, bool]:
        clients = {id(async_client("anthropic")): async_client("anthropic") for _ in range(3)}
        await asyncio.gather(*(aclaude().messages.create(**shop.question(f"{tag}{i}")) for i in range(3)))
        await wire.aclose()
        (client,) = clients.values()
        return client, client.is_closed()

    (first, first_closed), (second, second_closed) = asyncio.run(work("a")), asyncio.run(work("b"))
    assert first is not second
    assert (True, True) == (first_closed, second_closed)
    assert 6 == len(shop.primary.calls())


def test_threads_share_one_client(shop: Shop) -> None:
    """And after it was closed the next call makes a new one."""
    with ThreadPoolExecutor(4) as pool:
        clients = set(pool.map(lambda _: id(sync_client("anthropic")), range(8)))
        list(pool.map(lambda i: claude().messages.create(**shop.question(str(i))), range(8)))
    assert {id(sync_client("anthropic"))} == clients
    was = sync_client("anthropic")
    wire.close()
    assert was.is_closed()
    claude().messages.create(**shop.question("again"))
    assert 9 == len(shop.primary.calls())
