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

from tideover.core import progress
from tideover.core.breaker import CLOSED, Transition
from tideover.core.job import ENDS, End
from tideover.core.pacing import Felt, Pace, begun
from tideover.core.policy import PacePolicy
from tideover.core.route import Mark, Permit
from tideover.errors import StoreUnavailable
from tideover.store.account import Ended, Ledger, NewJob, Room
from tideover.store.answers import Answers
from tideover.store.backlog import Backlog
from tideover.store.breakers import Batch, Breakers
from tideover.store.client import FAILED, GONE, connect, lazy_client, store_errors
from tideover.store.facts import Facet, Group, HeldFacts, Member
from tideover.store.keys import Keys
from tideover.store.letters import Letters
from tideover.store.limiter import Limiter
from tideover.store.paces import Paces, standing_of
from tideover.store.registry import Registry, namespaces
from tideover.store.removal import Removal
from tideover.store.scripts import lease
from tideover.store.spending import Spending
from tideover.store.stories import Line, Stories
from tideover.store.twins import Twins

if TYPE_CHECKING:
    from tests.store.conftest import House

PERMIT = Permit("a/m", 0)
FACTS = HeldFacts(
    redis_id="r", job_id="job", task="t", queue="q", criticality="deferrable", wait_key="a/m", reason="outage", generation=0,
    held_ms=1, sent_ms=1, expires_ms=None, order=1,
)  # fmt: skip
GROUP = Group("q", b"6bytes", Facet("a/m", "t", "deferrable", "outage"), 1)
MEMBER = Member(GROUP, GROUP.id + FACTS.place)

