# SPDX-License-Identifier: Apache-2.0
"""What a provider says in each dialect: read a request, make the body of an answer, a stream or an error.

Bodies as the APIs send them: https://docs.anthropic.com/en/api/errors, https://platform.openai.com/docs/guides/error-codes,
and `research/reroute.md` §1.5.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from tideover.testing.faults import Fault

if TYPE_CHECKING:
    from collections.abc import Mapping

Dialect = Literal["anthropic", "openai-compatible"]
DIALECTS: Final[tuple[str, ...]] = get_args(Dialect)

STREAM_PIECES = 8
REQUESTS_LEFT = 45
"""Of 50 a minute, when a provider refuses for no reason of ours."""
OUTPUT_TOKENS = 64
SAYING = "The tide goes out and it comes back, and what stands on the shore is not lost. "
MODELS: Final[Mapping[Dialect, tuple[str, ...]]] = {
    "anthropic": ("claude-opus-4-8", "claude-sonnet-5-5", "claude-haiku-4-5"),
    "openai-compatible": ("gpt-5.5", "gpt-5.5-mini"),
}
EDGE_PAGE = b"""<!DOCTYPE html>
<html lang="en-US"><head><title>502: Bad gateway</title></head>
<body><h1>Bad gateway <span>Error code 502</span></h1><p>The web server reported a bad gateway error.</p>
<p>cloudflare</p></body></html>
"""
LOGIN_PAGE = b"<!DOCTYPE html>\n<html><head><title>Just a moment...</title></head><body>Please wait.</body></html>\n"


@dataclass(frozen=True)
class Ask:
    """What one request asks for.

    Attributes:
      n: of the call; makes ids that differ.
      model: empty when the request named none.
      stream_usage: whether the last chunk of a chat-completions stream tells the usage.
      says: the whole text of the answer.
      refusal: the body of the 400, when the request is the caller's own error.
    """

    dialect: Dialect
    n: int
    model: str = ""
    stream: bool = False
    input_tokens: int = 0
    output_tokens: int = 0
    stream_usage: bool = False
    says: str = ""
    refusal: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Problem:
    """An error of the API: HTTP status, and what stands in its body. `code` and `param` are OpenAI's."""

    status: int
    type: str
    message: str
    code: str | None = None
    param: str | None = None


ANTHROPIC_PROBLEMS: Final[Mapping[Fault, Problem]] = {
    Fault.BAD_REQUEST: Problem(400, "invalid_request_error", "messages: at least one message is required"),
    Fault.UNAUTHORIZED: Problem(401, "authentication_error", "invalid x-api-key"),
    Fault.QUOTA: Problem(402, "billing_error", "Your credit balance is too low to access the Anthropic API."),
    Fault.FORBIDDEN: Problem(403, "permission_error", "Your API key does not have permission to use the specified resource."),
    Fault.NOT_FOUND: Problem(404, "not_found_error", "model: {model}"),
    Fault.RATE_LIMITED: Problem(
        429, "rate_limit_error", "This request would exceed the rate limit for your organization of 50 requests per minute."
    ),
    Fault.FALSE_LIMITED: Problem(
        429, "rate_limit_error", "This request would exceed the rate limit for your organization of 50 requests per minute."
    ),
    Fault.API_ERROR: Problem(500, "api_error", "Internal server error"),
    Fault.BAD_GATEWAY: Problem(502, "api_error", "Bad gateway"),
    Fault.UNAVAILABLE: Problem(503, "api_error", "Service unavailable"),
    Fault.GATEWAY_TIMEOUT: Problem(504, "timeout_error", "Request timed out"),
    Fault.OVERLOADED: Problem(529, "overloaded_error", "Overloaded"),
}
OPENAI_PROBLEMS: Final[Mapping[Fault, Problem]] = {
    Fault.BAD_REQUEST: Problem(400, "invalid_request_error", "Invalid 'messages': empty array.", "empty_array", "messages"),
    Fault.UNAUTHORIZED: Problem(401, "invalid_request_error", "Incorrect API key provided.", "invalid_api_key"),
    Fault.QUOTA: Problem(
        429,
        "insufficient_quota",
        "You exceeded your current quota, please check your plan and billing details.",
        "insufficient_quota",
    ),
    Fault.FORBIDDEN: Problem(
        403,
        "request_forbidden",
        "Country, region, or territory not supported",
        "unsupported_country_region_territory",
    ),
    Fault.NOT_FOUND: Problem(
        404,
        "invalid_request_error",
        "The model `{model}` does not exist or you do not have access to it.",
        "model_not_found",
    ),
    Fault.RATE_LIMITED: Problem(
        429, "requests", "Rate limit reached for {model} on requests per min (RPM).", "rate_limit_exceeded"
    ),
    Fault.FALSE_LIMITED: Problem(
        429, "requests", "Rate limit reached for {model} on requests per min (RPM).", "rate_limit_exceeded"
    ),
    Fault.API_ERROR: Problem(500, "server_error", "The server had an error while processing your request. Sorry about that!"),
    Fault.BAD_GATEWAY: Problem(502, "server_error", "Bad gateway."),
    Fault.UNAVAILABLE: Problem(503, "server_error", "Service unavailable."),
    Fault.GATEWAY_TIMEOUT: Problem(504, "server_error", "The request timed out."),
    Fault.OVERLOADED: Problem(
        503, "server_error", "The engine is currently overloaded, please try again later.", "server_overloaded"
    ),
}


