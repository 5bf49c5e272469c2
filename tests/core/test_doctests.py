# SPDX-License-Identifier: Apache-2.0
"""Every example in a docstring is run: those of the core, and of whatever else has some."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import tideover

ROOT = Path(tideover.__file__).parent.parent
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(ROOT.rglob("*.py")) if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_hold(name: str) -> None:
    """They show what the module gives today."""
    found = doctest.testmod(import_module(name))
    assert (0, True) == (found.failed, found.attempted > 0)


def test_the_core_explains_itself_by_examples() -> None:
    """Arguments, route, outcome, pacing and breaker have some."""
    expected = {"tideover.arguments", *(f"tideover.core.{name}" for name in ("breaker", "job", "outcome", "pacing", "route"))}
    assert expected <= set(MODULES)
