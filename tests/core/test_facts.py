# SPDX-License-Identifier: Apache-2.0
"""What is known of held jobs is packed into a few bytes, and nothing of it is lost on the way."""

from __future__ import annotations

import doctest
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tideover.core.job import CRITICALITIES
from tideover.store import facts as facts_module
from tideover.store.facts import (
    BUCKETS,
    FIELD,
    FIXED,
    GROUP,
    MOST_DEATHS,
    MOST_HOLDS,
    MOST_MS,
    ORDER,
    SHARED,
    TICKS,
    UUID_BYTES,
    Facet,
    Group,
    HeldFacts,
    Member,
    breaker_keys_of,
    encoded,
    order_of,
    packed_id,
    text_id,
)

TEXT = st.text(st.characters(exclude_characters=FIELD, exclude_categories=["Cs"]), max_size=40)
UUIDS = st.uuids().map(str)
IDS = UUIDS | st.uuids().map(lambda made: made.hex) | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
MS = st.integers(0, MOST_MS)
HOUR_MS = 3_600_000
NOW_MS = 1_780_000_000_000

FACETS = st.builds(
    Facet,
    wait_key=st.lists(st.sampled_from(["a/m", "b/m", "c/x"]), unique=True).map(lambda keys: "|".join(sorted(keys))),
    task=TEXT,
    criticality=st.sampled_from(CRITICALITIES),
    reason=st.sampled_from(["outage", "pace", "failed", "review"]),
    tenant=TEXT,
    tag=TEXT,
    salt=st.just(""),
)


@st.composite
def held_facts(draw: st.DrawFn) -> HeldFacts:
    facet, redis_id = draw(FACETS), draw(IDS)
    return HeldFacts(
        redis_id=redis_id,
        job_id=draw(st.just(redis_id) | IDS),
        task=facet.task,
        queue="default",
        criticality=facet.criticality,
        wait_key=facet.wait_key,
        reason=facet.reason,
        generation=draw(st.integers(0, 2**32 - 1)),
        held_ms=draw(MS),
        sent_ms=draw(MS),
        expires_ms=draw(st.none() | st.integers(1, MOST_MS)),
        order=draw(MS),
        tenant=facet.tenant,
        tag=facet.tag,
        holds=draw(st.integers(0, MOST_HOLDS)),
        held_before_ms=draw(MS),
        deaths=draw(st.integers(0, MOST_DEATHS)),
        detail=draw(st.just("") | st.text(max_size=200)),
    )


def through_redis(facts: HeldFacts, facet: Facet) -> HeldFacts:
    """As the store writes it and reads it again."""
    packed = packed_id(facts.redis_id)
    raw = facts.packed(facet)[1]
    return HeldFacts.decode(facts.queue, packed, raw, Facet.decode(facet.encode()))


def plain(**more: Any) -> HeldFacts:
    told: dict[str, Any] = {
        "redis_id": "6f9619ff-8b86-4d01-b42d-00cf4fc964ff", "job_id": "6f9619ff-8b86-4d01-b42d-00cf4fc964ff", "task": "t",
        "queue": "default", "criticality": "deferrable", "wait_key": "a/m", "reason": "outage", "generation": 1,
        "held_ms": NOW_MS, "sent_ms": NOW_MS, "expires_ms": None, "order": NOW_MS * TICKS,
    }  # fmt: skip
    return HeldFacts(**{**told, **more})


# ids


@given(IDS)
def test_an_id_comes_back_as_it_was(redis_id: str) -> None:
    """Whoever made it."""
    assert redis_id == text_id(packed_id(redis_id))


@given(IDS)
def test_only_uuids_in_dramatiq_s_form_take_16_bytes(redis_id: str) -> None:
    """So the length says which of the two an id is; the scripts go by it, too."""
    canonical = len(redis_id) == 36 and is_uuid(redis_id)
    assert canonical == (len(packed_id(redis_id)) == UUID_BYTES)


def is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


