# SPDX-License-Identifier: Apache-2.0
"""The decision table: may this job call now, over which route, or must it wait?

| | primary usable | throttled or recovering | primary down, a fallback usable | no route usable | past its expiry |
|---|---|---|---|---|---|
| critical | run | recovering: run; throttled: reroute, else hold | reroute | hold | expire |
| deferrable | run | hold (`pace`), released at the pace | hold | hold | expire |

A deferrable task may ask to be rerouted as a critical one is (`reroute_when_deferrable`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tideover.core.job import Job
from tideover.core.route import BUSY, Hop, Permit

Readiness = Literal["yes", "pace", "no"]
Reason = Literal["outage", "pace", "failed", "review"]
"""Why a job is held: its breakers are open; the pace has no room; its own call failed before a breaker opened; only a human can
say what to do with it."""


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
class Expire:
    pass


Verdict = Run | Reroute | Hold | Expire


def readiness(job: Job, hop: Hop, *, now: float, permit: Permit | None) -> Readiness:
    """Whether a hop can carry this job's call now (*pace*: it could, but must not be hurried)."""
    if hop.refused is not None:
        return "pace" if hop.refused == BUSY else "no"
    if permit is not None and permit.covers(hop.key, hop.breaker):
        return "yes"
    if hop.breaker.throttled_until > now:
        return "pace"
    match hop.breaker.state:
        case "closed":
            return "yes"
        case "recovering":
            return "yes" if job.criticality == "critical" else "pace"
        case "open" | "half-open":
            return "no"


def decide(job: Job, chain: Sequence[Hop], *, now: float, permit: Permit | None = None) -> Verdict:
    """The verdict for a job that calls one model. `chain`: its routes for that model, primary first, never empty."""
    if job.expires_at is not None and now >= job.expires_at:
        return Expire()
    open_to_it = chain if job.may_reroute else chain[:1]
    ready = [(hop, readiness(job, hop, now=now, permit=permit)) for hop in open_to_it]
    for hop, answer in ready:
        if answer == "yes":
            return Run(hop.route) if hop is chain[0] else Reroute(hop.route)
    waits_for = [hop for hop, _ in ready if hop.serves or hop is chain[0]]
    reason: Reason = "pace" if any(answer == "pace" for _, answer in ready) else "outage"
    return hold_for_any(waits_for, reason)


def hold_for_any(hops: Sequence[Hop], reason: Reason) -> Hold:
    """A hold that the breaker of any of these hops frees."""
    return Hold(tuple(hop.key for hop in hops), reason, sum(hop.breaker.generation for hop in hops))


def unless_one_runs(verdicts: Sequence[Verdict]) -> Hold | None:
    """The verdict for a job that may call any of several models: held while none of them could be called, freed by the first.

    Which one it will call only its function knows, so the call itself is asked again. None: let it run.
    """
    holds = [verdict for verdict in verdicts if isinstance(verdict, Hold)]
    if not holds or len(holds) < len(verdicts):
        return None
    wait_key = tuple(dict.fromkeys(key for hold in holds for key in hold.wait_key))
    reason: Reason = "pace" if any(hold.reason == "pace" for hold in holds) else "outage"
    return Hold(wait_key, reason, sum(hold.generation for hold in holds))
