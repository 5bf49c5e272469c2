# SPDX-License-Identifier: Apache-2.0
"""`tideover breaker`: why a route is judged as it is, and an operator's own word over it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from tideover_worker.cli import output
from tideover_worker.cli.duration import Duration

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tideover.ops import BreakerExplanation, BreakerStatus

COLUMNS = ("key", "state", "computed", "generation", "calls", "failed", "brownout", "blackout", "threshold", "would_close")
key_argument = click.argument("key", metavar="KEY")


@click.group()
def breaker() -> None:
    """Look at breakers, and overrule them for a while.

    KEY is ROUTE/MODEL, ROUTE/* for a whole route, or task:NAME for a task, as in `tideover status`.
    """


@breaker.command(
    epilog="""\b
Examples:
  tideover breaker explain anthropic/claude-opus-4-8
  tideover breaker explain 'anthropic/*' --json
"""
)
@key_argument
@output.namespaces
@output.as_json
def explain(*, key: str, namespaces: tuple[str, ...], as_json: bool) -> None:
    """Why a breaker stands as it does: its charts, the evidence counted, what tripped it, and what would close it."""
    from tideover import ops

    with output.operator_of(namespaces) as operator:
        found = ops.explain_breaker(operator, key)
    if as_json:
        output.print_json(found)
    elif output.on_terminal():
        output.print_screen(*screen(found))
    else:
        print_row(found.breaker)


@breaker.command(
    epilog="""\b
Examples:
  tideover breaker force 'anthropic/*' open --for 30m --because 'their status page says so'
  tideover breaker force anthropic/claude-opus-4-8 closed --for 10m --because 'our account manager says it works'
"""
)
@key_argument
@click.argument("state", type=click.Choice(["open", "closed"]))
@click.option("--for", "for_s", type=Duration(), required=True, metavar="30m", help="Ends by itself after this long.")
@click.option("--because", "--reason", "why", required=True, metavar="TEXT", help="Shown in `tideover status`.")
@output.namespaces
@output.as_json
def force(*, key: str, state: str, for_s: float, why: str, namespaces: tuple[str, ...], as_json: bool) -> None:
    """Overrule what is computed: open (nothing calls it) or closed (everything may).

    What is computed goes on beneath it, and is shown beside it; `tideover breaker auto KEY` returns to it. Workers follow at
    once.
    """
    from tideover import ops

    with output.operator_of(namespaces) as operator:
        made = ops.force(operator, key, "open" if state == "open" else "closed", for_s=for_s, who=output.who(), why=why)
    show(made, f"{key} is forced {state}; computed: {made.computed}.", as_json=as_json)


@breaker.command(
    epilog="""\b
Example:
  tideover breaker auto 'anthropic/*'
"""
)
@key_argument
@output.namespaces
@output.as_json
def auto(*, key: str, namespaces: tuple[str, ...], as_json: bool) -> None:
    """Take an operator's word back: what is computed is in force again."""
    from tideover import ops

    with output.operator_of(namespaces) as operator:
        gone, now = ops.unforce(operator, key)
    show(now, f"{key} is {now.state} as computed{'' if gone else '; it was not forced'}.", as_json=as_json)


@breaker.command(
    epilog="""\b
Examples:
  tideover breaker resume task:tag_ticket        its jobs are released, a few at first
  tideover breaker resume 'anthropic/*'          do not wait for the next probe
"""
)
@key_argument
@output.namespaces
@output.as_json
def resume(*, key: str, namespaces: tuple[str, ...], as_json: bool) -> None:
    """Let jobs try a paused task, a parked route or an open breaker again, at the pace of one that recovers."""
    from tideover import ops

    with output.operator_of(namespaces) as operator:
        now = ops.resume(operator, key)
    show(now, f"{key} is {now.computed}: held jobs try it, a few at first.", as_json=as_json)


def show(now: BreakerStatus, words: str, *, as_json: bool) -> None:
    if as_json:
        output.print_json({"breaker": now})
    elif output.on_terminal():
        click.echo(words)
    else:
        print_row(now)


def print_row(told: BreakerStatus) -> None:
    from tideover import ops

    row = ops.as_json(told)
    output.print_lines(COLUMNS, [[row[name] for name in COLUMNS]])


def screen(found: BreakerExplanation) -> Iterator[RenderableType]:
    from rich.text import Text

    from tideover.ops import about
    from tideover_worker.cli.status_screen import STATES

    told = found.breaker
    symbol, style = STATES[told.state]
    since = "" if told.since_at is None else f" for {about(found.asked_at - told.since_at)}"
    yield Text.assemble((f"{symbol} {told.key} is {told.state}", style), f"{since}, generation {told.generation}")
    if told.why and told.state != "closed":
        yield Text(f"  why       {told.why}")
    if told.forced is not None:
        left = about(told.forced.until_at - found.asked_at)
        yield Text(f"  forced    {told.forced.state} by {told.forced.who} for {left} more; computed: {told.computed}")
    yield Text(f"  evidence  {found.evidence}")
    yield Text(f"  seen by   {found.reporters} processes within a minute, {found.failing} of them failing")
    if told.probed_at is not None:
        failed = f", {told.probes_failed} failed in this outage" if told.probes_failed else ""
        yield Text(f"  probed    {about(found.asked_at - told.probed_at)} ago: {told.probe_said}{failed}")
    for worker in found.apart:
        yield Text(f"  apart     worker {worker} alone finds it down", "yellow")
    if told.page is not None:
        yield Text(f"  page      {told.page}")
    if told.would_close:
        yield Text(f"  to close  {told.would_close}")
