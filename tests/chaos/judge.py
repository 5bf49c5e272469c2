# SPDX-License-Identifier: Apache-2.0
"""The judge of a run: a pure function of the ledger's lines. It trusts nothing that Redis or tideover says of itself.

A job must run to its end once. It may do so again only if its earlier run was *open* in one of the windows that DESIGN §5
names: its worker was killed, its worker stood still past the heartbeat, or Redis was killed. A run is open from its start
until its acknowledgement was done, and for the time in which acknowledgements may be gathered. A job may also run again
because the job before it did (a pipeline's step, a group's member), which then sends it once more.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TypeAlias

from tests.chaos.ledger import Line

ACK_S = 0.010
"""Acknowledgements may be gathered for so long."""
STILL_S = 2.0
"""A worker beats every second and is given up after 3 s of silence, so one that stands still for less is not."""
REDIS_UNDOES_S = 2.0
"""With `appendfsync everysec`, Redis may answer for so long before it writes, but only while an fsync is slow."""
SHOWN = 5


@dataclass(slots=True)
class Run:
    """One run of a job's function."""

    worker: str
    started_at: float
    finished_at: float = inf
    acked_at: float = inf


Runs: TypeAlias = Mapping[str, Sequence[Run]]
"""By job, in the order of their starts."""


@dataclass(frozen=True, slots=True)
class Window:
    """A fault during which a run that is open may have to be repeated."""

    why: str
    from_at: float
    until_at: float
    worker: str | None = None
    """Whose runs; None: everybody's."""

    def excuses(self, run: Run) -> bool:
        theirs = self.worker is None or self.worker == run.worker
        return theirs and run.started_at <= self.until_at and run.acked_at + ACK_S >= self.from_at


@dataclass(frozen=True, slots=True)
class Sent:
    """What was sent as one, and the state of its acceptance."""

    kind: str
    tags: tuple[str, ...]
    sure: bool

    def before(self, tag: str) -> tuple[str, ...]:
        """The jobs that send this one: a pipeline's step before, a group's members before the callback."""
        i = self.tags.index(tag)
        if self.kind == "pipeline":
            return self.tags[max(0, i - 1) : i]
        return self.tags[:-1] if self.kind == "group" and tag == self.tags[-1] else ()

    def expects(self, tag: str, runs: Runs, in_redis: Container[str]) -> bool:
        """Whether this job was sent, or should have been: by its sender, or by the jobs before it, which have finished.

        What was seen was sent, also where its sender does not know, and then its pipeline must go on. A group's callback is
        counted when it was seen; whether it is missing is said apart.
        """
        if tag in runs or tag in in_redis:
            return True
        match self.kind, self.before(tag):
            case "pipeline", (before,):
                return has_finished(runs, before)
            case "group", (_, *_):
                return False
            case _:
                return self.sure


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What became of a run's jobs, by tag."""

    accepted: int = 0
    """Jobs that were sent, by the sender or by the jobs before them, or should have been."""
    doubtful: int = 0
    """Jobs whose send raised, and which were not seen since."""
    succeeded: int = 0
    lost: list[str] = field(default_factory=list)
    """Neither finished nor anywhere in Redis."""
    stuck: list[str] = field(default_factory=list)
    """Not finished at the end, and still in Redis."""
    dead: list[str] = field(default_factory=list)
    """Became dead letters."""
    duplicates: dict[str, str | None] = field(default_factory=dict)
    """Ran again after they had run to the end, and the window that explains it; None: nothing does."""
    pipelines: Counter[str] = field(default_factory=Counter)
    """`complete`, `incomplete`."""
    callbacks: Counter[str] = field(default_factory=Counter)
    """`once`, `missing`, `twice`, `early`, of groups that are complete."""
    odd_callbacks: dict[str, str] = field(default_factory=dict)
    """What is wrong with a callback and is not explained."""
    results: Counter[str] = field(default_factory=Counter)
    """`right`, `wrong`."""
    wrong_results: list[str] = field(default_factory=list)
    books: list[str] = field(default_factory=list)
    """What is wrong with the account that tideover keeps."""

    @property
    def unexplained(self) -> list[str]:
        return [tag for tag, why in self.duplicates.items() if why is None]

    @property
    def complaints(self) -> list[str]:
        """The promises that were broken; empty when all were kept."""
        said = {
            "lost": self.lost,
            "stuck": self.stuck,
            "dead letters": self.dead,
            "duplicates that nothing explains": self.unexplained,
            "results that are wrong or missing": self.wrong_results,
            "group callbacks": [f"{tag} {what}" for tag, what in self.odd_callbacks.items()],
            "the account": self.books,
        }
        return [f"{len(who)} {what}: {', '.join(who[:SHOWN])}" for what, who in said.items() if who]


def judge(lines: Sequence[Line]) -> Verdict:
    """What the ledger of a whole run says."""
    verdict, runs, units = Verdict(), runs_of(lines), list(sent(lines))
    in_redis = {tag: line["place"] for line in lines if line["what"] == "remains" for tag in line["tags"]}
    windows = list(windows_of(lines))
    for unit in units:
        for tag in unit.tags:
            if unit.expects(tag, runs, in_redis):
                fate(verdict, tag, runs, in_redis)
                repeats(verdict, unit, tag, runs.get(tag, []), windows)
            elif not unit.sure:
                verdict.doubtful += 1
        if unit.kind == "pipeline" and (unit.sure or has_finished(runs, unit.tags[0])):
            verdict.pipelines["complete" if has_finished(runs, unit.tags[-1]) else "incomplete"] += 1
        if unit.kind == "group" and unit.sure:
            callback(verdict, unit, runs)
    for line in lines:
        if line["what"] == "result":
            verdict.results["right" if line["right"] else "wrong"] += 1
            if not line["right"]:
                verdict.wrong_results.append(f"{line['tag']} said {line['said']}")
    check_books(verdict, lines)
    return verdict


