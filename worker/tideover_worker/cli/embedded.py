# SPDX-License-Identifier: Apache-2.0
"""`tideover embedded`: the private Valkey of this directory."""

from __future__ import annotations

import click

from tideover_worker.cli import output
from tideover_worker.cli.config import plain


@click.group()
def embedded() -> None:
    """Look after the private Valkey of this directory.

    `tideover worker --dev` starts it; it goes on when the workers stop, and keeps its data under .tideover.
    """


@embedded.command(
    epilog="""\b
Examples:
  tideover embedded status
  valkey-cli -s $(tideover embedded status --json | jq -r .socket) info memory
"""
)
@output.as_json
def status(*, as_json: bool) -> None:
    """Say whether it runs, where it keeps its data, and its URL."""
    from tideover.settings import embedded_socket, settings
    from tideover_worker.embedded import running

    folder = settings().data_dir
    pid = running(folder)
    show({"running": pid is not None, "pid": pid, "data_dir": str(folder), "socket": str(embedded_socket(folder))}, as_json)


@embedded.command(
    epilog="""\b
Examples:
  tideover embedded stop
"""
)
@output.as_json
def stop(*, as_json: bool) -> None:
    """Stop it; its data stays. Exit code 0 also when it did not run."""
    from tideover.settings import settings
    from tideover_worker.embedded import stop as stop_server

    folder = settings().data_dir
    show({"stopped": stop_server(folder), "data_dir": str(folder)}, as_json)


def show(facts: dict[str, object], as_json: bool) -> None:
    if as_json:
        output.print_json(facts)
    elif output.on_terminal():
        table = output.table("KEY", "VALUE")
        for name, value in facts.items():
            table.add_row(name, plain(value))
        output.print_screen(table)
    else:
        output.print_lines(("key", "value"), facts.items())
