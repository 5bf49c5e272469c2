# SPDX-License-Identifier: Apache-2.0
"""What one call to a provider came to. The rules and the kinds are tables in `tideover.core.blame`; this reads the evidence.

No SDK is imported (that costs a process 0.9 s and 60 MiB): exceptions are known by the names in their MRO.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tideover.core import blame
from tideover.core.blame import (
    Blame,
    Kind,
    Said,
    Scope,
    blame_of_status,
    decode,
    headroom,
    read_error,
    retry_after,
    said_by,
    until_regained,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["OK", "Kind", "Outcome", "Scope", "of_exception", "of_message", "of_response", "of_stream_error", "of_task_error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a call came to.

    `why` is short and safe to log: status, error names and class names, never a provider's message, which may quote the
    prompt. `retry_after_s` is what the provider asked for, None if it asked for nothing.
    """

    kind: Kind
    scope: Scope
    why: str
    retry_after_s: float | None = None
    headroom: float | None = field(default=None, repr=False)
    """The share of the rate limits that the headers say is left, of the scarcest; None if they say nothing."""
    tokens: tuple[int, int] = field(default=(0, 0), repr=False)
    """Input and output tokens of a whole answer, as rate limits count them; 0: it does not say."""

    @property
    def counts_as_failure(self) -> bool:
        """Whether the breaker of this route and model counts it. Throttling, callers and ourselves never trip one.

        >>> of_response(529, {}, None).counts_as_failure, of_response(400, {}, None).counts_as_failure
        (True, False)
        """
        return self.kind in ("outage", "ambiguous", "auth", "quota", "model")

    @property
    def timed_out(self) -> bool:
        """Whether a time limit on our side ended the call, which is ours if we stood still meanwhile.

        >>> of_response(504, {}, b'{"error": {"code": "GatewayTimeout"}}').timed_out
        False
        """
        return "Timeout" in self.why and not self.why[0].isdigit()

    @property
    def answered(self) -> bool:
        """Whether the route is there at all: it answered, if only to ask for quiet or to refuse this request.

        >>> of_response(429, {}, None).answered, of_response(529, {}, None).answered
        (True, False)
        """
        return self.kind in ("ok", "throttle", "caller")


COUNTED_TOKENS = re.compile(rb'"(input|cache_creation_input|output)_tokens"\s*:\s*(\d{1,9})\b')
"""Tokens read from a cache count for no limit. Quotes within an answer's text are escaped, so that it cannot say so."""
MAX_DEPTH = 16
"""Causes can be made to form a ring."""

OK = Outcome(kind="ok", scope="model", why="ok")
"""A complete answer. A success of the breaker, whatever the model's stop reason."""


def of_response(status: int, headers: Mapping[str, str], body: bytes | None, *, now: float | None = None) -> Outcome:
    """Judge a response by its status, headers and body, in the dialect of Anthropic, OpenAI, Google or Bedrock.

    `body` is None when it was not read, as in a stream; then the content type stands in for it. `now` (Unix seconds) is
    needed to understand a `retry-after` that is a date; without it such a header is ignored. A 2xx is judged no further
    than that it is a JSON object and no error; a plain Messages answer needs `of_message`.

    >>> of_response(529, {"retry-after": "30"}, b'{"type": "error", "error": {"type": "overloaded_error"}}')
    Outcome(kind='outage', scope='model', why='529 overloaded_error', retry_after_s=30.0)
    >>> of_response(502, {"content-type": "text/html"}, b"<html>Bad gateway</html>").scope
    'route'
    """
    facts = {name.lower(): value for name, value in headers.items()}
    if 200 <= status < 300:
        return of_success(status, facts.get("content-type", ""), body)
    said = read_error(facts, body)
    kind, scope = blame_of_status(status, said)
    wait_s = retry_after(facts, now)
    if wait_s is None and said is not None and kind == "quota":
        wait_s = until_regained(said.message, now)
    ramp = said is not None and said.code in blame.OWN_PACE  # too fast a rise, whatever is left of the limit
    left = None if kind != "throttle" else 0.0 if ramp else headroom(facts)
    return Outcome(kind=kind, scope=scope, why=f"{status} {describe(said)}", retry_after_s=wait_s, headroom=left)


