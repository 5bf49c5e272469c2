# SPDX-License-Identifier: Apache-2.0
"""`tideover restore`: jobs that failed, expired or were discarded begin anew."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import click

from tideover_worker.cli import acts, output
from tideover_worker.cli.duration import Duration, DurationOrNever

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tideover.ops import ExpiresIn, Restored, RestoredBefore, RestorePreview

COLUMNS = (*acts.JOB_COLUMNS, "ended", "expires_at")
GROUP_COLUMNS = ("jobs", "namespace", "lane", "task", "ended", "tenant", "tag", "first_at", "last_at")
RESTORE = acts.Act("restore", "restored", "be restored", "no dead letters", unasked=20, groups=GROUP_COLUMNS, jobs=COLUMNS)


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
@RESTORE.options
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

    acts.check_ways(jobs, chosen, everything=everything, such_as="--task NAME or --ended expired")
    with output.operator_of(namespaces) as operator:
        filters = ops.DeadFilter(**chosen)
        selection = ops.choose_dead_jobs(operator, jobs) if jobs else ops.choose_dead(operator, filters)
        if dry_run:
            show_preview(ops.preview_restore(selection), as_json=as_json)
            return
        n = len(selection.letters)
        RESTORE.confirm(n, ops.counted(n, "job"), yes=yes)
        expires_in: ExpiresIn = "same" if expires_in_s is None else None if math.isinf(expires_in_s) else expires_in_s
        with output.progress_of(n, "Restoring") as progress:
            done = ops.restore(operator, selection, who=output.who(), why=why, expires_in=expires_in, progress=progress)
    show(done, as_json=as_json)
    if done.unreadable:
        sys.exit(1)


def show_preview(plan: RestorePreview, *, as_json: bool) -> None:
    from tideover.ops import counted

    words = f"Would restore {counted(plan.would_restore, 'job')}. Nothing was changed."
    RESTORE.show_preview(plan, words, left_behind(plan.before, plan.unreadable), as_json=as_json)


def show(done: Restored, *, as_json: bool) -> None:
    from tideover.ops import counted

    nothing_new = done.before and not done.jobs
    words = "" if nothing_new else f"Restored {counted(len(done.jobs), 'job')}. Watch: tideover status --watch"
    RESTORE.show(done, words, left_behind(done.before, done.unreadable), as_json=as_json)


def left_behind(before: Iterable[RestoredBefore], unreadable: int) -> Iterator[str]:
    from tideover.ops import counted

    for job in before:
        now = f"it is {job.state}" if job.end is None else f"it has {job.end}"
        yield f"job {job.id} was restored before; {now}, and is left as it is."
    if unreadable:
        yield f"{counted(unreadable, 'dead letter')} cannot be read here, and stay as they are."
