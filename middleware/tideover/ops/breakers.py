# SPDX-License-Identifier: Apache-2.0
"""Breakers for an operator: how each stands and on what evidence, what would close it, and the operator's own word over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from tideover.core.breaker import CLOSED, GRAVITY, Breaker, State, Transition, in_force, next_probe_at, threshold, together
from tideover.core.detector import BLACKOUT, BROWNOUT, is_brownout
from tideover.core.pacing import Factor, Pace, begun, pace_of
from tideover.core.route import above, is_task_key
from tideover.ops.access import Operator, Refused, Space, reaching
from tideover.ops.values import about, counted
from tideover.settings import Settings
from tideover.sources import did_you_mean

FACTORS: dict[str, Factor] = {factor: factor for factor in get_args(Factor)}
FRESH_S = 5.0
"""How long the leader's word on a pace is good for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """An operator's word over a breaker, which ends by itself."""

    state: Literal["open", "closed"]
    until_at: float
    who: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerStatus:
    """A route and model, a whole route (`route/*`) or a task (`task:name`).

    `state` is in force: the graver of its own and its route's, or what an operator said; `computed` is its own. `since_at`: of
    the computed state; `opened_at`: of the latest opening. `brownout`, `blackout`: where its charts stand, of `threshold`;
    `calls`, `failed`: the evidence in them; `usual_failure_rate`, `calls_per_s`: what was learned of it. `parked`: what must be
    mended (`auth`, `quota`, `model`, `paused`). `pace`: model calls per second, live and held ones, while jobs are held for it;
    `limited_by`: what keeps that from being higher. `would_close`: in words. `page`: what
    the provider's status page says.
    """

    key: str
    state: State
    computed: State
    generation: int
    since_at: float | None
    opened_at: float | None
    why: str
    parked: str | None
    forced: Override | None
    throttled_until_at: float | None
    next_probe_at: float | None
    probes_failed: int
    probed_at: float | None
    probe_said: str | None
    brownout: float
    blackout: float
    threshold: float
    calls: int
    failed: int
    is_brownout: bool
    usual_failure_rate: float
    calls_per_s: float
    pace: float
    limited_by: str
    would_close: str
    page: str | None

    @property
    def is_down(self) -> bool:
        return self.state in ("open", "half-open")


def statuses(known: Mapping[str, Breaker], settings: Settings, now: float) -> tuple[BreakerStatus, ...]:
    """All breakers; of whole routes and tasks only those that have something to say."""
    tellings = (breaker_status(key, breaker, known.get(above(key), CLOSED), settings, now) for key, breaker in known.items())
    return tuple(told for told in tellings if ("/" in told.key and not told.key.endswith("/*")) or is_telling(told))


def is_telling(told: BreakerStatus) -> bool:
    return told.state != "closed" or told.computed != "closed" or told.forced is not None


def breaker_status(key: str, breaker: Breaker, route: Breaker, settings: Settings, now: float) -> BreakerStatus:
    """`route`: the breaker above it."""
    seen = together(breaker, CLOSED if key == above(key) else route, now)
    policy, h, forced = settings.breaker.policy(), threshold(breaker, now), breaker.forced
    probe_at = next_probe_at(breaker, now, policy) if breaker.is_down else None
    pace = pace_now(breaker, seen, settings, now)
    return BreakerStatus(
        key=key,
        state=seen.state,
        computed=breaker.state,
        generation=breaker.generation,
        since_at=instant(breaker.since),
        opened_at=instant(breaker.opened_at),
        why=seen.why,
        parked=breaker.parked or None,
        forced=Override(state=forced.state, until_at=forced.until, who=forced.who, why=forced.why)
        if forced is not None and in_force(breaker, now) is not breaker
        else None,
        throttled_until_at=seen.throttled_until if seen.throttled_until > now else None,
        next_probe_at=probe_at,
        probes_failed=breaker.probes_failed,
        probed_at=instant(breaker.probed_at),
        probe_said=breaker.probe_said or None,
        brownout=round(breaker.charts.brownout, 2),
        blackout=round(breaker.charts.blackout, 2),
        threshold=round(h, 2),
        calls=breaker.charts.calls,
        failed=breaker.charts.failed,
        is_brownout=is_brownout(breaker.charts, h),
        usual_failure_rate=round(breaker.base.failure_rate, 4),
        calls_per_s=round(breaker.base.per_s, 3),
        pace=round(pace.rate, 2),
        limited_by=pace.factor,
        would_close=would_close(key, breaker, seen, probe_at, now),
        page=None if breaker.page is None or now >= breaker.page.until else breaker.page.said,
    )


def pace_now(own: Breaker, seen: Breaker, settings: Settings, now: float) -> Pace:
    """The leader's latest word, as long as it is fresh; else what the breaker would begin with."""
    policy = settings.drain.policy()
    would = pace_of(seen, begun(now, policy), {}, now=now, policy=policy)
    fresh = now - own.paced_at < FRESH_S and would.rate > 0
    return Pace(own.pace, FACTORS[own.limited_by]) if fresh else would


def instant(at: float) -> float | None:
    """In the store 0 stands for never."""
    return None if at == 0 else at


