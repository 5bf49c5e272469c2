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
from typing import TYPE_CHECKING, Any, get_args

import anthropic
import httpx2

from tideover import clock
from tideover.core.outcome import OK, Outcome, of_exception, of_message, of_response
from tideover.core.pacing import Limit, LimitOf, Limits
from tideover.errors import ConfigurationError, ProviderError
from tideover.providers import anthropic as messages
from tideover.providers import openai_compatible as chat
from tideover.providers import streaming
from tideover.providers.bound import bound_to_its_provider
from tideover.providers.clouds import is_event_stream
from tideover.providers.streaming import Fate
from tideover.settings import settings

if TYPE_CHECKING:
    from tideover.plan import Try

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
    """What a call came to: an SDK response, or what was raised. Of a stream only its beginning is known yet; its
    `fate` tells the rest."""

    route: str
    outcome: Outcome
    response: Any = None
    error: Exception | None = None
    losses: tuple[str, ...] = ()
    fate: Fate | None = None
    limits: Limits = field(default_factory=dict)
    foreign: bool = False
    """It went out with another credential than the route's own: of a client that the caller built, maybe for a customer."""

    def tell(self, report: Callable[[Outcome], None]) -> None:
        """Reports the outcome: now, or of a stream that began well when it has ended."""
        if self.fate is not None:
            self.fate.report = report
        else:
            report(self.outcome)


def is_message_call(request: Any) -> bool:
    return request.method.lower() == "post" and request.url in MESSAGES and isinstance(request.json, dict)


def call(step: Try, request: Any, call_next: Any) -> Tried:
    """From a thread. `call_next`: the rest of the caller's own client, where the route is the one that it calls; else None."""
    route, began = step.route, step.began
    losses: tuple[str, ...] = ()
    try:
        found, streams = settings().route(route), began is not None or request.stream
        check_bound(step, request)
        if found.kind == "openai-compatible":
            carried = chat.carry(sync_http(), **chat_options(step, request, streams))
            http, losses = carried.response, carried.losses
        elif call_next is not None:
            http = call_next(as_sent(step, request, began and messages.STREAM)).http_response
        else:
            sent = as_sent(step, request, began and messages.STREAM, stranger=True)
            http = messages.over(messages.sync_client(route), sent)
        if began is not None and http.is_success and is_event_stream(http):
            watch = watch_of(step, began)
            http = streaming.opened(http, watch) if request.stream else streaming.whole(http, watch)
        elif not http.is_success or (began is not None and not http.is_closed):
            http.read()
        return tried(route, request, http, messages.as_response(http, request), losses)
    except Exception as error:  # noqa: BLE001 - judged here, raised again where it is final
        return failed(route, error)


async def acall(step: Try, request: Any, call_next: Any) -> Tried:
    """As `call`, from an event loop."""
    route, began = step.route, step.began
    losses: tuple[str, ...] = ()
    try:
        found, streams = settings().route(route), began is not None or request.stream
        check_bound(step, request)
        if found.kind == "openai-compatible":
            carried = await chat.acarry(async_http(), **chat_options(step, request, streams))
            http, losses = carried.response, carried.losses
        elif call_next is not None:
            http = (await call_next(as_sent(step, request, began and messages.ASYNC_STREAM))).http_response
        else:
            sent = as_sent(step, request, began and messages.ASYNC_STREAM, stranger=True)
            http = await messages.aover(messages.async_client(route), sent)
        if began is not None and http.is_success and is_event_stream(http):
            watch = watch_of(step, began)
            http = await (streaming.aopened(http, watch) if request.stream else streaming.awhole(http, watch))
        elif not http.is_success or (began is not None and not http.is_closed):
            await http.aread()
        return tried(route, request, http, messages.as_async_response(http, request), losses)
    except Exception as error:  # noqa: BLE001 - judged here, raised again where it is final
        return failed(route, error)


