# SPDX-License-Identifier: Apache-2.0
"""One call at a fake provider, from the request to the end of its answer, well or in the way its fault says.

The row in the ledger is completed just before the last byte goes out, so that a client which has its answer finds it there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, assert_never

from tideover import clock
from tideover.testing import answers, clouds
from tideover.testing.faults import Fault
from tideover.testing.ledger import OK

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tideover.testing.answers import Ask
    from tideover.testing.latency import Wait
    from tideover.testing.ledger import Entry
    from tideover.testing.wire import Connection


HANG_POLL_S = 0.1


@dataclass
class Exchange:
    """What answering one call needs. `hang_over` says whether a hang is to be answered now; None: it never is."""

    connection: Connection
    ask: Ask
    entry: Entry
    wait: Wait
    retry_after_s: float
    hang_over: Callable[[], bool] | None
    limits: Mapping[str, str]
    """Headers of good answers that tell the limit."""
    frames: bool = False
    """Whether a stream goes out in AWS' frames."""

    async def perform(self, fault: Fault | None) -> None:
        """Answer the call. Raises `ClientGone` when the client does not wait for it."""
        match fault:
            case None:
                await self.succeed()
            case Fault.STREAM_STALL if self.ask.stream:
                await self.send_stream(fault)
            case Fault.HANG | Fault.STREAM_STALL:
                await self.hang()
                await self.succeed()
            case Fault.RESET:
                self.finish(fault, None)
                self.connection.reset()
            case Fault.STREAM_CUT | Fault.STREAM_ERROR | Fault.STREAM_ERROR_FIRST | Fault.STREAM_NO_STOP if self.ask.stream:
                await self.send_stream(fault)
            case Fault.STREAM_CUT:
                await self.send_json(fault, 200, answers.answer(self.ask), missing_bytes=100)
            case Fault.STREAM_NO_STOP:
                await self.send_json(fault, 200, answers.answer(self.ask, stops=False))
            case Fault.EDGE_HTML:
                await self.send_page(fault, 502, answers.EDGE_PAGE)
            case Fault.OK_HTML:
                await self.send_page(fault, 200, answers.LOGIN_PAGE)
            case Fault.OK_EMPTY:
                await self.send(fault, 200, b"", self.headers())
            case Fault.OK_ERROR_BODY:
                await self.send_problem(fault, Fault.OVERLOADED, status=200)
            case Fault.STREAM_ERROR | Fault.STREAM_ERROR_FIRST:
                await self.send_problem(fault, Fault.OVERLOADED)
            case (
                Fault.OVERLOADED
                | Fault.API_ERROR
                | Fault.BAD_GATEWAY
                | Fault.UNAVAILABLE
                | Fault.GATEWAY_TIMEOUT
                | Fault.UNAUTHORIZED
                | Fault.FORBIDDEN
                | Fault.NOT_FOUND
                | Fault.BAD_REQUEST
                | Fault.RATE_LIMITED
                | Fault.FALSE_LIMITED
                | Fault.QUOTA
            ):
                await self.send_problem(fault, fault)
            case _:
                assert_never(fault)

    async def succeed(self) -> None:
        if self.ask.stream:
            await self.send_stream(None)
            return
        await self.connection.sleep(self.wait.rest_s)
        await self.send_json(OK, 200, answers.answer(self.ask), self.limits)

    async def hang(self) -> None:
        """Say nothing until the client leaves, or until the hang is over."""
        while self.hang_over is None or not self.hang_over():
            await self.connection.sleep(HANG_POLL_S if self.hang_over is not None else None)

    async def send_stream(self, fault: Fault | None) -> None:
        """Send the first piece after the first-token wait, the others evenly over the rest of it."""
        await self.connection.sleep(self.wait.first_s)
        kind = clouds.AWS_STREAM if self.frames else "text/event-stream; charset=utf-8"
        await self.connection.begin_stream({**self.headers(kind), **self.limits})
        *pieces, last = [clouds.framed(piece) if self.frames else piece for piece in answers.stream(self.ask, fault)]
        for piece in pieces:
            await self.connection.chunk(piece)
            await self.connection.sleep(self.wait.rest_s / len(pieces))
        if fault is Fault.STREAM_STALL:
            await self.hang()
        self.finish(fault if fault is not None else OK, 200)
        await self.connection.chunk(last, last=fault is not Fault.STREAM_CUT)
        if fault is Fault.STREAM_CUT:
            self.connection.cut()

    async def send_problem(self, outcome: Fault, says: Fault, *, status: int | None = None) -> None:
        """Send the API error `says`; with `status` instead of its own."""
        problem = answers.problem_of(self.ask.dialect, says)
        extra: dict[str, str] = {}
        if says in (Fault.RATE_LIMITED, Fault.FALSE_LIMITED):
            resets_at = datetime.fromtimestamp(clock.now(), UTC) + timedelta(seconds=self.retry_after_s)
            rfc3339 = resets_at.isoformat(timespec="seconds").replace("+00:00", "Z")
            left = 0 if says is Fault.RATE_LIMITED else answers.REQUESTS_LEFT
            extra = answers.rate_limit_headers(self.ask.dialect, self.retry_after_s, rfc3339, left)
            extra |= self.limits if says is Fault.RATE_LIMITED else {}
        body = self.ask.refusal if says is Fault.BAD_REQUEST else None
        if body is None:
            body = answers.problem_body(self.ask.dialect, problem, model=self.ask.model, n=self.ask.n)
        await self.send_json(outcome, status if status is not None else problem.status, body, extra)

    async def send_page(self, outcome: Fault, status: int, page: bytes) -> None:
        """Send what the edge sends: no id of the API, a page for people."""
        await self.send(outcome, status, page, {"content-type": "text/html; charset=UTF-8", "server": "cloudflare"})

    async def send_json(
        self,
        outcome: str,
        status: int,
        body: Mapping[str, Any],
        extra: Mapping[str, str] | None = None,
        *,
        missing_bytes: int = 0,
    ) -> None:
        headers = {**self.headers(), **(extra if extra is not None else {})}
        await self.send(outcome, status, json.dumps(body).encode(), headers, missing_bytes=missing_bytes)

    async def send(self, outcome: str, status: int, body: bytes, headers: Mapping[str, str], *, missing_bytes: int = 0) -> None:
        await self.connection.sleep(self.wait.first_s)
        self.finish(outcome, status)
        await self.connection.respond(status, body, headers, missing_bytes=missing_bytes)

    def headers(self, content_type: str = "application/json") -> dict[str, str]:
        return answers.headers_of(self.ask.dialect, self.ask.n, content_type)

    def finish(self, outcome: str, status: int | None) -> None:
        """Complete the row, unless there is nobody left to answer."""
        self.connection.ensure_client()
        self.entry.end(outcome, status)
