# SPDX-License-Identifier: Apache-2.0
"""`tideover routes`: which way a job would go, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import click

from tideover_worker.cli import output

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tideover.core.job import Criticality
    from tideover.ops import HopTold, RouteTest

COLUMNS = (
    "namespace", "task", "model", "criticality", "verdict", "route", "kind", "domain", "name", "state", "serves", "why", "live",
)  # fmt: skip


@click.group()
def routes() -> None:
    """Try out which way the jobs of a task go when a provider is in trouble."""


@routes.command(
    epilog="""\b
Examples:
  tideover routes test draft_reply                            as things are now
  tideover routes test draft_reply --assume anthropic=down    as if the primary were down
  tideover routes test draft_reply --tenant acme --assume anthropic=down --assume openai=throttled
  tideover routes test draft_reply --live                     with a one-token call over each route, which costs a little
"""
)
@click.argument("task")
@click.option(
    "--assume", "assumed", multiple=True, metavar="ROUTE=STATE", help="up, down, suspect, recovering, throttled or parked."
)
@click.option(
    "--model", "models", multiple=True, metavar="NAME", help="Ask for this model instead of those that the task calls."
)
@click.option("--tenant", default="", metavar="NAME", help="As a job of this tenant, whose settings may narrow the routes.")
@click.option("--criticality", type=click.Choice(["critical", "deferrable"]), help="Instead of the task's own.")
@click.option("--live", is_flag=True, help="Make a one-token call over each route with this machine's credentials.")
@output.namespaces
@output.as_json
def test(
    *,
    task: str,
    assumed: tuple[str, ...],
    models: tuple[str, ...],
    tenant: str,
    criticality: str | None,
    live: bool,
    namespaces: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say where a job of TASK would go now: each route of its chain, why not there, what is lost there and what it costs.

    It reads Redis and this directory's settings, and changes nothing. No prompt goes anywhere; `--live` asks one-token
    questions.
    """
    from tideover import ops

    with output.operator_of(namespaces) as operator:
        found = ops.try_routes(
            operator,
            task,
            criticality=cast("Criticality | None", criticality),
            tenant=tenant,
            models=models,
            assume=dict(ops.assumptions(assumed)),
            live=live,
        )
    if as_json:
        output.print_json({"tests": found})
    elif output.on_terminal():
        output.print_screen(*screen(found))
    else:
        output.print_lines(COLUMNS, lines(found))


def lines(found: Sequence[RouteTest]) -> Iterator[tuple[object, ...]]:
    for one in found:
        for hop in one.hops:
            asked = one.namespace, one.task, one.model, one.criticality, one.verdict
            yield (*asked, hop.route, hop.kind, hop.domain, hop.model, hop.state, hop.serves, hop.why, hop.live)


def screen(found: Sequence[RouteTest]) -> Iterator[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    for one in found:
        yield Text(one.sentence[0].upper() + one.sentence[1:], style="bold")
        grid = Table.grid(padding=(0, 2))
        grid.add_column()
        grid.add_column()
        grid.add_column()
        grid.add_column(overflow="fold")
        for hop in one.hops:
            symbol, style = ("✓", "green") if hop.serves else ("✗", "red")
            grid.add_row(Text(f"  {symbol}", style), hop.route, hop.model or "—", Text("; ".join(remarks(hop)) or "usable"))
        yield grid
        yield ""


def remarks(hop: HopTold) -> Iterator[str]:
    """What is to be said of a hop."""
    if hop.why:
        yield hop.why + (" (assumed)" if hop.assumed else "")
    if hop.loses:
        yield hop.loses
    if hop.price is not None:
        yield f"{hop.price[0]:g} in, {hop.price[1]:g} out for a million tokens"
    if hop.live is not None:
        yield f"live: {hop.live}"
