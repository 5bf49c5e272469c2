# SPDX-License-Identifier: Apache-2.0
"""`tideover backlog`: held jobs, never their arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tideover_worker.cli import backlog_screen, output
from tideover_worker.cli.duration import Duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from tideover.ops import Breakdown, Filter, Operator

COLUMNS = (
    "id",
    "namespace",
    "task",
    "criticality",
    "lane",
    "reason",
    "waits_for",
    "detail",
    "sent_at",
    "held_at",
    "expires_at",
    "release_by_at",
    "tenant",
    "tag",
    "holds",
)


def facets(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that choose held jobs by what groups of them have in common."""
    waits = "Only jobs that wait for this route (anthropic), or for breakers that begin so (anthropic/claude-opus)."
    reason = "Only jobs held for this reason: outage, pace, failed or review (a human must look at them)."
    for decorator in (
        click.option("--tag", metavar="TAG", help="Only jobs with this tag; '' those with none."),
        click.option("--tenant", metavar="NAME", help="Only jobs of this tenant; '' those of none."),
        click.option("--waits-for", metavar="ROUTE", help=waits),
        click.option("--reason", metavar="REASON", help=reason),
        click.option("--task", metavar="NAME", help="Only jobs of this task."),
    ):
        command = decorator(command)
    return command


@click.command(
    epilog="""\b
Examples:
  tideover backlog                            the 50 most urgent held jobs
  tideover backlog --task tag_ticket          of one task
  tideover backlog --reason review            what a human must look at
  tideover backlog --tenant acme --tag nightly
  tideover backlog --waits-for anthropic      what the recovery of a route would free
  tideover backlog --held-for 2h              held for two hours or longer
  tideover backlog --expires-before 15m       what expires within a quarter of an hour
  tideover backlog --by tenant                how many jobs of each tenant
  tideover backlog --limit 500 --json | jq -r .next     then --after what it said
  tideover backlog --limit 100000 | cut -f1,3,9
"""
)
@facets
@click.option("--criticality", metavar="WHICH", help="Only critical or only deferrable jobs.")
@click.option("--held-for", "held_for_s", type=Duration(), metavar="2h", help="Only jobs held for so long or longer.")
@click.option(
    "--expires-before", "expires_before_s", type=Duration(), metavar="15m", help="Only jobs that expire within so long."
)
@click.option("--by", metavar="WHAT", help="Count jobs by task, reason, criticality, tenant, tag or waits-for instead.")
@click.option("--limit", type=click.IntRange(0), help="At most so many jobs.  [default: 50]")
@click.option("--after", metavar="CURSOR", help="Go on where an earlier page ended.")
@output.namespaces
@output.as_json
def backlog(
    *, by: str | None, limit: int | None, after: str | None, namespaces: tuple[str, ...], as_json: bool, **chosen: Any
) -> None:
    """List held jobs, the most urgent first: those whose expiry, or longest wait, comes first.

    Arguments of jobs are never shown: they hold prompts. Filters may be combined. No index knows ages, nor --tenant and --tag
    where there are so many that some share a group, nor --expires-before within the jobs that go by then. These filters look at
    jobs one by one, the 100,000 most urgent (not the newest), and say so when that was not all; the cursor goes on behind
    these, so that all pages together miss none. Piped, the number of jobs beyond the limit, and the cursor, go to stderr.
    """
    from tideover import ops

    if by is not None and not (limit is None and after is None):
        raise click.UsageError("--by counts all jobs; leave out --limit and --after.")
    with output.operator_of(namespaces) as operator:
        if by is not None:
            show_counts(ops.breakdown(operator, by, ops.Filter(**chosen)), as_json=as_json)
        else:
            show_jobs(operator, ops.Filter(**chosen), after, 50 if limit is None else limit, as_json=as_json)


def show_jobs(operator: Operator, chosen: Filter, after: str | None, limit: int, *, as_json: bool) -> None:
    from tideover import ops

    found = ops.backlog(operator, chosen, after=after, limit=limit)
    if as_json:
        output.print_json(found)
    elif output.on_terminal():
        output.print_screen(*backlog_screen.of_jobs(found, first=after is None))
    else:
        rows = ([row[name] for name in COLUMNS] for row in map(flat, ops.as_json(found)["jobs"]))
        output.print_lines(COLUMNS, rows)
        for line in backlog_screen.beyond(found, first=after is None):
            click.echo(line, err=True)


def show_counts(found: Breakdown, *, as_json: bool) -> None:
    if as_json:
        output.print_json(found)
    elif output.on_terminal():
        output.print_screen(*backlog_screen.of_counts(found))
    else:
        output.print_lines((found.by, "jobs", "critical"), ((one.value, one.jobs, one.critical) for one in found.slices))
        for line in backlog_screen.uncounted(found):
            click.echo(line, err=True)


def flat(job: dict[str, Any]) -> dict[str, Any]:
    return {**job, "waits_for": "|".join(job["waits_for"])}