@given(st.lists(IDS, unique=True))
def test_no_two_ids_are_packed_alike(ids: list[str]) -> None:
    """They are members of one set."""
    assert len(ids) == len({packed_id(redis_id) for redis_id in ids})


@pytest.mark.parametrize(
    "odd",
    [
        "",
        "x",
        "sixteen bytes id",
        "6F9619FF-8B86-4D01-B42D-00CF4FC964FF",
        "{6f9619ff-8b86-4d01-b42d-00cf4fc96}",
        "é" * 36,
        "-" * 36,
    ],
)
def test_ids_that_look_like_something_else(odd: str) -> None:
    """Those of 16 bytes, of 36 characters, in capitals or in braces are texts."""
    assert (odd, True) == (text_id(packed_id(odd)), len(packed_id(odd)) > UUID_BYTES)


# facts


@given(held_facts())
def test_facts_come_back_as_they_were(facts: HeldFacts) -> None:
    """From group, member and packed facts together."""
    assert facts == through_redis(facts, facts.facet)


@given(held_facts(), st.integers(1, 3))
def test_facts_of_a_shared_group_come_back_as_they_were(facts: HeldFacts, times: int) -> None:
    """Tenant and tag, which the group does not tell, included."""
    facet = facts.facet
    for _ in range(times):
        facet = facet.bucketed()
    assert facts == through_redis(facts, facet)


def test_most_facts_are_small() -> None:
    """A job of a UUID with nothing special about it: 43 bytes beside the 28 of its member, whatever its task is called."""
    facts = plain(task="a task with a long name", tenant="acme", tag="mail")
    member, packed = facts.packed(facts.facet)
    assert (28, 43, FIXED) == (len(member), len(packed), len(packed))


def test_what_does_not_fit_is_cut_and_not_refused() -> None:
    """A stranger's odd clock, or the hundred-thousandth hold, must not keep a job from being held."""
    odd = plain(held_ms=-5, sent_ms=2**60, expires_ms=2**60, held_before_ms=2**60, holds=10**6, deaths=10**6)
    expected = odd._replace(
        held_ms=0, sent_ms=MOST_MS, expires_ms=MOST_MS, held_before_ms=MOST_MS, holds=MOST_HOLDS, deaths=MOST_DEATHS
    )
    assert expected == through_redis(odd, odd.facet)


# facets and groups


@given(FACETS)
def test_a_facet_comes_back_as_it_was(facet: Facet) -> None:
    """Its bytes say all of it."""
    assert facet == Facet.decode(facet.encode())


@given(st.builds(Facet, *[st.text(max_size=10)] * 6))
def test_no_text_breaks_a_facet(facet: Facet) -> None:
    """Odd characters in a label cost the label a character, never the facet."""
    back = Facet.decode(facet.encode())
    assert facet.encode() == back.encode()
    assert [len(part) for part in facet] == [len(part) for part in back]


@given(st.lists(FACETS, unique=True, min_size=2, max_size=2))
def test_two_facets_have_two_ids_and_one_has_one(two: list[Facet]) -> None:
    """In all processes: it is made of the facet alone."""
    assert encoded(two[0])[0] != encoded(two[1])[0]
    assert GROUP == len(encoded(two[0])[0])
    assert encoded(two[0])[0] == encoded(Facet(*two[0]))[0]


@given(FACETS)
def test_a_shared_facet_tells_all_but_tenant_and_tag(facet: Facet) -> None:
    """What drain and operator act on stays: who waits for what, and why. A label that is not there stays away."""
    shared = facet.bucketed()
    assert facet[:4] == shared[:4]
    assert (bool(facet.tenant), bool(facet.tag)) == (bool(shared.tenant), bool(shared.tag))
    assert all(label.startswith(SHARED) for label in (shared.tenant, shared.tag) if label)
    again = shared.bucketed()
    assert (shared._replace(salt=""), "1", "2") == (again._replace(salt=""), shared.salt, again.salt)


