# SPDX-License-Identifier: Apache-2.0
"""Held jobs with one key are answered by one run: each gets the answer, is counted, and has its story."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import dramatiq
import pytest

from tideover import InvalidJob, ai_task, claude, ops, send_many, status, text_of
from tideover.core.route import NO_PERMIT
from tideover.ops import Operator
from tideover.store.facts import DIGEST, packed_id
from tideover.store.twins import Twins

if TYPE_CHECKING:
    from tests.pipeline.conftest import Job, Shop


def held_with(shop: Shop, keys: list[str], task: Any = None, **options: Any) -> list[Job]:
    """Jobs with these keys, held since the breaker opened."""
    before = shop.ledger.read().held
    asked = task or shop.summary
    messages = (asked.message_with_options(args=(f"{key}{n}",), key=key, **options) for n, key in enumerate(keys))
    sent = send_many(messages).accepted
    shop.until(lambda: shop.ledger.read().held == before + len(sent), "they are held")
    return sent


def ran(shop: Shop) -> Counter[str]:
    """How often jobs of each key ran: their tags begin with it."""
    return Counter(tag[0] for tag in shop.ran if tag[0] in "abz")


def test_one_run_answers_all_with_its_key(shop: Shop) -> None:
    """As many calls as keys; everybody has the answer and ends, and nothing is left behind."""
    shop.work()
    canaries = shop.open_breaker()
    jobs = held_with(shop, ["a"] * 30 + ["b"] * 5 + ["z"])
    shop.heal()
    answers = [shop.result(job) for job in jobs]
    assert Counter(a=1, b=1, z=1) == ran(shop)
    assert 3 == len(set(zip((job.args[0][0] for job in jobs), answers, strict=True)))
    shop.until_over()
    assert {"accepted": 36 + len(canaries), "succeeded": 36 + len(canaries)} == shop.books()
    left = [shop.keys.leaders("default"), shop.keys.waiters("default")]
    shop.until(lambda: shop.broker.client.exists(*left) == 0, "no key is remembered")


def test_tenants_and_tasks_do_not_share(shop: Shop) -> None:
    """The same key is another one for each."""

    @ai_task(criticality="deferrable", models=[shop.model], **shop.quick)
    def other(tag: str) -> str:
        shop.ran.append(tag)
        return text_of(claude().messages.create(**shop.question(tag)))

    shop.work()
    shop.open_breaker()
    jobs = [
        *held_with(shop, ["a"] * 3, tenant="x"),
        *held_with(shop, ["a"] * 3, tenant="y"),
        *held_with(shop, ["a"] * 3, other),
    ]
    shop.heal()
    assert all(shop.result(job) for job in jobs)
    assert 3 == ran(shop)["a"]


def test_a_task_may_say_what_its_jobs_share(shop: Shop) -> None:
    """By their arguments; None: nothing. Who sends may say otherwise."""

    @ai_task(criticality="deferrable", models=[shop.model], key=lambda tag: None if tag == "z" else "all", **shop.quick)
    def shared(tag: str) -> str:
        shop.ran.append(tag)
        return text_of(claude().messages.create(**shop.question(tag)))

    shop.work()
    held = shop.open_breaker()
    jobs = [*shop.send(shared, 3, "a"), shared.send("z"), shared.send("z")]
    jobs += [shared.send_with_options(args=(f"b{n}",), key="other") for n in range(2)]
    shop.until(lambda: shop.ledger.read().held == len(held) + len(jobs), "they are held")
    shop.heal()
    assert all(shop.result(job) for job in jobs)
    assert Counter(a=1, b=1, z=2) == ran(shop)


@pytest.mark.parametrize("key", ["", 5, "x" * 600])
def test_a_key_that_makes_no_sense_is_refused(shop: Shop, key: Any) -> None:
    """When the job is sent."""
    with pytest.raises(InvalidJob, match="key must be a text of 1 to 512 characters"):
        shop.summary.send_with_options(args=("a",), key=key)
    with pytest.raises(TypeError, match="key is a function"):
        ai_task(criticality="deferrable", key="a")  # type: ignore[call-overload]


def test_the_story_of_each_says_whose_answer_it_has(shop: Shop, operator: Operator) -> None:
    """While it waits, `explain` says for whom; afterwards, by whom it was answered."""
    shop.work()
    shop.open_breaker()
    leader, waiter = held_with(shop, ["a", "a"])
    told = ops.explain(operator, waiter.message_id)
    assert ("coalesced", "coalesced") == (told.reason, told.ways[0].state)
    assert leader.message_id in told.ways[0].words
    assert "outage" == ops.explain(operator, leader.message_id).reason
    shop.heal()
    shop.until_over()
    line = next(line for line in shop.story(waiter) if line.event == "succeeded")
    assert leader.message_id == line.facts["answered_with"]
    assert ["anthropic:claude-opus-4-8"] == line.facts["served"]
    assert leader.message_id in ops.explain(operator, waiter.message_id).story[-1].words


def test_the_key_itself_goes_nowhere(shop: Shop) -> None:
    """It may be a customer's name: Redis has a digest of it, and nothing else."""
    shop.work()
    shop.open_breaker()
    held_with(shop, ["a", "a"])
    shop.summary.send_with_options(args=("y",), key="SECRET-KEY")
    shop.until(lambda: shop.ledger.read().held == 6, "it is held")
    client = shop.broker.client
    dumps = (client.dump(key) or b"" for key in client.keys(f"{shop.namespace}:*"))
    assert not any(b"SECRET-KEY" in dump for dump in dumps)
    shop.heal()
    shop.until_over()


