# SPDX-License-Identifier: Apache-2.0
"""`tideover release`: held jobs go back to their queues by hand."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from tideover_worker.cli import acts, backlog_screen, output
from tideover_worker.cli.backlog import facets

if TYPE_CHECKING:
    from tideover.ops import Preview, Release

GROUP_COLUMNS = ("jobs", "goes", "namespace", "lane", "task", "criticality", "reason", "waits_for", "tenant", "tag")
RELEASE = acts.Act("release", "released", would="go", gone="not held", unasked=20, groups=GROUP_COLUMNS)


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
@facets
@click.option("--all", "everything", is_flag=True, help="All held jobs of the namespace.")
@click.option("--force", is_flag=True, help="Run them now, whatever the breakers say; the calls may fail.")
@click.option("--why", metavar="TEXT", help="Stands in the stories of the jobs.")
@RELEASE.options
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

    acts.check_ways(jobs, chosen, everything=everything)
    with output.operator_of(namespaces) as operator:
        selection = ops.choose_jobs(operator, jobs) if jobs else ops.choose(operator, ops.Filter(**chosen))
        plan = ops.preview(operator, selection, force=force)
        if dry_run:
            show_preview(plan, as_json=as_json)
            return
        ops.refuse_if_none_may_go(plan)
        at_once = f"{plan.would_go:,} jobs at once{', whatever their breakers say' if force else ''}"
        RELEASE.confirm(plan.would_go, at_once, yes=yes)
        with output.progress_of(selection.size, "Releasing") as progress:
            done = ops.release(operator, selection, who=output.who(), why=why, force=force, progress=progress)
    show(done, as_json=as_json)
    if done.still_held:
        sys.exit(1)


def show_preview(plan: Preview, *, as_json: bool) -> None:
    rest = () if output.on_terminal() else backlog_screen.left_behind(plan.would_stay, tuple(plan.barred), plan.in_review)
    RELEASE.show_preview(plan, backlog_screen.in_words(plan), rest, backlog_screen.of_preview(plan), as_json=as_json)


def show(done: Release, *, as_json: bool) -> None:
    from tideover.ops import counted

    what = f"{counted(len(done.jobs), 'job')}{' by force' if done.forced else ''}"
    rest = backlog_screen.left_behind(done.still_held, done.still_waiting_for, done.in_review)
    RELEASE.show(done, f"Released {what}. Watch: tideover status --watch", rest, as_json=as_json)
