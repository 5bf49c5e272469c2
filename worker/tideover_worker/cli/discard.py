# SPDX-License-Identifier: Apache-2.0
"""`tideover discard`: held jobs end by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tideover_worker.cli import acts, output
from tideover_worker.cli.backlog import facets
from tideover_worker.cli.backlog_screen import SHORT_ID

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tideover.ops import Discard, DiscardPreview

GROUP_COLUMNS = ("jobs", "namespace", "lane", "task", "criticality", "reason", "waits_for", "tenant", "tag")
DISCARD = acts.Act("discard", "discarded", would="end", gone="not held", unasked=0, groups=GROUP_COLUMNS)


@click.command(
    epilog="""\b
Examples:
  tideover discard 3f0c7a1e --because 'the customer has cancelled'
  tideover discard --task tag_ticket --tag nightly --because 'runs again tonight' --dry-run
  tideover discard --tenant acme --because 'contract ended' --yes      all of a tenant, without being asked
  tideover discard --reason review --task old_task --because 'the task is gone'
  tideover restore 3f0c7a1e                                          after all
"""
)
@facets
@click.option("--all", "everything", is_flag=True, help="All held jobs of the namespace.")
@click.option("--because", metavar="TEXT", required=True, help="Why: for the stories of the jobs, and for who waits for them.")
@DISCARD.options
def discard(
    *,
    jobs: tuple[str, ...],
    everything: bool,
    because: str,
    dry_run: bool,
    yes: bool,
    namespaces: tuple[str, ...],
    as_json: bool,
    **chosen: Any,
) -> None:
    """End held jobs: they will not run, and the account counts them as discarded.

    Who waits for one gets an error that says why. What was to follow it, as the next step of a pipeline, is not sent. It is
    kept as a dead letter: `tideover restore` puts it back within 7 days. Filters may be combined. Jobs that come to be held
    meanwhile are not touched. Those that need review stay unless they are named, or chosen by --reason review. It asks before
    it does anything. Exit code 4: a job is not held, or there is nobody to ask and no --yes.
    """
    from tideover import ops

    acts.check_ways(jobs, chosen, everything=everything)
    if not because.strip():
        raise click.UsageError("--because wants a reason: it is all that those who wait for these jobs will learn.")
    with output.operator_of(namespaces) as operator:
        if jobs:
            selection = ops.choose_jobs(operator, jobs)
        else:
            selection = ops.choose(operator, ops.Filter(**chosen), doing="discarding", done="discarded")
        if dry_run:
            show_preview(ops.preview_discard(selection), as_json=as_json)
            return
        DISCARD.confirm(selection.size, ops.counted(selection.size, "held job"), yes=yes)
        with output.progress_of(selection.size, "Discarding") as progress:
            done = ops.discard(operator, selection, who=output.who(), because=because, progress=progress)
    show(done, as_json=as_json)


def show_preview(plan: DiscardPreview, *, as_json: bool) -> None:
    from tideover.ops import counted

    words = f"Would discard {counted(plan.would_discard, 'job')}. Nothing was changed."
    DISCARD.show_preview(plan, words, left_behind(plan.in_review), as_json=as_json)


def show(done: Discard, *, as_json: bool) -> None:
    from tideover.ops import counted

    n = len(done.jobs)
    job, them = (done.jobs[0].id[:SHORT_ID], "it") if n == 1 else ("JOB...", "them")
    back = f" For 7 days `tideover restore {job}` puts {them} back." if n else ""
    DISCARD.show(done, f"Discarded {counted(n, 'job')}.{back}", left_behind(done.in_review), as_json=as_json)


def left_behind(in_review: int) -> Iterator[str]:
    from tideover.ops import counted

    if in_review:
        yield f"{counted(in_review, 'job')} in need of review stay held; --reason review discards those."
