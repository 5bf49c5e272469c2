# SPDX-License-Identifier: Apache-2.0
"""What in a request only the provider can read that made it: such a request is not rerouted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

FIELDS = ("container", "thread", "mcp_servers")
"""A container and a thread are kept by their provider; servers of tools come with credentials of their own."""

SIGNED = ("signature", "encrypted_content", "file_id")
"""Of blocks: earlier thinking, what was found on the web, compacted context, uploaded files."""


def bound_to_its_provider(body: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of what binds a request to one provider, sorted.

    >>> bound_to_its_provider({"messages": [{"role": "user", "content": "hi"}], "container": None})
    ()
    >>> bound_to_its_provider({"container": "c1", "messages": [{"content": [{"type": "thinking", "signature": "s"}]}]})
    ('container', 'thinking')
    """
    found = {name for name in FIELDS if body.get(name)}
    for block in blocks_of([body.get("messages"), body.get("system")]):
        if block.get("type") == "redacted_thinking" or any(block.get(name) for name in SIGNED):
            named = next((name for name in SIGNED if block.get(name)), "")
            found.add("file_id" if named == "file_id" else "thinking" if "thinking" in str(block.get("type")) else named)
    return tuple(sorted(found))


def blocks_of(parts: list[Any]) -> Iterator[Mapping[str, Any]]:
    """Every table within lists of messages and blocks, however deep; the inputs of tools are the caller's own words."""
    todo = list(parts)
    while todo:
        part = todo.pop()
        if isinstance(part, Mapping):
            yield part
            todo += [value for name, value in part.items() if name != "input"]
        elif isinstance(part, list | tuple):
            todo += part
