# SPDX-License-Identifier: Apache-2.0
"""Redis behind TLS: by the server itself where its program can, else by a proxy before it."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme

from tideover.errors import StoreUnavailable

if TYPE_CHECKING:
    from tests.topology.conftest import Rack, Shop


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `ca.pem`, which nobody else trusts, and `cert.pem` and `key.pem` of localhost."""
    folder, authority = tmp_path_factory.mktemp("papers"), trustme.CA()
    localhost = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    localhost.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    localhost.private_key_pem.write_to_path(folder / "key.pem")
    return folder


@contextmanager
def proxy(port: int, papers: Path) -> Iterator[int]:
    """Speaks TLS, and passes on to the server at `port` what it hears. Its own port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(papers / "cert.pem", papers / "key.pem")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    ends: set[asyncio.StreamWriter] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while some := await reader.read(65536):
                writer.write(some)
                await writer.drain()
        writer.transport.abort()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, to_server = await asyncio.open_connection("127.0.0.1", port)
        ends.update((writer, to_server))
        await asyncio.gather(copy(reader, to_server), copy(behind, writer))

    async def stop() -> None:
        server.close()
        for end in ends:
            end.transport.abort()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)

    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(serve, "127.0.0.1", 0, ssl=context), loop).result()
    yield server.sockets[0].getsockname()[1]
    asyncio.run_coroutine_threadsafe(stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def tls_port(rack: Rack, program: str, papers: Path) -> Iterator[int]:
    """Where a server speaks TLS."""
    port, files = rack.free_port(), {"cert": "cert.pem", "key": "key.pem", "ca-cert": "ca.pem"}
    options = [word for name, file in files.items() for word in (f"--tls-{name}-file", str(papers / file))]
    try:
        rack.node("--tls-port", str(port), "--tls-auth-clients", "no", *options, program=program)
    except pytest.fail.Exception:  # it was built without TLS
        with proxy(rack.node(program=program).port, papers) as port:
            yield port
    else:
        yield port


def test_the_story_over_tls(tls_port: int, open_shop: Callable[[str], Shop], papers: Path) -> None:
    """The authority is named in the URL, as redis-py names it."""
    open_shop(f"rediss://localhost:{tls_port}/0?ssl_ca_certs={papers / 'ca.pem'}").tell_the_story()


def test_a_server_that_nobody_vouches_for_is_refused(tls_port: int, open_shop: Callable[[str], Shop]) -> None:
    """Without the authority the certificate proves nothing."""
    shop = open_shop(f"rediss://localhost:{tls_port}/0")
    with pytest.raises(StoreUnavailable, match=r"(?i)certificate verify failed"):
        shop.summary.send("x")
