# SPDX-License-Identifier: Apache-2.0
"""Sending that can be repeated, sending many, and room for jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import dramatiq
import pytest

import tideover
from tideover import CapacityReached, InvalidJob, StoreUnavailable, ai_task, send_many
from tideover_worker import embedded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.pipeline.conftest import Shop

SENDER = """
from dramatiq.brokers.redis import RedisBroker
import dramatiq, os, sys
from tideover import Tideover, ai_task, send_many

broker = RedisBroker(url={url!r}, namespace={namespace!r})
broker.add_middleware(Tideover())
dramatiq.set_broker(broker)

@ai_task(criticality="deferrable")
def summary(tag: str) -> str: ...

def messages():
    for i in range(5000):
        if i == 3000:
            print("midway", flush=True)
            sys.stdin.readline()
        yield summary.message_with_options(args=(f"job{{i}}",), idempotency_key=f"batch-7/{{i}}")

sent = send_many(messages())
print(len(sent.accepted), len(sent.duplicate), len(sent.rejected), flush=True)
"""


def full(shop: Shop, **capacity: Any) -> None:
    lines = [f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}" for name, value in capacity.items()]
    shop.configure(more="[capacity]\n" + "\n".join(lines))


# sending once


def test_a_second_send_is_the_first_job(shop: Shop) -> None:
    """The same key gives the same job, while it lives and after it ended; it runs once."""
    first = shop.summary.send_with_options(args=("x",), idempotency_key="order-81")
    again = shop.summary.send_with_options(args=("x",), idempotency_key="order-81")
    assert first.message_id == again.message_id
    shop.work()
    assert shop.result(first) == shop.result(again)
    later = shop.summary.send_with_options(args=("x",), idempotency_key="order-81")
    assert shop.result(first) == shop.result(later)
    assert {"accepted": 1, "succeeded": 1} == shop.books()
    assert ["x"] == shop.ran


def test_a_key_is_its_task_s_and_tenant_s_own(shop: Shop) -> None:
    """Neither another task's nor another tenant's key is the same."""
    sent = [
        shop.summary.send_with_options(args=("x",), idempotency_key="k"),
        shop.asummary.send_with_options(args=("x",), idempotency_key="k"),
        shop.summary.send_with_options(args=("x",), idempotency_key="k", tenant="acme"),
        shop.summary.send("x"),
    ]
    assert 4 == len({job.message_id for job in sent})
    assert {"accepted": 4, "queued": 4} == shop.books()


def test_a_key_for_other_arguments_is_an_error(shop: Shop) -> None:
    """It would hand out an answer to another question."""
    shop.summary.send_with_options(args=("x",), idempotency_key="k")
    with pytest.raises(InvalidJob, match="other arguments"):
        shop.summary.send_with_options(args=("y",), idempotency_key="k")
    assert {"accepted": 1, "queued": 1} == shop.books()


def test_a_second_send_knows_the_first_one_s_lane(shop: Shop) -> None:
    """The first decides where the result is to be found."""
    first = shop.summary.send_with_options(args=("x",), idempotency_key="k")
    again = shop.summary.send_with_options(
        args=("x",), idempotency_key="k", criticality="critical", expires_in=timedelta(minutes=1)
    )
    assert (first.message_id, first.queue_name) == (again.message_id, again.queue_name)
    shop.work()
    assert shop.result(first) == shop.result(again)


@pytest.mark.parametrize("key", ["", "x" * 513, 7])
def test_a_key_must_be_a_text(shop: Shop, key: Any) -> None:
    with pytest.raises(InvalidJob, match="idempotency_key"):
        shop.summary.send_with_options(args=("x",), idempotency_key=key)


def test_the_same_message_enqueued_twice_is_two_jobs(shop: Shop) -> None:
    """As in stock dramatiq: without a key nothing is taken for a repetition."""
    message = shop.summary.message("x")
    shop.broker.enqueue(message)
    shop.broker.enqueue(message)
    assert {"accepted": 2, "queued": 2} == shop.books()
    shop.work()
    shop.until_over()
    assert {"accepted": 2, "succeeded": 2} == shop.books()


# sending many


def test_many_are_sent_and_run(shop: Shop) -> None:
    """Over several portions, lanes and tasks; each is answered once."""
    messages = [(shop.summary, shop.asummary, shop.reply)[i % 3].message(f"m{i}") for i in range(700)]
    sent = send_many(messages)
    assert (700, [], []) == (len(sent.accepted), sent.duplicate, sent.rejected)
    assert [message.message_id for message in messages] == [message.message_id for message in sent.accepted]
    assert {"accepted": 700, "queued": 700} == shop.books()
    shop.work(threads=8)
    shop.until(lambda: shop.books() == {"accepted": 700, "succeeded": 700}, "all have run", within_s=60)
    answered = Counter(call.job for call in shop.primary.calls() if call.outcome == "ok")
    assert Counter(f"m{i}" for i in range(700)) == answered
    assert shop.result(sent.accepted[0]) is not None


def test_one_bad_job_does_not_stop_the_others(shop: Shop) -> None:
    """It is among the rejected, with its error."""
    good, bad = shop.summary.message("fine"), shop.summary.message(("tuple",))  # type: ignore[arg-type]
    sent = send_many([good, bad])
    assert [good.message_id] == [message.message_id for message in sent.accepted]
    [rejected] = sent.rejected
    assert (bad, InvalidJob) == (rejected.message, type(rejected.error))
    assert {"accepted": 1, "queued": 1} == shop.books()


def test_many_sent_again_add_nothing(shop: Shop) -> None:
    """With keys; what is new among them is added."""
    keyed = [shop.summary.message_with_options(args=(f"m{i}",), idempotency_key=f"k{i}") for i in range(300)]
    assert 200 == len(send_many(keyed[:200]).accepted)
    sent = send_many(keyed)
    assert (100, 200, 0) == (len(sent.accepted), len(sent.duplicate), len(sent.rejected))
    assert {"accepted": 300, "queued": 300} == shop.books()


def test_a_sender_killed_midway(shop: Shop) -> None:
    """Run again it adds what was missing, and nothing twice."""
    program = SENDER.format(url=shop.redis_url, namespace=shop.namespace)
    killed = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert killed.stdout is not None
    assert b"midway\n" == killed.stdout.readline()
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    sent_before = shop.books()["accepted"]
    assert 0 < sent_before <= 3000
    again = subprocess.run([sys.executable, "-c", program], input=b"go on\n", capture_output=True, check=True)
    assert f"{5000 - sent_before} {sent_before} 0" == again.stdout.decode().splitlines()[-1]
    assert {"accepted": 5000, "queued": 5000} == shop.books()


def test_redis_goes_away_midway(private_shop: Shop) -> None:
    """The error says so, and knows what was accepted before."""
    shop = private_shop

    def messages() -> Iterator[dramatiq.Message[Any]]:
        for i in range(600):
            if i == 400:
                embedded.stop(shop.folder / "valkey")
            yield shop.summary.message_with_options(args=(f"m{i}",), idempotency_key=f"k{i}")

    with pytest.raises(StoreUnavailable) as caught:
        send_many(messages())
    assert 250 == len(caught.value.sent.accepted)
    embedded.start(shop.folder / "valkey")
    assert {"accepted": 250, "queued": 250} == shop.books()


# room


def test_there_is_no_room_for_one_more(shop: Shop) -> None:
    """Refused with a typed error; when a job has ended there is room again."""
    full(shop, max_jobs=3)
    shop.send(shop.summary, 3, "j")
    with pytest.raises(CapacityReached, match="3 jobs") as caught:
        shop.summary.send("one too many")
    assert (None, 3) == (caught.value.tenant, caught.value.limit)
    assert {"accepted": 3, "queued": 3} == shop.books()
    shop.work()
    shop.until_over()
    shop.summary.send("now")
    shop.until_over()
    assert {"accepted": 4, "succeeded": 4} == shop.books()


def test_each_tenant_has_its_own_room(shop: Shop) -> None:
    """A tenant's jobs count until they end, by whatever way; others are not hindered."""
    full(shop, max_jobs_per_tenant=2)
    for tenant in ("acme", "globex"):
        for i in range(2):
            shop.summary.send_with_options(args=(f"{tenant}{i}",), tenant=tenant)
    with pytest.raises(CapacityReached) as caught:
        shop.summary.send_with_options(args=("x",), tenant="acme")
    assert "acme" == caught.value.tenant
    shop.summary.send("without a tenant")
    shop.work()
    shop.until_over()
    assert {} == shop.broker.client.hgetall(shop.keys.tenants)
    shop.summary.send_with_options(args=("x",), tenant="acme")


