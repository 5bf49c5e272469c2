# SPDX-License-Identifier: Apache-2.0
"""Plays a story from the first process to the verdict, and tells how it ended."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import click

from tideover.store.account import Account
from tideover.store.breakers import Breakers
from tideover.testing.faults import Phase
from tideover_worker.demo.history import Historian
from tideover_worker.demo.screen import FRAMES_PER_S, clock_of, said_of, screen_for
from tideover_worker.demo.stage import ANTHROPIC_KEY, FALLBACK, OPENAI_KEY, PRIMARY, DemoFailed, Interruption, Stage
from tideover_worker.demo.story import Story
from tideover_worker.demo.verdict import Check, critical_waits, criticality_of, holds, job_calls, tag_of, verdict
from tideover_worker.demo.watch import Evidence, Frame, Watch

STALLED_S = 180.0
"""The demo gives up when no job has ended for so long. Nothing that tideover waits for takes longer than 120 s."""


def perform(story: Story, *, processes: int, keep: Path | None, as_json: bool, interruption: Interruption) -> bool:
    """Plays a story and prints the verdict. Returns whether all claims held.

    Raises `DemoFailed` when a process died, `Interrupted` when a signal came; nothing is left running in either case.
    """
    with folder_for(keep) as folder:
        if not as_json:
            click.echo(announcement(story, processes, folder))
        evidence = run(story, processes, folder, as_json=as_json, interruption=interruption)
    checks = verdict(evidence)
    if as_json:
        click.echo(json.dumps(as_object(story, evidence, checks, keep), indent=2))
    else:
        click.echo(report(evidence, checks))
        click.echo(where_to_look(evidence, keep))
    return all(check.ok for check in checks)


@contextmanager
def folder_for(keep: Path | None) -> Iterator[Path]:
    """The directory of the run: the one to be kept, which must be new or empty, or one that goes with the run."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="tideover-demo-") as folder:
        yield Path(folder)


def run(story: Story, processes: int, folder: Path, *, as_json: bool, interruption: Interruption) -> Evidence:
    """Everything between the first process and the last."""
    with Stage(folder, story, processes, interruption) as stage, Historian(Breakers(stage.client, stage.keys)) as historian:
        stage.begin()
        watch, patience = Watch(stage, historian), Patience()
        with screen_for(story.title, as_json=as_json) as screen:
            while True:
                stage.check()
                frame = watch.look()
                screen.show(frame)
                if patience.is_over(frame, all_sent=stage.all_sent):
                    break
                interruption.sleep(1 / FRAMES_PER_S)
        return watch.evidence()


class Patience:
    """Knows when to stop waiting: all jobs ended, the missing ones are nowhere, or nothing has moved for too long."""

    def __init__(self) -> None:
        self.ended, self.moved_s = 0, 0.0

    def is_over(self, frame: Frame, *, all_sent: bool) -> bool:
        if frame.ended != self.ended or not all_sent:
            self.ended, self.moved_s = frame.ended, frame.elapsed_s
        account = frame.account
        nobody_left = account.queued + account.running + account.held == 0
        return all_sent and (nobody_left or frame.elapsed_s - self.moved_s > STALLED_S)


def announcement(story: Story, processes: int, folder: Path) -> str:
    critical = sum(job.task == "reply" for job in story.jobs)
    return (
        f"tideover demo: {story.title}\n"
        f"  {critical} critical and {len(story.jobs) - critical} deferrable jobs over {story.jobs[-1].at_s:.0f} s, "
        f"speed {story.speed:g}, seed {story.seed}\n"
        f"  {processes} worker processes, two fake providers, a private Valkey, all in {folder}\n"
        f"  setting: the timeout of {PRIMARY} is {story.timeout_s:g} s; all constants of tideover are as shipped\n"
    )


def report(evidence: Evidence, checks: tuple[Check, ...]) -> str:
    lines = ["", *account_table(evidence.account), "", numbers_line(evidence), ""]
    for check in checks:
        mark = click.style("✓", fg="green") if check.ok else click.style("✗", fg="red", bold=True)
        lines.append(f" {mark} {click.style(check.claim, bold=True)}")
        lines.append(f"   {check.numbers}")
        lines += [f"     {case}" for case in check.against]
    return "\n".join(lines)


def account_table(account: Account) -> list[str]:
    ends = ((str(end), n) for end, n in account.ends.items())
    places = [("queued", account.queued), ("running", account.running), ("held", account.held), *ends]
    rows = [f"  - {name:<12}{n:>8}" for name, n in places]
    lost = click.style(f"= {'lost':<14}{account.lost:>8}", bold=True)
    return [f"  {'accepted':<14}{account.accepted:>8}", *rows, lost]


