# SPDX-License-Identifier: Apache-2.0
"""Which way would a job go? The chain of a task's routes hop by hop, as it is now or as if some of them were in trouble."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args

from tideover import clock
from tideover.core.admission import Degrade, Hold, Reroute, Run, decide, readiness
from tideover.core.breaker import CLOSED, Breaker, together
from tideover.core.job import Criticality, Job
from tideover.core.route import Hop, breaker_key, route_key
from tideover.ops.access import Misasked, Operator, Space, reaching
from tideover.settings import Settings
from tideover.tables import RouteSettings

Assumed = Literal["up", "down", "suspect", "recovering", "throttled", "parked"]

TRANSLATED = (
    "another model, by translation: refuses documents, server tools, files and earlier thinking; "
    "loses hints for caches and effort, user ids, and which stop sequence ended an answer"
)
QUIET_S = 60.0
LIVE_S = 30.0
"""How long a live call waits for bytes, at the most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HopTold:
    """A route of a chain. `model`: its name for the model, None where it has none; `serves`: a job could go there.

    `price`: for a million tokens in and out; `live`: what a one-token call came to, None where none was made.
    """

    route: str
    kind: str
    domain: str
    model: str | None
    state: str
    assumed: bool
    serves: bool
    why: str
    loses: str
    price: tuple[float, float] | None
    live: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTest:
    """Where a job of a task that calls a model would go: `verdict` is `run`, `reroute`, `degrade` or `hold`."""

    namespace: str
    task: str
    model: str
    criticality: Criticality
    tenant: str
    verdict: Literal["run", "reroute", "degrade", "hold"]
    sentence: str
    hops: tuple[HopTold, ...]


