# SPDX-License-Identifier: Apache-2.0
"""The carrier: one model call carried over the routes of its job. A middleware of the anthropic SDK, bound to the attempt.

What to do next is decided once, in `plan`, a generator without I/O; a thread and an event loop each have a short driver for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar

from tideover import clock, events
from tideover.attempt import Attempt, HoldSignal, Served, current
from tideover.core.admission import Expire, GiveBack, Hold, Reroute, Run, Verdict, decide
from tideover.core.outcome import Outcome
from tideover.core.route import BUSY, Hop, Permit, breaker_key
from tideover.errors import JobExpired, ProviderError

if TYPE_CHECKING:
    from anthropic import Anthropic, AsyncAnthropic

    from tideover.providers.wire import Tried

PATIENCE_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Waits of a call that failed while its breaker is not open: of a job that was released in this very generation, which is not
held in it again, and of a critical one with a route that is up. Before the first, a probe tells whether that route is up."""

MOST_QUIET_S = 120.0
"""How long a released job keeps quiet in its slot, all in all, because the provider asks it to (429)."""

BUSY_WAIT_S = 0.05
MOST_BUSY_S = 2.0
"""How long a call waits for a slot of its route before it goes elsewhere, or is held."""

MARGIN, MOST_MARGIN_S = 0.1, 1.0
"""The share of a coroutine's time limit, and the seconds at most, that are left when its call is given up."""

LAST_CHANCE_S = 2.0
"""How long a critical call that is under way when its breaker opens may still finish, before it is cut and rerouted."""

C = TypeVar("C", bound="Anthropic | AsyncAnthropic")


@dataclass(frozen=True, slots=True)
class Try:
    """Call this route now, under its own name of the model. `key`: give up when this breaker opens; None: see it through."""

    route: str
    model: str
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    seconds: float


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask the route a one-token question; the answer is whether that failed."""

    route: str
    model: str


Step: TypeAlias = Try | Wait | Probe
Said: TypeAlias = "Tried | bool | None"
Plan: TypeAlias = "Generator[Step, Said, Tried]"


def claude() -> Anthropic:
    """A real `anthropic.Anthropic` for the primary route. In a job its calls go over the job's routes, or hold the job."""
    from tideover.providers.anthropic import sync_client

    return wrap(sync_client(primary_of(current.get())))


def aclaude() -> AsyncAnthropic:
    """A real `anthropic.AsyncAnthropic` for the primary route. In a job its calls go over the job's routes, or hold it."""
    from tideover.providers.anthropic import async_client

    return wrap(async_client(primary_of(current.get())))


def wrap(client: C) -> C:
    """The same for a client that you built: it stays the primary. In a job its retries are off: waiting is tideover's."""
    import anthropic

    attempt = current.get()
    carrier: Any = async_carrier(attempt) if isinstance(client, anthropic.AsyncAnthropic) else sync_carrier(attempt)
    retries: dict[str, Any] = {} if attempt is None else {"max_retries": 0}
    carried: Any = client.with_options(middleware=[*client.middleware, carrier], **retries)
    return carried  # type: ignore[no-any-return]


def last_served() -> Served | None:
    """Who answered the latest call of the running job; None outside a job, and before its first answer."""
    attempt = current.get()
    return attempt.served[-1] if attempt is not None and attempt.served else None


def text_of(message: Any) -> str:
    """The text of a message's content blocks, one after the other."""
    return "".join(block.text for block in message.content if block.type == "text")


def primary_of(attempt: Attempt | None) -> str:
    from tideover.settings import settings

    return settings().primary if attempt is None else attempt.job.routes[0]


def plan(attempt: Attempt, model: str, *, streams: bool) -> Plan:
    """Which route to try, and what its answer means for the job; ends with what the caller gets, or in a hold."""
    health, job, primary = attempt.health, attempt.job, attempt.job.routes[0]
    attempt.model = model
    health.learn(job.task, model)
    if health.mode == "bypass":
        return (yield from just_call(attempt, primary, model))
    refused: dict[str, str] = {}
    last: Tried | None = None
    pauses = Pauses()
    while True:
        verdict = verdict_now(attempt, model, refused)
        match verdict:
            case Run(route) | Reroute(route):
                tried = yield from try_route(attempt, route, model, refused, streams=streams)
                if tried is None:
                    refused[route] = BUSY
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
                if not (yield from stay(attempt, model, verdict, last, pauses)):
                    assert last is not None
                    return last
                refused.clear()
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
    if patience_s == PATIENCE_S[0] and last is not None and (yield from is_down(insist_on, model, last)):
        return True
    yield Wait(patience_s)
    return True


def just_call(attempt: Attempt, route: str, model: str) -> Plan:
    """Calls the primary as if tideover were not there, apart from saying who answered."""
    name = attempt.health.settings.route(route).model(model) or model
    tried = yield Try(route, name)
    assert not isinstance(tried, bool | None)
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


