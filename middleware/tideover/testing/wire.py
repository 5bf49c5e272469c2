# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 on one accepted connection: requests in, answers, streams and rude endings out. Knows nothing of providers."""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

HEAD_MAX_BYTES = 256 * 1024
BODY_MAX_BYTES = 32 * 1024 * 1024  # what the Messages API takes (research/reroute.md §1.6)
ACCEPT_TURNS = 5  # of the loop, from accept() to `connected`, with one to spare
REASONS = {status.value: status.phrase for status in HTTPStatus}


class ClientGone(Exception):
    """The client hung up before it had its answer."""


class BadHttp(Exception):
    """What came in is no request; `status` says why."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"HTTP {status}")


@dataclass(frozen=True)
class Request:
    """One HTTP request. Header names are in lower case; the query is not decoded."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes


class Connection(asyncio.StreamReaderProtocol):
    """One client, one request after the other.

    It is a protocol of our own rather than a pair of streams only, because a fake that hangs has to see the client leave
    while it reads nothing: `gone` is set at the client's FIN or RST.
    """

    writer: asyncio.StreamWriter
    task: asyncio.Task[None]

    def __init__(self, serve: Callable[[Connection, Request], Awaitable[None]], connections: set[Connection]) -> None:
        self.reader = asyncio.StreamReader(limit=HEAD_MAX_BYTES)
        super().__init__(self.reader, self.connected)
        self.serve = serve
        self.connections = connections
        self.gone = asyncio.Event()
        self.lost = asyncio.Event()

    def connected(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.connections.add(self)
        self.task = asyncio.get_running_loop().create_task(self.run())

    def eof_received(self) -> bool | None:
        self.gone.set()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()
        self.connections.discard(self)
        super().connection_lost(exc)
        self.lost.set()

    async def run(self) -> None:
        try:
            while (request := await self.receive()) is not None:
                await self.serve(self, request)
                if self.writer.is_closing() or request.headers.get("connection", "").lower() == "close":
                    break
        except BadHttp as error:
            await self.respond(error.status, b"", {"connection": "close"})
        except (ClientGone, ConnectionError):
            pass
        finally:
            self.writer.close()

    async def receive(self) -> Request | None:
        """The next request; None when the client has no more."""
        try:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            request_line, *lines = head.rstrip("\r\n").split("\r\n")
            method, target, _version = request_line.split(" ")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            body = await self.receive_body(headers)
        except asyncio.IncompleteReadError:
            return None
        except asyncio.LimitOverrunError:
            raise BadHttp(431) from None
        except ValueError:
            raise BadHttp(400) from None
        url = urlsplit(target)
        return Request(method, url.path, url.query, headers, body)

    async def receive_body(self, headers: Mapping[str, str]) -> bytes:
        if "chunked" in headers.get("transfer-encoding", "").lower():
            return await self.receive_chunks()
        length = int(headers.get("content-length", "0"))
        if length > BODY_MAX_BYTES:
            raise BadHttp(413)
        return await self.reader.readexactly(length)

    async def receive_chunks(self) -> bytes:
        body = bytearray()
        while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
            if len(body) + size > BODY_MAX_BYTES:
                raise BadHttp(413)
            body += (await self.reader.readexactly(size + 2))[:-2]
        while await self.reader.readuntil(b"\r\n") != b"\r\n":  # trailers, which nobody needs
            pass
        return bytes(body)

    async def sleep(self, seconds: float | None) -> None:
        """Wait (None: for ever); `ClientGone` as soon as the client hangs up."""
        try:
            async with asyncio.timeout(seconds):
                await self.gone.wait()
        except TimeoutError:
            return
        raise ClientGone

    def ensure_client(self) -> None:
        """Raise `ClientGone` when there is nobody to answer any more."""
        if self.gone.is_set():
            raise ClientGone

    async def respond(self, status: int, body: bytes, headers: Mapping[str, str], *, missing_bytes: int = 0) -> None:
        """Send a whole answer; with `missing_bytes` the content-length promises so many more, and the connection ends."""
        self.writer.write(head_of(status, {**headers, "content-length": str(len(body) + missing_bytes)}) + body)
        if missing_bytes:
            self.writer.close()
        else:
            await self.writer.drain()

    async def begin_stream(self, headers: Mapping[str, str]) -> None:
        """Send the head of a chunked 200."""
        self.writer.write(head_of(200, {**headers, "transfer-encoding": "chunked"}))
        await self.writer.drain()

    async def chunk(self, data: bytes, *, last: bool = False) -> None:
        """Send a part of a stream; after the `last`, the stream is complete."""
        self.writer.write(b"%x\r\n%b\r\n%b" % (len(data), data, b"0\r\n\r\n" if last else b""))
        await self.writer.drain()

    def cut(self) -> None:
        """Close in good order for TCP, whatever HTTP still expects."""
        self.writer.close()

    def reset(self) -> None:
        """Close with RST: what a crashed or overrun front end does."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


def head_of(status: int, headers: Mapping[str, str]) -> bytes:
    """The status line and headers of an answer."""
    lines = [f"HTTP/1.1 {status} {REASONS.get(status, '')}", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class Listener:
    """A listening socket on 127.0.0.1 and the connections it accepted."""

    def __init__(self, serve: Callable[[Connection, Request], Awaitable[None]]) -> None:
        self.serve = serve
        self.connections: set[Connection] = set()
        self.server: asyncio.Server | None = None

    async def open(self, port: int) -> int:
        """Listen on `port` (0: any free one) and return the port."""
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(
            lambda: Connection(self.serve, self.connections), "127.0.0.1", port, backlog=1024
        )
        return int(self.server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening, drop every connection, and return when no socket or task of ours is left."""
        if self.server is None:
            return
        # Python 3.11's server fails an assertion, and leaks the socket, when it is closed between accept() and `connected`.
        for listening in self.server.sockets:
            asyncio.get_running_loop().remove_reader(listening.fileno())
        for _ in range(ACCEPT_TURNS):
            await asyncio.sleep(0)
        self.server.close()
        open_now = tuple(self.connections)
        for connection in open_now:
            connection.task.cancel()
            connection.writer.transport.abort()
        for connection in open_now:
            await connection.lost.wait()
        await asyncio.gather(*(connection.task for connection in open_now), return_exceptions=True)
        await self.server.wait_closed()
        self.server = None
