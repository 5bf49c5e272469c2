# SPDX-License-Identifier: Apache-2.0
"""The decision table: may this job call now, over which route, or must it wait?

| | primary usable | suspect | throttled or recovering | primary down, a fallback usable | no route usable | past its expiry |
|---|---|---|---|---|---|---|
| critical | run | run | recovering: run; throttled: reroute, else hold | reroute | degraded answer, else hold | expire |
| deferrable | run | hold (`suspect`), nothing released | hold (`pace`), released at the pace | hold | hold | expire |

A critical call waits up to two seconds for its turn on a recovering route, or for a short quiet of a throttled one; then it is
rerouted or held (`pace`). A deferrable task may ask to be rerouted as a critical one is (`reroute_when_deferrable`). A job
whose route only this process cannot reach is given back to its queue, for another one; a critical one is rerouted if that has
not helped for a minute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tideover.core.job import Job
from tideover.core.route import BUSY, NO_TURN, Hop, Permit

Readiness = Literal["yes", "suspect", "pace", "no"]
Reason = Literal["outage", "suspect", "pace", "failed", "paused", "coalesced", "review"]
"""Why a job is held: its breakers are open; its route may be failing; the pace has no room; its own call failed before a
breaker opened; most jobs of its task are refused as wrong; another job with its key runs for it; only a human can say what to
do with it."""


@dataclass(frozen=True, slots=True)
class Run:
    route: str


@dataclass(frozen=True, slots=True)
class Reroute:
    route: str


@dataclass(frozen=True, slots=True)
class Hold:
    """`wait_key`: the breakers any of which frees the job. `generation`: the sum of theirs; it moves when any of them does."""

    wait_key: tuple[str, ...]
    reason: Reason
    generation: int
    detail: str = ""


def needs_review(why: str) -> Hold:
    """A hold that no breaker frees: a human must say what to do."""
    return Hold((), "review", 0, why)


@dataclass(frozen=True, slots=True)
class Degrade:
    """Answered without a model, as its task says. `otherwise`: the hold where the task turns out to have no such answer."""

    otherwise: Hold


@dataclass(frozen=True, slots=True)
class Expire:
    pass


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Back to the queue: other processes reach its route."""

    key: str


Verdict = Run | Reroute | Degrade | Hold | Expire | GiveBack


def readiness(job: Job, hop: Hop, *, now: float, permit: Permit | None) -> Readiness:
    """Whether a hop can carry this job's call now (*pace*: it could, but must not be hurried)."""
    if hop.refused is not None:
        return "pace" if hop.refused in (BUSY, NO_TURN) else "no"
    if permit is not None and permit.covers(hop.key, hop.breaker):
        return "yes"
    if hop.breaker.throttled_until > now:
        return "pace"
    match hop.breaker.state:
        case "closed":
            return "yes"
        case "suspect":
            return "yes" if job.criticality == "critical" else "suspect"
        case "recovering":
            return "yes" if job.criticality == "critical" else "pace"
        case "open" | "half-open":
            return "no"


def decide(job: Job, chain: Sequence[Hop], *, now: float, permit: Permit | None = None) -> Verdict:
    """The verdict for a job that calls one model. `chain`: its routes for that model, primary first, never empty."""
    if job.expires_at is not None and now >= job.expires_at:
        return Expire()
    apart = chain[0].apart and not chain[0].breaker.is_down
    if apart and (chain[0].refused is None or not job.may_reroute):
        return GiveBack(chain[0].key)
    open_to_it = chain if job.may_reroute else chain[:1]
    ready = [(hop, readiness(job, hop, now=now, permit=permit)) for hop in open_to_it]
    for hop, answer in ready:
        if answer == "yes" and not (hop.apart and not hop.breaker.is_down):
            return Run(hop.route) if hop is chain[0] else Reroute(hop.route)
    if apart:
        return GiveBack(chain[0].key)
    waits_for = [hop for hop, _ in ready if hop.serves or hop is chain[0]]
    answers = {answer for _, answer in ready}
    reason: Reason = "pace" if "pace" in answers else "suspect" if "suspect" in answers else "outage"
    hold = hold_for_any(waits_for, reason)
    return Degrade(hold) if reason == "outage" and job.degrades and job.criticality == "critical" else hold


def hold_for_any(hops: Sequence[Hop], reason: Reason) -> Hold:
    """A hold that the breaker of any of these hops frees."""
    return Hold(tuple(hop.key for hop in hops), reason, sum(hop.breaker.generation for hop in hops))


def unless_one_runs(verdicts: Sequence[Verdict]) -> Hold | GiveBack | None:
    """The verdict for a job that may call any of several models: held while none of them could be called, freed by the first.

    Which one it will call only its function knows, so the call itself is asked again. None: let it run.
    """
    holds = [verdict for verdict in verdicts if isinstance(verdict, Hold)]
    backs = [verdict for verdict in verdicts if isinstance(verdict, GiveBack)]
    if not verdicts or len(holds) + len(backs) < len(verdicts):
        return None
    if backs:
        return backs[0]
    wait_key = tuple(dict.fromkeys(key for hold in holds for key in hold.wait_key))
    reasons = {hold.reason for hold in holds}
    reason: Reason = "pace" if "pace" in reasons else "suspect" if "suspect" in reasons else "outage"
    return Hold(wait_key, reason, sum(hold.generation for hold in holds))