def request_id(n: int) -> str:
    """The id that headers and error bodies carry for call `n`; shaped like Anthropic's."""
    return f"req_fake{n:016d}"


def headers_of(dialect: Dialect, n: int, content_type: str = "application/json") -> dict[str, str]:
    """The headers of any answer."""
    ids = {"request-id": request_id(n)}
    if dialect == "openai-compatible":
        ids["x-request-id"] = request_id(n)
    return {"content-type": content_type, **ids}


def problem_body(dialect: Dialect, problem: Problem, *, model: str, n: int) -> dict[str, Any]:
    """An error as the API of this dialect words it."""
    message = problem.message.replace("{model}", model)
    if dialect == "anthropic":
        error = {"type": problem.type, "message": message}
        return {"type": "error", "error": error, "request_id": request_id(n)}
    return {"error": {"message": message, "type": problem.type, "param": problem.param, "code": problem.code}}


def problem_of(dialect: Dialect, fault: Fault) -> Problem:
    """The API error that is this fault. KeyError for a fault that is not an API error."""
    return (ANTHROPIC_PROBLEMS if dialect == "anthropic" else OPENAI_PROBLEMS)[fault]


def rate_limit_headers(dialect: Dialect, retry_after_s: float, resets_at: str, requests_left: int = 0) -> dict[str, str]:
    """What a 429 tells about the limits; `resets_at` is RFC 3339."""
    headers = {"retry-after": f"{retry_after_s:g}"}
    if dialect == "anthropic":
        for kind, limit in (("requests", 50), ("tokens", 50_000), ("input-tokens", 40_000), ("output-tokens", 10_000)):
            remaining = requests_left if kind == "requests" else limit
            headers[f"anthropic-ratelimit-{kind}-limit"] = str(limit)
            headers[f"anthropic-ratelimit-{kind}-remaining"] = str(remaining)
            headers[f"anthropic-ratelimit-{kind}-reset"] = resets_at
        return headers
    for kind, limit, remaining in (("requests", 50, requests_left), ("tokens", 50_000, 50_000)):
        headers[f"x-ratelimit-limit-{kind}"] = str(limit)
        headers[f"x-ratelimit-remaining-{kind}"] = str(remaining)
        headers[f"x-ratelimit-reset-{kind}"] = f"{retry_after_s:g}s"
    return headers


def limit_headers(dialect: Dialect, per_minute: int, left: int) -> dict[str, str]:
    """What a good answer tells about the limit of requests."""
    if dialect == "anthropic":
        names = ("anthropic-ratelimit-requests-limit", "anthropic-ratelimit-requests-remaining")
    else:
        names = ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests")
    return dict(zip(names, (str(per_minute), str(left)), strict=True))