def test_the_next_one_runs_when_the_first_fails(shop: Shop) -> None:
    """Its failure is its own: the others still have a chance, one after the other."""

    @ai_task(criticality="deferrable", models=[shop.model], max_retries=0)
    def shaky(tag: str) -> str:
        shop.ran.append(tag)
        text_of(claude().messages.create(**shop.question(tag)))
        if ran(shop)["a"] < 3:
            raise ValueError(tag)
        return tag

    shop.work()
    shop.open_breaker()
    jobs = held_with(shop, ["a"] * 6, shaky)
    shop.heal()
    shop.until_over()
    assert 3 == ran(shop)["a"]
    assert {"accepted": 9, "failed": 2, "succeeded": 7} == shop.books()
    answer = [tag for tag in shop.ran if tag[0] == "a"][-1]
    assert [answer] * 4 == [shop.result(job) for job in jobs if shop.events(job)[-1] == "succeeded"]


@pytest.mark.parametrize("end", ["discard", "expire"])
def test_the_next_one_runs_when_the_first_ends_while_it_is_held(shop: Shop, operator: Operator, end: str) -> None:
    """Nobody waits for a job that is no more."""
    shop.work()
    shop.open_breaker()
    soon = {"expires_in": timedelta(seconds=2)} if end == "expire" else {}
    leader = held_with(shop, ["a"], **soon)[0]
    waiters = held_with(shop, ["a"] * 3)
    if end == "discard":
        ops.discard(operator, ops.choose_jobs(operator, [leader.message_id]), who="t", because="drill")
    shop.until_all("ended", [leader])
    shop.heal()
    assert all(shop.result(job) for job in waiters)
    assert 1 == ran(shop)["a"]


def test_a_waiter_that_must_go_earlier_goes_by_itself(shop: Shop, operator: Operator) -> None:
    """The first one's turn would come too late for it."""
    shop.work()
    shop.open_breaker()
    first = held_with(shop, ["a"], expires_in=timedelta(hours=5))[0]
    urgent = held_with(shop, ["a"], expires_in=timedelta(minutes=1))[0]
    assert ["outage", "outage"] == [ops.explain(operator, job.message_id).reason for job in (first, urgent)]
    shop.heal()
    shop.until_over()


def test_a_waiter_expires_on_time(shop: Shop) -> None:
    """Whatever its leader does."""
    shop.work()
    held = shop.open_breaker()
    leader = held_with(shop, ["a"], expires_in=timedelta(seconds=30))[0]
    waiter = held_with(shop, ["a"], expires_in=timedelta(seconds=3))[0]
    shop.until_all("ended", [waiter])
    assert "expired" == shop.events(waiter)[-1]
    assert shop.books() == {"accepted": len(held) + 2, "held": len(held) + 1, "expired": 1}
    shop.heal()
    assert shop.result(leader)


def test_jobs_that_something_follows_run_themselves(shop: Shop) -> None:
    """A pipeline's next step needs its own first one."""

    @ai_task(criticality="deferrable", models=[shop.model], **shop.quick)
    def step(answer: str) -> str:
        shop.ran.append("z")
        return answer

    shop.work()
    shop.open_breaker()
    before = shop.ledger.read().held
    for n in range(3):
        first = shop.summary.message_with_options(args=(f"a{n}",), key="a")
        dramatiq.pipeline([first, step.message()]).run()
    shop.until(lambda: shop.ledger.read().held == before + 3, "they are held")
    shop.heal()
    shop.until(lambda: ran(shop) == Counter(a=3, z=3), "each ran, and its next step, too")
    shop.until_over()


def test_a_waiter_whose_leader_nobody_knows_any_more_runs(shop: Shop) -> None:
    """The register is a hint: if it is lost, everybody runs in the end."""
    shop.work()
    shop.open_breaker()
    jobs = held_with(shop, ["a"] * 3)
    twins = Twins(shop.broker.client, shop.keys)
    found = shop.broker.client.hgetall(shop.keys.leaders("default"))
    (twin,) = found
    shop.broker.client.hset(shop.keys.leaders("default"), twin, "0\tnobody")
    assert 1 == len(twins.chosen("default"))
    shop.heal()
    assert all(shop.result(job) for job in jobs)


def test_an_answer_that_cannot_be_stored_is_missing_for_all(shop: Shop) -> None:
    """As it is for the job itself; nobody is stuck for it."""

    @ai_task(criticality="deferrable", models=[shop.model], max_retries=0)
    def odd(tag: str) -> object:
        shop.ran.append(tag)
        text_of(claude().messages.create(**shop.question(tag)))
        return {tag}

    shop.work()
    canaries = shop.open_breaker()
    jobs = held_with(shop, ["a"] * 3, odd)
    shop.heal()
    shop.until_over()
    assert 1 == ran(shop)["a"]
    assert {"accepted": len(jobs) + len(canaries), "succeeded": len(jobs) + len(canaries)} == shop.books()