def of_message(body: bytes) -> Outcome:
    """Judge the body of a plain 2xx Messages answer: only a complete message is ok.

    The SDK turns a `type: error` body into a message whose fields are all None, and a truncated one into a message
    without a stop reason, both silently.

    >>> of_message(b'{"type": "message", "stop_reason": "end_turn"}') is OK
    True
    >>> of_message(b'{"type": "message", "stop_reason": null}').why
    '2xx message without a stop_reason'
    """
    content = decode(body)
    if not isinstance(content, dict):
        return outcome_of(
            blame.OUTAGE_OF_ROUTE, "2xx with a body that is not JSON" if body.strip() else "2xx with an empty body"
        )
    if content.get("type") != "message":
        return outcome_of(blame.OUTAGE_OF_ROUTE, "2xx that is not a message")
    if content.get("stop_reason") is None:
        return outcome_of(blame.OUTAGE, "2xx message without a stop_reason")
    return of_answer(body)


def of_answer(body: bytes) -> Outcome:
    """A good answer, with the tokens that its body, or the first and last events of its stream, say it took.

    >>> of_answer(b'{"usage": {"input_tokens": 9, "cache_read_input_tokens": 800, "output_tokens": 3}}').tokens
    (9, 3)
    """
    said = {name: int(number) for name, number in COUNTED_TOKENS.findall(body)}  # a stream's last word counts
    if not said:
        return OK
    return replace(OK, tokens=(said.get(b"input", 0) + said.get(b"cache_creation_input", 0), said.get(b"output", 0)))


def of_stream_error(data: object) -> Outcome:
    """Judge the data of an error event within a stream: bytes, text or the decoded JSON.

    >>> of_stream_error(b'{"type": "error", "error": {"type": "overloaded_error"}}').why
    'stream overloaded_error'
    """
    said = said_by(decode(data) if isinstance(data, bytes | str) else data)
    names = () if said is None else tuple(name for name in (said.code, said.type) if name is not None)
    known = (table[name] for table in (blame.BY_NAME, blame.BY_STREAM_ERROR) for name in names if name in table)
    return outcome_of(next(known, blame.OUTAGE), f"stream {describe(said)}")


def of_exception(error: BaseException, *, now: float | None = None) -> Outcome:
    """Judge what a call raised: an SDK's error, a transport's, a cancellation, or a bug of our own (local).

    Use it where the error certainly came out of a call; where it came out of a task, use `of_task_error`.

    >>> of_exception(KeyError("x"))
    Outcome(kind='local', scope='job', why='KeyError', retry_after_s=None)
    """
    return of_link(error, now, trusted=True)


def of_task_error(error: BaseException, *, now: float | None = None) -> Outcome:
    """Judge what left a task, where the user's own code may use the same libraries.

    As `of_exception`, but an error of httpx2 or json counts only if an SDK entered that library: `json.loads` on a model's
    answer, or the task's own HTTP call elsewhere, says nothing about a provider.
    """
    return of_link(error, now, trusted=False)


def of_success(status: int, content_type: str, body: bytes | None) -> Outcome:
    if body is None:
        return outcome_of(blame.OUTAGE_OF_ROUTE, f"{status} with HTML") if "html" in content_type.lower() else OK
    content = decode(body)
    if not isinstance(content, dict):
        return outcome_of(blame.OUTAGE_OF_ROUTE, f"{status} that is not a JSON object")
    if content.get("type") == "error" or content.get("error") is not None:
        return outcome_of(blame.OUTAGE_OF_ROUTE, f"{status} with an error body")
    return OK


def describe(said: Said | None) -> str:
    if said is None:
        return "without an API error body"
    if said.code is not None:
        return said.code
    return "without an error type" if said.type is None else said.type


def outcome_of(told: Blame, why: str) -> Outcome:
    return Outcome(kind=told[0], scope=told[1], why=why)


