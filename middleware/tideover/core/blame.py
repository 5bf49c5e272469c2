# SPDX-License-Identifier: Apache-2.0
"""Whose fault a failed call is, and how far the fault reaches: the rules, as tables, and what an error body says.

    kind       meaning                                                        counts as a failure
    ok         a complete answer; refusals and length stops are answers too   no
    outage     the provider, or what stands before it, is not working         yes
    throttle   it works and asks for less: a pace, not a state                no
    quota      the money is spent; the job is innocent                        yes
    auth       the credential is refused; the job is innocent                 yes
    model      the route does not know the model; the job is innocent         yes
    ambiguous  it may be the provider or this one request (a read timeout)    yes
    caller     the request is at fault; it would fail on any route            no
    local      this process or the task's own code                            no

Exceptions are written `package.Class`, for any class of their MRO.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind = Literal["ok", "outage", "throttle", "quota", "auth", "model", "caller", "ambiguous", "local"]
Scope = Literal["job", "model", "route"]
"""How far the fault reaches: this job, this model on this route, or the route with all its models."""

Blame = tuple[Kind, Scope]

OUTAGE: Blame = ("outage", "model")
OUTAGE_OF_ROUTE: Blame = ("outage", "route")
THROTTLE: Blame = ("throttle", "model")
AMBIGUOUS: Blame = ("ambiguous", "model")
MODEL: Blame = ("model", "model")
QUOTA: Blame = ("quota", "route")
AUTH: Blame = ("auth", "route")
CALLER: Blame = ("caller", "job")
LOCAL: Blame = ("local", "job")

BY_STATUS: dict[int, Blame] = {
    401: AUTH,
    402: QUOTA,
    403: AUTH,
    404: MODEL,
    407: OUTAGE_OF_ROUTE,
    408: AMBIGUOUS,
    409: AMBIGUOUS,
    425: AMBIGUOUS,
    429: THROTTLE,
    499: AMBIGUOUS,
    501: CALLER,
}
"""Statuses that speak for themselves. Any other 4xx is the caller's, any other 5xx an outage, a 3xx an outage of the route."""

BY_NAME: dict[str, Blame] = {
    # Anthropic: `error.type`, or `error.details.error_code` (anthropic/_error_classes.py)
    "billing_error": QUOTA,
    "enforced_spend_limit_reached": QUOTA,
    "contract_spend_limit_reached": QUOTA,
    "linked_organization_spend_limit_reached": QUOTA,
    "linked_organization_billing_unavailable": QUOTA,
    "ramp_limit_exceeded": THROTTLE,
    "organization_on_hold": AUTH,
    "cmek_key_unreachable": OUTAGE_OF_ROUTE,  # the customer's own key: every model of the route needs it
    "cmek_context_unavailable": OUTAGE_OF_ROUTE,
    "cmek_key_disabled": OUTAGE_OF_ROUTE,
    "cmek_key_network_blocked": OUTAGE_OF_ROUTE,
    "request_body_timeout": AMBIGUOUS,
    "file_expired": CALLER,  # a 404 about something the request names, not about the model
    "thread_not_found": CALLER,
    "user_profile_not_billable": CALLER,  # a 403 about the tenant in the request, not about the credential
    "user_profile_billing_not_authorized": CALLER,
    # OpenAI: `error.code` or `error.type`
    "insufficient_quota": QUOTA,
    "billing_hard_limit_reached": QUOTA,
    "billing_not_active": QUOTA,
    "invalid_api_key": AUTH,
    "model_not_found": MODEL,
    # Google
    "API_KEY_INVALID": AUTH,
    # Bedrock: header `x-amzn-errortype`. From its documentation; not seen live.
    "ThrottlingException": THROTTLE,
    "ModelNotReadyException": OUTAGE,
    "ModelErrorException": OUTAGE,
    "ModelTimeoutException": AMBIGUOUS,
    "ServiceQuotaExceededException": QUOTA,
    "ExpiredTokenException": AUTH,
    "UnrecognizedClientException": AUTH,
    "InvalidSignatureException": AUTH,
}
"""Names that decide whatever the status is."""

BY_STREAM_ERROR: dict[str, Blame] = {
    "overloaded_error": OUTAGE,
    "api_error": OUTAGE,
    "timeout_error": AMBIGUOUS,
    "conflict_error": AMBIGUOUS,
    "rate_limit_error": THROTTLE,
    "rate_limit_exceeded": THROTTLE,
    "authentication_error": AUTH,
    "permission_error": AUTH,
    "not_found_error": MODEL,
    "invalid_request_error": CALLER,
}
"""Errors sent within a stream, after a 200. One that is not here is an outage: the request had been accepted."""

