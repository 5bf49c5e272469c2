# SPDX-License-Identifier: Apache-2.0
"""`tideover discard`: held jobs end by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tideover_worker.cli import dead_screen, output
from tideover_worker.cli.backlog import facets

if TYPE_CHECKING:
    from tideover.ops import Discard, DiscardPreview, Operator, Selection

GROUP_COLUMNS = ("jobs", "namespace", "lane", "task", "criticality", "reason", "waits_for", "tenant", "tag")


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
@click.argument("jobs", nargs=-1, metavar="[JOB]...")
@facets
@click.option("--all", "everything", is_flag=True, help="All held jobs of the namespace.")
@click.option("--because", metavar="TEXT", required=True, help="Why: for the stories of the jobs, and for who waits for them.")
@click.option("--dry-run", is_flag=True, help="Show how many and which would end; change nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output.namespaces
@output.as_json
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

    filtered = any(value is not None for value in chosen.values())
    if sum((bool(jobs), filtered, everything)) != 1:
        raise click.UsageError("Say which jobs: their ids, or filters such as --task NAME, or --all.")
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
        confirm(selection, yes=yes)
        done = carry_out(operator, selection, because)
    show(done, as_json=as_json)


def confirm(selection: Selection, *, yes: bool) -> None:
    """Asks, also before a single job; where nobody can be asked it refuses."""
    from tideover.ops import Refused, counted

    if yes:
        return
    what = counted(selection.size, "held job")
    if not output.can_ask():
        raise Refused(f"this would discard {what}, and there is nobody to ask; --yes says that it is meant")
    if not click.confirm(f"Discard {what}?", err=True):
        raise Refused("nothing was discarded")


def carry_out(operator: Operator, selection: Selection, because: str) -> Discard:
    from tideover import ops

    with output.progress_of(selection.size, "Discarding") as progress:
        return ops.discard(operator, selection, who=output.who(), because=because, progress=progress)


def show_preview(plan: DiscardPreview, *, as_json: bool) -> None:
    from tideover.ops import as_json as plain_data
    from tideover.ops import counted

    if as_json:
        output.print_json(plan)
        return
    if output.on_terminal():
        output.print_screen(*dead_screen.of_discard_preview(plan))
    else:
        groups = ({**group, "waits_for": "|".join(group["waits_for"])} for group in plain_data(plan)["groups"])
        output.print_lines(GROUP_COLUMNS, ([group[name] for name in GROUP_COLUMNS] for group in groups))
        click.echo(f"Would discard {counted(plan.would_discard, 'job')}. Nothing was changed.", err=True)
    tell_left_behind(plan.in_review)


def show(done: Discard, *, as_json: bool) -> None:
    from tideover.ops import counted

    if as_json:
        output.print_json(done)
    elif output.on_terminal():
        job = done.jobs[0].id[: dead_screen.SHORT_ID] if len(done.jobs) == 1 else "JOB..."
        back = f" For 7 days `tideover restore {job}` puts {'it' if len(done.jobs) == 1 else 'them'} back."
        click.echo(f"Discarded {counted(len(done.jobs), 'job')}.{back if done.jobs else ''}")
    else:
        rows = ((job.id, job.namespace, job.task, job.lane) for job in done.jobs)
        output.print_lines(("id", "namespace", "task", "lane"), rows)
    if done.gone:
        click.echo(f"{done.gone:,} were not held any more when their turn came.", err=True)
    if done.untold:
        click.echo(f"Redis would not take down the stories of {done.untold:,}; they are discarded all the same.", err=True)
    tell_left_behind(done.in_review)


def tell_left_behind(in_review: int) -> None:
    from tideover.ops import counted

    if in_review:
        click.echo(f"{counted(in_review, 'job')} in need of review stay held; --reason review discards those.", err=True)
