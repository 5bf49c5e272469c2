# SPDX-License-Identifier: Apache-2.0
"""What the commands share: their options, and the three forms of an answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from tideover_worker.cli.config import plain

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from tideover.ops import Operator

SCHEMA = 1
"""Version of the JSON documents; it moves when a field goes or changes its meaning."""

MOST_UNSEEN = 1000
"""Jobs that an act moves without a progress bar."""

as_json = click.option("--json", "as_json", is_flag=True, help='Print one JSON document with "schema": 1.')
namespaces = click.option(
    "-n", "--namespace", "namespaces", multiple=True, metavar="NAME", help="Only this namespace; may be given several times."
)

watch_s = click.option(
    "--watch", "watch_s", type=click.FloatRange(0.2), is_flag=False, flag_value=2.0, metavar="[SECONDS]",
    help="Show it again and again (every 2 s if not said), until Ctrl-C.",
)  # fmt: skip


def check_watch(every_s: float | None, command: str, *, as_json: bool) -> None:
    """Refuses to watch where there is no terminal."""
    if every_s is not None and (as_json or not on_terminal()):
        raise click.UsageError(f"--watch needs a terminal; elsewhere call `{command} --json` as often as you like.")


@contextmanager
def operator_of(chosen: Sequence[str]) -> Iterator[Operator]:
    """The operator of this directory's settings, for the chosen namespaces or for all."""
    from tideover.ops import open_operator  # redis and pydantic would slow every `--help` down
    from tideover.settings import settings

    operator = open_operator(settings(), chosen)
    try:
        yield operator
    finally:
        operator.close()


def print_json(value: object) -> None:
    from tideover.ops import as_json as plain_data

    click.echo(json.dumps({"schema": SCHEMA, **plain_data(value)}, indent=2))


def print_lines(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Tab-separated lines; a tab or a line break within a value becomes a space."""
    for row in (header, *rows):
        click.echo("\t".join(" ".join(plain(value).split()) for value in row))


def print_screen(*parts: RenderableType) -> None:
    from rich.console import Console  # loaded for a terminal only

    console = Console(highlight=False)
    for part in parts:
        console.print(part)


def watch(look: Callable[[], Iterable[RenderableType]], every_s: float) -> None:
    """Shows it again and again until Ctrl-C, also through a time in which Redis is gone."""
    import time
    from contextlib import suppress

    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from tideover.errors import StoreUnavailable

    with Live(console=Console(highlight=False), auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            try:
                live.update(Group(*look()), refresh=True)
            except StoreUnavailable as error:
                live.update(Text(f"✖ {error}", style="red"), refresh=True)
            time.sleep(every_s)


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """A table whose headings are `columns`; those in `right` are numbers."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


@contextmanager
def progress_of(jobs: int, doing: str) -> Iterator[Callable[[int], Any]]:
    """A bar on the terminal for an act that takes a while."""
    if jobs <= MOST_UNSEEN or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=jobs)
        yield lambda n: bar.advance(task, n)


def can_ask() -> bool:
    """Whether somebody sits at a terminal, who can be asked."""
    return sys.stdin.isatty() and on_terminal()


def on_terminal() -> bool:
    return sys.stdout.isatty()


def who() -> str:
    """The person at this machine, for stories and the bypass."""
    import os
    import pwd
    import socket

    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's user without an entry
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"