def numbers_line(evidence: Evidence) -> str:
    n, waits = numbers(evidence), critical_waits(evidence)
    quick = ", ".join(f"{seconds:.2f} s {when} the outage began" for when, seconds in waits.items())
    return (
        f"after {clock_of(evidence.elapsed_s)}: {n['jobs_held']} jobs held and released, {n['jobs_rerouted']} rerouted; "
        f"{n['calls_failed']} of {n['calls_to_primary']} calls of jobs to {PRIMARY} failed before its breakers knew\n"
        f"99 of 100 critical jobs were with a provider within {quick}"
    )


def numbers(evidence: Evidence) -> dict[str, int]:
    to_primary, to_fallback = list(job_calls(evidence.primary)), list(job_calls(evidence.fallback))
    return {
        "jobs": len(evidence.jobs),
        "jobs_held": len({line.job_id for line, _ in holds(evidence)}),
        "jobs_rerouted": len({tag_of(call) for call in to_fallback}),
        "holds": evidence.holds,
        "calls_to_primary": len(to_primary),
        "calls_failed": sum(call.outcome != "ok" for call in to_primary),
        "calls_to_fallback": len(to_fallback),
        "probes": len(evidence.primary) + len(evidence.fallback) - len(to_primary) - len(to_fallback),
    }


def a_held_job(evidence: Evidence) -> str | None:
    """The id of a deferrable job that was held; else of any that was."""
    held = [(criticality_of(lines) == "critical", line.at, line.job_id) for line, lines in holds(evidence)]
    return min(held)[2] if held else None


def where_to_look(evidence: Evidence, keep: Path | None) -> str:
    if keep is None:
        return f"\nTo look around in what is left of a run, keep it: tideover demo --keep DIR. Then:\n{commands('JOB')}"
    job = a_held_job(evidence) or "JOB"
    config = shlex.quote(str(keep.resolve() / "tideover.toml"))
    return (
        f"\nEverything of this run is in {keep}: settings, logs, ledgers, and the data of its Valkey, which has been stopped. "
        f"To look around:\n  export TIDEOVER_CONFIG={config} ANTHROPIC_API_KEY={ANTHROPIC_KEY} DEMO_OPENAI_KEY={OPENAI_KEY}\n"
        f"  tideover worker --dev tideover_worker.demo.tasks     # starts the Valkey; tideover embedded stop\n{commands(job)}"
    )


def commands(job: str) -> str:
    return (
        "  tideover status                                      # one sentence, then routes, backlog and drain\n"
        f"  tideover explain {job}\n"
        "The story behind it: docs/ in the repository; the tasks: worker/tideover_worker/demo/tasks.py"
    )


def as_object(story: Story, evidence: Evidence, checks: tuple[Check, ...], keep: Path | None) -> dict[str, Any]:
    account = evidence.account
    places = {"queued": account.queued, "running": account.running, "held": account.held}
    return {
        "schema": 1,
        "ok": all(check.ok for check in checks),
        "story": {"title": story.title, "speed": story.speed, "seed": story.seed, "timeout_s": story.timeout_s},
        "elapsed_s": round(evidence.elapsed_s, 1),
        "account": {"accepted": account.accepted, **places, **account.ends, "lost": account.lost},
        "numbers": numbers(evidence),
        "critical_wait_p99_s": critical_waits(evidence),
        "checks": [asdict(check) for check in checks],
        "phases": [
            phase_as_object(phase, ends_s)
            for phase, ends_s in zip(story.phases, accumulate(p.duration_s for p in story.phases), strict=True)
        ],
        "calls": [
            {
                "after_s": round(call.at - evidence.began_at, 2),
                "model": call.model,
                "outcome": call.outcome,
                "probe": call.job is None,
            }
            for call in evidence.primary
        ],
        "breakers": [
            {"after_s": round(move.at - evidence.began_at, 2), "breaker": move.key, "state": move.state, "what": said_of(move)}
            for move in evidence.history.all_moves()
        ],
        "fallback": FALLBACK,
        "held_job": a_held_job(evidence),
        "kept_in": None if keep is None else str(keep.resolve()),
    }


def phase_as_object(phase: Phase, ends_s: float) -> dict[str, Any]:
    """A phase of the first provider; times in seconds from the beginning."""
    return {
        "name": phase.name,
        "begins_s": round(ends_s - phase.duration_s, 2),
        "ends_s": round(ends_s, 2),
        "p_error": phase.p_error,
        "p_error_end": phase.p_error_end,
        "models": list(phase.models),
    }


__all__ = ["DemoFailed", "perform"]
