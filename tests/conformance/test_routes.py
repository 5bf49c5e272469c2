# SPDX-License-Identifier: Apache-2.0
"""docs/reference/routes.md says what the conformance suite finds today."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.conformance.page import HEAD, PAGE, line_of
from tests.conformance.providers import PROVIDERS, Provider


def test_the_page_has_a_row_for_each_provider() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(HEAD)
    assert [provider.name for provider in PROVIDERS] == [line.split(" | ")[0][2:] for line in text[len(HEAD) :].splitlines()]


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
def test_what_the_page_says_of_a_provider_is_true(provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every feature: asked plainly, as a stream and from an event loop."""
    monkeypatch.chdir(tmp_path)
    assert line_of(provider) in PAGE.read_text(encoding="utf-8")