BY_MESSAGE: tuple[tuple[re.Pattern[str], Blame], ...] = (
    (re.compile(r"You have reached your specified (workspace )?API usage limits", re.IGNORECASE), QUOTA),
    (re.compile(r"Your credit balance is too low", re.IGNORECASE), QUOTA),
    (re.compile(r"(API key not valid|Incorrect API key|Invalid API key)", re.IGNORECASE), AUTH),
)
"""400s that carry no code. Matched at the very start, because an error may quote the prompt further on."""

BY_EXCEPTION: tuple[tuple[str, Blame], ...] = (
    ("httpx2.PoolTimeout", LOCAL),  # our own connections are all in use
    ("httpx2.LocalProtocolError", LOCAL),
    ("httpx2.UnsupportedProtocol", LOCAL),
    ("httpx2.ConnectTimeout", OUTAGE_OF_ROUTE),
    ("httpx2.ConnectError", OUTAGE_OF_ROUTE),  # refused, DNS, TLS
    ("httpx2.ProxyError", OUTAGE_OF_ROUTE),
    ("httpx2.TooManyRedirects", OUTAGE_OF_ROUTE),
    ("httpx2.TimeoutException", AMBIGUOUS),
    ("httpx2.TransportError", OUTAGE),  # reset, cut, not HTTP
    ("httpx2.DecodingError", OUTAGE),
    ("json.JSONDecodeError", OUTAGE_OF_ROUTE),  # a 2xx with HTML, or empty
    ("anthropic.APIResponseValidationError", OUTAGE_OF_ROUTE),
    ("openai.APIResponseValidationError", OUTAGE_OF_ROUTE),
    ("anthropic.CredentialsError", AUTH),
    ("google.TransportError", OUTAGE_OF_ROUTE),  # google.auth: the token endpoint cannot be reached
    ("google.GoogleAuthError", AUTH),
    ("botocore.NoCredentialsError", AUTH),
    ("botocore.CredentialRetrievalError", AUTH),
    ("tideover.NotAnAnswer", OUTAGE_OF_ROUTE),
)
"""Exceptions without an HTTP status; the first that matches decides."""

BY_SOCKET_EXCEPTION: tuple[tuple[str, Blame], ...] = (
    ("builtins.ConnectionError", OUTAGE_OF_ROUTE),
    ("socket.gaierror", OUTAGE_OF_ROUTE),
    ("ssl.SSLError", OUTAGE_OF_ROUTE),
    ("builtins.TimeoutError", AMBIGUOUS),
)
"""The same for a transport other than httpx2's; believed only as the cause of an SDK's connection error."""

OWN_PACE = frozenset({"ramp_limit_exceeded", "ThrottlingException"})
"""Throttling that is about our pace even though most of the limit is left."""

LIMITS = re.compile(r"(?:anthropic-ratelimit-(.+)-(limit|remaining)|x-ratelimit-(limit|remaining)-(.+))")
"""Rate-limit headers: Anthropic's and OpenAI's."""

EDGE_STATUSES = frozenset({403, 404, *range(500, 529), *range(530, 600)})
"""Without an API's error body these come from what stands before the API (a firewall, a proxy). Only the API says 529."""

STATUS_ERRORS = frozenset({"anthropic.APIStatusError", "openai.APIStatusError", "httpx2.HTTPStatusError"})
CONNECTION_ERRORS = frozenset({"anthropic.APIConnectionError", "openai.APIConnectionError"})
TOKEN_ERRORS = frozenset({"anthropic.WorkloadIdentityError", "openai.SubjectTokenProviderError"})
SDKS = frozenset({"anthropic", "openai", "tideover"})
ANYONES = frozenset({"httpx2", "httpx", "json", "google", "boto3", "botocore"})
"""Libraries that a task may use on its own."""

GRAVITY: tuple[Kind, ...] = ("outage", "ambiguous", "auth", "quota", "model", "throttle", "caller", "local", "ok")
"""Which outcome stands for a group of errors: the first of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What an error body says, whatever its dialect. `message` is for matching only and goes nowhere."""

    type: str | None = None
    code: str | None = None
    message: str = ""


