# SPDX-License-Identifier: Apache-2.0
"""What this process's calls say of their routes: noted without I/O while they are under way, gathered by one thread."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from tideover import clock
from tideover.core.detector import Evidence, Run
from tideover.core.latency import bucket_of
from tideover.core.outcome import OK, Outcome
from tideover.core.pacing import Felt, Limits

MOST_QUEUED = 10_000
"""Ended calls that wait to be sent; of a flood only the latest are kept."""
MOST_KEYS = 1000
"""Breakers that one process reports on: more are model names made up at run time."""
MOST_JOBS = 10_000
PROBE = "probe "
"""What a probe has in place of a job's id begins so."""
MOST_RUNS = 2000
"""Of one breaker, while they wait to be sent."""


Paced = Literal["", "released", "again", "turn", "live"]
"""How a call of a recovering route counts for its pace: the first of a released job, a later one (its release has paid for
both), one that has waited for its turn, or one that nothing has paid for."""


@dataclass(slots=True, eq=False)
class Flight:
    """One call under way. `counted`: it was overdue, and counts as failed until it turns out well. `delayed`: this process
    stood still meanwhile.
    `model`: as its task names it. `task`: of a rerouted call, because that may have a budget.
    `foreign`: it went out with a credential that is not the route's own. `paced`: its route recovers, so that it counts for the
    pace. `aside`: the tokens that were set aside for it, of its route's limit."""

    route: str
    key: str
    job_id: str
    eras: tuple[int, int]
    """Of the breakers of its model and of its route."""
    began: float = field(default_factory=clock.monotonic)
    first_s: float | None = None
    counted: bool = False
    delayed: bool = False
    foreign: bool = False
    paced: Paced = ""
    model: str = ""
    task: str = ""
    aside: int = 0


