# SPDX-License-Identifier: Apache-2.0
"""The SDK's clients for the clouds that serve Claude: one row for each kind of route. No translation is needed for any."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import anthropic
import httpx2
from anthropic.lib.bedrock._stream_decoder import AWSEventStreamDecoder

from tideover.errors import ConfigurationError
from tideover.settings import Settings
from tideover.tables import RouteKind

NO_KEY = "none"
"""What a route without a credential sends, because the SDK sends something: never another route's key."""

CONNECT_TIMEOUT_S = 5.0

AWS_STREAM = "application/vnd.amazon.eventstream"


@dataclass(frozen=True, slots=True)
class Cloud:
    """A client of the SDK, and what it calls the settings of its route.

    `key`: its argument for the credential that the settings name; without one the client finds the cloud's own (AWS' chain,
    Google's application default credentials).
    """

    client: str
    key: str = "api_key"
    arguments: Mapping[str, str] = field(default_factory=dict)
    without_key: Mapping[str, str] = field(default_factory=dict)


AWS = {"region": "aws_region", "profile": "aws_profile"}

CLOUDS: Mapping[RouteKind, Cloud] = {
    "anthropic": Cloud("Anthropic", without_key={"api_key": NO_KEY}),
    "bedrock": Cloud("AnthropicBedrock", arguments=AWS),
    "bedrock-mantle": Cloud("AnthropicBedrockMantle", arguments=AWS),
    "vertex": Cloud("AnthropicVertex", "access_token", {"region": "region", "project": "project_id"}),
    "foundry": Cloud("AnthropicFoundry", arguments={"resource": "resource"}),
    "anthropic-aws": Cloud("AnthropicAWS", arguments={**AWS, "workspace": "workspace_id"}),
    "anthropic-google-cloud": Cloud(
        "AnthropicGoogleCloud", arguments={"region": "location", "project": "project", "workspace": "workspace_id"}
    ),
    "openai-compatible": Cloud("Anthropic", without_key={"api_key": NO_KEY}),  # its calls are carried by the translation
}


def options_of(settings: Settings, route: str) -> dict[str, Any]:
    """The arguments of a route's client. Its key is read now, so that a rotated one is seen."""
    found, key = settings.route(route), settings.api_key(route)
    cloud = CLOUDS[found.kind]
    timeout = httpx2.Timeout(found.timeout_s, connect=min(found.timeout_s, CONNECT_TIMEOUT_S))
    options: dict[str, Any] = {"timeout": timeout, **(cloud.without_key if key is None else {cloud.key: key})}
    if found.base_url is not None:
        options["base_url"] = found.base_url
    for ours, theirs in cloud.arguments.items():
        if (value := getattr(found, ours)) is not None:
            options[theirs] = value
    if names := settings.headers_of_others(route):
        options["default_headers"] = dict.fromkeys(names, anthropic.Omit())
    return options


def make(settings: Settings, route: str, options: Mapping[str, Any], *, asynchronous: bool) -> Any:
    """A client of a route. `ConfigurationError` where its cloud's libraries are missing, or the SDK refuses what is set."""
    cloud = CLOUDS[settings.route(route).kind]
    try:
        return getattr(anthropic, f"{'Async' if asynchronous else ''}{cloud.client}")(**options)
    except (ValueError, anthropic.AnthropicError) as error:
        raise ConfigurationError(f"route {route}: {error}") from None


def is_event_stream(upstream: httpx2.Response) -> bool:
    return "event-stream" in upstream.headers.get("content-type", "event-stream") or is_aws_stream(upstream)


def is_aws_stream(upstream: httpx2.Response) -> bool:
    return AWS_STREAM in upstream.headers.get("content-type", "")


def chunks_of(upstream: httpx2.Response) -> Iterator[bytes]:
    """The bytes of a stream as server-sent events, in which Bedrock wraps its own."""
    if not is_aws_stream(upstream):
        yield from upstream.iter_bytes()
        return
    for event in AWSEventStreamDecoder().iter_bytes(upstream.iter_bytes()):
        yield as_bytes(event)


async def achunks_of(upstream: httpx2.Response) -> AsyncIterator[bytes]:
    """As `chunks_of`, from an event loop."""
    if not is_aws_stream(upstream):
        async for chunk in upstream.aiter_bytes():
            yield chunk
        return
    async for event in AWSEventStreamDecoder().aiter_bytes(upstream.aiter_bytes()):
        yield as_bytes(event)


def as_bytes(event: Any) -> bytes:
    return f"event: {event.event}\ndata: {event.data}\n\n".encode()
