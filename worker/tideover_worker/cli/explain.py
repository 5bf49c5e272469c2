# SPDX-License-Identifier: Apache-2.0
"""`tideover explain`: one job's story."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from tideover_worker.cli import output

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from tideover.ops import Explanation

LOOKS = {
    "queued": ("●", "cyan"),
    "running": ("●", "cyan"),
    "held": ("▲", "yellow"),
    "expired": ("■", "yellow"),
    "discarded": ("■", "yellow"),
    "failed": ("✖", "red"),
    "succeeded": ("✔", "green"),
    "ended": ("■", "bold"),
    "lost": ("✖", "bold red"),
}

OVERDUE = "no worker has reached it; once one does it ends as expired, and no call is made"


@click.command(
    epilog="""\b
Examples:
  tideover explain 3f0c7a1e          the first characters of an id are enough, 6 at least
  tideover explain 3f0c7a1e --json | jq -r '.ways[].words'
"""
)
@click.argument("job")
@output.namespaces
@output.as_json
def explain(*, job: str, namespaces: tuple[str, ...], as_json: bool) -> None:
    """Tell what happened to a job, where it is now and why, what would free it and when that is expected.

    Stories are kept for 7 days, for jobs that were held, rerouted, expired, discarded or failed. A queued job is found by its
    whole id; past its expiry it is overdue: it ends as expired once a worker reaches it, and no call is made. Exit code 1:
    nothing is known of it. Piped, each line is an instant, an event and what it says.
    """
    from tideover import ops

    with output.operator_of(namespaces) as operator:
        found = ops.explain(operator, job)
    if as_json:
        output.print_json(found)
    elif output.on_terminal():
        output.print_screen(*screen(found))
    else:
        output.print_lines(("at", "event", "words"), lines(found))


def lines(found: Explanation) -> Iterator[tuple[object, ...]]:
    """The story, then how things are now, then what is expected."""
    from tideover.ops import iso

    for told in found.story:
        yield iso(told.told_at), told.event, told.words
    yield iso(found.asked_at), "now", " ".join(now_words(found))
    yield from (("", name, value) for name, value in whose(found) if value)
    for way in found.ways:
        yield "" if way.expected_at is None else iso(way.expected_at), "expected", f"{way.breaker} {way.words}"
    if found.overdue:
        yield "", "overdue", OVERDUE
    if found.remedy is not None:
        yield "", "remedy", found.remedy
    if found.restorable:
        yield "", "restorable", f"tideover restore {found.id}"
    for hindrance in found.hindrances:
        yield "", "hindrance", hindrance
    if found.expires_at is not None:
        yield iso(found.expires_at), "expires", "no call is made after that"


def now_words(found: Explanation) -> Iterator[str]:
    """Where the job is, in a few words."""
    from tideover.ops import about

    yield found.state if found.end is None else found.end
    if found.overdue:
        yield "and overdue"
    if found.since_at is not None:
        since = about(found.asked_at - found.since_at)
        yield f"for {since}" if found.end is None else f"{since} ago"
    if found.reason is not None:
        yield f"(reason {found.reason})"
    if found.state == "ended" and found.end is None:
        yield "(nobody wrote down how)"
    if found.lane is not None:
        yield f"in {found.lane}"
    if found.holds is not None and found.holds > 1:
        yield f"(held {found.holds} times so far)"


def expiry(found: Explanation, expires_at: float) -> tuple[str, str]:
    """What is to be said of a live job's expiry, and in which style."""
    from tideover.ops import about

    if found.overdue:
        return f"Overdue: its expiry passed {about(found.asked_at - expires_at)} ago, and {OVERDUE}.", "yellow"
    if expires_at <= found.asked_at:
        return f"Its expiry passed {about(found.asked_at - expires_at)} ago; no call is made after that.", "yellow"
    return f"Expires in {about(expires_at - found.asked_at)}; no call is made after that.", ""


def whose(found: Explanation) -> tuple[tuple[str, str | None], ...]:
    return ("tenant", found.tenant), ("tag", found.tag)


def screen(found: Explanation) -> Iterator[RenderableType]:
    from rich.text import Text

    from tideover.ops import iso

    symbol, style = LOOKS.get(found.end or found.state, LOOKS["ended"])
    owners = (f"{name} {value}" for name, value in whose(found) if value)
    what = ", ".join(part for part in (found.task, found.criticality, found.namespace, *owners) if part is not None)
    yield Text.assemble((f"{symbol} {' '.join(now_words(found))}", style), f"\n  job {found.id} ({what})\n")
    for told in found.story:
        yield Text.assemble((f"  {iso(told.told_at)[:19].replace('T', ' ')}  ", "dim"), told.words)
    if found.ways:
        yield Text("\nWhat frees it" + (", whichever comes first:" if len(found.ways) > 1 else ":"), style="bold")
    for way in found.ways:
        yield Text(f"  {way.breaker} {way.words}")
    for hindrance in found.hindrances:
        yield Text(f"  ! {hindrance}", style="red")
    if found.expires_at is not None:
        yield Text(*expiry(found, found.expires_at))
    if found.remedy is not None:
        yield Text(f"\n{found.remedy}.", style="yellow")
    elif found.state == "held":
        yield Text(f"Run it now, whatever the breakers say: tideover release {found.id} --force", style="dim")
    elif found.restorable:
        yield Text(f"Let it begin anew: tideover restore {found.id}", style="dim")
