# SPDX-License-Identifier: Apache-2.0
"""`tideover backlog`: held jobs, never their arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tideover_worker.cli import output

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from tideover.ops import Listing

SHORT_ID = 8
"""Characters of an id that a terminal shows; every command takes them for the whole."""

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
)


@click.command(
    epilog="""\b
Examples:
  tideover backlog                            the 50 most urgent held jobs
  tideover backlog --task tag_ticket          of one task
  tideover backlog --reason failed --limit 5
  tideover backlog --limit 100000 | cut -f1,3,9
"""
)
@click.option("--task", metavar="NAME", help="Only jobs of this task.")
@click.option("--reason", metavar="REASON", help="Only jobs held for this reason: outage, pace or failed.")
@click.option("--limit", type=click.IntRange(0), default=50, show_default=True, help="At most so many jobs.")
@output.namespaces
@output.as_json
def backlog(*, task: str | None, reason: str | None, limit: int, namespaces: tuple[str, ...], as_json: bool) -> None:
    """List held jobs, the most urgent first: those whose expiry, or longest wait, comes first.

    Arguments of jobs are never shown: they hold prompts. Piped, the number of jobs beyond the limit goes to stderr.
    """
    from tideover import ops

    with output.operator_of(namespaces) as operator:
        found = ops.backlog(operator, task=task, reason=reason, limit=limit)
    if as_json:
        output.print_json(found)
    elif output.on_terminal():
        output.print_screen(*screen(found, several=len(found.namespaces) > 1))
    else:
        rows = ([row[name] for name in COLUMNS] for row in map(flat, ops.as_json(found)["jobs"]))
        output.print_lines(COLUMNS, rows)
        if found.more:
            click.echo(beyond(found), err=True)


def flat(job: dict[str, Any]) -> dict[str, Any]:
    return {**job, "waits_for": "|".join(job["waits_for"])}


def beyond(found: Listing) -> str:
    """How many jobs the limit left out."""
    if not found.complete:
        return f"at least {found.more:,} more; there are too many held jobs to look at all of them"
    return f"{found.more:,} more; --limit {found.matching} shows all"


def screen(found: Listing, *, several: bool) -> Iterator[RenderableType]:
    from rich.text import Text

    from tideover.ops import about

    for one in found.namespaces:
        for lane in one.lanes:
            name = f"{one.namespace} {lane.queue}" if several else lane.queue
            yield Text(f"{name}: {lane.queued:,} queued, {lane.running:,} running, {lane.held:,} held", style="dim")
    if not found.jobs:
        yield Text("✔ No such job is held." if found.matching == 0 else beyond(found), style="green")
        return
    columns = ("TASK", "CRITICALITY", "REASON", "WAITS FOR", "HELD", "EXPIRES")
    table = output.table("JOB", *(["NAMESPACE"] if several else []), *columns)
    for job in found.jobs:
        expires = "never" if job.expires_at is None else f"in {about(job.expires_at - found.asked_at)}"
        held, where = about(found.asked_at - job.held_at), ([job.namespace] if several else [])
        waits_for = Text(" or ".join(job.waits_for))
        table.add_row(job.id[:SHORT_ID], *where, job.task, job.criticality, job.reason, waits_for, held, expires)
    yield table
    if found.more:
        yield Text(beyond(found), style="dim")