def try_route(
    attempt: Attempt, route: str, model: str, refused: dict[str, str], *, streams: bool
) -> Generator[Step, Said, Tried | None]:
    """One call over one route, reported to its breaker; None when the route had no slot for it."""
    health, key = attempt.health, breaker_key(route, model)
    busy_until = clock.monotonic() + MOST_BUSY_S
    while not health.take_slot(route):
        if clock.monotonic() >= busy_until:
            return None
        yield Wait(BUSY_WAIT_S)
    name = health.settings.route(route).model(model) or model
    if route != attempt.job.routes[0]:
        events.job_rerouted(attempt.job.id, attempt.job.task, route, attempt.detail or refused.get(attempt.job.routes[0], ""))
    flight = health.begin(route, model, attempt.job.id, streams=streams, released=attempt.spend_release(key))
    try:
        insists = attempt.permit is not None and attempt.permit.forced  # an operator wants this call to be seen through
        elsewhere = attempt.job.may_reroute and len(attempt.job.routes) > 1 and not insists
        tried = yield Try(route, name, key if elsewhere else None)
    except BaseException:
        health.flights.forget(flight)
        raise
    finally:
        health.free_slot(route)
    assert not isinstance(tried, bool | None)
    flight.foreign = attempt.foreign = tried.foreign
    if flight.paced and tried.limit is not None:
        health.flights.limits[flight.key] = tried.limit
    if tried.streaming:
        health.flights.first_token(flight)
    tried.tell(lambda outcome: health.end(flight, outcome))
    if tried.outcome.kind == "ok":
        attempt.served.append(Served(route, name, tried.losses))
    else:
        attempt.detail = f"{route}: {tried.outcome.why}"
    return tried


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


def answer(tried: Tried) -> Any:
    """What the SDK goes on with: the response, or the error as it came. A 2xx that is no answer is an error, too."""
    if tried.error is not None:
        raise tried.error
    if tried.outcome.kind != "ok" and tried.response.http_response.is_success:
        raise ProviderError(tried.route, tried.outcome.kind, tried.outcome.why)
    return tried.response


def sync_carrier(bound: Attempt | None) -> Callable[[Any, Any], Any]:
    def carry(request: Any, call_next: Any) -> Any:
        from tideover.providers import wire

        attempt = bound or current.get()
        if attempt is None or not wire.is_message_call(request):
            return call_next(request)
        said: Said = None
        with closing(plan(attempt, request.json["model"], streams=bool(request.stream))) as steps:
            while True:
                try:
                    step = steps.send(said)
                except StopIteration as done:
                    return answer(done.value)
                match step:
                    case Wait(seconds):
                        time.sleep(seconds)
                        said = None
                    case Probe(route, model):
                        said = attempt.health.probe_fails(route, model)
                    case Try(route, model):
                        said = wire.call(route, model, request, call_next if route == attempt.job.routes[0] else None)

    return carry


def async_carrier(bound: Attempt | None) -> Callable[[Any, Any], Any]:
    async def carry(request: Any, call_next: Any) -> Any:
        from tideover.providers import wire

        attempt = bound or current.get()
        if attempt is None or not wire.is_message_call(request):
            return await call_next(request)
        said: Said = None
        with closing(plan(attempt, request.json["model"], streams=bool(request.stream))) as steps:
            while True:
                try:
                    step = steps.send(said)
                except StopIteration as done:
                    return answer(done.value)
                match step:
                    case Wait(seconds):
                        await asyncio.sleep(seconds)
                        said = None
                    case Probe(route, model):
                        said = await asyncio.to_thread(attempt.health.probe_fails, route, model)
                    case Try(route, model, key):
                        call = wire.acall(route, model, request, call_next if route == attempt.job.routes[0] else None)
                        call = within_limit(attempt, route, call)
                        said = await (call if key is None else unless_opened(attempt, route, key, call))

    return carry


async def within_limit(attempt: Attempt, route: str, call: Coroutine[Any, Any, Tried]) -> Tried:
    """The call's answer, or word that there was none in the time that its coroutine has: else the breaker would not hear of it.

    Only a call that had half of that time at least says something of its provider; one that began later is cut with the job.
    """
    from tideover.providers import wire

    ends_at = None if attempt.cut is None else attempt.cut.when()
    if attempt.limit_s is None or ends_at is None or attempt.ends_within(attempt.limit_s / 2):
        return await call
    try:
        async with asyncio.timeout_at(ends_at - min(MOST_MARGIN_S, MARGIN * attempt.limit_s)):
            return await call
    except TimeoutError:
        return wire.unanswered(route)


async def unless_opened(attempt: Attempt, route: str, key: str, call: Coroutine[Any, Any, Tried]) -> Tried:
    """The call's answer, or word that its breaker opened meanwhile: a critical job does not wait on a dead provider."""
    from tideover.providers.wire import Tried

    loop = asyncio.get_running_loop()
    opened = loop.create_future()
    task = loop.create_task(call)
    with attempt.health.when_open(key, lambda: loop.call_soon_threadsafe(resolve, opened)):
        try:
            await asyncio.wait({task, opened}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({task}, timeout=LAST_CHANCE_S)
        finally:
            if not task.done():
                task.cancel()
    if task.done() and not task.cancelled():
        return task.result()
    return Tried(route, Outcome(kind="ambiguous", scope="model", why="its breaker opened while the call waited"))


def resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
