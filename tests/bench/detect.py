# SPDX-License-Identifier: Apache-2.0
"""How soon a failing route is seen, how seldom a healthy one is doubted, and how soon its return is known, beside the peers.

    python tests/bench/detect.py            all of it, on two cores, in some minutes
    python tests/bench/detect.py --quick    fewer seeds, in well under a minute
    python tests/bench/detect.py --json     the figures for programs

On a simulated clock (see detect_worlds.py). Ours are the functions of `tideover.core`; the peers' rules have their defaults;
`pybreaker` is the package itself, where it is installed (`pip install pybreaker`). Exit code 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from multiprocessing import Pool
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the worlds lie beside this file

from detect_worlds import PEERS, Outage, World, false_alarms, ours, peer, pybreaker_itself, recovered, wasted
from rich.console import Console
from rich.progress import track
from rich.table import Table

RULES = {**PEERS, **({"pybreaker itself": pybreaker_itself} if find_spec("pybreaker") else {})}
ONSETS: dict[str, tuple[World, float, tuple[float, float]]] = {
    "black-out, 10/s": (World(10, 1.0), 120, (1.5, 2.5)),
    "black-out, 1/s": (World(1, 1.0), 240, (4, 8)),
    "black-out, 0.1/s": (World(0.1, 1.0), 1200, (12, 40)),
    "hang, 10/s": (World(10, 1.0, hangs=True), 120, (8, math.inf)),
    "hang, 1/s": (World(1, 1.0, hangs=True), 240, (13, math.inf)),
    "brown-out of 25 %, 10/s": (World(10, 0.25), 120, (6, math.inf)),
}
"""World, how long one looks (s), and the goals for p50 and p95. A brown-out counts as seen when its route is suspect."""
ENDS = {
    "sharp end": (1.0, 0.0),
    "ramp of 300 s": (1.0, 300.0),
    "70 % brown-out": (0.7, 0.0),
    "50 % brown-out, ramp": (0.5, 300.0),
}
"""Share that fails, and seconds over which it fades away."""


def quantile(values: Sequence[float], q: float) -> float:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, math.ceil(q * len(ranked)) - 1)]


def onset(name: str, seed: int) -> dict[str, float]:
    world, until, _ = ONSETS[name]
    seen = ours(world, seed, until)
    found: dict[str, float] = {"tideover": seen.suspect if world.share < 0.5 else seen.opened, "brown-out": seen.brownout}
    found["wasted"] = wasted(world, seed, seen.opened, until)
    return {**found, **{rule: peer(RULES[rule], world, seed, until) for rule in RULES}}


def brownout_hour(seed: int) -> float:
    return ours(World(10, 0.25), seed, 3600).opened


def quiet(days: float, case: tuple[float, float]) -> tuple[float, float, int, int]:
    rate, usual = case
    return (rate, usual, *false_alarms(rate, usual, days, seed=int(rate * 1000)))


def ending(name: str, seed: int) -> tuple[float, int, int]:
    share, ramp_s = ENDS[name]
    lasts_s = min(6 * 3600.0, 3000 * math.exp(1.2 * random.Random(seed).gauss(0, 1)))
    end = recovered(Outage(lasts_s, share, ramp_s), seed)
    return end.late_s, end.premature, end.probes


def blip(seed: int) -> float:
    """Fourteen seconds of which 60 % fail (profile p01): for how long critical jobs went elsewhere."""
    return recovered(Outage(14.0, 0.6, 0.0), seed).elsewhere_s


def waited(endings: Sequence[tuple[float, int, int]]) -> list[float]:
    """Seconds until a return was known, without those where a premature close had lasted until the outage had faded away."""
    return [late_s for late_s, *_ in endings if late_s > 0]


def measured(seeds: int, hours: int, days: float) -> dict[str, Any]:
    works: list[tuple[str, Callable[[Any], Any], list[Any]]] = [
        *((name, partial(onset, name), list(range(seeds))) for name in ONSETS),
        ("hour", brownout_hour, list(range(hours))),
        ("quiet", partial(quiet, days), [(rate, usual) for rate in (10, 1, 0.1) for usual in (0.002, 0.005, 0.01)]),
        *((name, partial(ending, name), list(range(seeds))) for name in ENDS),
        ("blip", blip, list(range(seeds))),
    ]
    with Pool(2) as pool:
        shown = track(works, "measuring", console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
        return {name: pool.map(work, args) for name, work, args in shown}


def verdicts(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per goal: what, ours, goal, and whether it is met."""
    rows = []
    for name, (world, _, goals) in ONSETS.items():
        for q, goal in zip((0.5, 0.95), goals, strict=True):
            if goal < math.inf:
                found = quantile([one["tideover"] for one in raw[name]], q)
                rows.append({"what": f"{name}, p{q * 100:.0f} (s)", "ours": found, "goal": goal, "met": found <= goal})
        if name.startswith("black-out"):
            found, goal = quantile([one["wasted"] for one in raw[name]], 0.5), 10 + 0.7 * world.rate
            rows.append({"what": f"{name}: calls wasted, p50", "ours": found, "goal": goal, "met": found <= goal})
    opened = sum(opened for *_, opened, _ in raw["quiet"])
    rows.append({"what": "false openings, healthy", "ours": opened, "goal": 0, "met": opened == 0})
    late = [late_s for name in ENDS for late_s in waited(raw[name])]
    for q, goal in ((0.5, 20), (0.95, 60)):
        found = quantile(late, q)
        rows.append({"what": f"return known, p{q * 100:.0f} (s)", "ours": found, "goal": goal, "met": found <= goal})
    for name in ENDS:
        found = sum(premature for _, premature, _ in raw[name]) / len(raw[name])
        rows.append({"what": f"premature closes per outage, {name}", "ours": found, "goal": 1, "met": found <= 1})
    longest = max(raw["blip"])
    rows.append({"what": "blip of 14 s: rerouted at most (s)", "ours": longest, "goal": 30, "met": longest <= 30})
    return rows


