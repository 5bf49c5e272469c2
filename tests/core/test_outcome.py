# SPDX-License-Identifier: Apache-2.0
"""What an answer or an exception is taken for: the table of DESIGN §4 "Outcome", row by row, without any SDK."""

from __future__ import annotations

import asyncio
import doctest
import json
from typing import get_args

import pytest

from tideover.core import blame, outcome
from tideover.core.outcome import OK, Kind, Outcome, of_exception, of_message, of_response, of_stream_error, of_task_error

HTML = b"<html><body>Bad gateway</body></html>"


def anthropic(kind: str, message: str = "", code: str | None = None) -> bytes:
    details = {} if code is None else {"details": {"error_code": code}}
    return json.dumps({"type": "error", "error": {"type": kind, "message": message, **details}}).encode()


def openai(kind: str | None, code: str | int | None = None, message: str = "") -> bytes:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


OWN_LIMIT = "You have reached your specified API usage limits. You will regain access on 2026-12-01 at 00:00 UTC."
QUOTED = f"messages.0: '{OWN_LIMIT}' is not allowed"
GEMINI = {"error": {"code": 400, "message": "x", "status": "INVALID_ARGUMENT", "details": [{"reason": "API_KEY_INVALID"}]}}

RESPONSES = [
    # the Messages dialect
    (400, anthropic("invalid_request_error"), "caller", "job", "400 invalid_request_error"),
    (400, anthropic("invalid_request_error", OWN_LIMIT), "quota", "route", "400 invalid_request_error"),
    (400, anthropic("invalid_request_error", OWN_LIMIT.replace("API", "workspace API")), "quota", "route", None),
    (400, anthropic("invalid_request_error", QUOTED), "caller", "job", None),
    (400, anthropic("invalid_request_error", code="cmek_key_disabled"), "outage", "route", "400 cmek_key_disabled"),
    (400, anthropic("invalid_request_error", code="organization_on_hold"), "auth", "route", None),
    (400, HTML, "caller", "job", "400 without an API error body"),
    (401, anthropic("authentication_error"), "auth", "route", "401 authentication_error"),
    (402, anthropic("billing_error"), "quota", "route", "402 billing_error"),
    (402, HTML, "quota", "route", None),
    (403, anthropic("permission_error"), "auth", "route", "403 permission_error"),
    (403, anthropic("permission_error", code="user_profile_not_billable"), "caller", "job", None),
    (403, HTML, "outage", "route", "403 without an API error body"),
    (404, anthropic("not_found_error", "model: claude-x"), "model", "model", "404 not_found_error"),
    (404, anthropic("not_found_error", code="file_expired"), "caller", "job", "404 file_expired"),
    (404, HTML, "outage", "route", None),
    (407, HTML, "outage", "route", None),
    (408, anthropic("timeout_error"), "ambiguous", "model", None),
    (409, anthropic("conflict_error"), "ambiguous", "model", None),
    (413, HTML, "caller", "job", None),
    (422, anthropic("invalid_request_error"), "caller", "job", None),
    (425, HTML, "ambiguous", "model", None),
    (429, anthropic("rate_limit_error"), "throttle", "model", "429 rate_limit_error"),
    (429, anthropic("rate_limit_error", code="ramp_limit_exceeded"), "throttle", "model", "429 ramp_limit_exceeded"),
    (429, anthropic("rate_limit_error", code="enforced_spend_limit_reached"), "quota", "route", None),
    (429, anthropic("rate_limit_error", code="contract_spend_limit_reached"), "quota", "route", None),
    (429, HTML, "throttle", "model", None),
    (499, HTML, "ambiguous", "model", None),
    (500, anthropic("api_error"), "outage", "model", "500 api_error"),
    (500, HTML, "outage", "route", None),
    (501, anthropic("invalid_request_error"), "caller", "job", None),
    (502, anthropic("api_error"), "outage", "model", None),
    (502, b"", "outage", "route", "502 without an API error body"),
    (503, anthropic("api_error"), "outage", "model", None),
    (503, anthropic("api_error", code="cmek_key_unreachable"), "outage", "route", "503 cmek_key_unreachable"),
    (504, anthropic("timeout_error"), "ambiguous", "model", None),
    (504, HTML, "outage", "route", None),
    (520, HTML, "outage", "route", None),
    (529, anthropic("overloaded_error"), "outage", "model", "529 overloaded_error"),
    (529, HTML, "outage", "model", "529 without an API error body"),
    (302, b"", "outage", "route", None),
    # OpenAI and those compatible with it
    (401, openai("invalid_request_error", "invalid_api_key"), "auth", "route", "401 invalid_api_key"),
    (400, openai("invalid_request_error", None, "Incorrect API key provided: sk-..."), "auth", "route", None),
    (404, openai("invalid_request_error", "model_not_found"), "model", "model", "404 model_not_found"),
    (404, b'{"detail": "Not Found"}', "outage", "route", None),
    (404, b'{"error": "model \\"x\\" not found"}', "model", "model", "404 without an error type"),
    (429, openai("requests", "rate_limit_exceeded"), "throttle", "model", "429 rate_limit_exceeded"),
    (429, openai("insufficient_quota", "insufficient_quota"), "quota", "route", "429 insufficient_quota"),
    (429, openai("insufficient_quota"), "quota", "route", "429 insufficient_quota"),
    (500, openai("server_error"), "outage", "model", "500 server_error"),
    (
        400,
        b'{"object": "error", "message": "x", "type": "BadRequestError", "code": 400}',
        "caller",
        "job",
        "400 BadRequestError",
    ),
    # Google
    (400, json.dumps([GEMINI]).encode(), "auth", "route", "400 API_KEY_INVALID"),
    (429, b'{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED"}}', "throttle", "model", "429 RESOURCE_EXHAUSTED"),
]


