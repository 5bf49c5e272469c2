# SPDX-License-Identifier: Apache-2.0
"""What a worker says of its Redis when it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tideover.store.client import connect
from tideover_worker.boot import check_store

if TYPE_CHECKING:
    from tests.topology.conftest import Rack


@pytest.mark.parametrize(
    ("appendonly", "save", "level", "said"),
    [
        ("yes", "", None, None),
        ("no", "60 1", "WARNING", "after the last snapshot is lost when it crashes"),
        ("no", "", "CRITICAL", "every job is lost when it restarts"),
    ],
)
def test_missing_persistence_is_said_aloud(
    rack: Rack, caplog: pytest.LogCaptureFixture, appendonly: str, save: str, level: str | None, said: str | None
) -> None:
    """With the remedy; a server that appends to a file is passed in silence."""
    server = rack.node("--appendonly", appendonly, "--save", save)
    with connect(f"redis://127.0.0.1:{server.port}") as client:
        check_store(client)
    found = [(record.levelname, record.getMessage()) for record in caplog.records if "store_at_risk" in record.getMessage()]
    assert ([] if level is None else [level]) == [name for name, _ in found]
    assert all(said in text and "appendonly yes" in text for _, text in found if said is not None)
