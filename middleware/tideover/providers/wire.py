# SPDX-License-Identifier: Apache-2.0
"""One HTTP attempt over one route, in whichever dialect it speaks: from a thread (`call`) or an event loop (`acall`)."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import anthropic
import httpx2

from tideover import clock
from tideover.core.outcome import OK, Outcome, of_exception, of_message, of_response
from tideover.core.pacing import Limit, LimitOf, Limits
from tideover.errors import ConfigurationError
from tideover.providers import anthropic as messages
from tideover.providers import openai_compatible as chat
from tideover.settings import settings

MESSAGES = ("/v1/messages", "/v1/messages?beta=true")
"""The paths that the carrier carries; everything else goes to the primary as it is."""

PROBE: dict[str, Any] = {"max_tokens": 1, "messages": [{"role": "user", "content": "."}]}

LIMIT_HEADERS: tuple[tuple[LimitOf, str, str], ...] = (
    *(
        (kind, f"anthropic-ratelimit-{name}-limit", f"anthropic-ratelimit-{name}-remaining")
        for kind in get_args(LimitOf)
        if (name := kind.replace("_", "-"))
    ),
    ("requests", "x-ratelimit-limit-requests", "x-ratelimit-remaining-requests"),
    ("tokens", "x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens"),
)
NUMBER = re.compile(r"[1-9]\d{0,12}|0")
"""What is counted; how many of it a minute, and how many are left."""

_lock = threading.Lock()
_sync: dict[int, httpx2.Client] = {}
_async: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx2.AsyncClient] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Tried:
    """What a call came to: an SDK response, or what was raised. Of a stream (`streaming`) only its beginning is known yet."""

    route: str
    outcome: Outcome
    response: Any = None
    error: Exception | None = None
    losses: tuple[str, ...] = ()
    streaming: bool = False
    limits: Limits = field(default_factory=dict)
    foreign: bool = False
    """It went out with another credential than the route's own: of a client that the caller built, maybe for a customer."""

    def tell(self, report: Callable[[Outcome], None]) -> None:
        """Reports the outcome: now, or of a stream that began well when it has ended."""
        if self.streaming:
            messages.watch_stream(self.response.http_response, report)
        else:
            report(self.outcome)


def is_message_call(request: Any) -> bool:
    return request.method.lower() == "post" and request.url in MESSAGES and isinstance(request.json, dict)


def call(route: str, model: str, request: Any, call_next: Any) -> Tried:
    """From a thread. `call_next`: the rest of the caller's own client, where the route is the primary; else None."""
    try:
        if settings().route(route).kind == "openai-compatible":
            carried = chat.carry(sync_http(), **chat_options(route, model, request))
            return tried(route, request, messages.as_response(carried.response, route, request), carried.losses)
        if call_next is not None:
            response = call_next(messages.with_model(request, model))
        else:
            response = messages.over(messages.sync_client(route), messages.for_stranger(request, model))
        if not response.http_response.is_success:
            response.http_response.read()
        return tried(route, request, response)
    except Exception as error:  # noqa: BLE001 - judged here, raised again where it is final
        return failed(route, error)


async def acall(route: str, model: str, request: Any, call_next: Any) -> Tried:
    """As `call`, from an event loop."""
    try:
        if settings().route(route).kind == "openai-compatible":
            carried = await chat.acarry(async_http(), **chat_options(route, model, request))
            return tried(route, request, messages.as_async_response(carried.response, route, request), carried.losses)
        if call_next is not None:
            response = await call_next(messages.with_model(request, model))
        else:
            response = await messages.aover(messages.async_client(route), messages.for_stranger(request, model))
        if not response.http_response.is_success:
            await response.http_response.aread()
        return tried(route, request, response)
    except Exception as error:  # noqa: BLE001 - judged here, raised again where it is final
        return failed(route, error)


def tried(route: str, request: Any, response: Any, losses: tuple[str, ...] = ()) -> Tried:
    http = response.http_response
    body = http.content if http.is_closed else None
    if http.is_success and body is not None and not request.stream:
        outcome = of_message(body)
    else:
        outcome = of_response(http.status_code, http.headers, None if http.is_success else body, now=clock.now())
    foreign = is_foreign(route, http.request)
    if foreign and outcome.kind in ("auth", "quota", "model"):  # which says nothing of the route
        outcome = replace(outcome, kind="caller", scope="job")
    streaming = request.stream and http.is_success and outcome.kind == "ok"
    limits = limits_in(http.headers)
    if outcome.kind == "ok" and limits:  # a good answer of a route that says what is left of its limits
        outcome = replace(outcome, headroom=1.0)
    return Tried(route, outcome, response, losses=losses, streaming=streaming, limits=limits, foreign=foreign)


def limits_in(headers: Mapping[str, str]) -> Limits:
    """What an answer says of the account's limits, as far as it makes sense."""
    found: dict[LimitOf, Limit] = {}
    for kind, limit, remaining in LIMIT_HEADERS:
        told = headers.get(limit, ""), headers.get(remaining, "")
        if NUMBER.fullmatch(told[0]) and NUMBER.fullmatch(told[1]) and int(told[0]) > 0:
            found[kind] = Limit(int(told[0]) / 60, float(told[1]))
    return found


