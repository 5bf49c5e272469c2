# SPDX-License-Identifier: Apache-2.0
"""What `tideover backlog` and `tideover release --dry-run` show on a terminal, and what they say of the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tideover_worker.cli import output

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from tideover.ops import Breakdown, HeldJob, Listing, Preview

SHORT_ID = 8
"""Characters of an id that a terminal shows; every command takes them for the whole."""
MOST_GROUPS = 30
"""Groups of a preview that a terminal shows."""


def of_jobs(found: Listing, *, first: bool) -> Iterator[RenderableType]:
    from rich.text import Text

    several = len(found.namespaces) > 1
    for one in found.namespaces:
        for lane in one.lanes:
            name = f"{one.namespace} {lane.queue}" if several else lane.queue
            yield Text(f"{name}: {lane.queued:,} queued, {lane.running:,} running, {lane.held:,} held", style="dim")
    if found.jobs:
        yield table_of(found, several=several)
    elif found.next is None and not found.matching:
        yield Text("✔ No such job is held.", style="green")
    for line in beyond(found, first=first):
        yield Text(line, style="dim")


def table_of(found: Listing, *, several: bool) -> Table:
    """The jobs of a page; namespaces, tenants and tags only where there are some."""
    from rich.text import Text

    from tideover.ops import about

    more = [name for name in ("tenant", "tag") if any(getattr(job, name) for job in found.jobs)]
    columns = ("TASK", "CRITICALITY", "REASON", "WAITS FOR", *map(str.upper, more), "HELD", "EXPIRES")
    table = output.table("JOB", *(["NAMESPACE"] if several else []), *columns)
    for job in found.jobs:
        expires = "never" if job.expires_at is None else f"in {about(job.expires_at - found.asked_at)}"
        where = [job.namespace] if several else []
        values = (job.task, job.criticality, job.reason, waits_for(job), *(getattr(job, name) for name in more))
        held = about(found.asked_at - job.held_at)
        table.add_row(*(Text(value) for value in (job.id[:SHORT_ID], *where, *values, held, expires)))
    return table


def waits_for(job: HeldJob) -> str:
    """The breakers that free a job, or why a human must."""
    return " or ".join(job.waits_for) or job.detail


def beyond(found: Listing, *, first: bool) -> Iterator[str]:
    """What is not on this page, and how to get there."""
    if found.gave_up:
        yield stopped(found.looked_at, first=first)
    if found.next is not None:
        left = f"{found.matching - len(found.jobs):,} more" if first and found.complete else "there may be more"
        yield f"{left}; --after {found.next} goes on"
    elif not found.jobs and found.matching:
        yield f"{found.matching:,} match"


def of_counts(found: Breakdown) -> Iterator[RenderableType]:
    from rich.text import Text

    if not found.slices:
        yield Text("✔ No such job is held.", style="green")
        return
    table = output.table(found.by.upper().replace("-", " "), "JOBS", "CRITICAL", right=("JOBS", "CRITICAL"))
    nothing = "a human" if found.by == "waits-for" else "(none)"
    for one in found.slices:
        value = one.value.replace("|", " or ") if found.by == "waits-for" else one.value
        name = Text(f"{value} (several)") if one.shared else Text(value or nothing, "" if value else "dim")
        table.add_row(name, f"{one.jobs:,}", f"{one.critical:,}")
    table.add_section()
    table.add_row(Text("all", "bold"), f"{found.jobs:,}", f"{sum(one.critical for one in found.slices):,}")
    yield table
    for line in uncounted(found):
        yield Text(line, style="dim")


def uncounted(found: Breakdown) -> Iterator[str]:
    if not found.complete:
        yield stopped(found.looked_at, first=True)


def stopped(looked_at: int, *, first: bool) -> str:
    """What a filter without an index has looked at: the jobs that go first, not those that were held last."""
    which = "most urgent" if first else "next most urgent"
    return f"looked at the {looked_at:,} {which} held jobs one by one and stopped there; less urgent ones may match, too"


def of_preview(found: Preview) -> Iterator[RenderableType]:
    from rich.text import Text

    yield Text(in_words(found), style="bold")
    more = [name for name in ("tenant", "tag") if any(getattr(group, name) for group in found.groups)]
    table = output.table("JOBS", "TASK", "CRITICALITY", "REASON", "WAITS FOR", *map(str.upper, more), "", right=("JOBS",))
    for group in found.groups[:MOST_GROUPS]:
        values = (group.task, group.criticality, group.reason, " or ".join(group.waits_for))
        whose = (getattr(group, name) for name in more)
        goes = ("✔ would go", "green") if group.goes else ("▲ would stay", "yellow")
        table.add_row(f"{group.jobs:,}", *(Text(value) for value in (*values, *whose)), Text(*goes))
    yield table
    if len(found.groups) > MOST_GROUPS:
        yield Text(f"and {len(found.groups) - MOST_GROUPS:,} more groups; --json shows all", style="dim")
    for line in left_behind(found.would_stay, tuple(found.barred), found.in_review):
        yield Text(line, style="dim")


def in_words(found: Preview) -> str:
    from tideover.ops import counted

    force = ", whatever their breakers say" if found.forced else ""
    return f"Would release {counted(found.would_go, 'job')}{force}. Nothing was changed."


def left_behind(held: int, waiting_for: Sequence[str], in_review: int) -> Iterator[str]:
    """What a release does not touch, and how to release that, too."""
    from tideover.ops import counted

    if held:
        keys = ", ".join(waiting_for)
        yield f"{held:,} stay held, because {keys} lets nothing run now; --force releases them, too."
    if in_review:
        yield f"{counted(in_review, 'job')} in need of review stay held; --reason review releases those."
