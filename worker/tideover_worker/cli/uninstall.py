# SPDX-License-Identifier: Apache-2.0
"""`tideover uninstall`: every job goes back to where stock dramatiq looks for it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from tideover_worker.cli import output

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tideover.ops import Operator
    from tideover.ops.uninstall import Plan, Removed


@click.command(
    epilog="""\b
Examples:
  tideover uninstall --dry-run         what it would do
  tideover uninstall                   asks, then does it
  tideover uninstall -n shop --yes --json
"""
)
@click.option("--dry-run", is_flag=True, help="Only say what there is to do.")
@click.option("--force", is_flag=True, help="Go on though workers with tideover seem to be alive: they are gone.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output.namespaces
@output.as_json
def uninstall(*, dry_run: bool, force: bool, yes: bool, namespaces: tuple[str, ...], as_json: bool) -> None:
    """Take tideover out of a namespace, so that stock dramatiq runs every job.

    Held jobs go back to their queues, jobs of critical lanes to the head of theirs, and what dead workers had fetched is
    recovered. Then every key of tideover is deleted: the account, stories, breakers. dramatiq's keys and the results of jobs
    stay. Stop producers and workers with tideover first. When it was interrupted, run it again.

    Exit code 4: workers with tideover are alive, or there is nobody to ask. Exit code 1: some bodies could not be read.
    """
    from tideover.ops import Refused
    from tideover.ops import uninstall as way_out

    with output.operator_of(namespaces) as operator:
        planned = way_out.plan(operator)
        if dry_run:
            show_plan(planned, as_json=as_json)
            return
        if planned.workers and not force:
            raise Refused(way_out.refusal(planned.workers))
        confirm(planned, yes=yes)
        done = remove(operator, planned, force=force)
    show(done, as_json=as_json)
    if done.unreadable:
        sys.exit(1)


def remove(operator: Operator, planned: Plan, *, force: bool) -> Removed:
    """Does it, with a bar on a terminal."""
    from tideover.ops import uninstall as way_out

    with click.progressbar(length=planned.steps, label="Uninstalling", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        return way_out.uninstall(operator, force=force, tell=bar.update)


def confirm(planned: Plan, *, yes: bool) -> None:
    from tideover.ops import Refused

    if yes:
        return
    if not (sys.stdin.isatty() and output.on_terminal()):
        raise Refused("this would take tideover out, and there is nobody to ask; --yes says that it is meant")
    what = f"{planned.held:,} held, {planned.critical:,} in critical lanes, {planned.fetched:,} of dead workers"
    if not click.confirm(f"Take tideover out of namespace {planned.namespace}? Jobs to move: {what}", err=True):
        raise Refused("nothing was changed")


def show_plan(planned: Plan, *, as_json: bool) -> None:
    from tideover import ops

    if as_json:
        output.print_json({"dry_run": True, "plan": planned})
        return
    show_row({**ops.as_json(planned), "workers": len(planned.workers)})
    for worker in planned.workers:
        click.echo(f"Stop it first: the worker with {worker}", err=True)


def show(done: Removed, *, as_json: bool) -> None:
    from tideover import ops

    if as_json:
        output.print_json({"dry_run": False, "removed": done})
    else:
        show_row(ops.as_json(done))
    if done.unreadable:
        click.echo(
            f"{done.unreadable:,} jobs stay in critical lanes, because their bodies are no JSON. A stock worker runs them that "
            'declares the lane as a queue: broker.declare_queue("default.critical")',
            err=True,
        )


def show_row(row: Mapping[str, object]) -> None:
    """A line for each number on a terminal, else one row with a header."""
    if output.on_terminal():
        for name, value in row.items():
            click.echo(f"{name.replace('_', ' ')}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
    else:
        output.print_lines(list(row), [list(row.values())])