def read_ask(dialect: Dialect, body: bytes, headers: Mapping[str, str], *, speaker: str, n: int) -> Ask:
    """What is asked for; with a `refusal` when the body is no JSON object, or lacks a field that the API demands."""
    try:
        asked = json.loads(body)
    except ValueError:
        asked = None
    if not isinstance(asked, dict):
        return Ask(dialect, n, refusal=not_json(dialect, n))
    most = asked.get("max_completion_tokens", asked.get("max_tokens"))
    usual = min(most, OUTPUT_TOKENS) if isinstance(most, int) else OUTPUT_TOKENS
    output_tokens = tokens_header(headers, "x-fake-output-tokens", usual)
    options = asked.get("stream_options")
    return Ask(
        dialect,
        n,
        model=asked["model"] if isinstance(asked.get("model"), str) else "",
        stream=asked.get("stream") is True,
        input_tokens=tokens_header(headers, "x-fake-input-tokens", count_tokens(asked)),
        output_tokens=output_tokens,
        stream_usage=isinstance(options, dict) and options.get("include_usage") is True,
        says=f"{speaker}: {SAYING * (output_tokens * 4 // len(SAYING) + 1)}"[: max(1, output_tokens * 4)],
        refusal=refusal_of(dialect, asked, n),
    )


def refusal_of(dialect: Dialect, asked: Mapping[str, Any], n: int) -> dict[str, Any] | None:
    """The 400 for the first demanded field that is missing, empty or of the wrong type; None when all are there."""
    demanded: dict[str, type] = {"model": str, "messages": list}
    if dialect == "anthropic":
        demanded["max_tokens"] = int
    for name, kind in demanded.items():
        if not isinstance(asked.get(name), kind) or not asked[name]:
            return missing(dialect, name, n)
    return None


def not_json(dialect: Dialect, n: int) -> dict[str, Any]:
    """The 400 for a body that cannot be read."""
    said = "The request body is not valid JSON."
    if dialect == "openai-compatible":
        said = "We could not parse the JSON body of your request."
    return problem_body(dialect, Problem(400, "invalid_request_error", said), model="", n=n)


def missing(dialect: Dialect, name: str, n: int) -> dict[str, Any]:
    """The 400 for a field that is not there."""
    problem = Problem(400, "invalid_request_error", f"{name}: Field required")
    if dialect == "openai-compatible":
        said = f"Missing required parameter: '{name}'."
        problem = Problem(400, "invalid_request_error", said, "missing_required_parameter", name)
    return problem_body(dialect, problem, model="", n=n)


def tokens_header(headers: Mapping[str, str], name: str, otherwise: int) -> int:
    """The number in this header of the request, for tests that want a certain latency."""
    value = headers.get(name, "")
    return int(value) if value.isdecimal() else otherwise


def count_tokens(asked: Mapping[str, Any]) -> int:
    """Tokens of a request's text, at four characters each."""
    return (text_length(asked.get("messages")) + text_length(asked.get("system"))) // 4 + 1


def text_length(part: object) -> int:
    """Characters of text anywhere below a message, its content or a content block."""
    match part:
        case str():
            return len(part)
        case list():
            return sum(text_length(each) for each in part)
        case dict():
            return sum(text_length(part.get(key)) for key in ("content", "text"))
        case _:
            return 0


def answer(ask: Ask, *, stops: bool = True) -> dict[str, Any]:
    """The body of a plain answer; without `stops` it has no reason for having stopped."""
    if ask.dialect == "anthropic":
        content = [{"type": "text", "text": ask.says}]
        return message(ask, content, "end_turn" if stops else None, ask.output_tokens)
    said = {"role": "assistant", "content": ask.says, "refusal": None}
    choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": "stop" if stops else None}
    return {**completion(ask, "chat.completion"), "choices": [choice], "usage": usage(ask)}


def message(ask: Ask, content: list[dict[str, Any]], stop_reason: str | None, output_tokens: int) -> dict[str, Any]:
    return {
        "id": f"msg_fake{ask.n:016d}",
        "type": "message",
        "role": "assistant",
        "model": ask.model,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": {
            "input_tokens": ask.input_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": output_tokens,
            "service_tier": "standard",
        },
    }


