# SPDX-License-Identifier: Apache-2.0
"""What `tideover discard --dry-run` and `tideover restore --dry-run` show on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tideover_worker.cli import output
from tideover_worker.cli.backlog_screen import MOST_GROUPS, SHORT_ID

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType

    from tideover.ops import DiscardPreview, RestorePreview

__all__ = ["SHORT_ID", "of_discard_preview", "of_restore_preview"]


def of_discard_preview(found: DiscardPreview) -> Iterator[RenderableType]:
    from rich.text import Text

    from tideover.ops import counted

    yield Text(f"Would discard {counted(found.would_discard, 'job')}. Nothing was changed.", style="bold")
    more = whose(found.groups)
    table = output.table("JOBS", "TASK", "CRITICALITY", "REASON", "WAITS FOR", *map(str.upper, more), right=("JOBS",))
    for group in found.groups[:MOST_GROUPS]:
        values = (group.task, group.criticality, group.reason, " or ".join(group.waits_for) or "a human")
        table.add_row(f"{group.jobs:,}", *(Text(value) for value in (*values, *(getattr(group, name) for name in more))))
    yield table
    yield from beyond(len(found.groups))


def of_restore_preview(found: RestorePreview) -> Iterator[RenderableType]:
    from rich.text import Text

    from tideover.ops import counted, iso

    yield Text(f"Would restore {counted(found.would_restore, 'job')}. Nothing was changed.", style="bold")
    if not found.groups:
        return
    more = whose(found.groups)
    table = output.table("JOBS", "TASK", "ENDED", *map(str.upper, more), "FIRST", "LAST", right=("JOBS",))
    for group in found.groups[:MOST_GROUPS]:
        values = (group.task, group.ended or "(not written down)", *(getattr(group, name) for name in more))
        ended = (iso(at)[:19].replace("T", " ") for at in (group.first_at, group.last_at))
        table.add_row(f"{group.jobs:,}", *(Text(value) for value in (*values, *ended)))
    yield table
    yield from beyond(len(found.groups))


def whose(groups: Sequence[object]) -> list[str]:
    """Tenants and tags only where there are some."""
    return [name for name in ("tenant", "tag") if any(getattr(group, name) for group in groups)]


def beyond(groups: int) -> Iterator[RenderableType]:
    from rich.text import Text

    if groups > MOST_GROUPS:
        yield Text(f"and {groups - MOST_GROUPS:,} more groups; --json shows all", style="dim")
