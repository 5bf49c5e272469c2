# SPDX-License-Identifier: Apache-2.0
"""Redis is gone, silent, full or read-only: every port says so at once, and nothing is half done."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis

from tideover.core.breaker import CLOSED, Transition
from tideover.errors import StoreUnavailable
from tideover.store.account import Ledger
from tideover.store.backlog import Backlog, HeldSet
from tideover.store.breakers import Breakers
from tideover.store.client import FAILED, GONE, connect, lazy_client, lease, store_errors
from tideover.store.keys import Keys
from tideover.store.registry import Registry, namespaces
from tideover.store.stories import Line, Stories

if TYPE_CHECKING:
    from tests.store.conftest import House

HELD = HeldSet("q", "a/m")
PACE: Any = {"rate": 1.0, "burst": 1.0, "most_queued": 1}

CALLS: dict[str, Callable[[Any], object]] = {
    "Ledger.accept": lambda port: port.accept("q", "r", b""),
    "Ledger.hand_over": lambda port: port.hand_over("w", ("q", "r"), ("q", "s"), b"", "job"),
    "Ledger.adopt": lambda port: port.adopt("w", "q", ["r"]),
    "Ledger.settle": lambda port: port.settle("w", "q", "r", "job", "succeeded"),
    "Ledger.read": lambda port: port.read(),
    "Backlog.fetch": lambda port: port.fetch("w", "q", 1),
    "Backlog.hold": lambda port: port.hold("w", "q", ("a/m",), [], 1.0),
    "Backlog.held_sets": lambda port: port.held_sets(),
    "Backlog.release": lambda port: port.release(HELD, "a/m", None, "a/m@0", **PACE),
    "Backlog.free": lambda port: port.free(HELD, ["r"], "*@0"),
    "Backlog.expire": lambda port: port.expire(HELD, []),
    "Backlog.give_back": lambda port: port.give_back("w", "q", ["r"]),
    "Backlog.reclaim": lambda port: port.reclaim("w", "q", []),
    "Backlog.recover": lambda port: port.recover("w", "q", 1.0),
    "Backlog.due": lambda port: list(port.due(HELD, 1)),
    "Backlog.facts": lambda port: port.facts("q", ["r"]),
    "Backlog.browse": lambda port: list(port.browse(HELD)),
    "Backlog.ordered": lambda port: list(port.ordered(HELD)),
    "Backlog.size": lambda port: port.size(HELD),
    "Backlog.ahead": lambda port: port.ahead(HELD, "r"),
    "Backlog.sweep": lambda port: port.sweep("q", 1),
    "Backlog.whereabouts": lambda port: port.whereabouts("q", "r"),
    "Backlog.jobs_like": lambda port: port.jobs_like("0"),
    "Backlog.fetched": lambda port: port.fetched("w", ["q"]),
    "Backlog.place": lambda port: port.place("job"),
    "Backlog.is_running": lambda port: port.is_running("q", "r"),
    "Breakers.report": lambda port: port.report("a/m", 10.0),
    "Breakers.transition": lambda port: port.transition("a/m", CLOSED, Transition("open", "why")),
    "Breakers.listen": lambda port: port.listen(),
    "Breakers.keys_known": lambda port: port.keys_known(),
    "Breakers.read": lambda port: port.read(["a/m"]),
    "Registry.announce": lambda port: port.announce(),
    "Registry.enter_tasks": lambda port: port.enter_tasks({"t": {}}),
    "Registry.enter_routes": lambda port: port.enter_routes({"a": {}}),
    "Registry.beat": lambda port: port.beat("w"),
    "Registry.enter_worker": lambda port: port.enter_worker("w", {}),
    "Registry.remove_worker": lambda port: port.remove_worker("w"),
    "Registry.tasks": lambda port: port.tasks(),
    "Registry.routes": lambda port: port.routes(),
    "Registry.workers": lambda port: port.workers(),
    "Registry.learn": lambda port: port.learn("t", "m"),
    "Registry.models": lambda port: port.models(),
    "Registry.queues": lambda port: port.queues(),
    "Registry.heartbeats": lambda port: port.heartbeats(),
    "Registry.counters": lambda port: port.counters(),
    "Registry.count": lambda port: port.count("recovered"),
    "Registry.bypass": lambda port: port.bypass(),
    "Registry.set_bypass": lambda port: port.set_bypass({}, None),
    "Registry.clear_bypass": lambda port: port.clear_bypass(),
    "Stories.add": lambda port: port.add([Line("job", 1.0, "held", {})]),
    "Stories.of": lambda port: port.of("job"),
    "Stories.jobs_like": lambda port: port.jobs_like("0"),
    "Stories.everything": lambda port: port.everything(),
}
PORTS = {port.__name__: port for port in (Ledger, Backlog, Breakers, Registry, Stories)}


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[redis.Redis]:
    """A client of a server that is not there."""
    with connect(f"unix://{tmp_path / 'gone.sock'}") as client:
        yield client


def test_every_port_method_is_tried() -> None:
    """A new method of a port needs a line here."""
    methods = {f"{name}.{m}" for name, port in PORTS.items() for m, _ in inspect.getmembers(port, inspect.isfunction)}
    assert set(CALLS) == {method for method in methods if "._" not in method}


@pytest.mark.parametrize("method", CALLS)
def test_without_redis_every_port_says_so_with_the_remedy(dead: redis.Redis, method: str) -> None:
    """As one error of ours, which keeps what redis-py said."""
    port = PORTS[method.partition(".")[0]](dead, Keys("ns"))
    with (
        pytest.raises(
            StoreUnavailable, match=r"(?s)^trying: Redis did not answer.*Nothing was accepted\. Check that"
        ) as caught,
        store_errors("trying"),
    ):
        CALLS[method](port)
    assert isinstance(caught.value.__cause__, GONE)


def test_namespaces_and_leases_say_so_too(dead: redis.Redis) -> None:
    """They are asked without a port."""
    with pytest.raises(GONE):
        namespaces(dead)
    with pytest.raises(GONE):
        lease(dead, "lease", 1.0).acquire(blocking=False)


def test_an_error_of_our_own_is_not_taken_for_redis() -> None:
    """A bug inside the block stays what it is."""
    with pytest.raises(KeyError), store_errors("trying"):
        raise KeyError


def test_a_server_that_accepts_and_never_answers_is_gone(tmp_path: Path) -> None:
    """A hung Redis shows as a timeout, and a timeout counts as gone."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent.sock"))
        silent.listen()
        impatient = redis.Redis(unix_socket_path=str(tmp_path / "silent.sock"), socket_timeout=0.05, retry=None)
        with impatient as client, pytest.raises(GONE):
            Ledger(client, Keys("ns")).read()