@pytest.mark.parametrize(("status", "body", "kind", "scope", "why"), RESPONSES)
def test_an_error_response_is_judged_by_its_status_names_and_body(
    status: int, body: bytes, kind: str, scope: str, why: str | None
) -> None:
    judged = of_response(status, {}, body)
    assert (kind, scope) == (judged.kind, judged.scope)
    assert why is None or why == judged.why


@pytest.mark.parametrize(
    ("status", "name", "kind", "scope"),
    [
        (429, "ThrottlingException", "throttle", "model"),
        (429, "ModelNotReadyException:http://internal.amazon.com/coral/", "outage", "model"),
        (503, "ServiceUnavailableException", "outage", "model"),
        (400, "ServiceQuotaExceededException", "quota", "route"),
        (400, "ValidationException", "caller", "job"),
        (403, "AccessDeniedException", "auth", "route"),
        (403, "ExpiredTokenException", "auth", "route"),
        (404, "ResourceNotFoundException", "model", "model"),
        (408, "ModelTimeoutException", "ambiguous", "model"),
    ],
)
def test_bedrock_names_its_errors_in_a_header(status: int, name: str, kind: str, scope: str) -> None:
    judged = of_response(status, {"X-Amzn-ErrorType": name}, b'{"message": "x"}')
    assert (kind, scope, f"{status} {name.partition(':')[0]}") == (judged.kind, judged.scope, judged.why)


@pytest.mark.parametrize(("content_type", "scope"), [("application/json", "model"), ("text/html", "route"), (None, "route")])
def test_an_unread_body_is_judged_by_its_content_type(content_type: str | None, scope: str) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    assert scope == of_response(503, headers, None).scope


@pytest.mark.parametrize(
    ("body", "content_type", "kind"),
    [
        (b'{"input_tokens": 3}', "application/json", "ok"),
        (None, "text/event-stream", "ok"),
        (None, "text/html; charset=utf-8", "outage"),
        (b"", "application/json", "outage"),
        (HTML, "text/html", "outage"),
        (b"[]", "application/json", "outage"),
        (anthropic("overloaded_error"), "application/json", "outage"),
        (openai("server_error"), "application/json", "outage"),
    ],
)
def test_a_2xx_is_ok_only_with_json_that_is_no_error(body: bytes | None, content_type: str, kind: str) -> None:
    assert kind == of_response(200, {"content-type": content_type}, body).kind