def unfinished(lines: Sequence[Line]) -> list[str]:
    """The jobs that are sure to be accepted, and have not run to their end."""
    runs = runs_of(lines)
    return [tag for unit in sent(lines) if unit.sure for tag in unit.tags if not has_finished(runs, tag)]


def sent(lines: Sequence[Line]) -> Iterator[Sent]:
    for line in lines:
        if line["what"] in ("accepted", "doubtful"):
            yield Sent(line["kind"], tuple(line["tags"]), line["what"] == "accepted")


def runs_of(lines: Sequence[Line]) -> dict[str, list[Run]]:
    """The runs of each job, in the order of their starts.

    An acknowledgement does not say whose it is: it belongs to its worker's first run of that job that has finished and has
    none yet; else the run was interrupted, and it is the latest.
    """
    runs: dict[str, list[Run]] = defaultdict(list)
    by_name: dict[str, Run] = {}
    for line in lines:
        match line["what"]:
            case "started":
                by_name[line["run"]] = run = Run(line["worker"], line["at"])
                runs[line["tag"]].append(run)
            case "finished":
                by_name[line["run"]].finished_at = line["at"]
            case "acked":
                open_ = [run for run in runs[line["tag"]] if run.worker == line["worker"] and run.acked_at == inf]
                for run in [run for run in open_ if run.finished_at < inf][:1] or open_[-1:]:
                    run.acked_at = line["at"]
    return dict(runs)


def windows_of(lines: Sequence[Line]) -> Iterator[Window]:
    """When a run may have to be repeated: no other fault may do that."""
    pulses: dict[str, float] = {}
    for line in lines:
        if line["what"] == "pulse":
            last_at = pulses.get(line["worker"], inf)
            pulses[line["worker"]] = line["at"]
            if line["at"] - last_at >= STILL_S:
                yield Window("worker stood still", last_at, line["at"], line["worker"])
        if line["what"] != "fault":
            continue
        from_at, until_at = line["at"], line["until"]
        match line["kind"]:
            case "kill-worker":
                yield Window("worker killed", from_at, until_at, line["worker"])
            case "stop-worker" if until_at - from_at >= STILL_S:
                yield Window("worker stopped", from_at, until_at, line["worker"])
            case "kill-redis":
                yield Window("Redis killed", from_at, until_at)
                if line["unwritten"]:
                    yield Window("Redis undid writes", from_at - REDIS_UNDOES_S, from_at)


def has_finished(runs: Runs, tag: str) -> bool:
    return any(run.finished_at < inf for run in runs.get(tag, ()))


def fate(verdict: Verdict, tag: str, runs: Runs, in_redis: Mapping[str, str]) -> None:
    """Where a job ended."""
    verdict.accepted += 1
    if has_finished(runs, tag):
        verdict.succeeded += 1
    elif tag not in in_redis:
        verdict.lost.append(tag)
    else:
        (verdict.dead if in_redis[tag] == "dead" else verdict.stuck).append(tag)


def repeats(verdict: Verdict, unit: Sent, tag: str, runs: Sequence[Run], windows: Sequence[Window]) -> None:
    """Whether a job ran again after it had run to the end, and why that may be."""
    again = [run for i, run in enumerate(runs) if run.finished_at < inf and i + 1 < len(runs)]
    if not again:
        return
    why = [next((window.why for window in windows if window.excuses(run)), None) for run in again]
    if None in why and any(verdict.duplicates.get(other) for other in unit.before(tag)):
        why = ["the job before it ran again"]
    verdict.duplicates[tag] = None if None in why else why[0]


def callback(verdict: Verdict, unit: Sent, runs: Runs) -> None:
    """A group's callback runs once, after the last member. What the members' explained repeats do to it is explained."""
    *members, tag = unit.tags
    times = sum(run.finished_at < inf for run in runs.get(tag, ()))
    ended_at = [min(run.finished_at for run in runs[member]) for member in members if has_finished(runs, member)]
    complete = len(ended_at) == len(members)
    if times == 0 and not complete:
        return
    early = times > 0 and not (complete and max(ended_at) <= runs[tag][0].started_at)
    verdict.callbacks["missing" if times == 0 else "once" if times == 1 else "twice"] += 1
    verdict.callbacks["early"] += early
    if times == 0:
        verdict.odd_callbacks[tag] = "is missing"
    elif early and not any(verdict.duplicates.get(member) for member in members):
        verdict.odd_callbacks[tag] = "ran before the last member"
    elif times > 1 and verdict.duplicates[tag] is None:
        verdict.odd_callbacks[tag] = f"ran {times} times"


def check_books(verdict: Verdict, lines: Sequence[Line]) -> None:
    """tideover's own account agrees with the ledger. Stock dramatiq keeps none."""
    accounts = [line for line in lines if line["what"] == "account"]
    wrong = [line for line in accounts if line["difference"]]
    if wrong:
        verdict.books.append(f"it did not add up {len(wrong)} times of {len(accounts)}, first by {wrong[0]['difference']}")
    if accounts:
        last = accounts[-1]
        others = {end: n for end, n in last["ends"].items() if n and end != "succeeded"}
        if others:
            verdict.books.append(f"jobs ended otherwise: {others}")
        if last["accepted"] < verdict.accepted:
            verdict.books.append(f"it says {last['accepted']} were accepted, the ledger {verdict.accepted}")
