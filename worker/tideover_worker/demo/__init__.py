# SPDX-License-Identifier: Apache-2.0
"""`tideover demo`: an outage on this machine, with real processes and the real SDK, and the account at the end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from tideover_worker.demo.story import Story

BAD_INPUT = 2
SIGNALLED = 128


@click.command(
    epilog="""\b
Examples:
  tideover demo                                    2 June in about a minute
  tideover demo --speed 3                          the same with three times the jobs a second
  tideover demo --keep /tmp/june && ls /tmp/june   keeps settings, logs and data
  tideover demo --trace conv.csv --trace code.csv  real traces, with an outage in their middle
  tideover demo --profile outage-profiles.json#p05-staggered-models
  tideover demo --json | jq '.checks[] | select(.ok | not)'

Traces are CSV files with the columns TIMESTAMP,ContextTokens,GeneratedTokens, as in the Azure public dataset of LLM
inference traces (2023, CC-BY 4.0).

Exit codes: 0 all claims held; 1 one did not, or a process died; 2 an input that cannot be played; 130 and 143: stopped.
"""
)
@click.option("--speed", type=float, help="Divides arrivals, latencies and phases; never tideover's own constants.")
@click.option(
    "--trace", "traces", type=Path, multiple=True, metavar="FILE.csv", help="Replay it: first critical, second deferrable."
)
@click.option("--profile", metavar="FILE#ID", help="Play a recorded outage; --speed divides its phases only.")
@click.option("--seed", type=int, default=2, show_default=True, help="Of everything that is drawn.")
@click.option("--keep", type=Path, metavar="DIR", help="Run in this new or empty directory and leave it there.")
@click.option("--processes", type=click.IntRange(1, 64), default=2, show_default=True, help="Worker processes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end and nothing else.")
def demo(
    *,
    speed: float | None,
    traces: tuple[Path, ...],
    profile: str | None,
    seed: int,
    keep: Path | None,
    processes: int,
    as_json: bool,
) -> None:
    """Play an outage on this machine and check that tideover lost nothing.

    Two fake providers, workers as real processes, the real anthropic SDK over HTTP: logins fail, then calls hang, then come
    5xx and 529, then one model after the other recovers. It needs no key, no Redis and no Docker. At the end stands the
    account, checked against what the providers wrote down.
    """
    from tideover.errors import ConfigurationError  # what plays is loaded by those who play
    from tideover_worker.demo.play import DemoFailed, perform
    from tideover_worker.demo.stage import Interrupted, Interruption

    story = story_asked_for(speed, traces, profile, seed)
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        refuse(f"--keep {keep}: it must be a new or an empty directory")
    interruption = Interruption()
    interruption.listen()
    try:
        held = perform(story, processes=processes, keep=keep, as_json=as_json, interruption=interruption)
    except (DemoFailed, ConfigurationError) as error:
        click.echo(f"tideover demo: {error}", err=True)
        sys.exit(1)
    except Interrupted as signal:
        click.echo("tideover demo: stopped; nothing is left running", err=True)
        sys.exit(SIGNALLED + signal.number)
    sys.exit(0 if held else 1)


def story_asked_for(speed: float | None, traces: tuple[Path, ...], profile: str | None, seed: int) -> Story:
    """The story that the options ask for; exits with one line when there is none."""
    from tideover_worker.demo.story import june_second, of_profile, of_traces

    if speed is not None and not 0 < speed < float("inf"):
        refuse(f"--speed must be above 0, not {speed:g}")
    if traces and profile is not None:
        refuse("--trace and --profile are two different stories; give one of them")
    try:
        if traces:
            return of_traces(traces, seed, speed)
        if profile is not None:
            return of_profile(profile, seed, speed)
    except OSError as error:
        refuse(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        refuse(str(error))
    return june_second(seed, 1.0 if speed is None else speed)


def refuse(why: str) -> NoReturn:
    click.echo(f"tideover demo: {why}", err=True)
    sys.exit(BAD_INPUT)
