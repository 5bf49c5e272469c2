# SPDX-License-Identifier: Apache-2.0
"""A Redis in this process's memory, for users' tests: fakeredis, which runs our very scripts. There is no server."""

from __future__ import annotations

from importlib.util import find_spec

from tideover.store.client import Client


def open_memory() -> Client | None:
    """A client of a new, empty store; None where fakeredis or the Lua that it needs is not installed."""
    if find_spec("fakeredis") is None or find_spec("lupa") is None:
        return None
    import fakeredis

    return fakeredis.FakeRedis(server=fakeredis.FakeServer())
