# SPDX-License-Identifier: Apache-2.0
"""Ask a provider's status page for its incidents, over HTTP. Whatever goes wrong is an answer, too: nothing is known."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

import httpx2

from tideover.core.status_page import DEADLINE_S, Incident, parse

MOST_BYTES = 1_000_000
MOST_REDIRECTS = 3
"""Pages move: status.anthropic.com became status.claude.com."""

PATHS = ("/api/v2/incidents/unresolved.json", "/api/v1/summary", "/proxy/{host}", "/api/v2/summary.json")
"""Where the incidents of a page stand: Statuspage; incident.io's widget, and what its own page is made from; Statuspage again.

Statuspage's short list comes before its summary, which incident.io's pages have as well, but without their incidents.
"""

HEADERS = {"accept": "application/json", "accept-encoding": "identity", "user-agent": "tideover"}
"""Bytes as they are: a megabyte that was packed could be a thousand."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a page said. `incidents` None: unknown, and `why`. `address`: where it said so; None: nowhere."""

    incidents: tuple[Incident, ...] | None
    address: str | None = None
    why: str = ""


class Unreadable(Exception):
    """An answer that is none. `elsewhere`: the page itself works, so another of its addresses may have one."""

    def __init__(self, why: str, *, elsewhere: bool = True) -> None:
        super().__init__(why)
        self.elsewhere = elsewhere


def read_page(page: str, *, address: str | None = None, deadline_s: float = DEADLINE_S) -> Reading:
    """The incidents of a page, from a thread without an event loop. `address`: where it told them last. Never raises.

    A page given by its host (`https://status.claude.com`) is asked at each of `PATHS`; one given with a path, there only.
    `deadline_s` is for all of it, whatever trickles in meanwhile; only the look-up of a name may take the system longer.
    """
    try:
        return asyncio.run(reading(page, address, deadline_s))
    except TimeoutError:
        return Reading(None, why=f"it takes longer than {deadline_s:g} s")
    except Exception as error:  # noqa: BLE001 - extra knowledge: none of its faults is anybody's trouble
        return Reading(None, why=f"{type(error).__name__}: {str(error)[:100]}".rstrip(": "))


async def reading(page: str, address: str | None, deadline_s: float) -> Reading:
    why = ""
    async with asyncio.timeout(deadline_s), reader() as client:
        for at in [address] if address else addresses(page):
            try:
                return Reading(await read(client, at), at)
            except Unreadable as error:
                why = str(error)
                if not error.elsewhere:
                    break
    return Reading(None, why=why)


def reader() -> httpx2.AsyncClient:
    return httpx2.AsyncClient(headers=HEADERS, timeout=None, follow_redirects=True, max_redirects=MOST_REDIRECTS)


def addresses(page: str) -> list[str]:
    url = httpx2.URL(page)
    if url.path not in ("", "/") or url.query:
        return [page]
    return [str(url.join(path.format(host=url.host))) for path in PATHS]


async def read(client: httpx2.AsyncClient, address: str) -> tuple[Incident, ...]:
    """The incidents at one address; raises `Unreadable`, and httpx2's own exceptions."""
    async with client.stream("GET", address) as response:
        status, packed = response.status_code, response.headers.get("content-encoding", "identity")
        if status != 200:
            raise Unreadable(f"it answers {status}", elsewhere=status < 500)
        if packed != "identity":
            raise Unreadable("its answer is packed, though that was not asked for")
        body = await body_of(response)
    try:
        incidents = parse(json.loads(body))
    except (ValueError, RecursionError):
        raise Unreadable("its answer is no JSON") from None
    if incidents is None:
        raise Unreadable("its answer lists no incidents in a format that tideover knows")
    return incidents


async def body_of(response: httpx2.Response) -> bytes:
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > MOST_BYTES:
            raise Unreadable(f"its answer is longer than {MOST_BYTES:,} bytes", elsewhere=False)
    return bytes(body)
