# SPDX-License-Identifier: Apache-2.0
"""The examples print what they say they print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted(folder.name for folder in EXAMPLES.iterdir() if (folder / "run.py").exists()))
def test_an_example_prints_what_it_should(example: str) -> None:
    """Run as its README says, with real processes; the output is the one beside it."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / example / "run.py"], capture_output=True, text=True, timeout=110, check=False
    )
    assert (EXAMPLES / example / "expected_output.txt").read_text() == done.stdout, done.stderr