def watch_of(step: Try, began: Callable[[], None]) -> streaming.Watch:
    patience_s = streaming.MOST_SILENCES * settings().route(step.route).timeout_s
    return streaming.Watch(began, min(patience_s, step.most_s), step.most_s)


def silence_s(step: Try) -> float:
    """The longest silence of its provider."""
    return min(settings().route(step.route).timeout_s, step.silence_s)


def check_bound(step: Try, request: Any) -> None:
    """Raises `Untranslatable` where a request may go to no other provider than its own."""
    if step.reroutes and (bound := bound_to_its_provider(request.json)):
        raise chat.Untranslatable(bound)


def as_sent(step: Try, request: Any, stream_cls: Any, *, stranger: bool = False) -> Any:
    idle_s = None if stream_cls is None else silence_s(step)
    return messages.outgoing(request, step.model, stream_cls=stream_cls, idle_s=idle_s, stranger=stranger)


def tried(route: str, request: Any, http: httpx2.Response, response: Any, losses: tuple[str, ...] = ()) -> Tried:
    body = http.content if http.is_closed else None
    fate = http.stream if isinstance(http.stream, streaming.Fate) else None
    if http.is_success and body is not None and request.stream:
        outcome = Outcome(kind="outage", scope="route", why=f"{http.status_code} that is no stream")
    elif http.is_success and body is not None:
        outcome = of_message(body)
    else:
        outcome = of_response(http.status_code, http.headers, None if http.is_success else body, now=clock.now())
    foreign = is_foreign(route, http.request)
    if foreign and outcome.kind in ("auth", "quota", "model"):  # which says nothing of the route
        outcome = replace(outcome, kind="caller", scope="job")
    return Tried(route, outcome, response, losses=losses, fate=fate, limits=limits_in(http.headers), foreign=foreign)


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
        return Tried(route, Outcome(kind="caller", scope="job", why=why), error=ProviderError(route, "caller", why))
    outcome = of_exception(error, now=clock.now())
    if isinstance(error, httpx2.TransportError):
        asked = httpx2.Request("POST", settings().route(route).base_url or "https://provider")
        told = streaming.as_sdk_error(error, asked)
        told.__cause__, error.request = error, asked  # without prompt and key
        return Tried(route, outcome, error=told)
    return Tried(route, outcome, error=error)


def unanswered(route: str) -> Tried:
    """What a call comes to that was given up because its job's time limit was near: what the SDK makes of a timeout."""
    request = httpx2.Request("POST", settings().route(route).base_url or "https://provider")
    return failed(route, anthropic.APITimeoutError(request=request))


def chat_options(step: Try, request: Any, streams: bool) -> dict[str, Any]:
    found = settings().route(step.route)
    return {
        "base_url": found.base_url,
        "api_key": settings().api_key(step.route),
        "model": step.model,
        "body": request.json,
        "stream": streams,
        "timeout_s": silence_s(step),
        "headers": messages.for_strangers(request.headers),
        "dialect": found.dialect,
        "refuses_loss": step.refuses_loss,
    }


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
            if carried.outcome.kind != "ok":
                return carried.outcome
            http = carried.response
        else:
            client = messages.sync_client(route).with_options(timeout=timeout_s, max_retries=0)
            # not `messages.create`: monitors that wrap it (Sentry) would tell of each probe that fails
            http = client.post("/v1/messages", cast_to=httpx2.Response, body=body, stream=True, stream_cls=messages.STREAM)
        if is_event_stream(http):
            http = streaming.whole(http, streaming.Watch(no_matter, timeout_s, most_s=2 * timeout_s))
        content = http.read()
        return of_message(content) if http.is_success else of_response(http.status_code, http.headers, content, now=clock.now())
    except Exception as error:  # noqa: BLE001 - judged
        return of_exception(error, now=clock.now())


def no_matter() -> None:
    """Nobody asks when the answer to a probe began."""


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
    no_list = ("404", "405") if found.kind in ("anthropic", "openai-compatible") else ("4",)  # clouds refuse what they lack
    return OK if outcome.why.startswith(no_list) else outcome


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
