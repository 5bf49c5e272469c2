# SPDX-License-Identifier: Apache-2.0
"""The carrier: one model call carried over the routes of its job. A middleware of the anthropic SDK, bound to the attempt.

What to do next is decided in `tideover.plan`; a thread and an event loop each have a short driver for it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from contextlib import closing
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, TypeVar

from tideover.attempt import Attempt, Served, current
from tideover.core.outcome import Outcome
from tideover.errors import ProviderError
from tideover.plan import Probe, Room, Said, Try, Turn, Wait, plan

if TYPE_CHECKING:
    from anthropic import (
        Anthropic,
        AnthropicBedrock,
        AnthropicBedrockMantle,
        AnthropicVertex,
        AsyncAnthropic,
        AsyncAnthropicBedrock,
        AsyncAnthropicBedrockMantle,
        AsyncAnthropicVertex,
    )

    from tideover.providers.wire import Tried

    Client = Anthropic | AnthropicBedrock | AnthropicBedrockMantle | AnthropicVertex
    AsyncClient = AsyncAnthropic | AsyncAnthropicBedrock | AsyncAnthropicBedrockMantle | AsyncAnthropicVertex

LAST_CHANCE_S = 2.0
"""How long a critical call that is under way when its breaker opens may still finish, before it is cut and rerouted."""

C = TypeVar("C", bound="Client | AsyncClient")


def claude() -> Anthropic:
    """A real `anthropic.Anthropic` for the primary route. In a job its calls go over the job's routes, or hold the job."""
    from tideover.providers.anthropic import sync_client

    client: Anthropic = sync_client(primary_of(current.get()))
    return carried(client, primary_of(current.get()))


def aclaude() -> AsyncAnthropic:
    """A real `anthropic.AsyncAnthropic` for the primary route. In a job its calls go over the job's routes, or hold it."""
    from tideover.providers.anthropic import async_client

    client: AsyncAnthropic = async_client(primary_of(current.get()))
    return carried(client, primary_of(current.get()))


def wrap(client: C) -> C:
    """The same for a client that you built: it stays the primary. In a job its retries are off: waiting is tideover's."""
    attempt = current.get()
    return carried(client, primary_of(None) if attempt is None else attempt.job.primary or attempt.job.routes[0])


def carried(client: C, route: str) -> C:
    """The client with the carrier in it. `route`: the one that it calls by itself."""
    attempt = current.get()
    made: Any = async_carrier if iscoroutinefunction(client.request) else sync_carrier
    carrier = made(attempt, route)
    retries: dict[str, Any] = {} if attempt is None else {"max_retries": 0}
    made_so: Any = client.with_options(middleware=[*client.middleware, carrier], **retries)
    return made_so  # type: ignore[no-any-return]


def last_served() -> Served | None:
    """Who answered the latest call of the running job; None outside a job, and before its first answer.

    In the function that makes a task's degraded answer it says that nobody did.
    """
    attempt = current.get()
    if attempt is not None and attempt.degraded:
        return Served("", "", degraded=True)
    return attempt.served[-1] if attempt is not None and attempt.served else None


def text_of(message: Any) -> str:
    """The text of a message's content blocks, one after the other."""
    return "".join(block.text for block in message.content if block.type == "text")


def primary_of(attempt: Attempt | None) -> str:
    from tideover.settings import settings

    return settings().primary if attempt is None else attempt.job.routes[0]


def answer(tried: Tried) -> Any:
    """What the SDK goes on with: the response, or the error as it came. A 2xx that is no answer is an error, too."""
    if tried.error is not None:
        raise tried.error
    if tried.outcome.kind != "ok" and tried.response.http_response.is_success:
        raise ProviderError(tried.route, tried.outcome.kind, tried.outcome.why)
    return tried.response


def sync_carrier(bound: Attempt | None, its: str) -> Callable[[Any, Any], Any]:
    def carry(request: Any, call_next: Any) -> Any:
        from tideover.providers import wire

        attempt = bound or current.get()
        if attempt is None or not wire.is_message_call(request):
            return call_next(request)
        said: Said = None
        with closing(plan(attempt, request.json["model"])) as steps:
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
                    case Turn(key, most_s):
                        said = attempt.health.turn(key, most_s)
                    case Room(route, most_s):
                        said = attempt.health.rates.allow(route, most_s)
                    case Try():
                        said = wire.call(step, request, call_next if step.route == its else None)

    return carry


def async_carrier(bound: Attempt | None, its: str) -> Callable[[Any, Any], Any]:
    async def carry(request: Any, call_next: Any) -> Any:
        from tideover.providers import wire

        attempt = bound or current.get()
        if attempt is None or not wire.is_message_call(request):
            return await call_next(request)
        said: Said = None
        with closing(plan(attempt, request.json["model"])) as steps:
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
                    case Turn(key, most_s):
                        said = await asyncio.to_thread(attempt.health.turn, key, most_s)
                    case Room(route, most_s):
                        said = await asyncio.to_thread(attempt.health.rates.allow, route, most_s)
                    case Try():
                        call = wire.acall(step, request, call_next if step.route == its else None)
                        call = within(step, call)
                        said = await (call if step.key is None else unless_opened(attempt, step.route, step.key, call))

    return carry


async def within(step: Try, call: Coroutine[Any, Any, Tried]) -> Tried:
    """The call's answer, or word that there was none in the time that it has: else its breaker would not hear of it."""
    from tideover.providers import wire

    if step.most_s == math.inf:
        return await call
    try:
        async with asyncio.timeout(step.most_s):
            return await call
    except TimeoutError:
        return wire.unanswered(step.route)


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