@pytest.mark.parametrize(
    ("body", "kind", "scope"),
    [
        (b'{"type": "message", "stop_reason": "end_turn"}', "ok", "model"),
        (b'{"type": "message", "stop_reason": "refusal"}', "ok", "model"),
        (b'{"type": "message", "stop_reason": "max_tokens"}', "ok", "model"),
        (b'{"type": "message", "stop_reason": null}', "outage", "model"),
        (b'{"type": "message"}', "outage", "model"),
        (b'{"id": "chatcmpl-1"}', "outage", "route"),
        (anthropic("overloaded_error"), "outage", "route"),
        (b'{"type": "mess', "outage", "route"),
        (HTML, "outage", "route"),
        (b"\xff\xfe\xfd", "outage", "route"),
        (b" ", "outage", "route"),
    ],
)
def test_a_message_is_ok_only_if_it_is_complete(body: bytes, kind: str, scope: str) -> None:
    judged = of_message(body)
    assert (kind, scope) == (judged.kind, judged.scope)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (anthropic("overloaded_error"), "outage"),
        (anthropic("api_error"), "outage"),
        (anthropic("timeout_error"), "ambiguous"),
        (anthropic("rate_limit_error"), "throttle"),
        (anthropic("rate_limit_error", code="enforced_spend_limit_reached"), "quota"),
        (anthropic("invalid_request_error"), "caller"),
        (anthropic("billing_error"), "quota"),
        (openai("server_error").decode(), "outage"),
        ({"type": "insufficient_quota", "code": None}, "quota"),
        ("not json", "outage"),
        (None, "outage"),
    ],
)
def test_an_error_within_a_stream_is_judged_by_its_type(data: object, kind: str) -> None:
    assert kind == of_stream_error(data).kind


@pytest.mark.parametrize(
    ("headers", "now", "expected"),
    [
        ({}, None, None),
        ({"Retry-After": "12"}, None, 12.0),
        ({"retry-after": "0.5"}, None, 0.5),
        ({"retry-after": "-3"}, None, 0.0),
        ({"retry-after": "nan"}, None, None),
        ({"retry-after": "inf"}, None, None),
        ({"retry-after": "soon"}, 0.0, None),
        ({"retry-after-ms": "1500", "retry-after": "9"}, None, 1.5),
        ({"retry-after-ms": "x", "retry-after": "9"}, None, 9.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, None, None),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40.0, 60.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 400.0, 0.0),
    ],
)
def test_the_wait_a_provider_asks_for_is_understood_in_all_its_forms(
    headers: dict[str, str], now: float | None, expected: float | None
) -> None:
    assert expected == of_response(429, headers, b"", now=now).retry_after_s


def test_an_own_spend_limit_says_when_it_ends() -> None:
    now = 1796083200.0 - 3600.0  # an hour before 2026-12-01 00:00 UTC
    assert of_response(400, {}, anthropic("invalid_request_error", OWN_LIMIT), now=now).retry_after_s == 3600.0


def test_why_never_repeats_what_could_quote_a_prompt() -> None:
    body = json.dumps({"error": {"type": "my secret prompt", "code": "it's here", "message": "and here"}}).encode()
    assert of_response(400, {}, body).why == "400 without an error type"
    assert of_exception(ValueError("my secret prompt")).why == "ValueError"


def test_which_kinds_count_against_the_breaker() -> None:
    counting = {kind for kind in get_args(Kind) if Outcome(kind=kind, scope="model", why="").counts_as_failure}
    assert counting == {"outage", "ambiguous", "auth", "quota", "model"}
    assert not OK.counts_as_failure


def classes(module: str, *names: str) -> type[Exception]:
    """The class `module.names[-1]`, derived from the others in turn: what an SDK's MRO looks like."""
    kind: type[Exception] = Exception
    for name in names:
        kind = type(name, (kind,), {"__module__": module})
    return kind


