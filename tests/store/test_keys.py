# SPDX-License-Identifier: Apache-2.0
"""Every key in Redis is in the table at the top of `store/keys.py`, with the type and the lifetime that stand there."""

from __future__ import annotations

import doctest
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tideover import clock
from tideover.store import keys as keys_module
from tideover.store.client import lease
from tideover.store.keys import NAMESPACES, Keys, wait_key_text
from tideover.store.registry import namespaces
from tideover.store.stories import Line

if TYPE_CHECKING:
    from tests.store.conftest import House

WINDOW_S = 10.0
SECONDS = {"window + 60 s": WINDOW_S + 60, "1 h": 3600, "8 days": 8 * 86_400, "seconds": 60}
"""The lifetimes that Redis itself ends, and how long they are at most."""
FOR_EVER = ("for ever", "as asked", "7 days", "until dead", "cleaned by the maintainer")
"""Those that outlive all jobs. All others are gone when the last job has ended."""
NAMES = {"queue": r"[^:]+", "worker": r"[^:]+", "day": r"\d{8}", "key": r".+", "wait key": r".+", "name": r"[a-z]+"}


@dataclass(frozen=True)
class Documented:
    name: str
    kind: str
    lives: str

    def matches(self, key: str, namespace: str) -> bool:
        parts = re.split(r"<([a-z ]+)>", self.name)
        known = {**NAMES, "ns": re.escape(namespace)}
        pattern = "".join(known[part] if i % 2 else re.escape(part) for i, part in enumerate(parts))
        return re.fullmatch(pattern, key) is not None


def documented() -> list[Documented]:
    """The rows of both tables, the most particular names first."""
    rows = []
    for row in re.findall(r"^\| (`.*) \|$", keys_module.__doc__ or "", re.MULTILINE):
        names, kinds, _, lives = (cell.strip() for cell in row.split(" | "))
        whole: list[str] = []
        for name in re.findall(r"`([^`]+)`", names):
            whole.append(whole[0].removesuffix(".XQ") + name if name.startswith(".") else name)
        for name, kind in zip(whole, kinds.split(", "), strict=True):
            ours = "" if name.startswith("<ns>:") or name == NAMESPACES else "<ns>:__tideover__:"
            rows.append(Documented(ours + name, kind, lives))
    return sorted(rows, key=lambda row: -len(re.sub(r"<[a-z ]+>", "", row.name)))


def found(house: House) -> dict[str, Documented]:
    """Each key that is in Redis, with the row that documents it."""
    rows = documented()
    result = {}
    for key in (raw.decode() for raw in house.client.keys("*")):
        row = next((row for row in rows if row.matches(key, house.keys.namespace)), None)
        assert row is not None, f"{key} is not in the table of store/keys.py"
        result[key] = row
    return result


def live_a_busy_life(house: House) -> None:
    """Jobs in every place, and every port used."""
    house.registry.announce()
    house.registry.enter_tasks({"t": {}})
    house.registry.enter_routes({"a": {}})
    house.registry.enter_worker("w1", {})
    house.registry.learn("t", "m")
    house.registry.set_bypass({}, None)
    house.ledger.accept("default.DQ", "delayed", b"body")
    house.client.hset(house.keys.msgs("default"), "x", b"body")
    house.client.rpush(house.keys.queue("default"), "x")
    house.backlog.fetch("w1", "default", 1)
    house.ledger.adopt("w1", "default", ["x"])
    house.holding(4, expires_ms=5000)
    house.breakers.report("a/m", WINDOW_S, generation=0, ok=1)
    house.move("open", "half-open", "recovering")
    house.breakers.report("a/m", WINDOW_S, generation=1, ok=1)
    assert ["r0"] == house.release(1)
    house.stories.add([Line("job-r0", clock.now(), "held", {})])
    assert lease(house.client, house.keys.lease("drain"), 3).acquire(blocking=False)


def end_all_jobs(house: House) -> None:
    house.backlog.expire(house.held, list(house.backlog.browse(house.held)))
    house.settle("x")
    for queue in ("default", "default.DQ"):
        for job in house.backlog.fetch("w1", queue, 9)[0]:
            house.ledger.settle("w1", queue, job.redis_id, f"job-{job.redis_id}", "failed")


def test_every_key_is_documented(house: House) -> None:
    """By name and type; and every documented one was met, so that the table holds no stale row."""
    live_a_busy_life(house)
    seen = set(found(house).values())
    for key, row in found(house).items():
        assert row.kind == house.client.type(key).decode(), key
    end_all_jobs(house)
    seen |= set(found(house).values())
    assert {row.name for row in documented() if row.kind != "channel"} == {row.name for row in seen}


def test_every_key_lives_as_long_as_documented(house: House) -> None:
    """Where a time is promised Redis keeps it; nothing else vanishes by itself, because it would take jobs along."""
    live_a_busy_life(house)
    for key, row in found(house).items():
        left_s = house.client.ttl(key)
        if row.lives in SECONDS:
            assert 0 < left_s <= SECONDS[row.lives], key
        else:
            assert left_s == -1, key


def test_jobs_that_ended_leave_nothing_behind(house: House) -> None:
    """Whatever belongs to jobs goes with them, so that Redis does not fill up over the years."""
    live_a_busy_life(house)
    end_all_jobs(house)
    account = house.ledger.read()
    assert (6, 6, 0) == (account.accepted, sum(account.ends.values()), account.lost)
    leaked = {key for key, row in found(house).items() if row.lives not in SECONDS and row.lives not in FOR_EVER}
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
    house.registry.remove_worker("w1")
    assert ({}, {}) == (house.registry.workers(), house.registry.heartbeats())


@pytest.mark.parametrize("namespace", ["{shop}", "dramatiq"])
def test_one_hash_tag_keeps_a_namespace_together(namespace: str) -> None:
    """On a cluster a script may touch keys of one slot only: every key begins with the namespace."""
    keys = Keys(namespace)
    made = [getattr(keys, name) for name in dir(Keys) if isinstance(getattr(Keys, name), property)]
    made += [keys.queue("q"), keys.msgs("q"), keys.acks("w", "q"), keys.dead("q"), keys.dead_msgs("q"), keys.held("q", "k")]
    assert {namespace} == {key.split(":")[0] for key in made}


@given(st.lists(st.text(st.characters(exclude_characters="|"), min_size=1), min_size=1, max_size=4))
def test_a_wait_key_does_not_depend_on_the_order(breakers: list[str]) -> None:
    """Jobs that wait for the same breakers share a held set."""
    assert wait_key_text(breakers) == wait_key_text(list(reversed(breakers)))
    assert sorted(breakers) == wait_key_text(breakers).split("|")


def test_the_examples_in_the_docstrings_hold() -> None:
    """They are run."""
    assert 0 == doctest.testmod(keys_module).failed
