# SPDX-License-Identifier: Apache-2.0
"""One story on every server program: the one of the development tools, and those that TOPOLOGY_SERVERS names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.topology.conftest import Rack, Shop


def test_the_story_on_each_server(rack: Rack, open_shop: Callable[[str], Shop], program: str) -> None:
    """Sent, held, looked at, forced, drained: the same on each."""
    server = rack.node(program=program)
    open_shop(f"redis://127.0.0.1:{server.port}/0").tell_the_story()