def test_nobody_waits_for_one_that_waits_for_a_human(shop: Shop) -> None:
    """The first needs review: the next one runs."""
    shop.work()
    shop.open_breaker()
    leader, *others = held_with(shop, ["a"] * 4)
    shop.stop_working()
    members = shop.backlog.members("default", [leader.message_id])
    (facts,) = shop.backlog.release("default", list(members.values()), NO_PERMIT).jobs
    shop.backlog.fetch("somebody", "default", 1)
    assert [True] == shop.backlog.hold("somebody", "default", [facts._replace(reason="review", wait_key="")])
    shop.heal()
    shop.work()
    assert all(shop.result(job) for job in others)
    assert "review" == shop.facts(leader).reason


@pytest.mark.parametrize("form", ["upper", "plain"])
def test_any_id_will_do(shop: Shop, form: str) -> None:
    """Ids of other systems may be no lower-case UUIDs."""
    shop.work()
    shop.open_breaker()
    before = shop.ledger.read().held
    ids = [str(uuid4()).upper() if form == "upper" else f"job {n}" for n in range(3)]
    for job_id in ids:
        message = shop.summary.message_with_options(args=(f"a{job_id}",), key="a")
        shop.broker.enqueue(message.copy(message_id=job_id))
    shop.until(lambda: shop.ledger.read().held == before + 3, "they are held")
    client, leaders = shop.broker.client, shop.keys.leaders("default")
    (twin,) = client.hgetall(leaders)
    client.hset(leaders, twin, "0\tnobody")
    twins = Twins(client, shop.keys)
    assert [1, 1] == [len(twins.chosen("default")) for _ in range(2)]
    shop.heal()
    shop.until_over()


def test_the_most_urgent_of_those_who_wait_is_next(shop: Shop) -> None:
    """Whatever their ids; and who comes later and is due earlier goes by itself."""
    shop.work()
    shop.open_breaker()
    hours = [5, 3, 9, 4]
    jobs = [held_with(shop, ["a"], expires_in=timedelta(hours=10))[0]]
    client, leaders = shop.broker.client, shop.keys.leaders("default")
    (twin,) = client.hgetall(leaders)
    client.hset(leaders, twin, f"0\t{jobs[0].message_id}")  # so that all others wait for it
    jobs += [held_with(shop, ["a"], expires_in=timedelta(hours=n))[0] for n in hours]
    client.hset(leaders, twin, "0\tnobody")
    (chosen,) = Twins(client, shop.keys).chosen("default")
    assert list(shop.backlog.members("default", [jobs[2].message_id]).values()) == [chosen]
    urgent = held_with(shop, ["a"], expires_in=timedelta(hours=1))[0]
    assert "outage" == shop.facts(urgent).reason
    shop.heal()
    shop.until_over()


def test_nobody_waits_for_the_next_attempt_of_one_that_failed(shop: Shop) -> None:
    """That may be days off: the next one runs, for all that are left."""

    @ai_task(criticality="deferrable", models=[shop.model], max_retries=1, min_backoff=600_000, max_backoff=600_000)
    def shaky(tag: str) -> str:
        shop.ran.append(tag)
        text_of(claude().messages.create(**shop.question(tag)))
        if ran(shop)["a"] < 2:
            raise ValueError(tag)
        return tag

    shop.work()
    shop.open_breaker()
    leader, *others = held_with(shop, ["a"] * 4, shaky)
    shop.heal()
    assert 1 == len({shop.result(job) for job in others})
    assert 2 == ran(shop)["a"]
    assert "queued" == status(leader).state


def test_many_entries_that_are_out_of_date_are_cleared_in_parts(shop: Shop) -> None:
    """So that Redis is not kept from its other work for long."""
    twins = Twins(shop.broker.client, shop.keys)
    client, leaders, waiters = shop.broker.client, shop.keys.leaders("default"), shop.keys.waiters("default")
    twin = "t" * DIGEST
    client.hset(leaders, twin, "0\tnobody")
    client.zadd(waiters, {twin.encode() + packed_id(str(uuid4())): 0 for _ in range(1200)})
    seen = []
    for _ in range(4):
        assert [] == twins.chosen("default")
        seen.append((client.zcard(waiters), client.exists(leaders)))
    assert [(700, 1), (200, 1), (0, 0), (0, 0)] == seen


def test_bypassed_everybody_runs(shop: Shop) -> None:
    """While tideover does not act it coalesces nothing either. (Its breaker takes long to recover.)"""
    shop.configure(probe_after_s=60, probe_max_s=60)
    shop.work()
    shop.open_breaker()
    jobs = held_with(shop, ["a"] * 4)
    shop.heal()
    shop.registry.set_bypass({"who": "me", "why": "why"}, None)
    assert all(shop.result(job) for job in jobs)
    assert 4 == ran(shop)["a"]