def would_close(key: str, own: Breaker, seen: Breaker, probe_at: float | None, now: float) -> str:
    """What must happen for it to be closed again; empty: it is."""
    forced = in_force(own, now)
    if forced is not own:
        until = f"in {about(own.forced.until - now)}" if own.forced is not None else "soon"
        return f"`tideover breaker auto {key}`, or {until} by itself: then it is {own.state} as computed"
    if seen.state != own.state and GRAVITY[own.state] < GRAVITY[seen.state]:
        return f"its route {above(key)} is {seen.state}: that must recover first"
    match own.state:
        case "closed":
            return ""
        case "suspect":
            return "successes bring its charts down; most calls failing opens it"
        case "recovering":
            return "it closes once it has stood its time without failures"
        case "half-open":
            return "it is being asked now; about ten answers in a row say that it is back"
        case "open" if own.parked == "paused":
            return f"mend the task, then `tideover breaker resume {key}`"
        case "open":
            when = "" if probe_at is None else f"; next probe in {about(max(0.0, probe_at - now))}"
            mend = {
                "auth": "its credential must be mended",
                "quota": "its money is spent",
                "model": "its model map must be mended",
            }
            first = f"{mend[own.parked]}; " if own.parked in mend else ""
            return f"{first}about ten probes in a row must be answered{when}"


def evidence_of(told: BreakerStatus) -> str:
    """What its charts say, for a reader."""
    seen = f"{told.failed} of {counted(told.calls, 'call')} failed since the charts left zero" if told.calls else "no failure"
    return (
        f"{seen}; {BLACKOUT:.0%} chart {told.blackout:.1f}, {BROWNOUT:.0%} chart {told.brownout:.1f} of {told.threshold:.1f} "
        f"(suspect at half); usually {told.usual_failure_rate:.1%} at the most, {told.calls_per_s:.2g} calls/s"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerExplanation:
    """One breaker, its evidence in words, and which processes alone find it down."""

    namespace: str
    asked_at: float
    breaker: BreakerStatus
    evidence: str
    reporters: int
    failing: int
    apart: tuple[str, ...]


def explain_breaker(operator: Operator, key: str) -> BreakerExplanation:
    """How a breaker stands, why, and what would close it.

    Raises:
      Refused: there is no such breaker.
    """
    with reaching(operator.settings):
        space = operator.the_space("explain a breaker")
        known, now = space.breakers_known(), operator.now()
        check_key(space, key, known)
        told = breaker_status(key, known[key], known.get(above(key), CLOSED), operator.settings, now)
        by = space.breakers.report(key, "operator").by
        apart = tuple(worker for worker, facts in sorted(space.registry.workers().items()) if key in facts.get("apart", ()))
    return BreakerExplanation(
        namespace=space.name,
        asked_at=now,
        breaker=told,
        evidence=evidence_of(told),
        reporters=by.reporters,
        failing=by.failing,
        apart=apart,
    )


def force(operator: Operator, key: str, state: Literal["open", "closed"], *, for_s: float, who: str, why: str) -> BreakerStatus:
    """Sets an operator's word over what is computed, for so long. What is computed goes on beneath it.

    Raises:
      Refused: no route has such a name.
    """
    with reaching(operator.settings):
        space = operator.the_space("force a breaker")
        route = key.partition("/")[0]
        if route not in space.registry.routes() or "/" not in key:
            keys = sorted({*space.breakers.keys_known(), *(f"{name}/*" for name in space.registry.routes())})
            raise Refused(f"there is no breaker {key!r}{did_you_mean(key, keys)}. A whole route is ROUTE/*")
        breaker = space.breakers.force(key, state, for_s, who, why)
        over = space.breakers.read([above(key)])[above(key)]
        return breaker_status(key, breaker, over, operator.settings, operator.now())


def unforce(operator: Operator, key: str) -> tuple[bool, BreakerStatus]:
    """Takes an operator's word back; whether there was one, and how the breaker stands now."""
    with reaching(operator.settings):
        space = operator.the_space("unforce a breaker")
        check_key(space, key, space.breakers_known())
        gone = space.breakers.unforce(key)
        read = space.breakers.read([key, above(key)])
        return gone, breaker_status(key, read[key], read[above(key)], operator.settings, operator.now())


def resume(operator: Operator, key: str) -> BreakerStatus:
    """Lets jobs try a parked route or a paused task again, at the pace of one that recovers.

    Raises:
      Refused: it is not open.
    """
    with reaching(operator.settings):
        space = operator.the_space("resume a breaker")
        known, now = space.breakers_known(), operator.now()
        check_key(space, key, known)
        seen = known[key]
        if seen.state != "open" or not space.breakers.transition(key, seen, Transition(to="recovering", why="resumed"), now):
            raise Refused(f"{key} is {seen.state}: only an open one can be resumed")
        read = space.breakers.read([key, above(key)])
        return breaker_status(key, read[key], read[above(key)], operator.settings, operator.now())


def check_key(space: Space, key: str, known: Mapping[str, Breaker]) -> None:
    if key not in known:
        raise Refused(f"there is no breaker {key!r} in {space.name}{did_you_mean(key, known)}")
    if is_task_key(key) and not known[key].is_down:
        raise Refused(f"{key.removeprefix('task:')} is not paused")
