# SPDX-License-Identifier: Apache-2.0
"""Redis goes away while a job is being sent: the sender hears whether the job may have been accepted."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import redis
from dramatiq.brokers.redis import RedisBroker
from redis.backoff import NoBackoff
from redis.retry import Retry

from tideover import AITask, StoreUnavailable, Tideover, ai_task

if TYPE_CHECKING:
    from tests.pipeline.conftest import Shop

SAYS_SO = r"It may have been accepted.*idempotency_key"


class Relay:
    """Stands between redis-py and a server. When it is told to, it hands on what is asked and hangs up instead of answering."""

    def __init__(self, server: str) -> None:
        self.server = server
        self.hangs_up = False
        self.folder = tempfile.mkdtemp(prefix="relay-")  # a socket's path must be short
        self.path = f"{self.folder}/sock"
        self.open: list[socket.socket] = []
        self._listening = self.listen()

    def listen(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.bind(self.path)
        made.listen()
        threading.Thread(target=self._accept, args=(made,), daemon=True).start()
        return made

    def _accept(self, listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                asker, _ = listening.accept()
                answerer = socket.socket(socket.AF_UNIX)
                answerer.connect(self.server)
                self.open += [asker, answerer]
                for pair in ((asker, answerer, False), (answerer, asker, True)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while (piece := source.recv(65_536)) and not (answers and self.hangs_up):
                sink.sendall(piece)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends all connections, and lets nobody connect."""
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        for one in (self._listening, *self.open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        Path(self.path).unlink(missing_ok=True)


@pytest.fixture
def relay(valkey_url: str) -> Iterator[Relay]:
    made = Relay(urlsplit(valkey_url).path)
    yield made
    made.close()
    Path(made.folder).rmdir()


@pytest.fixture
def task(shop: Shop, relay: Relay) -> Iterator[AITask[[str], None]]:
    """A task whose jobs go through the relay; one was sent before."""
    client = redis.Redis(unix_socket_path=relay.path, retry=Retry(NoBackoff(), 1))
    broker = RedisBroker(client=client, namespace=shop.namespace)
    broker.add_middleware(Tideover())

    @ai_task(criticality="deferrable", broker=broker)
    def task(tag: str) -> None: ...

    task.send("first")
    yield task
    client.close()


def test_a_lost_answer_is_told_as_such(shop: Shop, relay: Relay, task: AITask[[str], None]) -> None:
    """Redis did it, and nobody heard: the sender must not believe that the job is not there."""
    relay.hangs_up = True
    with pytest.raises(StoreUnavailable, match=SAYS_SO) as caught:
        task.send("second")
    assert (True, 2) == (caught.value.may_be_accepted, shop.ledger.read().accepted)


def test_with_an_idempotency_key_it_is_safe_to_send_again(shop: Shop, relay: Relay, task: AITask[[str], None]) -> None:
    """As the error says."""
    relay.hangs_up = True
    with pytest.raises(StoreUnavailable, match=SAYS_SO):
        task.send_with_options(args=("second",), idempotency_key="second")
    relay.hangs_up = False
    task.send_with_options(args=("second",), idempotency_key="second")
    assert 2 == shop.ledger.read().accepted


def test_redis_that_died_after_it_did_it_is_no_redis_that_was_never_there(
    shop: Shop, relay: Relay, task: AITask[[str], None]
) -> None:
    """redis-py's last word is then that it cannot connect, which is said of the second time only."""
    relay.hangs_up = True
    Path(relay.path).unlink()
    with pytest.raises(StoreUnavailable, match=rf"connecting to.*{SAYS_SO}") as caught:
        task.send("second")
    assert (True, 2) == (caught.value.may_be_accepted, shop.ledger.read().accepted)


def test_without_a_connection_nothing_was_accepted(shop: Shop, relay: Relay, task: AITask[[str], None]) -> None:
    """There was nobody to accept it, so that sending it again is safe."""
    relay.close()
    with pytest.raises(StoreUnavailable, match="Nothing was accepted") as caught:
        task.send("second")
    assert (False, 1) == (caught.value.may_be_accepted, shop.ledger.read().accepted)


def test_a_refusal_accepts_nothing(shop: Shop) -> None:
    """A full Redis says so, and keeps no half of a job."""
    shop.summary.send("first")
    shop.broker.client.config_set("maxmemory", "1")
    try:
        with pytest.raises(StoreUnavailable, match="Nothing was accepted") as caught:
            shop.summary.send("second")
    finally:
        shop.broker.client.config_set("maxmemory", "0")
    assert (False, 1) == (caught.value.may_be_accepted, shop.ledger.read().accepted)
