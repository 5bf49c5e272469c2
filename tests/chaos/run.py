# SPDX-License-Identifier: Apache-2.0
"""The long lane: seed by seed, everything fails that can, and a ledger outside Redis says what became of the jobs."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dramatiq.message import Message
from tests.chaos.faults import KINDS, Chaos, Planned, plan
from tests.chaos.judge import Verdict, judge, unfinished
from tests.chaos.ledger import read
from tests.chaos.stage import BOOT_S, WORKERS, Stage, until

from tideover.store.account import Account, Ledger
from tideover.store.client import FAILED, connect
from tideover.store.keys import Keys

EXAMPLES = """examples:
  python -m tests.chaos.run --seeds 20                       the long lane
  python -m tests.chaos.run --seeds 5 --stock                stock dramatiq beside it: the same tasks, the same faults
  python -m tests.chaos.run --seed 7 --keep /tmp/seven       one seed again; its ledger and logs stay there
  python -m tests.chaos.run --only kill-worker --only flap   some faults only, to find out which
  python -m tests.chaos.run --json > rows.json               rows for a machine

A seed is a plan: the same faults at the same instants, though the machine's own timing differs from run to run.
Even seeds run with `appendfsync always`, odd ones with `everysec`, which is the default; what the kernel has got survives
a kill -9 of Redis with either. The exit code is 1 when tideover broke a promise, in any seed.
"""
NAMESPACE = "dramatiq"
PATIENCE_S = 30.0
"""A run is over when every job has ended, or when none has ended for so long: then the others are stuck."""
SEND_FOR = 0.8
"""The share of the faults' time over which jobs are sent."""
LOOK_S = 0.25
SAY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run."""

    seed: int
    who: str
    fsync: str
    seconds: float
    faults: Counter[str]
    verdict: Verdict
    folder: Path


class Watch:
    """Reads the account again and again, in a thread of its own, because Redis may not answer for a while."""

    def __init__(self, stage: Stage, label: str | None) -> None:
        self.stage, self.label = stage, label
        self.client = connect(stage.valkey.url)
        self.books = Ledger(self.client, Keys(NAMESPACE))
        self.account: Account | None = None
        self.enough = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def watch(self) -> None:
        started = said_at = time.monotonic()
        while not self.enough.wait(LOOK_S):
            self.look()
            if self.label is not None and time.monotonic() - said_at > SAY_S:
                said_at = time.monotonic()
                print(f"{self.label}  {said_at - started:3.0f} s  {self.progress()}", file=sys.stderr)

    def look(self) -> None:
        """Notes the account when it has changed. Stock dramatiq keeps none."""
        if self.stage.stock:
            return
        try:
            account = self.books.read()
        except FAILED:
            self.account = None
            return
        if account != self.account:
            places = {"queued": account.queued, "running": account.running, "held": account.held, "ends": account.ends}
            self.stage.note("account", accepted=account.accepted, difference=account.difference, **places)
        self.account = account

    def progress(self) -> str:
        n = Counter(line["what"] for line in read(self.stage.ledger))
        held = "" if self.account is None else f", {self.account.held} held"
        return f"{n['accepted']} units sent, {n['finished']} runs finished, {n['fault']} faults{held}"

    def close(self) -> None:
        self.enough.set()
        self.thread.join()
        self.client.close()


def play(stage: Stage, planned: list[Planned], *, seed: int, jobs: int, seconds: float, label: str | None = None) -> Verdict:
    """One seed on one stage, from the first start to the verdict. `label`: begins the lines that say how it goes."""
    for slot in stage.slots:
        slot.start()
    until(lambda: count(stage, "booted") >= WORKERS, f"all workers have booted; see {stage.log.name}", BOOT_S)
    stage.note("began", wall=time.time(), seed=seed, jobs=jobs, seconds=seconds)
    stage.send(seed, jobs, seconds * SEND_FOR)
    watch, chaos, started = Watch(stage, label), Chaos(stage, planned), time.monotonic()
    watch.thread.start()

    def over() -> bool:
        stage.supervise()
        return not chaos.go_on(time.monotonic() - started)

    try:
        until(over, "all faults are over", seconds + BOOT_S)
        stage.calm()
        until(lambda: count(stage, "sent"), f"everything is sent; see {stage.log.name}", BOOT_S)
        wait_for_the_end(stage, watch)
        stage.ask_for_results()
        watch.look()
    finally:
        watch.close()
    for place, tags in remains(stage).items():
        stage.note("remains", place=place, tags=tags)
    return judge(read(stage.ledger))


def count(stage: Stage, what: str) -> int:
    return sum(line["what"] == what for line in read(stage.ledger)) if stage.ledger.exists() else 0


def wait_for_the_end(stage: Stage, watch: Watch) -> None:
    """Until every job has ended by tideover's account; for stock, by the ledger. Or until nothing moves any more.

    Jobs that run again and again move nothing: of a group that two workers completed stock may enqueue the callback for ever.
    """
    seen, since, pause = None, time.monotonic(), threading.Event()
    while time.monotonic() - since < PATIENCE_S:
        pause.wait(LOOK_S)
        stage.supervise()
        left, account = len(unfinished(read(stage.ledger))), watch.account
        seen, since = (left, account), since if (left, account) == seen else time.monotonic()
        if stage.stock and not left:
            return
        if account is not None and account.queued == account.running == account.held == 0:
            return


def remains(stage: Stage) -> dict[str, list[str]]:
    """The tags of all jobs whose bodies are in Redis, in dramatiq's own hashes: `alive`, or `dead` letters."""
    found: dict[str, list[str]] = {"alive": [], "dead": []}
    client: Any = stage.valkey.client
    for key in client.scan_iter(f"{NAMESPACE}:*.msgs"):
        place = found["dead" if key.endswith(b".XQ.msgs") else "alive"]
        place += [Message.decode(body).args[0] for body in client.hvals(key)]
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How long and how hard a run is."""

    jobs: int
    seconds: float
    fsync: str | None = None
    """None: even seeds `always`, odd ones `everysec`."""
    only: frozenset[str] = frozenset(KINDS)
    say: bool = False


def run(folder: Path, seed: int, options: Options, *, stock: bool = False) -> Row:
    """One row of the table."""
    fsync = options.fsync or ("always" if seed % 2 == 0 else "everysec")
    who, started = "stock" if stock else "tideover", time.monotonic()
    stage = Stage(folder, stock=stock, fsync=fsync)
    try:
        planned = plan(seed, options.seconds, options.only)
        label = f"seed {seed} {who:8}" if options.say else None
        verdict = play(stage, planned, seed=seed, jobs=options.jobs, seconds=options.seconds, label=label)
    finally:
        stage.close()
    faults = Counter(str(line["kind"]) for line in read(stage.ledger) if line["what"] == "fault")
    took = time.monotonic() - started
    return Row(seed=seed, who=who, fsync=fsync, seconds=took, faults=faults, verdict=verdict, folder=folder)


def columns(row: Row) -> dict[str, str]:
    v = row.verdict
    numbers = {
        "seed": row.seed,
        "who": row.who,
        "fsync": row.fsync,
        "faults": row.faults.total(),
        "accepted": v.accepted,
        "succeeded": v.succeeded,
        "lost": len(v.lost),
        "stuck": len(v.stuck),
        "dead": len(v.dead),
        "duplicates": len(v.duplicates),
        "unexplained": len(v.unexplained),
        "pipelines": f"{v.pipelines['complete']}/{v.pipelines.total()}",
        "callbacks": v.callbacks["once"] + v.callbacks["missing"] + v.callbacks["twice"],
        "missing": v.callbacks["missing"],
        "twice": v.callbacks["twice"],
        "early": v.callbacks["early"],
        "right results": f"{v.results['right']}/{v.results.total()}",
        "seconds": f"{row.seconds:.0f}",
    }
    return {title: str(value) for title, value in numbers.items()}


def table_row(row: Row, *, head: bool) -> str:
    """A line of the table, below its titles if it is the first."""
    cells = columns(row)
    titles = "  ".join(f"{title:>8}" for title in cells) + "\n" if head else ""
    return titles + "  ".join(f"{value:>{max(8, len(title))}}" for title, value in cells.items())


def explanations(rows: list[Row]) -> Iterator[str]:
    """Below the table: what repeated jobs, how often each fault came, and which promises were broken where."""
    for who in dict.fromkeys(row.who for row in rows):
        why = Counter(why for row in rows if row.who == who for why in row.verdict.duplicates.values())
        said = ", ".join(f"{n} {why or 'UNEXPLAINED'}" for why, n in why.most_common())
        yield f"{who}: duplicates by window: {said or 'none'}"
    faults = sum((row.faults for row in rows), Counter[str]())
    yield "faults: " + ", ".join(f"{n} {kind}" for kind, n in faults.most_common())
    for row in rows:
        if row.who == "tideover":
            for complaint in row.verdict.complaints:
                yield f"BROKEN in seed {row.seed}: {complaint}. Evidence: {row.folder}"


def as_json(row: Row) -> dict[str, Any]:
    v = row.verdict
    return {
        "seed": row.seed,
        "who": row.who,
        "fsync": row.fsync,
        "seconds": round(row.seconds, 1),
        "faults": row.faults,
        "accepted": v.accepted,
        "doubtful": v.doubtful,
        "succeeded": v.succeeded,
        "lost": v.lost,
        "stuck": v.stuck,
        "dead": v.dead,
        "duplicates": v.duplicates,
        "pipelines": v.pipelines,
        "callbacks": v.callbacks,
        "results": v.results,
        "broken": v.complaints,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos.run",
        description="Kills workers and Redis, flaps providers and more while jobs run, and judges by a ledger outside Redis.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--seeds", type=int, default=20, metavar="N", help="seeds 1 to N (20)")
    add("--seed", type=int, action="append", metavar="S", help="this seed only; may be said again")
    add("--jobs", type=int, default=1500, metavar="N", help="jobs per run (1500)")
    add("--seconds", type=float, default=25.0, metavar="S", help="seconds of faults per run (25); then peace")
    add("--stock", action="store_true", help="also run stock dramatiq: a row below each of tideover's")
    add("--fsync", choices=["always", "everysec"], help="Valkey's appendfsync, for all seeds")
    add("--only", choices=KINDS, action="append", metavar="FAULT", help=f"only this of {', '.join(KINDS)}; may be said again")
    add("--keep", type=Path, metavar="DIR", help="keep ledgers and logs here; else only those of broken runs stay")
    add("--json", action="store_true", help="rows as JSON instead of the table")
    return parser.parse_args()


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no worker or server is left behind
    asked = arguments()
    home = asked.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    out = sys.stderr if asked.json else sys.stdout
    only = frozenset(asked.only or KINDS)
    options = Options(jobs=asked.jobs, seconds=asked.seconds, fsync=asked.fsync, only=only, say=True)
    rows: list[Row] = []
    for seed in asked.seed or range(1, asked.seeds + 1):
        for stock in (False, True) if asked.stock else (False,):
            folder = home / f"seed-{seed}-{'stock' if stock else 'tideover'}"
            shutil.rmtree(folder, ignore_errors=True)
            rows.append(row := run(folder, seed, options, stock=stock))
            print(table_row(row, head=len(rows) == 1), file=out, flush=True)
            if asked.keep is None and (stock or not row.verdict.complaints):
                shutil.rmtree(folder)
    print(json.dumps([as_json(row) for row in rows], indent=1) if asked.json else "\n".join(explanations(rows)))
    return 1 if any(row.verdict.complaints for row in rows if row.who == "tideover") else 0


if __name__ == "__main__":
    sys.exit(main())