def show(raw: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    console = Console(width=150)
    seen = Table("seen after, p50 / p95 in s", "tideover", *RULES, box=None, header_style="bold")
    for name in ONSETS:
        cells = ["tideover", *RULES]
        both = ([quantile([one[cell] for one in raw[name]], q) for q in (0.5, 0.95)] for cell in cells)
        seen.add_row(name, *(" / ".join("never" if s == math.inf else f"{s:.1f}" for s in pair) for pair in both))
    console.print(seen)
    opened = sum(at < math.inf for at in raw["hour"])
    certain = quantile([one["brown-out"] for one in raw["brown-out of 25 %, 10/s"]], 0.5)
    console.print(
        f"\nA brown-out of 25 % is certain after {certain:.1f} s (p50); opened within an hour: {opened} of {len(raw['hour'])}"
    )
    alarms = Table("healthy", "failures", "false openings", "suspicions", box=None, header_style="bold")
    for rate, usual, opened_, suspected in raw["quiet"]:
        alarms.add_row(f"{rate}/s", f"{usual:.1%}", str(opened_), str(suspected))
    console.print(alarms)
    ends = Table("the return is known after", "p50 s", "p95 s", "premature", "probes", box=None, header_style="bold")
    for name in ENDS:
        _, premature, probes = zip(*raw[name], strict=True)
        n = len(probes)
        ends.add_row(
            name,
            f"{quantile(waited(raw[name]), 0.5):.0f}",
            f"{quantile(waited(raw[name]), 0.95):.0f}",
            f"{sum(premature) / n:.1f}",
            f"{sum(probes) / n:.0f}",
        )
    console.print(ends)
    for row in rows:
        console.print(f"{'✓' if row['met'] else '✗'} {row['what']}: {row['ours']:.1f} (goal {row['goal']:.1f})")
    if "pybreaker itself" not in RULES:
        console.print("pybreaker is not installed, so it is not beside ours: pip install pybreaker")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer seeds and days")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    asked = parser.parse_args()
    days = 9.0 if asked.quick else 90.0
    raw = measured(40 if asked.quick else 300, 4 if asked.quick else 30, days)
    rows = verdicts(raw)
    if asked.json:
        print(json.dumps({"schema": 1, "days": days, "goals": rows, "raw": raw}))
    else:
        print(f"Healthy routes were watched for {days:.0f} simulated days at each rate and failure rate.\n")
        show(raw, rows)
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
