# SPDX-License-Identifier: Apache-2.0
"""A running demo to look at: a live view on a terminal, a plain line now and then elsewhere, nothing at all for a program."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tideover.core.breaker import Breaker, State
from tideover.core.route import split_key
from tideover_worker.demo.history import DOWN, Move
from tideover_worker.demo.watch import Frame

FRAMES_PER_S = 5
LINE_EVERY_S = 2.0
MOVES_SHOWN = 7
WIDEST = 110
WHY_LETTERS = 44
LOOKS: dict[State, tuple[str, str]] = {
    "closed": ("●", "green"),
    "suspect": ("◑", "yellow"),
    "open": ("✖", "bold red"),
    "half-open": ("◐", "yellow"),
    "recovering": ("◔", "cyan"),
}


class Screen(Protocol):
    def show(self, frame: Frame) -> None: ...


class Silence:
    """For a program that reads the JSON at the end."""

    def show(self, frame: Frame) -> None:
        del frame


class Lines:
    """For a pipe or a log: one line every two seconds."""

    def __init__(self) -> None:
        self.next_s = 0.0

    def show(self, frame: Frame) -> None:
        if frame.elapsed_s >= self.next_s:
            self.next_s = frame.elapsed_s + LINE_EVERY_S
            click.echo(line_of(frame))


class Terminal:
    """For a person."""

    def __init__(self, title: str, live: Live) -> None:
        self.title, self.live = title, live

    def show(self, frame: Frame) -> None:
        self.live.update(picture(self.title, frame, min(WIDEST, self.live.console.width)), refresh=True)


@contextmanager
def screen_for(title: str, *, as_json: bool) -> Iterator[Screen]:
    """The right screen for where stdout goes."""
    if as_json:
        yield Silence()
    elif not sys.stdout.isatty():
        yield Lines()
    else:
        with Live(console=Console(), auto_refresh=False) as live:
            yield Terminal(title, live)


def line_of(frame: Frame) -> str:
    states = " ".join(f"{split_key(key)[1]}={breaker.state}" for key, breaker in frame.breakers.items())
    return (
        f"{clock_of(frame.elapsed_s)}  anthropic: {frame.phase or 'well'}  {states}  {places_of(frame)}"
        f"  rerouted {frame.rerouted}  {frame.per_s:.0f}/s"
    )


def places_of(frame: Frame) -> str:
    account = frame.account
    return (
        f"accepted {account.accepted} = queued {account.queued} + running {account.running} + held {account.held}"
        f" + done {frame.ended}, lost {account.lost}"
    )


def picture(title: str, frame: Frame, width: int) -> Group:
    """The whole view of one frame."""
    head = Text.assemble(("tideover demo", "bold"), f"  {title}  ", (clock_of(frame.elapsed_s), "bold cyan"))
    drain = frame.elapsed_s >= frame.lasts_s
    head.append(" all is sent, the rest comes home" if drain else f" of {clock_of(frame.lasts_s)}, then the drain", style="dim")
    done = Text.assemble(
        (f"{frame.ended} of {frame.total} jobs done", "bold"),
        f"   rerouted {frame.rerouted}   {frame.per_s:.0f} jobs/s   ",
        (f"held {frame.account.held}", "bold yellow" if frame.account.held else "dim"),
    )
    bar = Table.grid()
    bar.add_row(ProgressBar(total=frame.total, completed=frame.ended, width=width - 4))
    return Group(
        head,
        Text(),
        weather(frame),
        breakers_table(frame),
        Text(),
        done,
        bar,
        Text(places_of(frame)),
        Text(),
        moves_table(frame),
    )


def weather(frame: Frame) -> Text:
    """How the two providers are, which tideover is not told."""
    well = ("well", "green")
    return Text.assemble("anthropic: ", (frame.phase, "bold red") if frame.phase else well, "   openai: ", well)


def breakers_table(frame: Frame) -> Table:
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    for name in ("breaker", "state", "for", "calls now", "why"):
        table.add_column(name, no_wrap=True, justify="right" if name == "for" else "left")
    for key, breaker in frame.breakers.items():
        mark, style = LOOKS[breaker.state]
        fails = Text("fail", style="red") if frame.failing[key] else Text("are answered", style="green")
        table.add_row(
            key,
            Text(f"{mark} {breaker.state}", style=style),
            age_of(breaker, frame.at),
            fails,
            short(breaker.why if breaker.state in DOWN else ""),
        )
    return table


def age_of(breaker: Breaker, now: float) -> str:
    return f"{max(0.0, now - breaker.since):.0f} s" if breaker.since else ""


def moves_table(frame: Frame) -> Table:
    """The latest changes of breakers."""
    table = Table(box=None, pad_edge=False, show_header=False)
    began_at = frame.at - frame.elapsed_s
    for move in frame.moves[-MOVES_SHOWN:]:
        mark, style = LOOKS[move.state]
        why = short(move.why) if move.state == "open" else ""
        table.add_row(clock_of(move.at - began_at), move.key, Text(f"{mark} {said_of(move)}", style=style), why)
    return table


def said_of(move: Move) -> str:
    match move.state:
        case "open":
            return "the probe failed" if move.was == "half-open" else "opened"
        case "half-open":
            return "is being probed"
        case "recovering":
            return "recovering: the drain begins"
        case "suspect":
            return "suspect: what can wait waits"
        case "closed":
            return "calm again" if move.was == "suspect" else "closed"


def short(why: str) -> str:
    return why if len(why) <= WHY_LETTERS else f"{why[: WHY_LETTERS - 1]}…"


def clock_of(seconds: float) -> str:
    """
    >>> clock_of(125.4)
    '02:05'
    """
    return f"{int(max(0.0, seconds)) // 60:02d}:{int(max(0.0, seconds)) % 60:02d}"