def is_foreign(route: str, request: httpx2.Request) -> bool:
    """Whether a request carried a key that is not the one which the settings know of its route; False if they know none."""
    try:
        own = settings().api_key(route)
    except ConfigurationError:
        return False
    sent = request.headers.get("authorization", "").removeprefix("Bearer ") or request.headers.get("x-api-key", "")
    return own is not None and sent not in ("", own)


def failed(route: str, error: Exception) -> Tried:
    """What an exception came to. A request that this dialect cannot carry rules out the route; nobody is at fault."""
    if isinstance(error, chat.Untranslatable):
        why = f"cannot carry {', '.join(error.what)}"
        return Tried(route, Outcome(kind="caller", scope="job", why=why), error=error)
    return Tried(route, of_exception(error, now=clock.now()), error=error)


def unanswered(route: str) -> Tried:
    """What a call comes to that was given up because its job's time limit was near: what the SDK makes of a timeout."""
    request = httpx2.Request("POST", settings().route(route).base_url or "https://provider")
    return failed(route, anthropic.APITimeoutError(request=request))


def chat_options(route: str, model: str, request: Any) -> dict[str, Any]:
    found = settings().route(route)
    return {
        "base_url": found.base_url,
        "api_key": settings().api_key(route),
        "model": model,
        "body": request.json,
        "stream": request.stream,
        "timeout_s": found.timeout_s,
        "headers": passed_on(request.headers),
        "dialect": found.dialect,
    }


def passed_on(headers: Mapping[str, Any]) -> dict[str, str]:
    """The caller's own extra headers, without those that the SDK uses to talk to itself."""
    return {name: value for name, value in headers.items() if name.lower().startswith("x-") and "stainless" not in name.lower()}


def probe(route: str, model: str, timeout_s: float) -> Outcome:
    """A streamed one-token call, from a thread: the smallest question that only a working route answers.

    `timeout_s`: how long each wait for bytes may take.
    """
    found = settings().route(route)
    body = {**PROBE, "model": found.model(model) or model, "stream": True}
    timeout_s = min(found.timeout_s, timeout_s)
    try:
        if found.kind == "openai-compatible":
            options: dict[str, Any] = {"base_url": found.base_url, "api_key": settings().api_key(route), "model": body["model"]}
            options["dialect"] = found.dialect
            carried = chat.carry(sync_http(), body=body, stream=True, timeout_s=timeout_s, headers={}, **options)
            return of_events(carried.response.read()) if carried.outcome.kind == "ok" else carried.outcome
        client = messages.sync_client(route).with_options(timeout=timeout_s, max_retries=0)
        # not `messages.create`: monitors that wrap it (Sentry) would tell of each probe that fails
        answer = client.post("/v1/messages", cast_to=httpx2.Response, body=body)
        events = "event-stream" in answer.headers.get("content-type", "")
        return of_events(answer.content) if events else of_message(answer.content)
    except Exception as error:  # noqa: BLE001 - judged
        return of_exception(error, now=clock.now())


def of_events(body: bytes) -> Outcome:
    """What a whole stream of events came to."""
    seen: list[Outcome] = []
    watch = messages.EndWatch(seen.append)
    watch.see(body)
    if not seen:
        seen.append(Outcome(kind="outage", scope="model", why="stream ended without message_stop"))
    return seen[0]


def knock(route: str, timeout_s: float) -> Outcome:
    """Asks a route's front door (`GET /models`), which is free: it proves DNS, TLS, the credential and the edge, but no model.

    A route that has no such list answers all the same, if only with a 404.
    """
    found = settings().route(route)
    timeout_s = min(found.timeout_s, timeout_s)
    try:
        if found.kind == "openai-compatible":
            key = settings().api_key(route)
            headers = {"user-agent": "tideover"} | ({} if key is None else {"authorization": f"Bearer {key}"})
            assert found.base_url is not None
            http = sync_http().get(f"{found.base_url.rstrip('/')}/models", headers=headers, timeout=timeout_s)
            outcome = of_response(http.status_code, http.headers, http.content, now=clock.now())
        else:
            client = messages.sync_client(route).with_options(timeout=timeout_s, max_retries=0)
            client.get("/v1/models?limit=1", cast_to=httpx2.Response)
            return OK
    except Exception as error:  # noqa: BLE001 - judged
        outcome = of_exception(error, now=clock.now())
    return OK if outcome.why.startswith(("404", "405")) else outcome


def sync_http() -> httpx2.Client:
    """The HTTP client of this process for other dialects."""
    with _lock:
        if os.getpid() not in _sync:
            _sync[os.getpid()] = httpx2.Client()
        return _sync[os.getpid()]


def async_http() -> httpx2.AsyncClient:
    """The HTTP client of the running event loop for other dialects."""
    loop = asyncio.get_running_loop()
    if loop not in _async:
        _async[loop] = httpx2.AsyncClient()
    return _async[loop]


def close() -> None:
    """Closes the clients that threads of this process used."""
    messages.close()
    with _lock:
        client = _sync.pop(os.getpid(), None)
    if client is not None:
        client.close()


async def aclose() -> None:
    """Closes the clients that the running event loop used."""
    await messages.aclose()
    client = _async.pop(asyncio.get_running_loop(), None)
    if client is not None:
        await client.aclose()
