# SPDX-License-Identifier: Apache-2.0
"""What `tideover release`, `discard` and `restore` share: their options, the question beforehand, and what they tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import click

from tideover_worker.cli import output
from tideover_worker.cli.backlog_screen import MOST_GROUPS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from rich.console import RenderableType

    from tideover.ops import Discard, DiscardPreview, Preview, Release, Restored, RestorePreview

    AnyPreview = Preview | DiscardPreview | RestorePreview

JOB_COLUMNS = ("id", "namespace", "task", "lane")


class Act(NamedTuple):
    """What is done to chosen jobs, in words.

    `would`: what becomes of them. `gone`: what those are not any more that came too late. `unasked`: so many need no question.
    `groups`, `jobs`: the columns of a preview and of what was done.
    """

    verb: str
    done: str
    would: str
    gone: str
    unasked: int
    groups: Sequence[str]
    jobs: Sequence[str] = JOB_COLUMNS

    def options(self, command: Callable[..., Any]) -> Callable[..., Any]:
        """The ids of jobs, and the options of every act."""
        when = f" before more than {self.unasked} jobs" if self.unasked else ""
        for decorator in (
            output.as_json,
            output.namespaces,
            click.option("--yes", is_flag=True, help=f"Do not ask{when}."),
            click.option("--dry-run", is_flag=True, help=f"Show how many and which would {self.would}; change nothing."),
            click.argument("jobs", nargs=-1, metavar="[JOB]..."),
        ):
            command = decorator(command)
        return command

    def confirm(self, n: int, what: str, *, yes: bool) -> None:
        """Asks, unless it is about few jobs; where nobody can be asked it refuses."""
        from tideover.ops import Refused

        if yes or n <= self.unasked:
            return
        if not output.can_ask():
            raise Refused(f"this would {self.verb} {what}, and there is nobody to ask; --yes says that it is meant")
        if not click.confirm(f"{self.verb.capitalize()} {what}?", err=True):
            raise Refused(f"nothing was {self.done}")

    def show(self, done: Release | Discard | Restored, words: str, rest: Iterable[str], *, as_json: bool) -> None:
        """What was done: `words` on a terminal, else the jobs; then what is left, and why."""
        if as_json:
            output.print_json(done)
        elif not output.on_terminal():
            output.print_lines(self.jobs, lines_of(done.jobs, self.jobs))
        elif words:
            click.echo(words)
        if done.gone:
            tell([f"{done.gone:,} were {self.gone} any more when their turn came."])
        if done.untold:
            tell([f"Redis would not take down the stories of {done.untold:,}; they are {self.done} all the same."])
        tell(rest)

    def show_preview(
        self,
        plan: AnyPreview,
        words: str,
        rest: Iterable[str],
        screen: Iterable[RenderableType] | None = None,
        *,
        as_json: bool,
    ) -> None:
        """What would be done: `screen`, or groups of jobs below `words`; then what would be left, and why."""
        if as_json:
            output.print_json(plan)
            return
        if output.on_terminal():
            output.print_screen(*(screen_of(words, plan.groups, self.groups) if screen is None else screen))
        else:
            output.print_lines(self.groups, lines_of(plan.groups, self.groups))
            tell([words])
        tell(rest)


def check_ways(jobs: Sequence[str], chosen: Mapping[str, Any], *, everything: bool, such_as: str = "--task NAME") -> None:
    """Jobs are chosen in one way: by their ids, or by filters, or all."""
    if sum((bool(jobs), any(value is not None for value in chosen.values()), everything)) != 1:
        raise click.UsageError(f"Say which jobs: their ids, or filters such as {such_as}, or --all.")


def lines_of(parts: Sequence[object], columns: Sequence[str]) -> Iterator[Sequence[object]]:
    from tideover.ops import as_json as plain_data

    for row in plain_data(parts):
        yield ["|".join(value) if isinstance(value := row[name], list) else value for name in columns]


def screen_of(words: str, groups: Sequence[object], columns: Sequence[str]) -> Iterator[RenderableType]:
    """A table of groups of jobs below `words`: not all columns, and tenants and tags only where there are some."""
    from rich.text import Text

    yield Text(words, style="bold")
    if not groups:
        return
    rare = [name for name in ("tenant", "tag") if not any(getattr(group, name) for group in groups)]
    shown = [name for name in columns if name not in ("namespace", "lane", *rare)]
    table = output.table(*(name.removesuffix("_at").replace("_", " ").upper() for name in shown), right=("JOBS",))
    for group in groups[:MOST_GROUPS]:
        table.add_row(*(Text(cell(name, getattr(group, name))) for name in shown))
    yield table
    if len(groups) > MOST_GROUPS:
        yield Text(f"and {len(groups) - MOST_GROUPS:,} more groups; --json shows all", style="dim")


def cell(name: str, value: Any) -> str:
    """What a terminal shows of a group."""
    from tideover.ops import iso

    match name:
        case "jobs":
            return f"{value:,}"
        case "waits_for":
            return " or ".join(value) or "a human"
        case "ended":
            return value or "(not written down)"
        case "first_at" | "last_at":
            return iso(value)[:19].replace("T", " ")
        case _:
            return str(value)


def tell(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line, err=True)
