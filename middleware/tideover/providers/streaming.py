# SPDX-License-Identifier: Apache-2.0
"""Reads the answer to a call, which comes as a stream: a plain call's to its end, a stream's to its first content.

So a provider that hangs shows after the idle timeout, and one that fails before user code saw anything can be replaced.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import anthropic
import httpx2

from tideover import clock
from tideover.core.outcome import Outcome, of_exception, of_message, of_stream_error
from tideover.providers.clouds import achunks_of, chunks_of
from tideover.providers.reassembly import Reassembly

MOST_SILENCES = 5
"""How many idle timeouts a provider may fill with pings before its first content."""

STATUS_OF_ERROR = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "conflict_error": 409,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "timeout_error": 504,
    "overloaded_error": 529,
}
"""What an error within a stream would have been as the answer to a plain call; 500 for others."""

OF_THE_WIRE = ("content-length", "content-encoding", "transfer-encoding", "content-type")
"""Headers that say how the bytes came, which is not how they are handed on."""

JSON = {"content-type": "application/json"}


@dataclass(slots=True)
class Watch:
    """Follows an answer while it comes.

    `began` is called at its first content, which comes within `patience_s`; all of it comes within `most_s`.
    """

    began: Callable[[], None]
    patience_s: float
    most_s: float = math.inf
    stream: Reassembly = field(default_factory=Reassembly)
    since: float = field(default_factory=clock.monotonic)

    def take(self, chunk: bytes) -> None:
        waited = not self.stream.begun
        self.stream.push(chunk)
        if waited and self.stream.begun:
            self.began()
        if clock.monotonic() - self.since > (self.most_s if self.stream.begun else self.patience_s):
            raise httpx2.ReadTimeout("only signs of life, and no answer")

    @property
    def has_begun(self) -> bool:
        return self.stream.begun or self.stream.ended


def whole(upstream: httpx2.Response, watch: Watch) -> httpx2.Response:
    """Reads a stream to its end: the answer that a plain call would have got."""
    try:
        for chunk in chunks_of(upstream):
            watch.take(chunk)
        watch.stream.end()
    except httpx2.TransportError:
        if not watch.stream.ended:
            raise
    finally:
        upstream.close()
    return plain(upstream, watch.stream)


async def awhole(upstream: httpx2.Response, watch: Watch) -> httpx2.Response:
    """As `whole`, from an event loop."""
    try:
        async for chunk in achunks_of(upstream):
            watch.take(chunk)
        watch.stream.end()
    except httpx2.TransportError:
        if not watch.stream.ended:
            raise
    finally:
        await upstream.aclose()
    return plain(upstream, watch.stream)


def opened(upstream: httpx2.Response, watch: Watch) -> httpx2.Response:
    """Reads a stream to its first content: the stream from its beginning, or the error that came instead."""
    chunks, first = chunks_of(upstream), list[bytes]()
    try:
        for chunk in chunks:
            first.append(chunk)
            watch.take(chunk)
            if watch.has_begun:
                break
        else:
            watch.stream.end()
    except BaseException:
        upstream.close()
        raise
    if watch.stream.error is not None:
        upstream.close()
        return plain(upstream, watch.stream)
    return streamed(upstream, Passing(upstream, watch.stream, first, chunks))


async def aopened(upstream: httpx2.Response, watch: Watch) -> httpx2.Response:
    """As `opened`, from an event loop."""
    chunks, first = achunks_of(upstream), list[bytes]()
    try:
        async for chunk in chunks:
            first.append(chunk)
            watch.take(chunk)
            if watch.has_begun:
                break
        else:
            watch.stream.end()
    except BaseException:
        await upstream.aclose()
        raise
    if watch.stream.error is not None:
        await upstream.aclose()
        return plain(upstream, watch.stream)
    return streamed(upstream, AsyncPassing(upstream, watch.stream, first, chunks))


class Fate:
    """How a stream that user code reads ends: told once, as soon as it is known, to `report`."""

    report: Callable[[Outcome], None] | None = None

    def __init__(self, upstream: httpx2.Response, stream: Reassembly) -> None:
        self.upstream, self.stream = upstream, stream

    @property
    def elapsed(self) -> Any:
        """For `Response.elapsed`."""
        return getattr(self.upstream.stream, "elapsed", None)

    def tell(self, outcome: Outcome) -> None:
        report, self.report = self.report, None
        if report is not None:
            report(outcome)

    def look(self) -> None:
        """After each chunk: the SDK reads no further than an error event."""
        if self.stream.error is not None:
            self.tell(of_stream_error(self.stream.error))
        elif self.stream.over:
            self.tell(outcome_of(self.stream))

    def broken(self, error: httpx2.TransportError) -> anthropic.APIConnectionError | None:
        """What the reader gets for an error of the transport; None: the answer was complete."""
        if self.stream.ended:
            return None
        self.tell(of_exception(error, now=clock.now()))
        return as_sdk_error(error, self.upstream.request)


class Passing(Fate, httpx2.SyncByteStream):
    """The bytes of a stream as they come, from its beginning."""

    def __init__(self, upstream: httpx2.Response, stream: Reassembly, first: list[bytes], chunks: Iterator[bytes]) -> None:
        super().__init__(upstream, stream)
        self.first, self.chunks = first, chunks

    def __iter__(self) -> Iterator[bytes]:
        try:
            self.look()
            yield from self.first
            for chunk in self.chunks:
                self.stream.push(chunk)
                self.look()
                yield chunk
            self.stream.end()
            self.look()
        except httpx2.TransportError as error:
            if (broken := self.broken(error)) is not None:
                raise broken from error

    def close(self) -> None:
        self.upstream.close()


class AsyncPassing(Fate, httpx2.AsyncByteStream):
    """As `Passing`, for an event loop."""

    def __init__(self, upstream: httpx2.Response, stream: Reassembly, first: list[bytes], chunks: AsyncIterator[bytes]) -> None:
        super().__init__(upstream, stream)
        self.first, self.chunks = first, chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            self.look()
            for chunk in self.first:
                yield chunk
            async for chunk in self.chunks:
                self.stream.push(chunk)
                self.look()
                yield chunk
            self.stream.end()
            self.look()
        except httpx2.TransportError as error:
            if (broken := self.broken(error)) is not None:
                raise broken from error

    async def aclose(self) -> None:
        await self.upstream.aclose()


def as_sdk_error(error: httpx2.TransportError, request: httpx2.Request) -> anthropic.APIConnectionError:
    """The error as the SDK raises it where it reads an answer itself."""
    if isinstance(error, httpx2.TimeoutException):
        return anthropic.APITimeoutError(request=request)
    return anthropic.APIConnectionError(message=str(error) or "Connection error.", request=request)


def outcome_of(stream: Reassembly) -> Outcome:
    """What a stream that has ended came to."""
    if stream.error is not None:
        return of_stream_error(stream.error)
    said = {} if stream.message is None else {name: stream.message.get(name) for name in ("type", "stop_reason", "usage")}
    return of_message(json.dumps(said).encode())


def plain(upstream: httpx2.Response, stream: Reassembly) -> httpx2.Response:
    """A stream that has ended, as the answer to a plain call."""
    if stream.error is None:
        return made(upstream, 200, JSON, content=json.dumps(stream.whole()).encode())
    event = json.loads(stream.error)
    error = event.get("error")
    kind = error.get("type") if isinstance(error, dict) else None
    return made(upstream, STATUS_OF_ERROR.get(str(kind), 500), JSON, content=stream.error)


def streamed(upstream: httpx2.Response, stream: Passing | AsyncPassing) -> httpx2.Response:
    return made(upstream, upstream.status_code, {"content-type": "text/event-stream; charset=utf-8"}, stream=stream)


def made(upstream: httpx2.Response, status: int, headers: dict[str, str], **body: Any) -> httpx2.Response:
    """A response with another body, and what else upstream said."""
    kept = [(name, value) for name, value in upstream.headers.multi_items() if name not in OF_THE_WIRE]
    response = httpx2.Response(
        status, headers=[*kept, *headers.items()], request=upstream.request, extensions=upstream.extensions, **body
    )
    response.history = upstream.history
    with suppress(RuntimeError):  # a transport that is no network may not have measured it
        if upstream.is_closed:
            response.elapsed = upstream.elapsed
    return response
