# SPDX-License-Identifier: Apache-2.0
"""The verdict on a run: the account and the stories, checked against the providers' ledgers. Values in, checks out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tideover.core.route import breaker_key
from tideover.store.stories import Line
from tideover.testing.ledger import OK, Call
from tideover_worker.demo.stage import PRIMARY
from tideover_worker.demo.watch import Evidence

GRACE_S = 1.0
"""What the news of a breaker may take to reach every worker."""
EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Check:
    """One claim: whether it held, the numbers that say so, and a few of the cases that speak against it."""

    claim: str
    ok: bool
    numbers: str
    against: tuple[str, ...] = ()


def verdict(evidence: Evidence) -> tuple[Check, ...]:
    """All claims about a run, in the order of their weight."""
    return (
        nothing_lost(evidence),
        ledger_equal(evidence),
        nothing_burnt(evidence),
        critical_not_held(evidence),
        dead_provider_left_alone(evidence),
        held_once(evidence),
    )


def nothing_lost(evidence: Evidence) -> Check:
    account = evidence.account
    still_here = account.queued + account.running + account.held
    unexplained = account.ends["unexplained"]
    complete = account.accepted == len(evidence.jobs) == sum(account.ends.values())
    return Check(
        "every job is accounted for",
        complete and account.difference == 0 and evidence.most_lost == 0 and unexplained == 0,
        f"lost {account.lost}, unexplained {unexplained}, still here {still_here}, accepted {account.accepted} of "
        f"{len(evidence.jobs)} sent; at most {evidence.most_lost} lost in {evidence.readings} readings on the way",
    )


def ledger_equal(evidence: Evidence) -> Check:
    """Jobs against answers: what the providers say that they answered in full."""
    answered = Counter(tag_of(call) for call in job_calls((*evidence.primary, *evidence.fallback)) if call.outcome == OK)
    missing, strange = evidence.jobs.keys() - answered.keys(), answered.keys() - evidence.jobs.keys()
    twice = [tag for tag, n in answered.items() if n > 1]
    succeeded = evidence.account.ends["succeeded"]
    return Check(
        "each job succeeded exactly once, says the providers' ledger",
        not missing and not strange and not twice and succeeded == len(evidence.jobs),
        f"{succeeded} jobs succeeded, {sum(answered.values())} answers for {len(answered)} jobs; "
        f"{len(missing)} without an answer, {len(twice)} answered more than once, {len(strange)} that nobody sent",
        examples([*sorted(missing), *(told_twice(evidence, tag) for tag in sorted(twice)), *sorted(strange)]),
    )


def told_twice(evidence: Evidence, tag: str) -> str:
    """A job's tag with the answers that providers gave for it: from when to when, in seconds after the start."""
    answers = [
        f"{call.provider} {after(evidence, call.at)}-{after(evidence, call.finished_at)}"
        for call in job_calls((*evidence.primary, *evidence.fallback))
        if tag_of(call) == tag and call.outcome == OK
    ]
    return f"{tag} answered by {' and '.join(answers)}"


def after(evidence: Evidence, at: float | None) -> str:
    return "?" if at is None else f"{at - evidence.began_at:.3f}"


def nothing_burnt(evidence: Evidence) -> Check:
    ends = evidence.account.ends
    retried = {tag_of(call) for call in job_calls((*evidence.primary, *evidence.fallback)) if retries_of(call) > 0}
    failed = [job_id for job_id, lines in evidence.stories.items() if any(line.event == "failed" for line in lines)]
    ended_badly = ends["failed"] + ends["expired"] + ends["discarded"]
    return Check(
        "the outage burnt no attempt",
        not retried and not failed and ended_badly == 0 and evidence.dead_letters == 0,
        f"{len(retried)} jobs retried, {ended_badly} failed, expired or discarded, {evidence.dead_letters} dead letters",
        examples([*sorted(retried), *failed]),
    )