def completion(ask: Ask, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-fake{ask.n:016d}", "object": kind, "created": 1_780_000_000 + ask.n, "model": ask.model}


def usage(ask: Ask) -> dict[str, int]:
    total = ask.input_tokens + ask.output_tokens
    return {"prompt_tokens": ask.input_tokens, "completion_tokens": ask.output_tokens, "total_tokens": total}


def stream(ask: Ask, fault: Fault | None) -> list[bytes]:
    """The pieces of a streamed answer, to be sent with pauses between; the first is the first token.

    With `STREAM_NO_STOP` what ends the answer is not there; with `STREAM_CUT`, `STREAM_STALL` and `STREAM_ERROR` only the first
    half is, in the last case followed by the error; with `STREAM_ERROR_FIRST` the error follows the head.
    """
    step = max(1, len(ask.says) // STREAM_PIECES)
    texts = [ask.says[start:end] for start, end in pairwise([*range(0, len(ask.says), step), len(ask.says)])]
    head, deltas, tail = message_events(ask, texts) if ask.dialect == "anthropic" else completion_events(ask, texts)
    match fault:
        case Fault.STREAM_CUT | Fault.STREAM_STALL:
            deltas, tail = deltas[: (len(deltas) + 1) // 2], b""
        case Fault.STREAM_ERROR | Fault.STREAM_ERROR_FIRST:
            problem = problem_of(ask.dialect, Fault.OVERLOADED)
            body = problem_body(ask.dialect, problem, model=ask.model, n=ask.n)
            deltas = deltas[: (len(deltas) + 1) // 2] if fault is Fault.STREAM_ERROR else [b""]
            tail = event(body, "error") if ask.dialect == "anthropic" else event(body)
        case Fault.STREAM_NO_STOP:
            tail = b""
        case _:
            pass
    deltas[0] = head + deltas[0]
    deltas[-1] += tail
    return deltas


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    label = f"event: {name}\n" if name is not None else ""
    return f"{label}data: {json.dumps(data)}\n\n".encode()


def message_events(ask: Ask, texts: list[str]) -> tuple[bytes, list[bytes], bytes]:
    """Head, deltas and tail of a Messages stream."""

    def named(data: dict[str, Any]) -> bytes:
        return event(data, data["type"])

    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    head = named({"type": "message_start", "message": message(ask, [], None, 1)}) + named(block) + named({"type": "ping"})
    deltas = [
        named({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}) for text in texts
    ]
    end = {"stop_reason": "end_turn", "stop_sequence": None}
    tail = named({"type": "content_block_stop", "index": 0})
    tail += named({"type": "message_delta", "delta": end, "usage": {"output_tokens": ask.output_tokens}})
    return head, deltas, tail + named({"type": "message_stop"})


def completion_events(ask: Ask, texts: list[str]) -> tuple[bytes, list[bytes], bytes]:
    """Head, deltas and tail of a chat-completions stream."""
    unused = {"usage": None} if ask.stream_usage else {}

    def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**completion(ask, "chat.completion.chunk"), "choices": [choice], **unused})

    tail = chunk({}, "stop")
    if ask.stream_usage:
        tail += event({**completion(ask, "chat.completion.chunk"), "choices": [], "usage": usage(ask)})
    return chunk({"role": "assistant", "content": ""}), [chunk({"content": text}) for text in texts], tail + b"data: [DONE]\n\n"


def models(dialect: Dialect) -> dict[str, Any]:
    """The body of `GET /v1/models`."""
    names = MODELS[dialect]
    if dialect == "openai-compatible":
        data = [{"id": name, "object": "model", "created": 1_780_000_000, "owned_by": "fake"} for name in names]
        return {"object": "list", "data": data}
    created = "2026-06-01T00:00:00Z"
    about = {"type": "model", "created_at": created, "lifecycle": "active"}
    data = [{**about, "id": name, "display_name": name} for name in names]
    return {"data": data, "has_more": False, "first_id": names[0], "last_id": names[-1]}
