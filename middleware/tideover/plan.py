# SPDX-License-Identifier: Apache-2.0
"""What one model call does next, decided in one place: a generator without I/O, for whom threads and event loops run steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from tideover import clock, events
from tideover.attempt import Attempt, HoldSignal, Served
from tideover.core.admission import Degrade, Expire, GiveBack, Hold, Reroute, Run, Verdict, decide
from tideover.core.route import BUSY, NO_TIME, NO_TURN, Hop, Permit, breaker_key
from tideover.errors import JobExpired, ProviderError

if TYPE_CHECKING:
    from tideover.evidence import Flight
    from tideover.providers.wire import Tried

PATIENCE_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Waits of a call that failed while its breaker is not open: of a job that was released in this very generation, which is not
held in it again, and of a critical one with a route that is up. Before the first, a probe tells whether that route is up."""

MOST_TURN_S = 2.0
"""How long a live call waits for its turn on a recovering route before it goes elsewhere, or is held."""

MOST_QUIET_S = 120.0
"""How long a released job keeps quiet in its slot, all in all, because the provider asks it to (429)."""

MOST_ROOM_S = 30.0
"""How long a critical call, or one of a released job, waits for room under its route's limits per minute, where others wait
`MOST_TURN_S`: they find no room while these wait."""

BUSY_WAIT_S = 0.05
MOST_BUSY_S = 2.0
"""How long a call waits for a slot of its route before it goes elsewhere, or is held."""


@dataclass(frozen=True, slots=True)
class Try:
    """Call this route now, under its own name of the model.

    `key`: give up when this breaker opens; None: see it through. `began` hears of the first content; None: nobody does, so that
    the call goes out just as the caller made it. `reroutes`: it is not the job's primary. `refuses_loss`: a route
    that would lose a part of the request is none. `most_s`: how long it may take; `silence_s`: and its provider be silent, if
    that is shorter than the route's own `timeout_s`.
    """

    route: str
    model: str
    key: str | None = None
    began: Callable[[], None] | None = None
    reroutes: bool = False
    refuses_loss: bool = False
    most_s: float = math.inf
    silence_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Wait:
    seconds: float


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask the route a one-token question; the answer is whether that failed."""

    route: str
    model: str


@dataclass(frozen=True, slots=True)
class Turn:
    """Take a turn in the pace of this breaker; the answer is how long to wait for it, None: more than `most_s`."""

    key: str
    most_s: float


@dataclass(frozen=True, slots=True)
class Room:
    """Take one call's room under the limits of this route; the answer is how long to wait for it and the tokens set aside.

    None: more than `most_s`.
    """

    route: str
    most_s: float


Step: TypeAlias = Try | Wait | Probe | Turn | Room
Said: TypeAlias = "Tried | bool | float | tuple[float, int] | None"
Plan: TypeAlias = "Generator[Step, Said, Tried]"


def plan(attempt: Attempt, model: str) -> Plan:
    """Which route to try, and what its answer means for the job; ends with what the caller gets, or in a hold."""
    health, job, primary = attempt.health, attempt.job, attempt.job.routes[0]
    if attempt.degraded == "outage":
        raise ProviderError(primary, "outage", "no route is usable, and what makes the degraded answer may not call a model")
    attempt.model = model
    health.learn(job.task, model)
    if health.mode == "bypass":
        return (yield from just_call(attempt, primary, model))
    refused: dict[str, str] = {}
    last: Tried | None = None
    pauses = Pauses()
    yield from await_quiet(attempt, breaker_key(primary, model))
    while True:
        verdict = verdict_now(attempt, model, refused)
        match verdict:
            case Run(route) | Reroute(route):
                tried = yield from try_route(attempt, route, model, refused)
                if isinstance(tried, str):
                    refused[route] = tried
                elif is_final(tried, route == primary) or health.mode != "act":
                    return tried
                else:
                    last, refused[route] = tried, BUSY if tried.outcome.kind == "throttle" else tried.outcome.why
                    if tried.outcome.kind == "caller":
                        attempt.unfit.add(route)
            case GiveBack():
                attempt.give_back = True
                raise HoldSignal
            case Hold():
                if NO_TURN in refused.values():
                    hold(attempt, verdict)
                if not (yield from stay(attempt, model, verdict, last, pauses)):
                    assert last is not None
                    return last
                refused.clear()
            case Degrade(otherwise):
                attempt.otherwise = otherwise
                raise HoldSignal
            case Expire():
                raise JobExpired(job.id)


@dataclass(slots=True)
class Pauses:
    """What a call has left of its patience, and how long it has kept quiet because it was told to."""

    patience: Iterator[float] = field(default_factory=lambda: iter(PATIENCE_S))
    quiet_s: float = 0.0


def stay(attempt: Attempt, model: str, verdict: Hold, last: Tried | None, pauses: Pauses) -> Generator[Step, Said, bool]:
    """Holds the job, or waits in its slot where a hold is not its due; False: it waited enough, and the failure is its own."""
    released = was_released(attempt, verdict)
    throttled = last is not None and last.outcome.kind == "throttle"
    if released and last is not None and throttled and pauses.quiet_s < MOST_QUIET_S:
        pause_s = min(max(PATIENCE_S[0], last.outcome.retry_after_s or 0.0), PATIENCE_S[-1])
        pauses.quiet_s += pause_s
        if not attempt.ends_within(pause_s):
            yield Wait(pause_s)
            return True
    insist_on = attempt.job.routes[0] if released else route_that_is_up(attempt, model)
    patience_s = None if insist_on is None else next(pauses.patience, None)
    if patience_s is not None and attempt.ends_within(patience_s):
        patience_s = None
    if patience_s is None and released and last is not None and not throttled:
        return False
    if insist_on is None or patience_s is None:
        hold(attempt, verdict)
    probes = patience_s == PATIENCE_S[0] and not attempt.ends_within(attempt.health.probing_s(insist_on, model))
    if probes and last is not None and (yield from is_down(insist_on, model, last)):
        return True
    yield Wait(patience_s)
    return True


def just_call(attempt: Attempt, route: str, model: str) -> Plan:
    """Calls the primary as if tideover were not there, apart from saying who answered."""
    name = attempt.health.settings.route(route).model(model) or model
    tried = yield Try(route, name)
    assert not isinstance(tried, bool | float | tuple | None)
    if tried.outcome.kind == "ok":
        attempt.served.append(Served(route, name, tried.losses))
    return tried


def verdict_now(attempt: Attempt, model: str, refused: dict[str, str]) -> Verdict:
    """The verdict on the next call. In observe mode it is only told, and the primary is called."""
    chain = attempt.health.chain(attempt.job, model, refused, attempt.unfit)
    verdict = decide(attempt.job, chain, now=clock.now(), permit=permit_for(attempt, chain[0]))
    if attempt.health.mode == "observe" and not isinstance(verdict, Run):
        would = f"reroute to {verdict.route}" if isinstance(verdict, Reroute) else type(verdict).__name__.lower()
        events.verdict_observed(attempt.job.id, attempt.job.task, would)
        return Run(chain[0].route)
    return verdict


def permit_for(attempt: Attempt, primary: Hop) -> Permit | None:
    """The job's permit. One that has had an answer goes on while its route recovers: to start it again would cost that call."""
    if attempt.permit is None and attempt.served and primary.breaker.state == "recovering":
        return Permit(primary.key, primary.breaker.generation)
    return attempt.permit