CALLS: dict[str, Callable[[Any], object]] = {
    "Answers.keep": lambda port: port.keep("0f", b"1", 1.0, 60.0),
    "Spending.add": lambda port: port.add({"route:a": 1.0}, 1.0),
    "Spending.read": lambda port: port.read(1.0),
    "Limiter.allow": lambda port: port.allow("a", 60.0, 60.0, 1.0),
    "Limiter.took": lambda port: port.took("a", 1, 1, 1),
    "Answers.find": lambda port: port.find("0f"),
    "Ledger.accept": lambda port: port.accept("q", [NewJob(redis_id="r", body=b"")], Room()),
    "Ledger.accept_plain": lambda port: port.accept_plain("default", "id", b"body"),
    "Ledger.hand_over": lambda port: port.hand_over("w", ("q", "r"), ("q", "s"), b"", "job"),
    "Ledger.adopt": lambda port: port.adopt("w", "q", ["r"]),
    "Ledger.settle": lambda port: port.settle("w", "q", "r", "job", "succeeded"),
    "Ledger.settle_all": lambda port: port.settle_all("w", "q", [Ended("r", "job", "failed")]),
    "Ledger.read": lambda port: port.read(),
    "Backlog.fetch": lambda port: port.fetch("w", "q", 1),
    "Backlog.hold": lambda port: port.hold("w", "q", [FACTS]),
    "Backlog.begin": lambda port: port.begin("w", "q", "r", Mark()),
    "Backlog.has": lambda port: port.has("w", "q", "r"),
    "Backlog.release": lambda port: port.release("q", [MEMBER.raw], PERMIT),
    "Backlog.expire": lambda port: port.expire("q", [FACTS]),
    "Backlog.give_back": lambda port: port.give_back("w", "q", ["r"]),
    "Backlog.reclaim": lambda port: port.reclaim("w", "q", []),
    "Backlog.recover": lambda port: port.recover("w", "q", 1.0),
    "Backlog.groups": lambda port: port.groups("q"),
    "Backlog.heads": lambda port: port.heads([GROUP], 1),
    "Backlog.walk": lambda port: list(port.walk([GROUP], 1)),
    "Backlog.page": lambda port: port.page([GROUP], 1),
    "Backlog.browse": lambda port: list(port.browse([GROUP])),
    "Backlog.facts_at": lambda port: port.facts_at([MEMBER]),
    "Backlog.facts_of": lambda port: port.facts_of([MEMBER]),
    "Backlog.facts": lambda port: port.facts("q", [b"r"]),
    "Backlog.members": lambda port: port.members("q", ["r"]),
    "Backlog.incomplete": lambda port: port.incomplete([MEMBER]),
    "Backlog.size": lambda port: port.size("q"),
    "Backlog.ahead": lambda port: port.ahead(FACTS, [GROUP]),
    "Backlog.sweep": lambda port: port.sweep("q", 1),
    "Backlog.whereabouts": lambda port: port.whereabouts("q", "r"),
    "Backlog.jobs_like": lambda port: port.jobs_like("0", ["q"]),
    "Backlog.fetched": lambda port: port.fetched("w", ["q"]),
    "Backlog.place": lambda port: port.place("job", ["q"]),
    "Backlog.is_running": lambda port: port.is_running("q", "r"),
    "Twins.claimed": lambda port: list(port.claimed("q", [FACTS._replace(twin="0" * 16)])),
    "Twins.claim": lambda port: port.claim("q", [FACTS]),
    "Twins.chosen": lambda port: port.chosen("q"),
    "Twins.is_done": lambda port: port.is_done("q", "0" * 16),
    "Twins.waiting": lambda port: port.waiting("q", "0" * 16),
    "Twins.answered": lambda port: port.answered("q", [FACTS]),
    "Twins.leader": lambda port: port.leader("q", "0" * 16),
    "Breakers.report": lambda port: port.report("a/m", "p"),
    "Breakers.transition": lambda port: port.transition("a/m", CLOSED, Transition(to="open", why="why"), 0.0),
    "Breakers.begin_probe": lambda port: port.begin_probe("a/m", CLOSED, 1.0, 0.0),
    "Breakers.end_probe": lambda port: port.end_probe("a/m", 1),
    "Breakers.force": lambda port: port.force("a/m", "open", 1.0, "me", "why"),
    "Breakers.unforce": lambda port: port.unforce("a/m"),
    "Breakers.note_page": lambda port: port.note_page("a/m", None),
    "Breakers.latencies": lambda port: port.latencies("a/m"),
    "Breakers.note_credential": lambda port: port.note_credential("a", "digest", 1.0),
    "Breakers.credentials": lambda port: port.credentials("a"),
    "Breakers.listen": lambda port: port.listen(),
    "Breakers.keys_known": lambda port: port.keys_known(),
    "Breakers.read": lambda port: port.read(["a/m"]),
    "Paces.turn": lambda port: port.turn("a/m", 2.0, PacePolicy()),
    "Paces.feel": lambda port: port.feel("a/m", Felt(sent=1), live=1, limits={}),
    "Paces.read": lambda port: port.read("a/m", 1.0),
    "Paces.publish": lambda port: port.publish(
        "a/m", standing_of({}, 1.0), begun(1.0, PacePolicy()), Pace(1.0, "ramp"), progress.begun(1, 1.0), CLOSED
    ),
    "Paces.order": lambda port: port.order("a/m", {}),
    "Paces.countermand": lambda port: port.countermand("a/m"),
    "Paces.orders": lambda port: port.orders(),
    "Letters.bodies": lambda port: port.bodies("q", ["r"]),
    "Letters.pages": lambda port: list(port.pages("q")),
    "Letters.like": lambda port: list(port.like("job", ["q"])),
    "Letters.has": lambda port: port.has("job", ["q"]),
    "Letters.oldest_at": lambda port: port.oldest_at(["q"]),
    "Letters.last_words": lambda port: port.last_words(["job"]),
    "Letters.restore": lambda port: port.restore("q", "r", "job", b"", ""),
    "Letters.live_body": lambda port: port.live_body("q", "r"),
    "Letters.drop": lambda port: port.drop(["name"]),
    "Registry.announce": lambda port: port.announce(),
    "Registry.enter_tasks": lambda port: port.enter_tasks({"t": {}}),
    "Registry.enter_routes": lambda port: port.enter_routes({"a": {}}),
    "Registry.now": lambda port: port.now(),
    "Registry.schema": lambda port: port.schema(),
    "Registry.leader": lambda port: port.leader("drain"),
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
    "Registry.raise_schema": lambda port: port.raise_schema(),
    "Registry.note_strangers": lambda port: port.note_strangers({"w": 1.0}),
    "Registry.strangers": lambda port: port.strangers(),
    "Registry.with_jobs": lambda port: port.with_jobs(["w"], ["q"]),
    "Registry.end_elsewhere": lambda port: port.end_elsewhere(0, 1),
    "Registry.counters": lambda port: port.counters(),
    "Registry.count": lambda port: port.count("recovered"),
    "Registry.bypass": lambda port: port.bypass(),
    "Registry.set_bypass": lambda port: port.set_bypass({}, None),
    "Registry.clear_bypass": lambda port: port.clear_bypass(),
    "Stories.add": lambda port: port.add([Line("job", 1.0, "held", {})]),
    "Stories.of": lambda port: port.of("job"),
    "Stories.jobs_like": lambda port: port.jobs_like("0"),
    "Stories.everything": lambda port: port.everything(),
    "Removal.held": lambda port: port.held("q"),
    "Removal.put_back": lambda port: port.put_back("q", [MEMBER.raw]),
    "Removal.queued": lambda port: port.queued("q"),
    "Removal.dead": lambda port: port.dead("q"),
    "Removal.number_queued": lambda port: port.number_queued("q"),
    "Removal.number_dead": lambda port: port.number_dead("q"),
    "Removal.number_of_bodies": lambda port: port.number_of_bodies("q"),
    "Removal.bodies": lambda port: port.bodies("q", ["r"]),
    "Removal.dead_bodies": lambda port: port.dead_bodies("q", ["r"]),
    "Removal.all_bodies": lambda port: list(port.all_bodies("q")),
    "Removal.merge": lambda port: port.merge("q", "r", [("r", b"")]),
    "Removal.bury": lambda port: port.bury("q", "r", [("r", b"")]),
    "Removal.rewrite": lambda port: port.rewrite("q", "r", b"", b""),
    "Removal.our_keys": lambda port: list(port.our_keys()),
    "Removal.forget": lambda port: port.forget(),
    "Removal.wipe": lambda port: port.wipe(["key"]),
}
PORTS = {
    port.__name__: port
    for port in (Answers, Spending, Limiter, Ledger, Backlog, Breakers, Paces, Letters, Registry, Stories, Removal, Twins)
}


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
    """A Redis without memory: `r0` and `r1` are in a worker's hands, `r2` to `r4` held, and `r5` waits in its queue."""
    house.accept("r0", "r1", "r2", "r3", "r4", tenant="x")
    house.put("r5")
    house.backlog.fetch("w1", "default", 5)
    house.hold(["r2", "r3", "r4"], expires_ms=2000, tenant="x")
    house.client.config_set("maxmemory", 1)
    yield house
    house.client.config_set("maxmemory", 0)
    assert 0 == house.ledger.read().lost


