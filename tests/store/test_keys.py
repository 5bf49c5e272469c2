# SPDX-License-Identifier: Apache-2.0
"""Every key in Redis is in the table at the top of `store/keys.py`, with the type and the lifetime that stand there."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tideover import clock
from tideover.core.pacing import Felt
from tideover.store import keys as keys_module
from tideover.store.answers import Answers
from tideover.store.breakers import Batch
from tideover.store.keys import Keys, wait_key_text
from tideover.store.limiter import Limiter
from tideover.store.paces import Paces
from tideover.store.registry import namespaces
from tideover.store.scripts import Scripts, lease
from tideover.store.spending import Spending
from tideover.store.stories import Line
from tideover.store.twins import Twins

if TYPE_CHECKING:
    from tests.conftest import Documented, KeyTable
    from tests.store.conftest import House

WINDOW_S = 10.0
BY_ITSELF = ("2 min", "1 h", "2 h", "2 days", "8 days", "30 days", "seconds")
"""The lifetimes that Redis itself ends."""
FOR_EVER = ("for ever", "as asked", "7 days", "until dead", "cleaned by the maintainer")
"""Those that outlive all jobs. All others are gone when the last job has ended."""


def found(house: House, table: KeyTable) -> dict[str, Documented]:
    """Each key that is in Redis, with the row that documents it."""
    rows = {key: table.row_of(key, house.keys.namespace) for key in (raw.decode() for raw in house.client.keys("*"))}
    assert [] == [key for key, row in rows.items() if row is None]
    return {key: row for key, row in rows.items() if row is not None}


def live_a_busy_life(house: House) -> None:
    """Jobs in every place, and every port used."""
    house.registry.announce()
    house.registry.enter_tasks({"t": {}})
    house.registry.enter_routes({"a": {}})
    house.registry.enter_worker("w1", {})
    house.registry.learn("t", "m")
    house.registry.set_bypass({}, None)
    house.registry.note_strangers({"w0": 1.0})
    house.accept("delayed", queue="default.DQ", tenant="acme", once=("key", "digest"))
    house.put("x")
    house.put("y")
    house.backlog.fetch("w1", "default", 2)
    house.ledger.adopt("w1", "default", ["x", "y"])
    house.hold(["y"], job_id="job-y", expires_ms=6000)
    house.holding(4, expires_ms=5000)
    for tag in ("leads", "waits"):
        house.accept(tag)
    house.backlog.fetch("w1", "default", 2)
    facts = [house.facts(tag)._replace(twin="0" * 16) for tag in ("leads", "waits")]
    house.backlog.hold("w1", "default", Twins(house.client, house.keys).claimed("default", facts))
    house.breakers.report("a/m", "p", Batch(era=0, runs=[("ok", 1)], latencies={"s0": 1}))
    house.breakers.note_credential("a", "digest", 1.0)
    house.move("open", "half-open", "recovering")
    house.breakers.report("a/m", "p", Batch(era=2, runs=[("failed", 1)]))
    house.breakers.force("a/m", "closed", 5.0, "me", "why")
    assert ["r0"] == house.release(1)
    paces = Paces(house.client, house.keys)
    paces.feel("a/m", Felt(sent=1), live=1, limits={})
    paces.order("a/m", {"max_rate": 1})
    Spending(house.client, house.keys).add({"route:a": 1.0}, 1.0)
    Limiter(house.client, house.keys).allow("a", 60.0, None, 1.0)
    Answers(house.client, house.keys).keep("0f", b'{"answer": 1}', 1.0, 60.0)
    house.stories.add([Line("r0", clock.now(), "held", {})])
    Scripts(house.client).run("arrive-2", ["a barrier that is gone", house.keys.group("g")], ["r0", 30_000])
    assert lease(house.client, house.keys.lease("drain"), 3).acquire(blocking=False)


def end_all_jobs(house: House) -> None:
    house.backlog.expire("default", list(house.backlog.browse(house.groups())))
    house.settle("x")
    for queue, tenant in (("default", ""), ("default.DQ", "acme")):
        for job in house.backlog.fetch("w1", queue, 9)[0]:
            house.settle(job.redis_id, "failed", queue=queue, tenant=tenant)
    assert [] == Twins(house.client, house.keys).chosen("default")  # as the drain does every second


def test_every_key_is_documented(house: House, key_table: KeyTable) -> None:
    """By name, type and lifetime; and every documented one was met, so that the table holds no stale row."""
    live_a_busy_life(house)
    seen = set(found(house, key_table).values())
    assert [] == key_table.faults(house.client)
    end_all_jobs(house)
    seen |= set(found(house, key_table).values())
    assert {row.name for row in key_table.rows if row.kind != "channel"} == {row.name for row in seen}


def test_every_lifetime_is_one_that_the_tests_know(key_table: KeyTable) -> None:
    """A new one would be taken for one without an end."""
    of_jobs = {"while not empty", "while it has jobs", "until they end", "until released", "until it ends or is held"}
    assert {*BY_ITSELF, *FOR_EVER, *of_jobs} == {row.lives for row in key_table.rows if row.kind != "channel"}
    assert set(BY_ITSELF) == {row.lives for row in key_table.rows if row.allows(30)} - {"as asked"}


@pytest.mark.parametrize(
    ("leak", "said"),
    [
        (lambda house: house.client.set("stray", 1), "not in the table"),
        (lambda house: house.client.set(house.keys.own("stray"), 1), "not in the table"),
        (lambda house: house.client.set("0" * 32, 1), "not in the table"),
        (lambda house: house.client.set(house.keys.account, 1), "the table of store/keys.py says hash"),
        (lambda house: house.client.hset(house.keys.stories("20260602"), "job", "x"), "says: 8 days"),
        (lambda house: house.client.set(house.keys.lease("drain"), "x", ex=600), "says: seconds"),
        (lambda house: house.client.expire(house.keys.msgs("default"), 600), "says: while not empty"),
    ],
)
def test_a_leak_is_found(house: House, key_table: KeyTable, leak: Callable[[House], object], said: str) -> None:
    """By the check that follows every test: a name, a type or a lifetime that is not documented."""
    house.accepted(1)
    assert [] == key_table.faults(house.client)
    leak(house)
    (fault,) = key_table.faults(house.client)
    assert said in fault
    house.client.flushall()


def test_jobs_that_ended_leave_nothing_behind(house: House, key_table: KeyTable) -> None:
    """Whatever belongs to jobs goes with them, so that Redis does not fill up over the years."""
    live_a_busy_life(house)
    end_all_jobs(house)
    account = house.ledger.read()
    assert (9, 9, 0) == (account.accepted, sum(account.ends.values()), account.lost)
    leaked = {key for key, row in found(house, key_table).items() if row.lives not in BY_ITSELF and row.lives not in FOR_EVER}
    assert set() == leaked


def test_the_quiet_of_a_bypass_ends_as_asked(house: House) -> None:
    """An off switch with a time to live switches itself on again."""
    house.registry.set_bypass({"who": "me"}, 60.0)
    assert {"who": "me"} == house.registry.bypass()
    assert 0 < house.client.ttl(house.keys.bypass) <= 60
    assert [True, False] == [house.registry.clear_bypass(), house.registry.clear_bypass()]


def test_the_registry_knows_who_is_there(house: House) -> None:
    """What processes entered can be read without their code; routes that left the settings leave the registry."""
    live_a_busy_life(house)
    house.registry.enter_routes({"b": {"kind": "anthropic"}})
    assert {"b": {"kind": "anthropic"}} == house.registry.routes()
    assert ({"t": {}}, {"w1": {}}) == (house.registry.tasks(), house.registry.workers())
    assert {"t": frozenset({"m"})} == house.registry.models()
    assert ["default"] == house.registry.queues()
    assert [house.keys.namespace] == namespaces(house.client)
    assert not house.registry.remove_worker("w1")  # it has a job
    end_all_jobs(house)
    assert house.registry.remove_worker("w1")
    assert ({}, {}) == (house.registry.workers(), house.registry.heartbeats())


@pytest.mark.parametrize("namespace", ["{shop}", "dramatiq"])
def test_one_hash_tag_keeps_a_namespace_together(namespace: str) -> None:
    """On a cluster a script may touch keys of one slot only: every key begins with the namespace."""
    keys = Keys(namespace)
    made = [getattr(keys, name) for name in dir(Keys) if isinstance(getattr(Keys, name), property)]
    made += [keys.acks("w", "q"), keys.stories("20260602"), keys.once("20260602"), keys.lease("drain")]
    made += [make("q") for make in (keys.queue, keys.msgs, keys.dead, keys.dead_msgs)]
    made += [make("q") for make in (keys.held, keys.facts, keys.groups, keys.counts, keys.marks)]
    made += [make("a/m") for make in (keys.breaker, keys.reporters, keys.failing, keys.latencies, keys.bucket)]
    assert {namespace} == {key.split(":")[0] for key in made}


@given(st.lists(st.text(st.characters(exclude_characters="|"), min_size=1), min_size=1, max_size=4))
def test_a_wait_key_does_not_depend_on_the_order(breakers: list[str]) -> None:
    """Jobs that wait for the same breakers share a group."""
    assert wait_key_text(tuple(breakers)) == wait_key_text(tuple(reversed(breakers)))
    assert sorted(breakers) == wait_key_text(tuple(breakers)).split("|")


def test_the_examples_in_the_docstrings_hold() -> None:
    """They are run."""
    assert 0 == doctest.testmod(keys_module).failed
