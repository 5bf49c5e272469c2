# SPDX-License-Identifier: Apache-2.0
"""`tideover restore`: jobs that failed, expired or were discarded begin anew."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import click

from tideover_worker.cli import dead_screen, output
from tideover_worker.cli.duration import Duration, DurationOrNever

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tideover.ops import DeadSelection, ExpiresIn, Operator, Restored, RestoredBefore, RestorePreview

MOST_UNASKED = 20
"""Jobs that are restored without a question."""

COLUMNS = ("id", "namespace", "task", "lane", "ended", "expires_at")
GROUP_COLUMNS = ("jobs", "namespace", "lane", "task", "ended", "tenant", "tag", "first_at", "last_at")


@click.command(
    epilog="""\b
Examples:
  tideover restore 3f0c7a1e 9b2d4411                 two jobs
  tideover restore --task tag_ticket --ended expired --dry-run
  tideover restore --ended expired --ended-within 3h --yes     what an outage has cost
  tideover restore --task tag_ticket --ended failed --why 'its defect is mended'
  tideover restore 3f0c7a1e --expires-in 2h          or --expires-in never
"""
)
@click.argument("jobs", nargs=-1, metavar="[JOB]...")
@click.option("--task", metavar="NAME", help="Only jobs of this task.")
@click.option("--ended", metavar="HOW", help="Only jobs that ended so: failed, expired or discarded.")
@click.option(
    "--ended-within", "ended_within_s", type=Duration(), metavar="3h", help="Only jobs that ended in the last 3 hours."
)
@click.option("--tenant", metavar="NAME", help="Only jobs of this tenant; '' those of none.")
@click.option("--tag", metavar="TAG", help="Only jobs with this tag; '' those with none.")
@click.option("--all", "everything", is_flag=True, help="All dead letters of the namespace.")
@click.option(
    "--expires-in", "expires_in_s", type=DurationOrNever(), metavar="2h",
    help="Their answers are useful for so long from now on, or never cease to be (never).  [default: as long as when sent]",
)  # fmt: skip
@click.option("--why", metavar="TEXT", help="Stands in the stories of the jobs.")
@click.option("--dry-run", is_flag=True, help="Show how many and which would be restored; change nothing.")
@click.option("--yes", is_flag=True, help=f"Do not ask before more than {MOST_UNASKED} jobs.")
@output.namespaces
@output.as_json
def restore(
    *,
    jobs: tuple[str, ...],
    everything: bool,
    expires_in_s: float | None,
    why: str | None,
    dry_run: bool,
    yes: bool,
    namespaces: tuple[str, ...],
    as_json: bool,
    **chosen: Any,
) -> None:
    """Put dead letters back on their queues: jobs that failed for good, expired or were discarded, for 7 days.

    Each begins anew: the same task and arguments, no attempt spent. Its time until it expires begins anew, too, as long as it
    had when it was sent, and none if it had none; --expires-in says otherwise. Whoever waits for it from now on gets its new
    result. From there on it goes as any job does: in an outage it is held. In the account it is accepted once more. A job that
    was restored before is left as it is. How a job ended is read in its story; one that has none is left out by --ended.

    Exit code 4: a job is no dead letter, or more than 20 jobs and nobody to ask. Exit code 1: nothing is known of a job, or its
    dead letter is gone, or some could not be read.
    """
    from tideover import ops

    filtered = any(value is not None for value in chosen.values())
    if sum((bool(jobs), filtered, everything)) != 1:
        raise click.UsageError("Say which jobs: their ids, or filters such as --task NAME or --ended expired, or --all.")
    with output.operator_of(namespaces) as operator:
        filters = ops.DeadFilter(**chosen)
        selection = ops.choose_dead_jobs(operator, jobs) if jobs else ops.choose_dead(operator, filters)
        if dry_run:
            show_preview(ops.preview_restore(selection), as_json=as_json)
            return
        confirm(selection, yes=yes)
        done = carry_out(operator, selection, why=why, expires_in_s=expires_in_s)
    show(done, as_json=as_json)
    if done.unreadable:
        sys.exit(1)


def confirm(selection: DeadSelection, *, yes: bool) -> None:
    """Asks before many jobs; where nobody can be asked it refuses."""
    from tideover.ops import Refused, counted

    n = len(selection.letters)
    if yes or n <= MOST_UNASKED:
        return
    if not output.can_ask():
        raise Refused(f"this would restore {counted(n, 'job')}, and there is nobody to ask; --yes says that it is meant")
    if not click.confirm(f"Restore {counted(n, 'job')}?", err=True):
        raise Refused("nothing was restored")


def carry_out(operator: Operator, selection: DeadSelection, *, why: str | None, expires_in_s: float | None) -> Restored:
    from tideover import ops

    expires_in: ExpiresIn = "same" if expires_in_s is None else None if math.isinf(expires_in_s) else expires_in_s
    with output.progress_of(len(selection.letters), "Restoring") as progress:
        return ops.restore(operator, selection, who=output.who(), why=why, expires_in=expires_in, progress=progress)


def show_preview(plan: RestorePreview, *, as_json: bool) -> None:
    from tideover.ops import as_json as plain_data
    from tideover.ops import counted

    if as_json:
        output.print_json(plan)
        return
    if output.on_terminal():
        output.print_screen(*dead_screen.of_restore_preview(plan))
    else:
        rows = ([group[name] for name in GROUP_COLUMNS] for group in plain_data(plan)["groups"])
        output.print_lines(GROUP_COLUMNS, rows)
        click.echo(f"Would restore {counted(plan.would_restore, 'job')}. Nothing was changed.", err=True)
    tell_rest(plan.before, plan.unreadable)


def show(done: Restored, *, as_json: bool) -> None:
    from tideover.ops import as_json as plain_data
    from tideover.ops import counted

    if as_json:
        output.print_json(done)
    elif output.on_terminal():
        if done.jobs or not done.before:
            click.echo(f"Restored {counted(len(done.jobs), 'job')}. Watch: tideover status --watch")
    else:
        output.print_lines(COLUMNS, ([job[name] for name in COLUMNS] for job in plain_data(done)["jobs"]))
    if done.gone:
        click.echo(f"{done.gone:,} were no dead letters any more when their turn came.", err=True)
    if done.untold:
        click.echo(f"Redis would not take down the stories of {done.untold:,}; they are restored all the same.", err=True)
    tell_rest(done.before, done.unreadable)


def tell_rest(before: Iterable[RestoredBefore], unreadable: int) -> None:
    from tideover.ops import counted

    for job in before:
        now = f"it is {job.state}" if job.end is None else f"it has {job.end}"
        click.echo(f"job {job.id} was restored before; {now}, and is left as it is.", err=True)
    if unreadable:
        click.echo(f"{counted(unreadable, 'dead letter')} cannot be read here, and stay as they are.", err=True)