def test_a_full_redis_accepts_nothing(full: House) -> None:
    """The sender hears of it, and no half of the job stays behind."""
    before = full.ledger.read()
    with pytest.raises(StoreUnavailable, match="its maxmemory"), store_errors("sending a job"):
        full.accept("new", tenant="x", once=("key", "digest"))
    assert (before, {"r0", "r1", "r2", "r3", "r4", "r5"}) == (full.ledger.read(), full.bodies())
    assert [] == full.client.keys(full.keys.once("*"))
    assert {b"x": b"5"} == full.client.hgetall(full.keys.tenants)


@pytest.mark.parametrize("end", ENDS)
def test_a_full_redis_lets_jobs_end(full: House, end: End) -> None:
    """What frees memory must not need any."""
    assert full.settle("r0", end, tenant="x")
    assert 1 == full.ledger.read().ends[end]


def test_a_full_redis_lets_jobs_be_held(full: House) -> None:
    """What keeps a job must not need any, or an outage that fills Redis would end in failures; also in a group of its own."""
    assert [True] == full.hold(["r0"], tenant="x")
    assert [True] == full.hold(["r1"], tenant="x", tag="new", job_id="job-r1")
    assert (5, [4, 1]) == (full.ledger.read().held, [group.n for group in full.groups()])


def test_a_full_redis_lets_held_jobs_go(full: House) -> None:
    """At their pace and by hand: the backlog that filled it is the one to be worked off."""
    assert ["r2"] == full.release(rate=0.0, burst=1.0)
    assert ["r3"] == full.release_by_hand("r3")
    assert ["r3", "r5", "r2"] == full.queued()
    assert ["r4"] == full.held()