@pytest.fixture
def full(house: House) -> Iterator[House]:
    """A Redis without memory, with two jobs in a worker's hands."""
    house.fetched(2)
    house.client.config_set("maxmemory", 1)
    yield house
    house.client.config_set("maxmemory", 0)


def test_a_full_redis_accepts_nothing(full: House) -> None:
    """The sender hears of it, and no half of the job stays behind."""
    with pytest.raises(StoreUnavailable, match="its maxmemory"), store_errors("sending a job"):
        full.ledger.accept("default", "new", b"body")
    account = full.ledger.read()
    assert (2, 2, 0) == (account.accepted, account.running, account.lost)
    assert {"r0", "r1"} == full.bodies()


def test_a_full_redis_still_lets_jobs_end_and_be_held(full: House) -> None:
    """What frees memory, and what keeps a job, must not need any."""
    assert full.settle("r0", "failed")
    assert [True] == full.hold(["r1"])
    account = full.ledger.read()
    assert (1, 1, 0) == (account.ends["failed"], account.held, account.lost)


def test_a_full_redis_still_gives_out_what_it_has(full: House) -> None:
    """Else the backlog that filled it could never be worked off."""
    assert 2 == full.backlog.give_back("w1", "default", ["r0", "r1"])
    jobs, _ = full.backlog.fetch("w2", "default", 5)
    assert ["r0", "r1"] == [job.redis_id for job in jobs]
    assert ([], []) == full.backlog.fetch("w2", "default", 5)
    assert (2, 0) == (full.ledger.read().running, full.ledger.read().lost)


@pytest.fixture
def replica(house: House) -> Iterator[House]:
    """A Redis that has become a replica, as after a failover, with a job in a worker's hands."""
    house.fetched(1)
    house.client.replicaof("127.0.0.1", "1")
    yield house
    house.client.replicaof("NO", "ONE")


def test_a_replica_is_no_place_to_write(replica: House) -> None:
    """A client that still talks to the old primary gets an error that means: try again later; nothing has moved."""
    for move in (lambda: replica.settle("r0"), lambda: replica.hold(["r0"]), lambda: replica.accepted(1)):
        with pytest.raises(GONE):
            move()
    assert (1, 0) == (replica.ledger.read().running, replica.ledger.read().lost)


def test_a_lazy_client_asks_for_its_url_once_and_late(valkey_url: str) -> None:
    """Declaring tasks needs no Redis and no settings; the first command does."""
    asked = []

    def url() -> str:
        asked.append(1)
        return valkey_url

    client = lazy_client(url)
    script = client.register_script(b"return 81")
    assert [] == asked
    assert 81 == script()
    assert client.ping()
    assert [1] == asked
    client.close()


def test_what_is_gone_has_failed() -> None:
    """Whoever catches the wider error catches the narrower one."""
    assert all(issubclass(gone, FAILED) for gone in GONE)
