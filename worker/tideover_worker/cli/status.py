# SPDX-License-Identifier: Apache-2.0
"""`tideover status`: one sentence, then what it stands on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from tideover_worker.cli import output, status_screen

if TYPE_CHECKING:
    from tideover.ops import Status


@click.command(
    epilog="""\b
Examples:
  tideover status                     all namespaces of this Redis
  tideover status --watch             again every 2 seconds, until Ctrl-C
  tideover status -n shop --json | jq '.namespaces[0].standing.lost'
  tideover status | awk -F'\\t' '$2 == "breaker" && $4 == "state"'
"""
)
@output.watch_s
@output.namespaces
@output.as_json
def status(*, watch_s: float | None, namespaces: tuple[str, ...], as_json: bool) -> None:
    """How things stand: one sentence, then breakers, routes, backlog and workers.

    The account says: accepted = queued + running + held + ended. What is missing from that sum is lost, and then the exit
    code is 1. A queued job past its expiry counts as queued until a worker reaches it; `tideover explain` says that it is
    overdue. Piped, each line is namespace, item, name, field and value.
    """
    from tideover import ops

    output.check_watch(watch_s, "tideover status", as_json=as_json)
    with output.operator_of(namespaces) as operator:
        if watch_s is not None:
            output.watch(lambda: status_screen.of_status(ops.status(operator)), watch_s)
            return
        found = ops.status(operator)
    if as_json:
        output.print_json(found)
    elif output.on_terminal():
        output.print_screen(*status_screen.of_status(found))
    else:
        output.print_lines(("namespace", "item", "name", "field", "value"), lines(found))
    if found.lost:
        sys.exit(1)


def lines(found: Status) -> Iterator[tuple[object, ...]]:
    """Every value on a line of its own; first the verdict over all namespaces."""
    from tideover.ops import as_json

    answer = as_json(found)
    yield from (("", "verdict", "", field, answer["verdict"][field]) for field in ("level", "sentence"))
    for one in answer["namespaces"]:
        yield from ((one["namespace"], "verdict", "", field, value) for field, value in one["verdict"].items())
        for item, value in one["standing"].items():
            yield from ((one["namespace"], *row) for row in of_item(item, value))


def of_item(item: str, value: Any) -> Iterator[tuple[object, ...]]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        for part in value:
            yield from ((item.removesuffix("s"), name_of(part), field, what) for field, what in part.items())
    elif isinstance(value, dict):
        yield from ((item, "", field, what) for field, what in value.items())
    else:
        yield "standing", "", item, value


def name_of(part: dict[str, Any]) -> str:
    """What a part of the answer is called: by its first field, and held jobs by their wait key and reason."""
    if "waits_for" in part:
        return f"{'|'.join(part['waits_for'])} {part['reason']}".strip()
    return str(next(iter(part.values())))