@dataclass(slots=True)
class Pending:
    """Evidence of one era of one breaker, in its order."""

    runs: list[Run] = field(default_factory=list)
    learned: int = 0
    """How many of the runs this process's own charts have taken in."""
    latencies: Counter[str] = field(default_factory=Counter)
    why: str = ""

    def add(self, kind: Evidence, n: int = 1) -> None:
        if len(self.runs) > self.learned and self.runs[-1][0] == kind:
            self.runs[-1] = (kind, self.runs[-1][1] + n)
        else:
            self.runs.append((kind, n))
        if len(self.runs) > MOST_RUNS:  # Redis is gone for long, and will not miss what is so old
            del self.runs[: MOST_RUNS // 2]
            self.learned = max(0, self.learned - MOST_RUNS // 2)


class Flights:
    """The calls of this process that are under way, and those that ended since last time."""

    def __init__(self) -> None:
        self._open: dict[int, Flight] = {}
        """In the order in which they began."""
        self._jobs: deque[tuple[str, int, str, bool]] = deque(maxlen=MOST_QUEUED)
        self._ended: deque[tuple[Flight, Outcome]] = deque(maxlen=MOST_QUEUED)
        self._paced: deque[tuple[Flight, Outcome | None, float]] = deque(maxlen=MOST_QUEUED)
        """What the pace hears of: calls that began (None), and those that ended, with the seconds they took."""
        self.limits: dict[str, Limits] = {}
        """The latest that providers told of their limits, by breaker."""

    def begin(self, flight: Flight) -> Flight:
        self._open[id(flight)] = flight
        if flight.paced:
            self._paced.append((flight, None, 0.0))
        return flight

    def first_token(self, flight: Flight) -> None:
        """A call has begun to be answered: it counts as a success until it breaks."""
        flight.first_s = clock.monotonic() - flight.began
        self._open.pop(id(flight), None)
        self._ended.append((flight, OK))

    def end(self, flight: Flight, outcome: Outcome) -> None:
        if flight.paced:
            self._paced.append((flight, outcome, clock.monotonic() - flight.began))
        if outcome.kind == "ok" and flight.first_s is not None:
            return
        if self._open.pop(id(flight), None) is not None:
            flight.first_s = clock.monotonic() - flight.began if outcome.kind == "ok" else None
        self._ended.append((flight, outcome))

    def forget(self, flight: Flight) -> None:
        """A call that was given up says nothing, unless it is overdue already."""
        self._open.pop(id(flight), None)

    def note_job(self, key: str, era: int, job_id: str, *, refused: bool) -> None:
        """How a job went, for the breaker of its task."""
        self._jobs.append((key, era, job_id, refused))

    def jobs(self) -> Iterator[tuple[str, int, str, bool]]:
        while self._jobs:
            yield self._jobs.popleft()

    def ended(self) -> Iterator[tuple[Flight, Outcome]]:
        while self._ended:
            yield self._ended.popleft()

    def paced(self) -> Iterator[tuple[Flight, Outcome | None, float]]:
        while self._paced:
            yield self._paced.popleft()

    def excuse(self, seconds: float) -> None:
        """Calls under way are not to blame for a time in which this process itself stood still."""
        for flight in list(self._open.values()):
            flight.began += seconds
            flight.delayed = True

    def overdue(self, limit_s: Callable[[str], float], least_s: float) -> Iterator[Flight]:
        """Calls that should have answered by now, each once. `limit_s`: of a breaker."""
        now = clock.monotonic()
        for flight in list(self._open.values()):
            if now - flight.began < least_s:
                return
            if not flight.counted and now - flight.began >= limit_s(flight.key):
                flight.counted = True
                yield flight


@dataclass(slots=True)
class Pressure:
    """What a recovering route's calls came to since last time, and how many of them no release has paid for."""

    felt: Felt = field(default_factory=Felt)
    live: int = 0

    def add(self, flight: Flight, outcome: Outcome | None, took_s: float, quiet_s: float) -> None:
        felt = self.felt
        match None if outcome is None else outcome.kind:
            case None:
                jobs, again = felt.jobs + (flight.paced == "released"), felt.again + (flight.paced == "again")
                self.felt = replace(felt, sent=felt.sent + 1, jobs=jobs, again=again)
                self.live += flight.paced == "live"
            case "ok":
                assert outcome is not None
                tokens = {"input_tokens": felt.input_tokens + outcome.tokens[0]}
                tokens |= {"output_tokens": felt.output_tokens + outcome.tokens[1], "told": felt.told + any(outcome.tokens)}
                self.felt = replace(felt, ok=felt.ok + 1, took_s=felt.took_s + took_s, **tokens)
            case "throttle":
                self.felt = replace(felt, throttled=felt.throttled + 1, quiet_s=max(felt.quiet_s, quiet_s))
            case "outage" | "ambiguous" if not flight.counted:
                self.felt = replace(felt, lost=felt.lost + 1)
            case _:
                pass

    def overdue(self) -> None:
        self.felt = replace(self.felt, lost=self.felt.lost + 1)


class Gathered(defaultdict[tuple[str, int], Pending]):
    """Evidence by breaker and era. Distinct jobs count: one that fails ten times in an era is one failure."""

    def __init__(self, failed_jobs: dict[str, tuple[int, set[str]]]) -> None:
        super().__init__(Pending)
        self.failed_jobs = failed_jobs

    def succeeded(self, key: str, era: int) -> None:
        self[key, era].add("ok")

    def failed(self, key: str, era: int, job_id: str, why: str) -> bool:
        """Counts a failure; False: one of its job counts already."""
        known, jobs = self.failed_jobs.get(key, (-1, set[str]()))
        if known != era or len(jobs) > MOST_JOBS:
            known, jobs = era, set()
        if key not in self.failed_jobs and len(self.failed_jobs) >= MOST_KEYS:
            return False
        self.failed_jobs[key] = (known, jobs)
        if job_id in jobs:
            return False
        jobs.add(job_id)
        self[key, era].add("failed")
        self[key, era].why = why
        return True

    def lapsed(self, key: str, era: int, why: str) -> None:
        """Counts a failure in the place of a success."""
        self[key, era].add("lapsed")
        self[key, era].why = why

    def taken_back(self, key: str, era: int, job_id: str) -> None:
        _, jobs = self.failed_jobs.get(key, (-1, set[str]()))
        jobs.discard(job_id)
        self[key, era].add("back")

    def took(self, flight: Flight) -> None:
        """Notes how long a first token took; probes, which ask for so little, teach nothing."""
        if flight.first_s is not None and not flight.job_id.startswith(PROBE):
            self[flight.key, flight.eras[0]].latencies[bucket_of(flight.first_s)] += 1