def test_a_full_redis_lets_held_jobs_expire(full: House) -> None:
    """They become dead letters, as ever."""
    assert [True] * 3 == full.backlog.expire("default", list(full.backlog.browse(full.groups())))
    assert {"r2", "r3", "r4"} == set(full.dead())


def test_a_full_redis_lets_a_job_be_retried(full: House) -> None:
    """The successor takes the place of its predecessor."""
    assert full.ledger.hand_over("w1", ("default", "r0"), ("default.DQ", "r0"), b"retry", "r0")
    assert ["r0"] == full.queued("default.DQ")


def test_a_full_redis_gives_back_what_a_dead_worker_had(full: House) -> None:
    """And counts its death; whoever lives can say so, or all would be taken for dead."""
    assert full.registry.beat("w1") > 0
    assert -1 == full.backlog.recover("w1", "default", 15)
    assert 2 == full.backlog.recover("w1", "default", 0)
    assert ["\t0\t0\t1\t"] * 2 == [full.mark("r0"), full.mark("r1")]


def test_a_full_redis_lets_a_job_begin(full: House) -> None:
    """Also one that was aboard when a worker died."""
    full.backlog.begin("w1", "default", "r0", Mark(deaths=1, begun_by="w1"))
    assert "\t0\t0\t1\tw1" == full.mark("r0")


def test_a_full_redis_still_gives_out_what_it_has(full: House) -> None:
    """Else the backlog that filled it could never be worked off; a stranger's job is adopted as ever."""
    assert 1 == full.backlog.reclaim("w1", "default", ["r1"])
    assert 1 == full.backlog.give_back("w1", "default", ["r1"])
    jobs, _ = full.backlog.fetch("w2", "default", 5)
    assert ["r1", "r0", "r5"] == [job.redis_id for job in jobs]
    assert [1, 0] == [full.ledger.adopt("w2", "default", ["r5"]), full.ledger.adopt("w2", "default", ["r5"])]
    assert ([], []) == full.backlog.fetch("w2", "default", 5)
    assert (3, 3) == (full.ledger.read().running, full.ledger.read().held)


def test_a_full_redis_restores_and_sweeps_dead_letters(full: House) -> None:
    """The one moves a body, the other frees memory."""
    full.settle("r0", "failed", tenant="x")
    full.settle("r1", "failed", tenant="x")
    assert full.letters.restore("default", "r0", "r0", b"again", "x")
    assert 1 == full.backlog.sweep("default", -1000)
    assert {b"x": b"4"} == full.client.hgetall(full.keys.tenants)


def test_a_full_redis_gives_leases(full: House) -> None:
    """One to a process at a time, as ever: without them nobody drains, probes or keeps house."""
    key = full.keys.lease("drain")
    mine, another = lease(full.client, key, 3), lease(full.client, key, 3)
    assert [True, False] == [mine.acquire(blocking=False), another.acquire(blocking=False)]
    assert mine.reacquire()
    mine.release()
    assert another.acquire(blocking=False)


def test_a_full_redis_lets_breakers_move(full: House) -> None:
    """A backlog may have filled it; a breaker that could not close would keep it held for ever."""
    full.move("open", "half-open", "recovering")
    reading = full.breakers.report("a/m", "p", Batch(era=2, runs=[("ok", 1)]))
    assert ("recovering", 1) == (reading.breaker.state, reading.breaker.charts.ok)
    assert "closed" == full.move("closed").state


@pytest.fixture
def replica(house: House) -> Iterator[House]:
    """A Redis that has become a replica, as after a failover, with a job in a worker's hands."""
    house.fetched(1)
    house.client.replicaof("127.0.0.1", "1")
    yield house
    house.client.replicaof("NO", "ONE")


def test_a_replica_is_no_place_to_write(replica: House) -> None:
    """A client that still talks to the old primary gets an error that means: try again later; nothing has moved."""
    for move in (lambda: replica.settle("r0"), lambda: replica.hold(["r0"]), lambda: replica.accept("new")):
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
