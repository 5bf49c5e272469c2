# SPDX-License-Identifier: Apache-2.0
"""One job: what happened to it, where it is now, what would free it and when that is expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

from tideover.core.job import CRITICAL_SUFFIX, ENDS, Criticality, End, is_criticality
from tideover.core.pacing import PATIENCE_S
from tideover.core.route import above
from tideover.ops.access import Operator, Space, find_job, reaching
from tideover.ops.breakers import BreakerStatus, breaker_status
from tideover.ops.drain import turn_after_s
from tideover.ops.renewal import readable
from tideover.ops.standing import workers_of
from tideover.ops.values import about, counted
from tideover.settings import Settings
from tideover.stamp import stamp_of, tenant_of
from tideover.store.facts import HeldFacts
from tideover.store.letters import Letters
from tideover.store.stories import Line, told_by
from tideover.store.twins import Twins

LOOKS = 5
"""A job that is in no place may just be on its way; so often we look before we say that it is lost."""

Where = Literal["queued", "running", "held", "ended", "lost"]


LATE = "its turn comes after its expiry"
WHY = {
    "outage": "no route that it may use is up",
    "pace": "the pace had no room for it",
    "suspect": "its route may be failing, and it can wait",
    "failed": "its own call failed before a breaker opened",
    "coalesced": "another job with its key runs for it",
    "paused": "most jobs of its task are refused as wrong",
    "review": "it needs review",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """One line of a job's story; `facts` are what `words` says, for programs."""

    told_at: float
    event: str
    words: str
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A breaker that frees the job once it lets go; `expected_at` None: nobody can tell.

    `back_by_at`: the provider must be back by then for the job's turn to come before its expiry, as far as can be told; in the
    past: that is not feasible any more. None: it never expires, or its route is up.
    """

    breaker: str
    state: str
    words: str
    expected_at: float | None
    back_by_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """`end` is None while the job lives, and when nobody wrote down how it ended.

    Only of a held job is known: `reason`, `detail` (its last failure, or why it needs review), `holds` (how often it was held,
    this time included), `ahead` (held jobs that go before it; None: it waits for a human, not for its turn). Only of one that
    is alive: `expires_at`, `tenant`, `tag`. `overdue`: it is queued and past its expiry, so it ends as expired once a worker
    reaches it. `restorable`: it has ended, and is a dead letter. `remedy`: what a human must do.
    """

    id: str
    namespace: str
    asked_at: float
    state: Where
    end: End | None
    task: str | None
    criticality: Criticality | None
    lane: str | None
    reason: str | None
    since_at: float | None
    expires_at: float | None
    overdue: bool
    restorable: bool
    ahead: int | None
    detail: str | None
    tenant: str | None
    tag: str | None
    holds: int | None
    remedy: str | None
    story: tuple[Told, ...]
    ways: tuple[Way, ...]
    hindrances: tuple[str, ...]


def explain(operator: Operator, asked: str) -> Explanation:
    """Where the job of this id (or of its first characters) is, why, since when, and what would free it.

    Raises:
      JobNotFound: nothing is known of it, or the characters stand for several jobs.
    """
    with reaching(operator.settings):
        now = operator.now()
        space, job_id = find_job(operator, asked)
        where, lane, held = locate(space, job_id)
        told = [*space.stories.of(job_id), *([] if held is None else told_by(held))]
        lines = tuple({line.encode(): line for line in told}.values())
        ahead = None if held is None or held.reason == "review" else ahead_of(space, held)
        ways = () if held is None or ahead is None else ways_out(space, held, ahead, operator.settings, now)
        obstacles = hindrances(space, lane, operator.settings, now)
        said = said_of_held(held) if held is not None else said_of(space, job_id, where, lines)
        restorable = where == "ended" and Letters(operator.client, space.backlog.keys).has(job_id, space.registry.queues())
    last = lines[-1] if lines else None
    ended = last is not None and where == "ended" and last.event in ENDS
    return Explanation(
        id=job_id,
        namespace=space.name,
        asked_at=now,
        state=where,
        end=next(end for end in ENDS if last is not None and end == last.event) if ended else None,
        lane=lane,
        reason=None if held is None else held.reason,
        since_at=held.held_ms / 1000 if held is not None else (last.at if last is not None and ended else None),
        overdue=where == "queued" and said["expires_at"] is not None and said["expires_at"] <= now,
        restorable=restorable,
        ahead=ahead,
        detail=None if held is None else held.detail,
        holds=None if held is None else held.holds,
        remedy=None if held is None else remedy_for(held),
        story=tuple(Told(told_at=line.at, event=line.event, words=in_words(line), facts=line.facts) for line in lines),
        ways=ways,
        hindrances=obstacles,
        **said,
    )


class Said(TypedDict):
    """What was said of a job when it was sent."""

    task: str | None
    criticality: Criticality | None
    expires_at: float | None
    tenant: str | None
    tag: str | None


def said_of_held(held: HeldFacts) -> Said:
    return Said(
        task=held.task,
        criticality=held.criticality,
        expires_at=None if held.expires_ms is None else held.expires_ms / 1000,
        tenant=held.tenant,
        tag=held.tag,
    )


def said_of(space: Space, job_id: str, where: Where, lines: Sequence[Line]) -> Said:
    """From the message of a job that is queued or runs; of another one its story knows some."""
    told = lines[0].facts if lines else {}
    said = Said(task=told.get("task"), criticality=told.get("criticality"), expires_at=None, tenant=None, tag=None)
    place = space.backlog.place(job_id, space.registry.queues()) if where in ("queued", "running") else None
    body = None if place is None else Letters(space.backlog.client, space.backlog.keys).live_body(*place)
    message = None if body is None else readable(body)
    if message is None:
        return said
    stamp = stamp_of(message)
    criticality, expires_ms, tag = (stamp.get(name) for name in ("criticality", "expires_ms", "tag"))
    return Said(
        task=message.actor_name,
        criticality=criticality if is_criticality(criticality) else said["criticality"],
        expires_at=expires_ms / 1000 if isinstance(expires_ms, int | float) else None,
        tenant=tenant_of(message),
        tag=tag if isinstance(tag, str) else "",
    )


def remedy_for(held: HeldFacts) -> str | None:
    """What a human must do about a held job; None: it needs nobody."""
    if held.reason != "review":
        return None
    return f"No breaker frees it. Mend what is said of it, then `tideover release {held.job_id}`: it runs as any other job does"


def locate(space: Space, job_id: str) -> tuple[Where, str | None, HeldFacts | None]:
    """Its place, its lane and, while it is held, its facts."""
    lane = None
    for _ in range(LOOKS):
        place = space.backlog.place(job_id, space.registry.queues())
        if place is None:
            return "ended", None, None
        lane, redis_id = place
        where, held = space.backlog.whereabouts(lane, redis_id)
        if where is not None:
            return where, lane, held
    return "lost", lane, None


def in_place(space: Space, job_id: str, where: Where) -> str:
    """Where a job is, as the end of a sentence."""
    if where != "ended":
        return f"it is {where}"
    end = end_told(space.stories.of(job_id))
    return "it has ended" if end is None else f"it has ended as {end}"


def end_told(story: Sequence[Line]) -> End | None:
    """How a job ended at last, as its story tells it."""
    return next((end for line in reversed(story) for end in ENDS if end == line.event), None)


def ahead_of(space: Space, held: HeldFacts) -> int:
    """How many held jobs go before it, of those that wait for the same breakers: critical ones, and earlier ones of its own."""
    lanes = [] if held.queue.endswith(CRITICAL_SUFFIX) else space.backlog.groups(held.queue + CRITICAL_SUFFIX)
    ours = [group for group in (*space.backlog.groups(held.queue), *lanes) if group.facet.wait_key == held.wait_key]
    going = [group for group in ours if group.facet.reason != "coalesced"]
    critical = sum(group.n for group in going if group.queue != held.queue)
    return critical + space.backlog.ahead(held, [group for group in going if group.queue == held.queue])


def ways_out(space: Space, held: HeldFacts, ahead: int, settings: Settings, now: float) -> tuple[Way, ...]:
    """What each breaker that it waits for needs to let it go; any one of them will do."""
    if space.registry.bypass() is not None:
        return (
            Way(
                breaker="any",
                state="bypass",
                words=f"tideover is bypassed; {counted(ahead, 'job')} go before it",
                expected_at=now,
            ),
        )
    if held.reason == "coalesced":
        leader = Twins(space.backlog.client, space.backlog.keys).leader(held.queue, held.twin) or held.detail
        words = f"the job {leader} has its key, and its answer is for both; if it has none, this one runs"
        return (Way(breaker=" or ".join(held.breaker_keys), state="coalesced", words=words, expected_at=None),)
    keys = held.breaker_keys
    states = space.breakers.read([*keys, *(above(key) for key in keys)])
    ways = []
    for key in keys:
        told = breaker_status(key, states[key], states[above(key)], settings, now)
        turn_in_s = turn_after_s(space, key, states[key], settings, now)(ahead + 1)
        ways.append(feasible(way_out(told, ahead, turn_in_s, now), held, turn_in_s, now))
    return tuple(ways)


def feasible(way: Way, held: HeldFacts, turn_in_s: float, now: float) -> Way:
    """With word on whether the job's turn comes before its expiry."""
    if held.expires_ms is None:
        return way
    back_by_at = held.expires_ms / 1000 - turn_in_s
    if way.state in ("open", "half-open"):
        if back_by_at <= now:
            return replace(way, words=f"{way.words}; {LATE} even if it were back now", back_by_at=back_by_at)
        when = f"in time if it is back within {about(back_by_at - now)}, as its turn comes about {about(turn_in_s)} later"
        return replace(way, words=f"{way.words}; {when}", back_by_at=back_by_at)
    late = way.expected_at is not None and way.expected_at > held.expires_ms / 1000
    return replace(way, words=f"{way.words}; {LATE} at this pace") if late else way


