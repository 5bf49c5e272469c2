# SPDX-License-Identifier: Apache-2.0
"""Plays recorded outages against real workers, and tells how each went: one row per profile.

    python tests/bench/profiles.py outage-profiles.json                      all of them: two minutes each
    python tests/bench/profiles.py outage-profiles.json --only p01 --only p16
    python tests/bench/profiles.py outage-profiles.json --json

Each is a `tideover demo --profile`: two fake providers, two worker processes, a private Valkey, 12 jobs a second, 55 % of them
critical. A phase lasts as recorded, 25 s at the most (10 s where the provider is well). Seconds count from the onset, calls are
those of jobs, probes are not among them. Exit code 1: an account does not hold, a claim of the demo does not, or what a profile
`must_not` happened.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tideover.core.route import split_key

FAILING, WELL = 0.05, 0.2
"""From this share of failures on an outage counts as begun, and up to that one as over."""
MOST_ELSEWHERE_S = 30.0
ONCE = "each job succeeded exactly once"
"""A call that is cut because its breaker opened may be answered all the same; such jobs are counted (`twice`)."""


@dataclass
class Row:
    """How one profile went; None: it never happened."""

    profile: str
    ok: bool = False
    suspect_s: float | None = None
    open_s: float | None = None
    failed_calls: int = 0
    wasted_when_open: int = 0
    rerouted: int = 0
    held: int = 0
    openings: int = 0
    premature: int = 0
    back_s: float | None = None
    longest_open_s: float = 0.0
    probes: int = 0
    twice: int = 0
    accepted: int = 0
    lost: int = 0
    faults: list[str] = field(default_factory=list)


class Weather:
    """What the provider did to one model, as the phases say."""

    def __init__(self, phases: list[dict[str, Any]], model: str) -> None:
        self.phases = [p for p in phases if any(word == "*" or word in model for word in p["models"])]

    def share_at(self, at: float) -> float:
        for phase in self.phases:
            if phase["begins_s"] <= at < phase["ends_s"]:
                if phase["p_error_end"] is None:
                    return float(phase["p_error"])
                done = (at - phase["begins_s"]) / (phase["ends_s"] - phase["begins_s"])
                return float(phase["p_error"] + done * (phase["p_error_end"] - phase["p_error"]))
        return 0.0

    @property
    def onset(self) -> float | None:
        return next((p["begins_s"] for p in self.phases if max(p["p_error"], p["p_error_end"] or 0.0) >= FAILING), None)

    def over_after(self, at: float) -> float | None:
        """When the outage that was on at this instant was over."""
        instants = [at + step / 10 for step in range(3000)]
        return next((instant for instant in instants if self.share_at(instant) <= WELL), None)


def play(file: Path, profile: str, seed: int) -> dict[str, Any]:
    demo = "from tideover_worker.cli import main; main()"
    command = [sys.executable, "-c", demo, "demo", "--profile", f"{file}#{profile}", "--json", "--seed", str(seed)]
    with tempfile.TemporaryDirectory() as folder:
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if not ended.stdout:
        raise SystemExit(f"{profile}: {ended.stderr.strip()[-2000:]}")
    played: dict[str, Any] = json.loads(ended.stdout)
    return played


def row_of(profile: str, played: dict[str, Any]) -> Row:
    numbers, account = played["numbers"], played["account"]
    row = Row(profile, rerouted=numbers["jobs_rerouted"], held=numbers["jobs_held"], probes=numbers["probes"])
    row.accepted, row.lost = account["accepted"], account["lost"]
    row.failed_calls = numbers["calls_failed"]
    for check in played["checks"]:
        if check["claim"].startswith(ONCE):
            row.twice = len(check["against"])
        elif not check["ok"]:
            row.faults.append(f"{check['claim']}: {check['numbers']}")
    by_model: dict[str, list[dict[str, Any]]] = {}
    for move in played["breakers"]:
        by_model.setdefault(split_key(move["breaker"])[1], []).append(move)
    for model, moves in by_model.items():
        read(row, model, moves, Weather(played["phases"], model), played["calls"])
    row.ok = not row.faults and not row.lost
    return row


def read(row: Row, model: str, moves: list[dict[str, Any]], weather: Weather, calls: list[dict[str, Any]]) -> None:
    """Adds what one breaker went through."""
    onset, opened_at = weather.onset, None
    for move in moves:
        at, state = move["after_s"], move["state"]
        if onset is not None and at >= onset:
            row.suspect_s = least(row.suspect_s, at - onset if state in ("suspect", "open") else None)
            row.open_s = least(row.open_s, at - onset if state == "open" else None)
        if state == "open" and opened_at is None:
            opened_at, row.openings = at, row.openings + 1
        elif state == "recovering" and opened_at is not None:
            row.premature += weather.share_at(at) > WELL
            over = weather.over_after(opened_at)
            if over is not None and weather.share_at(at) <= WELL:
                row.back_s = max(row.back_s or 0.0, at - max(over, opened_at))
            row.longest_open_s = max(row.longest_open_s, at - opened_at)
            row.wasted_when_open += failed_between(calls, model, opened_at + 1, at)
            opened_at = None
    if opened_at is not None:
        row.faults.append(f"{model} never came back")


def failed_between(calls: list[dict[str, Any]], model: str, start: float, end: float) -> int:
    mine = (call for call in calls if call["model"] == model and start <= call["after_s"] < end and not call["probe"])
    return sum(call["outcome"] != "ok" for call in mine)


def least(known: float | None, new: float | None) -> float | None:
    return known if new is None else new if known is None else min(known, new)


def judge(row: Row, must_not: str) -> None:
    """What the profile must not bring about, in its own words."""
    if "open the breaker" in must_not and row.openings:
        row.faults.append("a breaker opened")
    if "more than 30 s" in must_not and row.longest_open_s > MOST_ELSEWHERE_S:
        row.faults.append(f"critical jobs went elsewhere for {row.longest_open_s:.0f} s")
    row.ok = row.ok and not row.faults


def show(rows: list[Row]) -> None:
    titles = ("suspect s", "open s", "calls failed", "while open", "rerouted", "held", "openings", "premature", "back s")
    table = Table(
        "profile", *titles, "longest open s", "probes", "twice", "accepted", "lost", "", box=None, header_style="bold"
    )
    for row in rows:
        numbers = (row.suspect_s, row.open_s, row.failed_calls, row.wasted_when_open, row.rerouted, row.held, row.openings)
        more = (row.premature, row.back_s, row.longest_open_s, row.probes, row.twice, row.accepted, row.lost)
        table.add_row(
            row.profile, *(cell(value) for value in (*numbers, *more)), "✓" if row.ok else "✗ " + "; ".join(row.faults)
        )
    Console(width=190).print(table)


def cell(value: float | None) -> str:
    return "—" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", type=Path, metavar="FILE", help="in the format tideover-outage-profiles/1")
    parser.add_argument(
        "--only", action="append", default=[], metavar="ID", help="profiles whose id begins so; may be given again"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON document")
    asked = parser.parse_args()
    recorded = {profile["id"]: profile for profile in json.loads(asked.profiles.read_text(encoding="utf-8"))["profiles"]}
    known = list(recorded)
    chosen = [name for name in known if not asked.only or name.startswith(tuple(asked.only))]
    if not chosen:
        parser.error(f"{asked.profiles} has no such profile; it has {', '.join(known)}")
    rows = []
    shown = track(chosen, "playing", console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
    for name in shown:
        rows.append(row_of(name, play(asked.profiles.resolve(), name, asked.seed)))
        judge(rows[-1], recorded[name].get("expect", {}).get("must_not", ""))
    if asked.json:
        print(json.dumps({"schema": 1, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        show(rows)
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
