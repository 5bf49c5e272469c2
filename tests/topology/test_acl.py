# SPDX-License-Identifier: Apache-2.0
"""A user of Redis with the rights that docs/topologies.md lists: nothing dangerous, no INFO, no other keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
import redis

from tideover.errors import StoreUnavailable

if TYPE_CHECKING:
    from tests.topology.conftest import Node, Rack, Shop

DOCUMENT = Path(__file__).parents[2] / "docs" / "topologies.md"
PASSWORD = "pa ss/w@rd#1"
FORBIDDEN = ("FLUSHALL", "KEYS *", "CONFIG GET *", "GET other", "PUBLISH other x", "ACL LIST", "SHUTDOWN", "EVAL x 0")
ASKED_AT_BOOT = {"info", "config", "config|get", "client"}
"""By the check of the store; `client`: Redis 6.2 does not let everybody say which library he uses, as redis-py does."""


def rule() -> list[str]:
    """The line of the document, for the namespace `shop`."""
    (line,) = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("ACL SETUSER tideover")]
    return [word.replace("PASSWORD", PASSWORD).replace("NAMESPACE", "shop") for word in line.split()]


def refused(server: Node) -> set[str]:
    """What users were refused on this server: commands, keys and channels."""
    log: list[Any] = server.ask("ACL", "LOG")
    entries = [entry if isinstance(entry, dict) else dict(zip(entry[::2], entry[1::2], strict=True)) for entry in log]
    return {entry[b"object"].decode() for entry in entries}


def test_the_story_as_a_user_with_few_rights(
    rack: Rack, open_shop: Callable[[str], Shop], program: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is refused but the questions of the boot, which say so in the log and go on."""
    server = rack.node(program=program)
    server.ask(*rule())
    open_shop(f"redis://tideover:{quote(PASSWORD, safe='')}@127.0.0.1:{server.port}/0").tell_the_story()
    assert refused(server) <= ASKED_AT_BOOT
    assert ["store_at_risk" in text and "may not ask" in text for text in caplog.messages].count(True) == 1


def test_the_user_may_do_nothing_else(rack: Rack, program: str) -> None:
    """No dangerous command, no other key, no other channel."""
    server = rack.node(program=program)
    server.ask(*rule())
    with redis.Redis(port=server.port, username="tideover", password=PASSWORD) as client:
        for command in FORBIDDEN:
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())


def test_a_right_that_is_missing_is_named(rack: Rack, open_shop: Callable[[str, str], Shop]) -> None:
    """Who sends with a namespace that the user may not touch learns where the rights are listed."""
    server = rack.node()
    server.ask(*rule())
    shop = open_shop(f"redis://tideover:{quote(PASSWORD, safe='')}@127.0.0.1:{server.port}/0", "other")
    with pytest.raises(StoreUnavailable, match=r"NoPermissionError.*docs/topologies\.md"):
        shop.summary.send("x")