@pytest.mark.parametrize("form", ["tenant {}", "~{}", "{}"])
def test_any_number_of_labels_share_few_groups(form: str) -> None:
    """Also those that look like shared ones already."""
    facets = (Facet("a/m", "t", "deferrable", "outage", form.format(n), form.format(n)) for n in range(1000))
    assert BUCKETS / 2 < len({facet.bucketed() for facet in facets}) <= BUCKETS


def test_groups_tell_the_breakers_that_are_waited_for() -> None:
    """Each once; who needs review waits for none."""
    facets = [Facet(key, "t", "deferrable", "outage") for key in ("a/m|b/m", "b/m", "")]
    groups = [Group("default", encoded(facet)[0], facet, 1) for facet in facets]
    assert {"a/m", "b/m"} == breaker_keys_of(groups)
    assert () == facets[-1].breaker_keys


# order


@given(held_facts(), held_facts())
def test_members_of_a_group_lie_in_their_order(one: HeldFacts, other: HeldFacts) -> None:
    """Compared as bytes, which is how Redis sorts them; the order first, then the id."""
    group = b"6bytes"
    first, second = (
        Member(Group("q", group, one.facet, 1), group + one.place),
        Member(Group("q", group, one.facet, 1), group + other.place),
    )
    assert (one.order, packed_id(one.redis_id)) == (first.order, first.key[ORDER:])
    expected = (one.order, packed_id(one.redis_id)) < (other.order, packed_id(other.redis_id))
    assert expected == (first.raw < second.raw) == (first.key < second.key)


@given(st.integers(0, HOUR_MS), st.none() | st.integers(0, 2 * HOUR_MS), st.integers(0, TICKS - 1))
def test_a_job_goes_by_its_expiry_and_by_its_longest_wait(held: int, expires: int | None, nth: int) -> None:
    """Whichever is earlier, counted from its first hold."""
    expires_ms = None if expires is None else NOW_MS + expires
    order = order_of(held_ms=NOW_MS + held, held_before_ms=held, expires_ms=expires_ms, max_wait_s=3600, nth=nth)
    latest = NOW_MS + HOUR_MS
    assert (latest if expires_ms is None else min(latest, expires_ms)) == plain(order=order).by_ms


@given(st.lists(st.integers(1, HOUR_MS), min_size=1, max_size=5), st.integers(1, HOUR_MS))
def test_a_job_that_is_held_again_keeps_its_place(held_for: list[int], later: int) -> None:
    """Released and held at once, again and again, it goes before all that were first held after it, and after those before."""
    age = {"expires_ms": None, "max_wait_s": 86_400.0, "nth": 0}
    first = order_of(held_ms=NOW_MS, held_before_ms=0, **age)
    again = order_of(held_ms=NOW_MS + sum(held_for), held_before_ms=sum(held_for), **age)
    newcomer = order_of(held_ms=NOW_MS + later, held_before_ms=0, **age)
    assert first == again < newcomer


@given(st.integers(2, TICKS))
def test_jobs_held_in_one_millisecond_keep_their_order(n: int) -> None:
    """As they came; and none of them comes into the next millisecond."""
    age = {"held_before_ms": 0, "expires_ms": None, "max_wait_s": 60.0}
    orders = [order_of(held_ms=NOW_MS, nth=nth, **age) for nth in range(n)]
    assert sorted(set(orders)) == orders
    assert orders[-1] < order_of(held_ms=NOW_MS + 1, nth=0, **age)


@given(MS, MS, st.none() | st.integers(1, 2**60), st.floats(1, 31_536_000), st.integers(0, 500))
def test_every_order_fits(held_ms: int, before_ms: int, expires_ms: int | None, max_wait_s: float, nth: int) -> None:
    """Whatever the clocks say, a job can be held."""
    order = order_of(held_ms=held_ms, held_before_ms=before_ms, expires_ms=expires_ms, max_wait_s=max_wait_s, nth=nth)
    assert 0 <= order <= MOST_MS
    assert order == Member(Group("q", b"6bytes", plain().facet, 1), b"6bytes" + plain(order=order).place).order


def test_the_examples_in_the_docstrings_hold() -> None:
    """They are run."""
    assert 0 == doctest.testmod(facts_module).failed