def test_room_is_for_ai_jobs(shop: Shop) -> None:
    """Other actors' jobs are not refused, and a retry or a next step of a pipeline never is."""
    full(shop, max_jobs=2)

    @dramatiq.actor
    def plain() -> None: ...

    @ai_task(criticality="deferrable")
    def step(*tags: str) -> str:
        return "done"

    other = shop.summary.send("other")
    (step.message("a") | step.message("b")).run()  # type: ignore[operator]
    plain.send()
    assert {"accepted": 3, "queued": 3} == shop.books()
    shop.work()
    shop.until_over()
    assert shop.result(other) is not None
    assert {"accepted": 4, "succeeded": 4} == shop.books()


def test_the_longest_held_makes_room(shop: Shop) -> None:
    """With `expire_oldest` the held job that has waited longest expires for the new one, and is told so."""
    full(shop, max_jobs=4, overflow="expire_oldest")
    shop.work()
    canaries = shop.open_breaker()
    first = shop.summary.send("first")
    shop.until_all("held", [first])
    second = shop.summary.send("second")
    shop.until_all("held", [second])
    books = shop.books()
    assert {"accepted": 5, "held": 4, "expired": 1} == books
    gone = [job for job in canaries if tideover.status(job).state == "ended"]
    assert ["expired"] == [tideover.status(job).end for job in gone]
    with pytest.raises(tideover.JobExpired):
        tideover.wait_for_sync(gone[0], timeout=timedelta(seconds=5))


