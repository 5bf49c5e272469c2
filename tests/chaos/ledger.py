# SPDX-License-Identifier: Apache-2.0
"""The ledger outside Redis: one file, to which every process of a run appends a JSON object a line, each with one write.

A line stands there the moment it is written, whatever happens to its writer. Its instant is this machine's monotonic clock,
which is one for all processes and which no shifted clock touches.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

Line: TypeAlias = Mapping[str, Any]

VARIABLE = "CHAOS_LEDGER"
"""Names the file, for the processes of a run."""


def note(what: str, *, path: Path | None = None, **facts: Any) -> None:
    """Appends a line; to the file that the environment names unless `path` says another."""
    line = json.dumps({"at": time.monotonic(), "what": what, **facts}, separators=(",", ":")) + "\n"
    file = os.open(os.environ[VARIABLE] if path is None else path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def read(path: Path) -> list[Line]:
    """All lines so far, in the order of their instants."""
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return sorted(map(json.loads, whole.splitlines()), key=lambda line: float(line["at"]))
