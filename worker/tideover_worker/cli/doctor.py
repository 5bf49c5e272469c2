# SPDX-License-Identifier: Apache-2.0
"""`tideover doctor`: one sentence about whether the backlog would drain, then the checklist that it stands on."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import click

from tideover_worker.cli import output

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from tideover.ops import Check, Diagnosis, Severity

NOT_ARMED = 6
COLUMNS = ("namespace", "subject", "severity", "jobs", "sentence", "remedy")
LOOKS: dict[Severity, tuple[str, str]] = {
    "blocks": ("✗", "red"),
    "warns": ("!", "yellow"),
    "unchecked": ("?", "yellow"),
    "ok": ("✓", "green"),
}


@click.command(
    epilog="""\b
Examples:
  tideover doctor                            after a deploy, or while an outage lasts: would it all come home?
  tideover doctor -n shop || page-somebody   exit code 6: something blocks
  tideover doctor --json | jq -r '.namespaces[].checks[] | select(.severity == "blocks") | .remedy'
"""
)
@output.namespaces
@output.as_json
def doctor(*, namespaces: tuple[str, ...], as_json: bool) -> None:
    """Is it armed: would this backlog drain if the provider came back now? If not: why, and what to do.

    Each check is fine (✓), warns (!), blocks (✗) or could not be made (?). Jobs that need review wait for a human: they
    warn, and block nothing. Exit code 6: something blocks. It reads Redis only, changes nothing, and calls no provider.
    Piped, each line is namespace, subject, severity, jobs, sentence and remedy; the first one is the sentence over all.
    """
    from tideover import ops

    with output.operator_of(namespaces) as operator:
        found = ops.diagnose(operator)
    if as_json:
        output.print_json(found)
    elif output.on_terminal():
        output.print_screen(*screen(found))
    else:
        output.print_lines(COLUMNS, lines(found))
    if not found.armed:
        sys.exit(NOT_ARMED)


def lines(found: Diagnosis) -> Iterator[tuple[object, ...]]:
    """The sentence over all namespaces, then every check on a line of its own."""
    yield "", "armed", "ok" if found.armed else "blocks", sum(one.stay for one in found.namespaces), found.sentence, ""
    named = [(one.namespace, check) for one in found.namespaces for check in one.checks]
    for namespace, check in [*named, *(("", check) for check in found.redis)]:
        yield namespace, check.subject, check.severity, check.jobs, check.sentence, check.remedy


def screen(found: Diagnosis) -> Iterator[RenderableType]:
    from rich.text import Text

    yield headline(found.sentence, armed=found.armed)
    for one in found.namespaces:
        if len(found.namespaces) > 1:
            yield Text(f"\n{one.namespace}", style="bold underline")
            yield headline(one.sentence, armed=one.armed)
        yield ""
        yield checklist(one.checks)
    if len(found.namespaces) > 1:
        yield Text("\nRedis", style="bold underline")
    yield checklist(found.redis)


def headline(sentence: str, *, armed: bool) -> Text:
    from rich.text import Text

    symbol, style = LOOKS["ok" if armed else "blocks"]
    word, colon, rest = sentence.partition(": ")
    return Text.assemble((f"{symbol} {word}{colon}", style), rest)


def checklist(checks: Iterable[Check]) -> Table:
    """Each check with its remedy beneath it."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_column()
    grid.add_column(width=8)
    grid.add_column(overflow="fold")
    for check in checks:
        symbol, style = LOOKS[check.severity]
        grid.add_row(Text(f"  {symbol}", style), Text(check.subject), Text(check.sentence))
        if check.remedy:
            grid.add_row("", "", Text(f"→ {check.remedy}", style="cyan"))
    return grid