def test_without_held_jobs_nothing_makes_room(shop: Shop) -> None:
    """What is queued or runs is not taken away."""
    full(shop, max_jobs=1, overflow="expire_oldest")
    shop.summary.send("queued")
    with pytest.raises(CapacityReached):
        shop.summary.send("one too many")


@pytest.mark.parametrize("label", ["~x", "a\x1fb", "x" * 65, "line\nbreak", 7, " leading"])
def test_tenants_and_tags_are_words(shop: Shop, label: Any) -> None:
    for name in ("tenant", "tag"):
        with pytest.raises(InvalidJob, match=name):
            shop.summary.send_with_options(args=("x",), **{name: label})


def test_tenant_and_tag_are_known_of_a_held_job(shop: Shop) -> None:
    shop.work()
    shop.open_breaker()
    job = shop.summary.send_with_options(args=("x",), tenant="acme", tag="nightly")
    shop.until_all("held", [job])
    assert ("acme", "nightly") == (shop.facts(job).tenant, shop.facts(job).tag)


def test_tenants_take_turns(shop: Shop) -> None:
    """A tenant with few jobs does not wait behind one with many."""
    shop.work(threads=1)
    shop.open_breaker()
    many = [shop.summary.send_with_options(args=(f"many{i}",), tenant="many") for i in range(40)]
    shop.until_all("held", many)
    few = [shop.summary.send_with_options(args=(f"few{i}",), tenant="few") for i in range(3)]
    shop.until_all("held", few)
    shop.ran.clear()
    shop.heal()
    shop.until_over()
    last_of_few = max(shop.ran.index(f"few{i}") for i in range(3))
    assert last_of_few < shop.ran.index("many39"), shop.ran
