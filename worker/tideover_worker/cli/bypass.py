# SPDX-License-Identifier: Apache-2.0
"""`tideover bypass`: the emergency switch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from tideover_worker.cli import output
from tideover_worker.cli.duration import Duration

if TYPE_CHECKING:
    from tideover.ops import Bypass


@click.group()
def bypass() -> None:
    """Switch tideover off and on: the emergency switch.

    While it is bypassed nothing is held or rerouted, jobs run as stock dramatiq would run them, and held jobs are released.
    The account goes on. Workers follow within about a second.
    """


@bypass.command(
    epilog="""\b
Examples:
  tideover bypass on --for 30m --why 'holds jobs though the provider is up'
  tideover bypass on -n shop               until `tideover bypass off -n shop`
"""
)
@click.option("--for", "for_s", type=Duration(), metavar="30m", help="Ends by itself after this long; else it stays on.")
@click.option("--why", "--reason", "why", metavar="TEXT", help="Shown in `tideover status`.")
@output.namespaces
@output.as_json
def on(*, for_s: float | None, why: str | None, namespaces: tuple[str, ...], as_json: bool) -> None:
    """Switch tideover off in one namespace.

    With several namespaces in this Redis, name the one (else exit code 4).
    """
    from tideover import ops

    with output.operator_of(namespaces) as operator:
        made = ops.bypass_on(operator, who=output.who(), why=why, for_s=for_s)
    show(made, bypassed=True, as_json=as_json)


@bypass.command(
    epilog="""\b
Examples:
  tideover bypass off
  tideover bypass off -n shop --json
"""
)
@output.namespaces
@output.as_json
def off(*, namespaces: tuple[str, ...], as_json: bool) -> None:
    """Switch tideover on again. Says who had switched it off; exit code 0 also when nobody had."""
    from tideover import ops

    with output.operator_of(namespaces) as operator:
        was = ops.bypass_off(operator)
    show(was, bypassed=False, as_json=as_json)


def show(facts: Bypass | None, *, bypassed: bool, as_json: bool) -> None:
    from tideover import ops

    row = {} if facts is None else ops.as_json(facts)
    if as_json:
        output.print_json({"bypassed": bypassed, "bypass": facts})
    elif output.on_terminal():
        click.echo(in_words(facts, bypassed=bypassed))
    else:
        names = ("who", "why", "since_at", "until_at")
        output.print_lines(("bypassed", *names), [(bypassed, *(row.get(name) for name in names))])


def in_words(facts: Bypass | None, *, bypassed: bool) -> str:
    from tideover.ops import iso

    if facts is None:
        return "tideover was not bypassed; nothing changed."
    if bypassed:
        until = "until `tideover bypass off`" if facts.until_at is None else f"until {iso(facts.until_at)}"
        return f"Bypassed {until}. Watch: tideover status --watch"
    since = "" if facts.since_at is None else f" since {iso(facts.since_at)}"
    return f"tideover acts again; it was bypassed by {facts.who}{since}."