def try_routes(
    operator: Operator,
    task: str,
    *,
    criticality: Criticality | None = None,
    tenant: str = "",
    models: Sequence[str] = (),
    assume: Mapping[str, Assumed],
    live: bool = False,
) -> tuple[RouteTest, ...]:
    """What would become of a job, for each model that its task calls.

    Args:
      criticality: of the job; None: the task's, critical where that depends on arguments.
      tenant: whose job it is.
      models: those to ask for; empty: those that the task names or was seen to call.
      assume: route → how to take it instead of as it is.
      live: makes a one-token call over each route, whatever its breaker says.

    Raises:
      Misasked: there is no such task, route or model to ask for.
      StoreUnavailable: Redis does not answer.
    """
    for name in assume:
        if name not in operator.settings.routes:
            raise Misasked(f"there is no route {name!r} to assume something of; known: {', '.join(operator.settings.routes)}")
    with reaching(operator.settings):
        spaces = [(space, known) for space in operator.spaces if task in (known := space.registry.tasks())]
        if not spaces:
            known_names = sorted({name for space in operator.spaces for name in space.registry.tasks()})
            near = get_close_matches(task, known_names, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; start a worker that has it"
            raise Misasked(f"there is no task {task!r}{hint}")
        now = operator.now()
        return tuple(
            tried(operator.settings, space, asked, Question(task, known[task], criticality, tenant), assume, now, live=live)
            for space, known in spaces
            for asked in models_of(space, task, known[task], models)
        )


@dataclass(frozen=True, slots=True)
class Question:
    task: str
    facts: Mapping[str, Any]
    criticality: Criticality | None
    tenant: str

    def job(self, settings: Settings, model: str) -> Job:
        said = self.facts["criticality"]
        routes = settings.narrowed(tuple(self.facts["routes"]), self.tenant, None)
        if not routes:
            raise Misasked(f"tenant {self.tenant} allows none of the routes of task {self.task}")
        return Job(
            id="",
            task=self.task,
            criticality=self.criticality or ("deferrable" if said == "deferrable" else "critical"),
            routes=routes,
            models=(model,),
            reroute_when_deferrable=self.facts.get("reroute_when_deferrable", False),
            degrades=self.facts.get("degrades", False),
        )


def models_of(space: Space, task: str, facts: Mapping[str, Any], asked: Sequence[str]) -> Sequence[str]:
    models = asked or sorted({*facts["models"], *space.registry.models().get(task, ())})
    if not models:
        raise Misasked(f"nobody knows yet which models task {task} calls; name one with --model")
    return models


def tried(
    settings: Settings,
    space: Space,
    model: str,
    question: Question,
    assume: Mapping[str, Assumed],
    now: float,
    *,
    live: bool,
) -> RouteTest:
    job = question.job(settings, model)
    chain = tuple(hop_of(settings, space, name, model, assume.get(name), now) for name in job.routes)
    verdict = decide(job, chain, now=now)
    word: Literal["run", "reroute", "degrade", "hold"]
    match verdict:
        case Run(route) | Reroute(route):
            word, what = ("run", f"runs on {route}") if route == job.routes[0] else ("reroute", f"is rerouted to {route}")
        case Degrade():
            word, what = "degrade", "is answered without a model, as its task says"
        case Hold(wait_key, reason):
            word, what = "hold", f"is held ({reason}) until {' or '.join(wait_key)} is back"
        case _:
            word, what = "hold", "waits for another process"
    return RouteTest(
        namespace=space.name,
        task=job.task,
        model=model,
        criticality=job.criticality,
        tenant=question.tenant,
        verdict=word,
        sentence=f"a {job.criticality} job of {job.task} that calls {model} {what}",
        hops=tuple(told(settings, job, hop, model, assume, now, live=live) for hop in chain),
    )


def hop_of(settings: Settings, space: Space, name: str, model: str, assumed: Assumed | None, now: float) -> Hop:
    key, route = breaker_key(name, model), settings.route(name)
    known = space.breakers.read([key, route_key(name)])
    breaker = together(known[key], known[route_key(name)], now) if assumed is None else breaker_as(assumed, now)
    serves = route.model(model) is not None
    return Hop(name, key, breaker, None if serves else f"it has no model for {model}", serves)


def breaker_as(assumed: Assumed, now: float) -> Breaker:
    match assumed:
        case "up":
            return CLOSED
        case "down":
            return Breaker(state="open")
        case "parked":
            return Breaker(state="open", parked="quota")
        case "throttled":
            return Breaker(throttled_until=now + QUIET_S)
        case "suspect" | "recovering":
            return Breaker(state=assumed)


def told(
    settings: Settings, job: Job, hop: Hop, model: str, assume: Mapping[str, Assumed], now: float, *, live: bool
) -> HopTold:
    route = settings.route(hop.route)
    name, first = route.model(model), hop.route == job.routes[0]
    state = "throttled" if hop.breaker.throttled_until > now else hop.breaker.parked or hop.breaker.state
    price = None if name is None else settings.prices.get(name)
    return HopTold(
        route=hop.route,
        kind=route.kind,
        domain=route.domain,
        model=name,
        state=state,
        assumed=hop.route in assume,
        serves=(first or job.may_reroute) and readiness(job, hop, now=now, permit=None) == "yes",
        why=why_not(job, hop, first=first, state=state),
        loses="" if first else losses_of(route),
        price=None if price is None else (price.input, price.output),
        live=asked_live(hop.route, model) if live and name is not None else None,
    )


def why_not(job: Job, hop: Hop, *, first: bool, state: str) -> str:
    """What speaks against a hop; empty: nothing."""
    if hop.refused is not None:
        return hop.refused
    if not first and not job.may_reroute:
        return "deferrable jobs wait for their primary"
    return "" if state == "closed" else f"it is {state}"


def losses_of(route: RouteSettings) -> str:
    return TRANSLATED if route.kind == "openai-compatible" else ""


def asked_live(route: str, model: str) -> str:
    """What a one-token call comes to."""
    from tideover.providers import wire

    began = clock.monotonic()
    outcome = wire.probe(route, model, LIVE_S)
    return f"answered in {clock.monotonic() - began:.1f} s" if outcome.kind == "ok" else outcome.why


def assumptions(words: Sequence[str]) -> Iterator[tuple[str, Assumed]]:
    """Reads `anthropic=down`. Raises `Misasked`."""
    for word in words:
        name, _, state = word.partition("=")
        known: tuple[Assumed, ...] = get_args(Assumed)
        found = next((each for each in known if each == state), None)
        if found is None:
            raise Misasked(f"say --assume ROUTE=STATE with one of {', '.join(known)}, not {word!r}")
        yield name, found