def way_out(breaker: BreakerStatus, ahead: int, turn_in_s: float, now: float) -> Way:
    why = f" ({breaker.why})" if breaker.why else ""
    expected_at: float | None = None
    match breaker.state:
        case "open" | "half-open":
            expected_at = None if breaker.next_probe_at is None else max(now, breaker.next_probe_at)
            words = f"is {breaker.state}{why}: {breaker.would_close}"
        case _ if breaker.throttled_until_at is not None:
            expected_at = breaker.throttled_until_at
            words = f"asked for quiet for {about(expected_at - now)} more; {counted(ahead, 'job')} go before this one"
        case "suspect" if breaker.pace == 0:
            expected_at = now + PATIENCE_S
            words = f"may be failing{why}: {breaker.would_close}; else a few jobs try it within {PATIENCE_S:.0f} s"
        case "closed" | "recovering" | "suspect":
            expected_at = now + turn_in_s
            words = f"is {breaker.state}; {turn(ahead, breaker.pace)}"
    return Way(breaker=breaker.key, state=breaker.state, words=words, expected_at=expected_at)


def turn(ahead: int, pace: float) -> str:
    return f"{counted(ahead, 'held job')} before this one; the route is used at {pace:.0f} calls/s, live ones included"


def hindrances(space: Space, lane: str | None, settings: Settings, now: float) -> tuple[str, ...]:
    """What else keeps a live job from going on."""
    if lane is None:
        return ()
    alive = [worker for worker in workers_of(space, settings, now) if not worker.silent]
    queue = base(lane)
    if not alive:
        return ("no worker is alive, so nothing is probed, released or run",)
    if not any(base(name) == queue for worker in alive for name in worker.queues):
        return (f"no worker that is alive takes jobs of the queue {queue}",)
    return ()


