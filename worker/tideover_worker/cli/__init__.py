# SPDX-License-Identifier: Apache-2.0
"""`tideover`: arguments to ops calls, results to tables, TSV or JSON, and exit codes.

A command's module is imported when the command is asked for, and what it needs beyond click when it runs: `--help` is quick.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click

COMMANDS: dict[str, tuple[str, str]] = {
    "status": ("tideover_worker.cli.status", "How things stand: one sentence, then breakers, backlog, workers."),
    "doctor": ("tideover_worker.cli.doctor", "Is it armed? Whether the backlog would drain now; if not, why, and what to do."),
    "backlog": ("tideover_worker.cli.backlog", "List held jobs, and what is queued beside them."),
    "explain": ("tideover_worker.cli.explain", "Tell what happened to a job, where it is, and what would free it."),
    "release": ("tideover_worker.cli.release", "Put held jobs back on their queues now."),
    "discard": ("tideover_worker.cli.discard", "End held jobs; they can be restored for 7 days."),
    "restore": ("tideover_worker.cli.restore", "Put jobs that failed, expired or were discarded back on their queues."),
    "drain": ("tideover_worker.cli.drain", "See how the backlog comes home; pause, cap and resume it."),
    "breaker": ("tideover_worker.cli.breaker", "Why a route is judged as it is; force it open or closed for a while."),
    "routes": ("tideover_worker.cli.routes", "Try out which way a task's jobs go when a provider is in trouble."),
    "bypass": ("tideover_worker.cli.bypass", "Switch tideover off and on: the emergency switch."),
    "worker": ("tideover_worker.cli.worker", "Run worker processes."),
    "embedded": ("tideover_worker.cli.embedded", "Look after the private Valkey of this directory."),
    "config": ("tideover_worker.cli.config", "Look at the settings of this directory and environment."),
    "uninstall": ("tideover_worker.cli.uninstall", "Take tideover out: every job goes back to stock dramatiq."),
    "demo": ("tideover_worker.demo", "The whole story on this machine, in about a minute."),
}
"""Name → module that has the command under this name, and what `tideover --help` says of it."""


class Tideover(click.Group):
    """A group that imports a command when it is asked for, and turns errors into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            near = get_close_matches(cmd_name, COMMANDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {cmd_name!r}.{hint}", ctx)
        command: click.Command = getattr(import_module(COMMANDS[cmd_name][0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, what) for name, (_, what) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            code = exit_code(error)
            if code is None:
                raise
            click.echo(f"tideover: {error}", err=True)
            ctx.exit(code)


def exit_code(error: Exception) -> int | None:
    """The exit code of an error that its message explains; None: a defect, which deserves its stack trace."""
    from tideover.errors import ConfigurationError, StoreUnavailable, TideoverError
    from tideover.ops import Misasked, Refused

    match error:
        case ConfigurationError() | Misasked():
            return 2
        case StoreUnavailable():
            return 3
        case Refused():
            return 4
        case TideoverError():
            return 1
        case _:
            return None


@click.command(
    cls=Tideover,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Output: tables on a terminal; piped, tab-separated lines with a header; with --json one JSON document.
Exit codes:
  0  ok
  1  failed, or jobs are lost
  2  wrong usage or configuration
  3  Redis cannot be reached
  4  refused; the message says why
  6  not armed (`tideover doctor`)
""",
)
@click.version_option(package_name="tideover")
def main() -> None:
    """tideover carries AI jobs over a provider's outage."""
