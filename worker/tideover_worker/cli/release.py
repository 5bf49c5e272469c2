# SPDX-License-Identifier: Apache-2.0
"""`tideover release`: held jobs go back to their queues by hand."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from tideover_worker.cli import backlog_screen, output
from tideover_worker.cli.backlog import facets

if TYPE_CHECKING:
    from tideover.ops import Operator, Preview, Release, Selection

MOST_UNASKED = 20
"""Jobs that are released without a question."""

GROUP_COLUMNS = ("jobs", "goes", "namespace", "lane", "task", "criticality", "reason", "waits_for", "tenant", "tag")


@click.command(
    epilog="""\b
Examples:
  tideover release 3f0c7a1e 9b2d4411         two jobs, if their breakers let them run
  tideover release --task tag_ticket --yes   all held jobs of a task, without being asked
  tideover release --tenant acme --waits-for anthropic --dry-run
  tideover release --reason review --task tag_ticket    after its defect is mended
  tideover release 3f0c7a1e --force --why 'customer is on the phone'
"""
)
@click.argument("jobs", nargs=-1, metavar="[JOB]...")
@facets
@click.option("--all", "everything", is_flag=True, help="All held jobs of the namespace.")
@click.option("--force", is_flag=True, help="Run them now, whatever the breakers say; the calls may fail.")
@click.option("--why", metavar="TEXT", help="Stands in the stories of the jobs.")
@click.option("--dry-run", is_flag=True, help="Show how many and which would go; change nothing.")
@click.option("--yes", is_flag=True, help=f"Do not ask before more than {MOST_UNASKED} jobs.")
@output.namespaces
@output.as_json
def release(
    *,
    jobs: tuple[str, ...],
    everything: bool,
    force: bool,
    why: str | None,
    dry_run: bool,
    yes: bool,
    namespaces: tuple[str, ...],
    as_json: bool,
    **chosen: Any,
) -> None:
    """Put held jobs back at the head of their queues, at once and not at the pace.

    Held jobs are released by themselves once a breaker recovers; this is for the exception. Filters may be combined. Jobs that
    come to be held meanwhile are not touched. Those that need review stay unless they are named, or chosen by --reason review:
    look at them and mend what is wrong first. Exit code 4: their breakers would not let them run now (--force does), or more
    than 20 jobs and nobody to ask. Exit code 1: some were released and some had to stay.
    """
    from tideover import ops

    filtered = any(value is not None for value in chosen.values())
    if sum((bool(jobs), filtered, everything)) != 1:
        raise click.UsageError("Say which jobs: their ids, or filters such as --task NAME, or --all.")
    with output.operator_of(namespaces) as operator:
        selection = ops.choose_jobs(operator, jobs) if jobs else ops.choose(operator, ops.Filter(**chosen))
        plan = ops.preview(operator, selection, force=force)
        if dry_run:
            show_preview(plan, as_json=as_json)
            return
        ops.refuse_if_none_may_go(plan)
        confirm(plan, yes=yes)
        done = carry_out(operator, selection, why=why, force=force)
    show(done, as_json=as_json)
    if done.still_held:
        sys.exit(1)


def confirm(plan: Preview, *, yes: bool) -> None:
    """Asks before many jobs; where nobody can be asked it refuses."""
    from tideover.ops import Refused

    if yes or plan.would_go <= MOST_UNASKED:
        return
    what = f"{plan.would_go:,} jobs at once{', whatever their breakers say' if plan.forced else ''}"
    if not output.can_ask():
        raise Refused(f"this would release {what}, and there is nobody to ask; --yes says that it is meant")
    if not click.confirm(f"Release {what}?", err=True):
        raise Refused("nothing was released")


def carry_out(operator: Operator, selection: Selection, *, why: str | None, force: bool) -> Release:
    from tideover import ops

    with output.progress_of(selection.size, "Releasing") as progress:
        return ops.release(operator, selection, who=output.who(), why=why, force=force, progress=progress)


def show_preview(plan: Preview, *, as_json: bool) -> None:
    from tideover.ops import as_json as plain_data

    if as_json:
        output.print_json(plan)
    elif output.on_terminal():
        output.print_screen(*backlog_screen.of_preview(plan))
    else:
        groups = ({**group, "waits_for": "|".join(group["waits_for"])} for group in plain_data(plan)["groups"])
        output.print_lines(GROUP_COLUMNS, ([group[name] for name in GROUP_COLUMNS] for group in groups))
        click.echo(backlog_screen.in_words(plan), err=True)
        tell_left_behind(plan.would_stay, tuple(plan.barred), plan.in_review)


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
    if done.untold:
        click.echo(f"Redis would not take down the stories of {done.untold:,}; they are released all the same.", err=True)
    tell_left_behind(done.still_held, done.still_waiting_for, done.in_review)


def tell_left_behind(held: int, waiting_for: tuple[str, ...], in_review: int) -> None:
    for line in backlog_screen.left_behind(held, waiting_for, in_review):
        click.echo(line, err=True)