def base(lane: str) -> str:
    """The queue as the task names it.

    >>> base("default.critical.DQ")
    'default'
    """
    return lane.removesuffix(".DQ").removesuffix(CRITICAL_SUFFIX)


def in_words(line: Line) -> str:
    """What happened, for a reader. Events that a later version tells are named as they are."""
    facts = line.facts
    served = f", served by {', '.join(facts['served'])}" if facts.get("served") else ""
    match line.event:
        case "enqueued":
            return f"enqueued as {facts.get('criticality')}"
        case "held":
            detail = f"; last failure: {facts['detail']}" if facts.get("detail") else ""
            why = WHY.get(facts["reason"], facts["reason"])
            if facts["reason"] == "coalesced":
                return f"held (coalesced): {why}: {facts.get('detail')}"
            if facts["reason"] == "review":
                return (
                    f"held for review: {facts.get('detail')}; once that is mended, `tideover release {line.job_id}` lets it run"
                )
            return f"held ({facts['reason']}): {why}; waits for {' or '.join(facts['waits_for'])}{detail}"
        case "released" if facts.get("by") == "hand":
            forced, reason = ("by force " if facts.get("forced") else ""), facts.get("reason")
            return f"released {forced}by {facts.get('who')}{'' if reason is None else f': {reason}'}"
        case "released":
            return f"released by {facts.get('by')} after {about(facts.get('held_s', 0))}"
        case "expired" | "succeeded" as event if facts.get("degraded"):
            old = f", {about(facts['age_s'])} old" if "age_s" in facts else ""
            why = "no route was usable" if facts["degraded"] == "outage" else "it was past its expiry"
            return f"{event}, with its task's degraded answer{old}: {why}"
        case "expired":
            return f"expired{' while held' if facts.get('while') == 'held' else ''}; no call was made after that"
        case "discarded" if "because" in facts:
            return f"discarded by {facts.get('who')}: {facts['because']}; it is kept with the dead letters for 7 days"
        case "restored":
            had, reason = facts.get("ended"), facts.get("reason")
            after = "" if had is None else f" (it had ended as {had})"
            return f"restored by {facts.get('who')}{after}{'' if reason is None else f': {reason}'}; it begins anew"
        case "failed":
            return f"failed for good{served}; it is kept with the dead letters for 7 days"
        case "succeeded" if "answered_with" in facts:
            return f"answered with the job {facts['answered_with']}, which has its key{served}"
        case event:
            return f"{event}{served}"