def await_quiet(attempt: Attempt, key: str) -> Generator[Step, Said, None]:
    """Waits, if the call is critical, while its primary asks to be left in peace; not if that takes long."""
    patience_s = MOST_TURN_S if attempt.job.criticality == "critical" and attempt.health.mode == "act" else 0.0
    while 0 < (quiet_s := attempt.health.view(key).throttled_until - clock.now()) <= patience_s:
        if attempt.ends_within(quiet_s):
            return
        yield Wait(quiet_s)
        patience_s -= quiet_s


def needs_turn(attempt: Attempt, key: str) -> bool:
    """Whether a call waits for its turn in the pace: a live one of a recovering route, which no release has paid for.

    The calls of a job that has had an answer go on: to hold it would cost that one.
    """
    paid = attempt.permit is not None and (attempt.permit.forced or attempt.permit.key == key)
    return attempt.health.mode == "act" and attempt.health.view(key).state == "recovering" and not paid and not attempt.served


def await_turn(attempt: Attempt, key: str) -> Generator[Step, Said, bool]:
    """Waits for the turn of a call in the pace of its route; False: it is too long, or the route went down."""
    wait_s = yield Turn(key, MOST_TURN_S)
    if isinstance(wait_s, float) and wait_s > 0:
        yield Wait(wait_s)
    return wait_s is not None and not attempt.health.view(key).is_down


def await_room(attempt: Attempt, route: str, key: str) -> Generator[Step, Said, int | None]:
    """Waits for room under the limits of a route; the tokens set aside, None: it is too long, or the route went down."""
    if attempt.health.mode != "act" or not attempt.health.rates.limited(route):
        return 0
    patient = attempt.job.criticality == "critical" or attempt.permit is not None or bool(attempt.served)
    found = yield Room(route, MOST_ROOM_S if patient else MOST_TURN_S)
    wait_s, aside = found if isinstance(found, tuple) else (0.0, None)
    if aside is None or attempt.ends_within(wait_s):
        attempt.detail = f"{route}: its limits per minute have no room"
        return None
    if wait_s > 0:
        yield Wait(wait_s)
    return None if attempt.health.view(key).is_down else aside