def critical_not_held(evidence: Evidence) -> Check:
    held = [(line, lines) for line, lines in holds(evidence) if criticality_of(lines) == "critical"]
    wrong = []
    for line, _ in held:
        paced, keys = line.facts["reason"] == "pace", line.facts["waits_for"]
        usable = evidence.history.usable_throughout(keys, line.at - GRACE_S, line.at, paced=paced)
        if usable:
            wrong.append(
                f"{line.job_id} held at {line.at:.3f} ({line.facts['reason']}) while {' and '.join(usable)} was usable"
            )
    return Check(
        "no critical job was held while an allowed route was usable",
        not wrong,
        f"{len(wrong)} of {len(held)} holds of critical jobs",
        examples(wrong),
    )


def dead_provider_left_alone(evidence: Evidence) -> Check:
    wrong, down_calls = [], 0
    for call in evidence.primary:
        down_s = evidence.history.down_since(breaker_key(PRIMARY, call.model), call.at)
        if down_s is None:
            continue
        down_calls += 1
        if call.job is not None and down_s > GRACE_S:
            wrong.append(f"{call.job} called {call.model} at {call.at:.3f}, {down_s:.1f} s after its breaker had opened")
    openings = sum(move.state == "open" and move.was != "half-open" for move in evidence.history.all_moves())
    return Check(
        f"no job waited on the dead provider (from {GRACE_S:.0f} s after a breaker opened)",
        not wrong,
        f"{len(wrong)} calls of jobs, among {down_calls} calls incl. probes while a breaker was open; {openings} openings",
        examples(wrong),
    )


def held_once(evidence: Evidence) -> Check:
    """A release is a permit: in the generation of its breaker it is good for the whole job."""
    times = Counter(
        (line.job_id, line.facts["generation"], "|".join(sorted(line.facts["waits_for"]))) for line, _ in holds(evidence)
    )
    again = [f"{job} {n} times in generation {generation} of {key}" for (job, generation, key), n in times.items() if n > 1]
    told = sum(times.values())
    return Check(
        "each held job was held once in a breaker's generation",
        not again and told == evidence.holds,
        f"{len({job for job, _, _ in times})} jobs held, {told} holds told in their stories, {evidence.holds} counted; "
        f"{len(again)} held again in the same generation",
        examples(again),
    )


def critical_waits(evidence: Evidence) -> dict[str, float]:
    """Within how many seconds 99 of 100 critical jobs reached the provider that answered them: before the outage, and since."""
    reached = {tag_of(call): call.at for call in job_calls((*evidence.primary, *evidence.fallback)) if call.outcome == OK}
    since = min((call.at for call in job_calls(evidence.primary) if call.outcome != OK), default=math.inf)
    found: dict[str, list[float]] = {"before": [], "since": []}
    for tag, job in evidence.jobs.items():
        sent_at = evidence.began_at + job.at_s
        if job.task == "reply" and tag in reached:
            found["before" if sent_at < since else "since"].append(max(0.0, reached[tag] - sent_at))
    return {when: round(sorted(waits)[math.ceil(0.99 * len(waits)) - 1], 2) for when, waits in found.items() if waits}


def holds(evidence: Evidence) -> Iterator[tuple[Line, Sequence[Line]]]:
    """Each hold of each job, with the job's whole story."""
    for lines in evidence.stories.values():
        yield from ((line, lines) for line in lines if line.event == "held")


def criticality_of(lines: Sequence[Line]) -> Any:
    return next((line.facts["criticality"] for line in lines if line.event == "enqueued"), None)


def job_calls(calls: Iterable[Call]) -> Iterator[Call]:
    """The calls of jobs: probes name none."""
    return (call for call in calls if call.job is not None)


def tag_of(call: Call) -> str:
    return str(call.job).rpartition("/")[0]


def retries_of(call: Call) -> int:
    """How many attempts of its job were burnt before this call."""
    return int(str(call.job).rpartition("/")[2])


def examples(cases: Sequence[str]) -> tuple[str, ...]:
    more = len(cases) - EXAMPLES
    return (*cases[:EXAMPLES], f"... and {more} more") if more > 0 else tuple(cases)
