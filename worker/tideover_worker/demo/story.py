# SPDX-License-Identifier: Apache-2.0
"""What a demo plays: which jobs are sent when, and how the first provider fails meanwhile. Values only; nothing runs here."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import Literal

from tideover.testing.faults import Fault, Phase, phases_of_profile
from tideover.testing.latency import Latency

TaskName = Literal["reply", "summary"]
"""The demo's two tasks: `reply` is critical, `summary` deferrable."""

MODELS = {"claude-opus-4-8": 0.4, "claude-sonnet-5": 0.35, "claude-haiku-4-5": 0.25}
"""The models that jobs call, and their shares."""
FALLBACK_MODELS = {"claude-opus-4-8": "gpt-5.5", "claude-sonnet-5": "gpt-5.5", "claude-haiku-4-5": "gpt-5.5-mini"}
PROFILE_WORDS = {"opus-new": "opus-4-8"}
"""A model group of outage-profiles.json → the word of our model's name that stands for it; the others stand for themselves."""

JOBS_PER_S = 12.0
CRITICAL_SHARE = 0.55
WELL_S = 2.0
ARRIVALS_S = 33.0
"""The generated workload goes on until shortly after the last model is well."""
TRACE_LASTS_S = 480.0
PROFILE_PHASE_S, PROFILE_WELL_S = 25.0, 10.0
"""The longest that a phase of a recorded outage is played, and one in which the provider is well."""
WELL_ERRORS = 0.01
OUTAGE_FROM, OUTAGE_UNTIL = 0.4, 0.6
"""Where in a trace the outage lies, as shares of its time."""
SHORTEST_TIMEOUT_S = 3.0
TIMEOUT_MARGIN = 2.0
"""The primary's timeout is at least so many times the longest answer, so that only a hang meets it."""

GENERATED_LATENCY = Latency(base_s=0.15, per_output_token_s=0.002)
TRACE_LATENCY = Latency(base_s=0.3, per_input_token_s=0.0001, per_output_token_s=0.012)

OVERLOAD = {Fault.OVERLOADED: 0.5, Fault.API_ERROR: 0.2, Fault.UNAVAILABLE: 0.2, Fault.EDGE_HTML: 0.1}
OUTAGE = (
    Phase("login errors, one model", 2, 0.95, {Fault.UNAUTHORIZED: 1.0}, models=("sonnet",)),
    Phase("login errors", 4, 0.95, {Fault.UNAUTHORIZED: 1.0}),
    Phase("timeouts", 5, 0.95, {Fault.HANG: 1.0}),
    Phase("5xx and 529", 4, 0.9, OVERLOAD),
    Phase("haiku is back", 5, 0.9, OVERLOAD, models=("opus", "sonnet")),
    Phase("sonnet is back", 5, 0.9, OVERLOAD, models=("opus",)),
)
"""2 June: login errors, then timeouts, then 5xx, then a recovery in which one model after the other comes back.

The seconds fit tideover's probes (5, 7.5 and 11.25 s after a failure): each model comes back shortly before one is due, and
the last not later than the third, so that nobody waits for a fourth.
"""


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """A job to be sent `at_s` seconds after the start. `tag` is how the providers' ledgers know it."""

    at_s: float
    task: TaskName
    tag: str
    model: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """A demo to be played.

    Attributes:
      title: what it plays, in a few words.
      jobs: in the order of their sending.
      phases: of the first provider, from the start; it is well after the last.
      latency, latency_speed: how long answers take, and what divides that.
      speed: what the user asked for, or what was chosen.
    """

    title: str
    jobs: tuple[PlannedJob, ...]
    phases: tuple[Phase, ...]
    latency: Latency
    latency_speed: float
    speed: float
    seed: int

    @property
    def lasts_s(self) -> float:
        """Seconds until the last job is sent and the last phase is over; jobs that were held end later."""
        return max(self.jobs[-1].at_s, sum(phase.duration_s for phase in self.phases))

    @property
    def timeout_s(self) -> float:
        """The primary's timeout, in whole seconds: short, so that a hang shows, and longer than any answer."""
        waits = (self.latency.of(job.input_tokens, job.output_tokens, luck=1.0) for job in self.jobs)
        longest_s = max(wait.first_s + wait.rest_s for wait in waits) / self.latency_speed
        return float(max(SHORTEST_TIMEOUT_S, math.ceil(TIMEOUT_MARGIN * longest_s)))


def june_second(seed: int, speed: float) -> Story:
    """The default: a generated workload, and the outage of 2 June in half a minute."""
    well = Phase("well", WELL_S / speed, 0.0, {})
    return Story(
        title="2 June on this machine",
        jobs=generated(random.Random(seed), ARRIVALS_S / speed, JOBS_PER_S * speed),
        phases=(well, *scaled(OUTAGE, 1 / speed)),
        latency=GENERATED_LATENCY,
        latency_speed=speed,
        speed=speed,
        seed=seed,
    )