def of_link(error: BaseException, now: float | None, *, trusted: bool, depth: int = 0) -> Outcome:
    """Judge an error, or else the error it was explicitly raised from, or the gravest of its group.

    `__context__` is not followed: what happens to be raised while an outage is handled is a bug of its own. `trusted` is
    false where a bare error of httpx2 or json may be the task's own.
    """
    if isinstance(error, BaseExceptionGroup):
        members = [of_link(member, now, trusted=trusted, depth=depth + 1) for member in error.exceptions]
        return min(members, key=lambda outcome: blame.GRAVITY.index(outcome.kind))
    names = names_of(error)
    known = trusted or not blame.ANYONES & {name.partition(".")[0] for name in names} or entered_by_sdk(error)
    outcome = of_sdk_error(error, names, now) if known else None
    if outcome is not None:
        return outcome
    cause = error.__cause__
    local = outcome_of(blame.LOCAL, type(error).__name__)
    if cause is None or depth > MAX_DEPTH:
        return local
    inner = of_link(cause, now, trusted=trusted, depth=depth + 1)
    return local if inner.kind == "local" else inner


def of_sdk_error(error: BaseException, names: frozenset[str], now: float | None) -> Outcome | None:
    """Judge one error by its class and the facts it carries; None if it is no provider's."""
    if names & blame.CONNECTION_ERRORS:
        return of_connection_error(error, names, now)
    if names & blame.STATUS_ERRORS:
        return of_status_error(error, now)
    if names & blame.TOKEN_ERRORS:
        return of_token_error(error)
    for name, told in blame.BY_EXCEPTION:
        if name in names:
            return outcome_of(told, type(error).__name__)
    if "openai.APIError" in names:  # how its SDK raises an error event within a stream
        return of_stream_error(getattr(error, "body", None))
    return None


def of_connection_error(error: BaseException, names: frozenset[str], now: float | None) -> Outcome:
    """An SDK's connection error hides which one it was, and wraps bugs of our own auth callable too: its cause tells."""
    cause = error.__cause__
    if cause is None:
        timeout = any(name.endswith(".APITimeoutError") for name in names)
        return outcome_of(blame.AMBIGUOUS if timeout else blame.OUTAGE_OF_ROUTE, type(error).__name__)
    inner = of_link(cause, now, trusted=True)
    if inner.kind != "local":
        return inner
    below = names_of(cause)
    told = (told for name, told in blame.BY_SOCKET_EXCEPTION if name in below)
    return outcome_of(next(told, blame.LOCAL), inner.why)


def of_status_error(error: BaseException, now: float | None) -> Outcome:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if response is None or not isinstance(status, int):
        return outcome_of(blame.AMBIGUOUS, type(error).__name__)
    if 200 <= status < 300:  # an error event within a stream
        return of_stream_error(getattr(error, "body", None))
    try:
        body = response.content
    except RuntimeError:  # httpx2.ResponseNotRead
        body = None
    return of_response(status, response.headers, body if isinstance(body, bytes) else None, now=now)


def of_token_error(error: BaseException) -> Outcome:
    """A failed exchange of credentials: an outage where the token endpoint is down, else the credential is at fault."""
    status = getattr(getattr(error, "response", error), "status_code", None)
    if status is None:
        told = blame.OUTAGE_OF_ROUTE if any(n.startswith("httpx2.") for n in names_of(error.__cause__)) else blame.AUTH
        return outcome_of(told, type(error).__name__)
    down = status >= 500 or status < 300 or status in (408, 429)
    return outcome_of(blame.OUTAGE_OF_ROUTE if down else blame.AUTH, f"token exchange {status}")


def names_of(error: BaseException | None) -> frozenset[str]:
    """The classes of an error as `package.Class`; httpx2 may be called httpx by those who aliased it."""
    packages = ((kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__)
    return frozenset(f"{'httpx2' if package == 'httpx' else package}.{name}" for package, name in packages)


def entered_by_sdk(error: BaseException) -> bool:
    """Whether the frame that called into httpx2 or json, by the traceback, is an SDK's."""
    caller, step = "", error.__traceback__
    while step is not None:
        package = str(step.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in blame.ANYONES:
            return caller in blame.SDKS
        caller, step = package, step.tb_next
    return False
