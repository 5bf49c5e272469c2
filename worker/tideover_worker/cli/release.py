# SPDX-License-Identifier: Apache-2.0
"""`tideover release`: held jobs go back to their queues by hand."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from tideover_worker.cli import output

if TYPE_CHECKING:
    from tideover.ops import Release, Selection

MOST_UNASKED = 20
"""Jobs that are released without a question."""


@click.command(
    epilog="""\b
Examples:
  tideover release 3f0c7a1e 9b2d4411         two jobs, if their breakers let them run
  tideover release --task tag_ticket --yes   all held jobs of a task, without being asked
  tideover release 3f0c7a1e --force --reason 'customer is on the phone'
"""
)
@click.argument("jobs", nargs=-1, metavar="[JOB]...")
@click.option("--task", metavar="NAME", help="All held jobs of this task.")
@click.option("--all", "everything", is_flag=True, help="All held jobs of the namespace.")
@click.option("--force", is_flag=True, help="Run them now, whatever the breakers say; the calls may fail.")
@click.option("--reason", "why", metavar="TEXT", help="Stands in the stories of the jobs.")
@click.option("--yes", is_flag=True, help=f"Do not ask before more than {MOST_UNASKED} jobs.")
@output.namespaces
@output.as_json
def release(
    *,
    jobs: tuple[str, ...],
    task: str | None,
    everything: bool,
    force: bool,
    why: str | None,
    yes: bool,
    namespaces: tuple[str, ...],
    as_json: bool,
) -> None:
    """Put held jobs back at the head of their queues, at once and not at the pace.

    Held jobs are released by themselves once a breaker recovers; this is for the exception. Jobs that come to be held
    meanwhile are not touched. Exit code 4: their breakers would not let them run now (--force does), or more than 20 jobs
    and nobody to ask. Exit code 1: some were released and some had to stay.
    """
    from tideover import ops

    if sum((bool(jobs), task is not None, everything)) != 1:
        raise click.UsageError("Say which jobs: their ids, or --task NAME, or --all.")
    with output.operator_of(namespaces) as operator:
        selection = ops.choose_jobs(operator, jobs) if jobs else ops.choose_all(operator, task)
        ops.permits(operator, selection, force=force)
        confirm(selection, yes=yes, force=force)
        done = ops.release(operator, selection, who=output.who(), why=why, force=force)
    show(done, as_json=as_json)
    if done.still_held:
        sys.exit(1)


def confirm(selection: Selection, *, yes: bool, force: bool) -> None:
    """Asks before many jobs; where nobody can be asked it refuses."""
    from tideover.ops import Refused

    if yes or selection.size <= MOST_UNASKED:
        return
    what = f"{selection.size:,} jobs at once{', whatever their breakers say' if force else ''}"
    if not (sys.stdin.isatty() and output.on_terminal()):
        raise Refused(f"this would release {what}, and there is nobody to ask; --yes says that it is meant")
    if not click.confirm(f"Release {what}?", err=True):
        raise Refused("nothing was released")


def show(done: Release, *, as_json: bool) -> None:
    from tideover.ops import counted

    if as_json:
        output.print_json(done)
    elif output.on_terminal():
        what = f"{counted(len(done.jobs), 'job')}{' by force' if done.forced else ''}"
        click.echo(f"Released {what}. Watch: tideover status --watch")
    else:
        rows = ((job.id, job.namespace, job.task, job.lane) for job in done.jobs)
        output.print_lines(("id", "namespace", "task", "lane"), rows)
    if done.gone:
        click.echo(f"{done.gone:,} were not held any more when their turn came.", err=True)
    if done.still_held:
        keys = ", ".join(done.still_waiting_for)
        click.echo(f"{done.still_held:,} stay held, because {keys} lets nothing run now; --force releases them, too.", err=True)
