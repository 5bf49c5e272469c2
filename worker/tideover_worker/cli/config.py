# SPDX-License-Identifier: Apache-2.0
"""`tideover config`: what the settings are, and where each of them was written."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

import click

Explained = Mapping[str, tuple[object, str]]
"""Dotted key → (value, origin)."""


@click.group()
def config() -> None:
    """Look at the settings of this directory and environment."""


@config.command(
    epilog="""\b
Examples:
  tideover config show                          every setting, its value and where it was written
  tideover config show | grep -v 'default$'     only what somebody set
  tideover config show --json | jq '."breaker.settle_s"'
"""
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: key, then value and origin.")
def show(*, as_json: bool) -> None:
    """Show the settings that count here, with their origin.

    Passwords are masked. Piped, each line is key, value and origin, separated by tabs; a value that is not set is
    empty. Exit code 2: the settings are wrong; the message says which and why.
    """
    from tideover.errors import ConfigurationError  # pydantic would slow every `--help` down
    from tideover.settings import explain_settings, settings

    try:
        explained = explain_settings(settings())
    except ConfigurationError as error:
        click.echo(f"tideover: {error}", err=True)
        sys.exit(2)
    if as_json:
        click.echo(as_object(explained))
    elif sys.stdout.isatty():
        print_table(explained)
    else:
        click.echo(as_lines(explained))


def as_object(explained: Explained) -> str:
    return json.dumps({key: {"value": value, "origin": origin} for key, (value, origin) in explained.items()}, indent=2)


def as_lines(explained: Explained) -> str:
    return "\n".join(f"{key}\t{plain(value)}\t{origin}" for key, (value, origin) in explained.items())


def print_table(explained: Explained) -> None:
    from rich.console import Console  # loaded for a terminal only
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("key", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("origin", overflow="fold")
    for key, (value, origin) in explained.items():
        table.add_row(Text(key), Text(plain(value)), Text(origin), style="dim" if origin == "default" else "")
    Console().print(table)


def plain(value: object) -> str:
    """A value as text: nothing for None, JSON for a table."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