def of_traces(paths: Sequence[Path], seed: int, speed: float | None) -> Story:
    """Recorded arrivals, with the outage of 2 June in their middle. `speed` None: one that makes them last about 8 minutes.

    Raises ValueError or OSError for a file that cannot be replayed.
    """
    if len(paths) > 2:
        raise ValueError(f"--trace takes two files, critical calls first and deferrable ones second, not {len(paths)}")
    tasks: tuple[TaskName, ...] = ("reply", "summary")
    rows = sorted((row, task) for path, task in zip(paths, tasks, strict=False) for row in read_trace(path))
    first_at, last_at = rows[0][0][0], rows[-1][0][0]
    chosen = max(1.0, round((last_at - first_at) / TRACE_LASTS_S, 2)) if speed is None else speed
    draw = random.Random(seed)
    jobs = tuple(
        PlannedJob((at - first_at) / chosen, task, f"{task}-{n}", model_drawn(draw), given, made)
        for n, ((at, given, made), task) in enumerate(rows)
    )
    lasts_s = max(jobs[-1].at_s, 1.0)
    outage_s = sum(phase.duration_s for phase in OUTAGE)
    return Story(
        title=f"2 June in the middle of {' and '.join(path.name for path in paths)}",
        jobs=jobs,
        phases=(
            Phase("well", OUTAGE_FROM * lasts_s, 0.0, {}),
            *scaled(OUTAGE, (OUTAGE_UNTIL - OUTAGE_FROM) * lasts_s / outage_s),
        ),
        latency=TRACE_LATENCY,
        latency_speed=chosen,
        speed=chosen,
        seed=seed,
    )


def of_profile(named: str, seed: int, speed: float | None) -> Story:
    """A recorded outage, `FILE#ID`, under a generated workload that `speed` does not change. None: no phase is long.

    Raises ValueError or OSError when there is no such profile.
    """
    file, mark, profile_id = named.rpartition("#")
    if not mark:
        raise ValueError(f"--profile is FILE#ID, as in outage-profiles.json#p04-june2-2026, not {named!r}")
    try:
        recorded = phases_of_profile(file, profile_id, model_of=PROFILE_WORDS, offered_per_s=JOBS_PER_S)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no file of outage profiles: {type(error).__name__}: {error}") from None
    phases = shortened(recorded) if speed is None else scaled(recorded, 1 / speed)
    lasts_s = sum(phase.duration_s for phase in phases)
    chosen = round(sum(phase.duration_s for phase in recorded) / lasts_s, 2)
    return Story(
        title=f"outage profile {profile_id}",
        jobs=generated(random.Random(seed), lasts_s, JOBS_PER_S),
        phases=phases,
        latency=GENERATED_LATENCY,
        latency_speed=1.0,
        speed=chosen,
        seed=seed,
    )


def shortened(phases: Iterable[Phase]) -> tuple[Phase, ...]:
    """The phases cut to what shows: a blip stays as it was, hours become half a minute."""
    most = (
        (phase, PROFILE_WELL_S if phase.p_error < WELL_ERRORS and phase.limit_per_s is None else PROFILE_PHASE_S)
        for phase in phases
    )
    return tuple(replace(phase, duration_s=min(phase.duration_s, most_s)) for phase, most_s in most)


def scaled(phases: Iterable[Phase], factor: float) -> tuple[Phase, ...]:
    """The phases with their durations multiplied."""
    return tuple(replace(phase, duration_s=phase.duration_s * factor) for phase in phases)


def generated(draw: random.Random, lasts_s: float, rate: float) -> tuple[PlannedJob, ...]:
    """Jobs at random instants, `rate` a second on average (a Poisson process), at least one of each task."""
    n = max(2, round(lasts_s * rate))
    instants = list(accumulate(draw.expovariate(1.0) for _ in range(n)))
    jobs = []
    for i, at in enumerate(instants):
        task: TaskName = "reply" if i == 0 or (i > 1 and draw.random() < CRITICAL_SHARE) else "summary"
        tokens = round(draw.lognormvariate(6.0, 0.8)), round(draw.uniform(20, 200))
        jobs.append(PlannedJob(at / instants[-1] * lasts_s, task, f"{task}-{i}", model_drawn(draw), *tokens))
    return tuple(jobs)


def model_drawn(draw: random.Random) -> str:
    return draw.choices(list(MODELS), weights=list(MODELS.values()))[0]


COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


def read_trace(path: Path) -> list[tuple[float, int, int]]:
    """Arrival (unix time), input and output tokens of each row. ValueError names file and line of the first bad one."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        header = next(lines, [])
        if [name.strip() for name in header] != COLUMNS:
            raise ValueError(f"{path}:1: the first line must be {','.join(COLUMNS)}, not {','.join(header)!r}")
        rows = [read_row(path, lines.line_num, row) for row in lines if row]
    if not rows:
        raise ValueError(f"{path} has no rows after its first line")
    return rows


def read_row(path: Path, line: int, row: Sequence[str]) -> tuple[float, int, int]:
    try:
        instant, given, made = row
        tokens = int(given), int(made)
        if min(tokens) < 0:
            raise ValueError("tokens are 0 or more")
        return datetime.fromisoformat(instant).timestamp(), *tokens
    except ValueError as error:
        raise ValueError(f"{path}:{line}: {','.join(row)!r} is no {','.join(COLUMNS)}: {error}") from None
