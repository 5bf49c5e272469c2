# SPDX-License-Identifier: Apache-2.0
"""`tideover drain`: how the backlog comes home, and an operator's word over its pace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from tideover_worker.cli import output
from tideover_worker.cli.duration import Duration

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tideover.ops import Drains, DrainStatus, Operator, Order

ALL = "*"
COLUMNS = (
    "namespace", "key", "state", "held", "released", "most", "pace", "rate", "limited_by", "soonest_at", "latest_at",
    "will_miss",
)  # fmt: skip
LIMITS = {
    "open": "the breaker is open",
    "suspect": "the route is suspect",
    "quiet": "the provider asked for quiet",
    "flapping": "the route opened often",
    "ramp": "still gathering speed",
    "congestion": "the provider bears no more",
    "provider limit": "the provider's limit",
    "token limit": "the provider's limit of tokens",
    "own cap": "your own cap",
    "workers": "no worker has room for more",
    "paused": "paused",
}
key_argument = click.argument("key", metavar="[KEY]", default=ALL)
for_option = click.option(
    "--for", "for_s", type=Duration(), metavar="30m", help="Ends by itself after this long; else it stays."
)
why_option = click.option("--because", "--reason", "why", required=True, metavar="TEXT", help="Shown by `drain status`.")


@click.group()
def drain() -> None:
    """See how the backlog comes home, and slow it down or stop it.

    KEY is a breaker, as ROUTE/MODEL; without one it is all of them. What is computed goes on beneath an operator's word.
    """


@drain.command(
    epilog="""\b
Examples:
  tideover drain status
  tideover drain status --watch             again every 2 seconds, until Ctrl-C
  tideover drain status --json | jq '.drains[] | {key, held, limited_by}'
"""
)
@output.watch_s
@output.namespaces
@output.as_json
def status(*, watch_s: float | None, namespaces: tuple[str, ...], as_json: bool) -> None:
    """How fast held jobs go back, what keeps that from being faster, when the last one goes, and how many come too late.

    A job that waits for several breakers counts for each of them. The end is a range: it moves with the provider.
    """
    from tideover import ops

    output.check_watch(watch_s, "tideover drain status", as_json=as_json)
    with output.operator_of(namespaces) as operator:
        if watch_s is not None:
            output.watch(lambda: screen(ops.drains(operator)), watch_s)
            return
        found = ops.drains(operator)
    if as_json:
        output.print_json(found)
    elif output.on_terminal():
        output.print_screen(*screen(found))
    else:
        rows = (tuple(ops.as_json(one)[name] for name in COLUMNS) for one in found.drains)
        output.print_lines(COLUMNS, rows)


@drain.command(
    epilog="""\b
Examples:
  tideover drain pause --because 'the database is full' --for 30m
  tideover drain pause anthropic/claude-opus-4-8 --because 'we wait for their all-clear'
"""
)
@key_argument
@for_option
@why_option
@output.namespaces
@output.as_json
def pause(*, key: str, for_s: float | None, why: str, namespaces: tuple[str, ...], as_json: bool) -> None:
    """Release nothing. Workers follow within about a second.

    Live critical jobs go on; live deferrable ones queue up behind the backlog as long as their route recovers.
    """
    with output.operator_of(namespaces) as operator:
        order(operator, key, 0.0, for_s, why, as_json=as_json)


@drain.command(
    epilog="""\b
Examples:
  tideover drain cap 5 --because 'our own database cannot follow'
  tideover drain cap 0.5 anthropic/claude-opus-4-8 --because 'an important customer is live' --for 2h
"""
)
@click.argument("per_s", metavar="JOBS_PER_S", type=click.FloatRange(0.01, 10_000))
@key_argument
@for_option
@why_option
@output.namespaces
@output.as_json
def cap(*, per_s: float, key: str, for_s: float | None, why: str, namespaces: tuple[str, ...], as_json: bool) -> None:
    """Release at most so many jobs per second. Workers follow within about a second.

    Live critical jobs go on; live deferrable ones queue up behind the backlog as long as their route recovers.
    """
    with output.operator_of(namespaces) as operator:
        order(operator, key, per_s, for_s, why, as_json=as_json)


@drain.command(
    epilog="""\b
Examples:
  tideover drain resume
  tideover drain resume anthropic/claude-opus-4-8
"""
)
@key_argument
@output.namespaces
@output.as_json
def resume(*, key: str, namespaces: tuple[str, ...], as_json: bool) -> None:
    """Take a pause or a cap back. Exit code 0 also when there was none."""
    from tideover import ops

    with output.operator_of(namespaces) as operator:
        gone = ops.resume_drain(operator, key)
    if as_json:
        output.print_json({"key": key, "resumed": gone})
    elif output.on_terminal():
        click.echo("The drain goes on at its own pace." if gone else "Nothing was paused or capped; nothing changed.")
    else:
        output.print_lines(("key", "resumed"), [(key, gone)])


def order(operator: Operator, key: str, max_rate: float, for_s: float | None, why: str, *, as_json: bool) -> None:
    from tideover import ops

    made = ops.cap_drain(operator, key, max_rate, for_s=for_s, who=output.who(), why=why)
    row = ops.as_json(made)
    if as_json:
        output.print_json({"key": key, "order": made})
    elif output.on_terminal():
        click.echo(f"{in_words(made)}. Watch: tideover drain status --watch")
    else:
        output.print_lines(("key", *row), [(key, *row.values())])


def in_words(made: Order) -> str:
    from tideover.ops import iso

    until = "until `tideover drain resume`" if made.until_at is None else f"until {iso(made.until_at)}"
    what = "Releases are paused" if made.max_rate == 0 else f"Releases are capped at {made.max_rate:g} jobs/s"
    return f"{what} {until}, by {made.who}: {made.why}"


def screen(found: Drains) -> Iterator[RenderableType]:
    from rich.text import Text

    for namespace, made in found.orders.items():
        yield Text(f"⚑ {namespace}: {in_words(made)}", style="magenta")
    if not found.drains:
        yield Text("✔ nothing is held for any breaker", style="green")
        return
    for one in found.drains:
        yield from lines(one, found.asked_at)
        if one.order is not None and found.orders.get(one.namespace) != one.order:
            yield Text(f"  ⚑ {in_words(one.order)}; computed: {one.pace:.1f}/s", style="magenta")


def lines(one: DrainStatus, asked_at: float) -> Iterator[RenderableType]:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    from tideover.ops import about

    ends = "nobody can tell the end"
    if one.soonest_at is not None and one.latest_at is not None:
        ends = f"ends in {about(one.soonest_at - asked_at)} to {about(one.latest_at - asked_at)}"
    yield Text.assemble((one.key, "bold"), f" is {one.state}: {one.rate:.1f} jobs/s ({LIMITS[one.limited_by]})")
    row = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=max(1, one.most), completed=one.most - one.held, width=20)
    row.add_row("", bar, f"{one.held:,} held, {one.released:,} released; {ends}")
    yield row
    if one.will_miss:
        yield Text(f"  ! {one.will_miss:,} jobs will expire before their turn, at this pace", style="yellow")