def try_route(attempt: Attempt, route: str, model: str, refused: dict[str, str]) -> Generator[Step, Said, Tried | str]:
    """One call over one route, reported to its breaker; or why there was none: it has no slot, no turn in the pace, no time."""
    health, key = attempt.health, breaker_key(route, model)
    turn = needs_turn(attempt, key)
    if turn and not (yield from await_turn(attempt, key)):
        return NO_TURN
    aside = yield from await_room(attempt, route, key)
    if aside is None:
        return NO_TURN
    busy_until = clock.monotonic() + MOST_BUSY_S
    while not health.slots.take(route):
        if clock.monotonic() >= busy_until:
            return BUSY
        yield Wait(BUSY_WAIT_S)
    try:
        step = step_over(attempt, route, model, refused)
        if step.most_s <= 0:
            return NO_TIME
        if step.reroutes:
            why = attempt.detail or refused.get(attempt.job.routes[0], "")
            events.job_rerouted(attempt.job.id, attempt.job.task, route, why)
        payer = attempt.job.task if step.reroutes else ""
        flight = health.begin(route, model, attempt.job.id, paid_by=attempt.paid_by(key, turn=turn), task=payer)
        flight.aside = aside
        try:
            tried = yield replace(step, began=lambda: health.flights.first_token(flight))
        except BaseException:
            health.flights.forget(flight)
            raise
    finally:
        health.slots.free(route)
    assert not isinstance(tried, bool | float | tuple | None)
    note_answer(attempt, flight, step, tried)
    return tried


def step_over(attempt: Attempt, route: str, model: str, refused: Container[str]) -> Try:
    """The call: how long it may take, and what it gives way to."""
    health, job, rest_s = attempt.health, attempt.job, attempt.rest_s()
    insists = attempt.permit is not None and attempt.permit.forced  # an operator wants this call to be seen through
    elsewhere = job.may_reroute and len(job.routes) > 1 and not insists
    others = (other for other in job.routes if other != route and other not in refused)
    in_reserve = elsewhere and any(not health.view(breaker_key(other, model)).is_down for other in others)
    return Try(
        route,
        health.settings.route(route).model(model) or model,
        key=breaker_key(route, model) if elsewhere else None,
        reroutes=route != job.routes[0],
        refuses_loss=job.refuses_loss,
        most_s=rest_s,
        silence_s=rest_s / 2 if in_reserve else rest_s,  # half of the time is left for another route
    )


def note_answer(attempt: Attempt, flight: Flight, step: Try, tried: Tried) -> None:
    """Tells what a call came to: to its breaker, and for the job's story."""
    health = attempt.health
    attempt.called_s += clock.monotonic() - flight.began
    flight.foreign = attempt.foreign = tried.foreign
    if tried.limits:
        health.reporter.note_limits(flight, tried.limits, tried.outcome)
    if tried.outcome.kind == "ambiguous" and attempt.limit_s is not None and step.most_s < attempt.limit_s / 2:
        health.flights.forget(flight)  # it had too little time to say something of its provider
    else:
        tried.tell(lambda outcome: health.end(flight, outcome))
    if tried.outcome.kind == "ok":
        attempt.served.append(Served(step.route, step.model, tried.losses))
    else:
        attempt.detail = f"{step.route}: {tried.outcome.why}"


def is_final(tried: Tried, on_primary: bool) -> bool:
    """Whether the caller gets this answer: a good one, or a failure that no other route would mend."""
    match tried.outcome.kind:
        case "ok" | "local":
            return True
        case "caller":
            return on_primary  # a fallback may speak an older dialect; what the primary takes is not the caller's fault there
        case "outage" | "throttle" | "quota" | "auth" | "model" | "ambiguous":
            return False


def route_that_is_up(attempt: Attempt, model: str) -> str | None:
    """A route that a job which may be rerouted could use by now, although calls of this attempt failed; None: there is none."""
    chain = attempt.health.chain(attempt.job, model, {}, attempt.unfit)
    match decide(attempt.job, chain, now=clock.now(), permit=attempt.permit):
        case Run(route) | Reroute(route) if attempt.job.may_reroute:
            return route
        case _:
            return None


def is_down(route: str, model: str, last: Tried) -> Generator[Step, Said, bool]:
    """Tells an outage from a request that only this job cannot get answered: a probe decides, and may open the breaker."""
    return last.outcome.counts_as_failure and (yield Probe(route, model)) is True


def was_released(attempt: Attempt, verdict: Hold) -> bool:
    """Whether this job was released in the generation that it would be held in: a hold is for once per generation."""
    permit = attempt.permit
    if permit is None or permit.forced:  # forced: an operator let it try once
        return False
    view = attempt.health.view(permit.key)
    return permit.key in verdict.wait_key and permit.covers(permit.key, view)


def hold(attempt: Attempt, verdict: Hold) -> NoReturn:
    """Takes the job off the worker; `reason` says whether its breaker was open or its own call failed first."""
    state = attempt.health.view(verdict.wait_key[0]).state
    if verdict.reason == "outage" and state not in ("open", "half-open"):
        verdict = replace(verdict, reason="failed")
    attempt.hold = verdict
    raise HoldSignal