def blame_of_status(status: int, said: Said | None) -> Blame:
    if said is None and status in EDGE_STATUSES:
        return OUTAGE_OF_ROUTE
    for name in () if said is None else (said.code, said.type):
        if name is not None and name in BY_NAME:
            return BY_NAME[name]
    if said is not None and status in (400, 429):
        for pattern, told in BY_MESSAGE:
            if pattern.match(said.message):
                return told
    if status == 504 and said is not None and said.type == "timeout_error":
        return AMBIGUOUS
    if status in BY_STATUS:
        return BY_STATUS[status]
    if status >= 500:
        return OUTAGE
    return CALLER if status >= 400 else OUTAGE_OF_ROUTE


def read_error(headers: Mapping[str, str], body: bytes | None) -> Said | None:
    """What an API's error body says; None if the body is not one."""
    amazon = identifier(headers.get("x-amzn-errortype", "").partition(":")[0])
    if amazon is not None:
        return Said(type=amazon)
    if body is None:
        return Said() if "json" in headers.get("content-type", "") else None
    return said_by(decode(body))


def said_by(content: object) -> Said | None:
    if isinstance(content, list) and content:  # Google's OpenAI-compatible endpoint wraps its errors in a list
        content = content[0]
    if not isinstance(content, dict):
        return None
    error = content.get("error", content)
    if isinstance(error, str):  # {"error": "...", "code": "..."}: xAI, Ollama
        return Said(type=identifier(content.get("error_type")), code=identifier(content.get("code")), message=error)
    if not isinstance(error, dict) or not {"type", "code", "status"} & error.keys():
        return None
    kind = identifier(error.get("type"))
    message = error.get("message")
    return Said(
        type=identifier(error.get("status")) if kind is None else kind,
        code=code_of(error),
        message=message if isinstance(message, str) else "",
    )


def code_of(error: Mapping[str, object]) -> str | None:
    details = error.get("details")
    if isinstance(details, dict):  # Anthropic
        return identifier(details.get("error_code"))
    reasons = [item.get("reason") for item in details if isinstance(item, dict)] if isinstance(details, list) else []
    named = [name for name in map(identifier, [*reasons, error.get("code")]) if name is not None]
    return named[0] if named else None


def identifier(value: object) -> str | None:
    """The value if it is a name; anything else could be a sentence, and a sentence could quote the prompt."""
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_.]{0,63}", value) else None


def retry_after(headers: Mapping[str, str], now: float | None) -> float | None:
    """Seconds a provider asked to wait: `retry-after-ms`, else `retry-after` in seconds or as a date.

    >>> retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40.0)
    60.0
    """
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit_s
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    if now is None or "retry-after" not in headers:
        return None
    try:
        date = parsedate_to_datetime(headers["retry-after"])
    except ValueError:
        return None
    return max(0.0, date.timestamp() - now)


def headroom(headers: Mapping[str, str]) -> float | None:
    """The share of the rate limits that is left, of the scarcest (0 to 1); None without headers that say so.

    >>> headroom({"anthropic-ratelimit-requests-limit": "50", "anthropic-ratelimit-requests-remaining": "5"})
    0.1
    >>> headroom({"x-ratelimit-limit-tokens": "100", "x-ratelimit-remaining-tokens": "90"}), headroom({})
    (0.9, None)
    """
    limits: dict[str, dict[str, float]] = {}
    for name, value in headers.items():
        found = LIMITS.fullmatch(name.lower())
        if found is not None and re.fullmatch(r"\d{1,12}", value):
            limits.setdefault(found[1] or found[4], {})[found[2] or found[3]] = float(value)
    shares = [each["remaining"] / each["limit"] for each in limits.values() if each.get("limit", 0) > 0 and "remaining" in each]
    return min(shares, default=None)


def until_regained(message: str, now: float | None) -> float | None:
    """Seconds until "You will regain access on 2026-12-01 at 00:00 UTC.", the one date an own spend limit states."""
    found = re.search(r"regain access on (\d{4}-\d\d-\d\d) at (\d\d:\d\d) UTC", message)
    if found is None or now is None:
        return None
    try:
        date = datetime.fromisoformat(f"{found[1]} {found[2]}").replace(tzinfo=UTC)
    except ValueError:
        return None
    return max(0.0, date.timestamp() - now)


def decode(body: bytes | str) -> object:
    try:
        return json.loads(body)
    except ValueError:
        return None