CONNECTION = classes("anthropic._exceptions", "APIConnectionError")
TIMEOUT = classes("anthropic._exceptions", "APIConnectionError", "APITimeoutError")
POOL = classes("httpx2._exceptions", "TransportError", "TimeoutException", "PoolTimeout")
READ = classes("httpx2._exceptions", "TransportError", "TimeoutException", "ReadTimeout")
CONNECT = classes("httpx._exceptions", "TransportError", "NetworkError", "ConnectError")
TOKEN = classes("anthropic.lib.credentials._workload", "WorkloadIdentityError")


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def with_status(error: BaseException, status: int | None) -> BaseException:
    error.status_code = status  # type: ignore[attr-defined]
    return error


EXCEPTIONS = [
    (CONNECTION(), "outage", "route"),
    (TIMEOUT(), "ambiguous", "model"),
    (caused(TIMEOUT(), READ()), "ambiguous", "model"),
    (caused(TIMEOUT(), POOL()), "local", "job"),
    (caused(CONNECTION(), CONNECT()), "outage", "route"),
    (caused(CONNECTION(), ConnectionResetError()), "outage", "route"),
    (caused(CONNECTION(), FileNotFoundError()), "local", "job"),
    (caused(CONNECTION(), ZeroDivisionError()), "local", "job"),
    (caused(RuntimeError("wrapped by the task"), caused(TIMEOUT(), READ())), "ambiguous", "model"),
    (caused(RuntimeError(), KeyError()), "local", "job"),
    (with_status(TOKEN(), 503), "outage", "route"),
    (with_status(TOKEN(), 429), "outage", "route"),
    (with_status(TOKEN(), 400), "auth", "route"),
    (with_status(TOKEN(), None), "auth", "route"),
    (caused(with_status(TOKEN(), None), CONNECT()), "outage", "route"),
    (classes("anthropic._exceptions", "CredentialsError")(), "auth", "route"),
    (classes("google.auth.exceptions", "GoogleAuthError", "TransportError")(), "outage", "route"),
    (classes("google.auth.exceptions", "GoogleAuthError", "RefreshError")(), "auth", "route"),
    (ExceptionGroup("", [ValueError(), caused(TIMEOUT(), READ())]), "ambiguous", "model"),
    (asyncio.CancelledError(), "local", "job"),
    (KeyboardInterrupt(), "local", "job"),
    (ConnectionResetError(), "local", "job"),
]


@pytest.mark.parametrize(("error", "kind", "scope"), EXCEPTIONS)
def test_an_exception_is_judged_by_its_classes_and_its_cause(error: BaseException, kind: str, scope: str) -> None:
    judged = of_exception(error)
    assert (kind, scope) == (judged.kind, judged.scope)


def test_a_bug_while_an_outage_is_handled_stays_a_bug() -> None:
    try:
        try:
            raise CONNECTION
        except CONNECTION:
            {}["typo"]
    except KeyError as error:
        judged = of_exception(error)
    assert judged == Outcome(kind="local", scope="job", why="KeyError")


def test_a_ring_of_causes_ends() -> None:
    first, second = ValueError(), KeyError()
    first.__cause__, second.__cause__ = second, first
    assert of_exception(first).kind == "local"


def test_a_tasks_own_use_of_json_is_no_outage() -> None:
    """`json.loads` on a model's answer is the commonest of all bugs; it must not open a breaker."""
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("Sure! Here is the JSON:")
    assert of_task_error(caught.value).kind == "local"
    assert of_exception(caught.value).kind == "outage"


def test_an_sdks_use_of_json_is_an_outage_wherever_it_surfaces() -> None:
    """The SDK's frame is the one that entered json."""
    sdk: dict[str, object] = {"__name__": "anthropic._response"}
    exec("import json\ndef parse(text): return json.loads(text)", sdk)
    with pytest.raises(json.JSONDecodeError) as caught:
        sdk["parse"](HTML)  # type: ignore[operator]
    assert of_task_error(caught.value).kind == "outage"


@pytest.mark.parametrize("module", [blame, outcome])
def test_the_examples_in_the_docstrings_hold(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]
