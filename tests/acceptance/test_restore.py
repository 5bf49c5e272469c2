# SPDX-License-Identifier: Apache-2.0
"""`tideover restore`: jobs that failed, expired or were discarded begin anew; and queued jobs that are overdue."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from dramatiq.brokers.redis import RedisBroker
from dramatiq.message import Message
from dramatiq.results import ResultFailure

import tideover
from tideover.store.letters import Letters
from tideover_worker.cli import main

if TYPE_CHECKING:
    from tests.acceptance.conftest import Desk

Job = Message[Any]
PROMPT = "SECRET-PROMPT"
SOON = timedelta(milliseconds=200)


def ids(jobs: Sequence[Job]) -> list[str]:
    return [job.message_id for job in jobs]


def test_an_overdue_job_says_so(desk: Desk) -> None:
    """`explain` tells that a queued job is past its expiry, and what becomes of it; before that, when it expires."""
    early = desk.answer.send_with_options(args=(PROMPT,), expires_in=timedelta(hours=2), tenant="acme")
    late = desk.answer.send_with_options(args=(PROMPT,), expires_in=SOON)
    desk.until(lambda: tideover.status(late).overdue, "it is overdue")
    told = [desk.explain(job) for job in (early, late)]
    assert [("queued", False), ("queued", True)] == [(one["state"], one["overdue"]) for one in told]
    assert [("answer", "deferrable", "acme"), ("answer", "deferrable", "")] == [
        (one["task"], one["criticality"], one["tenant"]) for one in told
    ]
    assert told[1]["expires_at"] < told[1]["asked_at"] < told[0]["expires_at"]
    rows = [line.split("\t")[1] for line in desk.ask("explain", late.message_id).out.splitlines()]
    assert ["event", "now", "overdue", "hindrance", "expires"] == rows
    _, seen = desk.on_terminal("explain", late.message_id)
    assert ("queued and overdue in default" in seen, "Overdue: its expiry passed " in seen) == (True, True)


def test_an_expired_job_is_restored(desk: Desk) -> None:
    """It begins anew as a new job of the account, with time; its waiter gets the new answer, its story tells of it."""
    (job,) = desk.late(tenant="acme")
    with pytest.raises(tideover.JobExpired):
        desk.result(job)
    assert desk.explain(job)["restorable"]
    assert "tideover restore" in desk.on_terminal("explain", job.message_id)[1]
    done = desk.ask("restore", job.message_id[:8], "--expires-in", "1h", "--why", "the customer asks again", "--json").json
    assert [(job.message_id, "answer", "default", "expired")] == [
        (one["id"], one["task"], one["lane"], one["ended"]) for one in done["jobs"]
    ]
    assert {"accepted": 2, "queued": 1, "expired": 1} == desk.books()
    told = desk.explain(job)
    assert ("queued", False, False) == (told["state"], told["overdue"], told["restorable"])
    assert told["story"][-1]["words"].endswith(": the customer asks again; it begins anew")
    again = desk.ask("restore", job.message_id)
    assert (0, "was restored before; it is queued" in again.err) == (again.code, True)
    desk.work()
    assert "answer 1" == desk.result(job)
    desk.until_books(accepted=2, succeeded=1, expired=1)
    assert ["expired", "restored", "succeeded"] == [line["event"] for line in desk.explain(job)["story"]]
    assert "it has succeeded" in desk.ask("restore", job.message_id).err
    assert ({}, 1) == (desk.broker.client.hgetall(desk.keys.tenants), desk.registry.counters()["restored"])


@pytest.mark.parametrize(("words", "seconds"), [((), 0.2), (("--expires-in", "never"), None), (("--expires-in", "1h"), 3600.0)])
def test_a_restored_job_has_time(desk: Desk, words: tuple[str, ...], seconds: float | None) -> None:
    """As long as when it was sent, counted from now, unless the operator says otherwise."""
    (job,) = desk.late()
    (done,) = desk.ask("restore", job.message_id, *words, "--json").json["jobs"]
    raw = desk.broker.client.hget(desk.keys.msgs("default"), job.message_id)
    stamp = Message.decode(raw).options["tideover"]
    assert (stamp["expires_ms"] is None, done["expires_at"] is None) == (seconds is None, seconds is None)
    assert seconds is None or int(stamp["sent_ms"]) + seconds * 1000 == stamp["expires_ms"]


def test_a_failed_job_is_restored(desk: Desk) -> None:
    """With no attempt spent: it has all its retries again. What it had failed with is no answer any more."""
    desk.defect = True
    desk.work()
    job = desk.answer.send(PROMPT)
    with pytest.raises(ResultFailure):
        desk.result(job)
    desk.until_books(accepted=1, failed=1)
    desk.rest()
    assert 2 == len(desk.ran)
    assert [job.message_id] == desk.ask("restore", "--ended", "failed", "--why", "mended").ids
    with pytest.raises(tideover.NotYet):
        tideover.wait_for_sync(job, timeout=timedelta(seconds=0))
    desk.work()
    with pytest.raises(ResultFailure):
        desk.result(job)
    desk.until_books(accepted=2, failed=2)
    assert 4 == len(desk.ran)
    desk.defect = False
    assert [job.message_id] == desk.ask("restore", job.message_id).ids
    assert "answer 5" == desk.result(job)
    desk.until_books(accepted=3, succeeded=1, failed=2)


def test_a_job_of_a_stock_producer_is_restored(desk: Desk) -> None:
    """Its Redis id is another than its job id: it is found by the latter all the same, also afterwards, and counted once."""
    stranger = RedisBroker(url=desk.url, namespace=desk.namespace)
    stranger.declare_queue("default")
    job = stranger.enqueue(Message("default", "plain", (PROMPT,), {}, {}))
    stranger.close()
    desk.defect = True
    desk.work()
    desk.until_books(accepted=1, failed=1)
    desk.rest()
    [[letter]] = Letters(desk.broker.client, desk.keys).pages("default")
    place = f"default\t{letter.redis_id}"  # as a restore that was killed leaves it
    desk.broker.client.hset(desk.keys.places, job.message_id, place)
    assert [job.message_id] == desk.ask("restore", job.message_id).ids
    assert "queued" == desk.explain(job)["state"]
    assert {"accepted": 2, "queued": 1, "failed": 1} == desk.books()
    desk.defect = False
    desk.work()
    desk.until_books(accepted=2, succeeded=1, failed=1)
    assert {} == desk.broker.client.hgetall(desk.keys.places)


def test_restore_says_where_a_job_is(desk: Desk) -> None:
    """A job that is no dead letter is an error, which says where it is or how long dead letters are kept."""
    late = desk.answer.send(PROMPT).message_id
    said = desk.ask("restore", late)
    assert (4, "is no dead letter: it is queued" in said.err) == (said.code, True)
    desk.backlog.fetch("a-worker", "default", 1)
    desk.registry.beat("a-worker")
    assert "is no dead letter: it is running" in desk.ask("restore", late).err
    desk.backlog.give_back("a-worker", "default", [late])
    (held,) = desk.held(1)
    assert f"it is held; `tideover release {held.message_id}`" in desk.ask("restore", held.message_id).err
    assert (1, 2, 2) == tuple(desk.ask("restore", *words).code for words in (["0c4f0c4f"], [], ["--ended", "succeeded"]))
    desk.provider.heal()
    desk.result(held)
    said = desk.ask("restore", held.message_id)
    assert (4, "it has succeeded, so there is nothing to restore" in said.err) == (said.code, True)


def test_a_dead_letter_that_is_gone(desk: Desk) -> None:
    """Dead letters are swept after their time; then the error says so, and when the job ended."""
    (job,) = desk.late()
    desk.until(lambda: desk.backlog.sweep("default", 0), "it is swept")
    said = desk.ask("restore", job.message_id)
    assert (1, "dead letters are kept for 7 days" in said.err, "it expired at " in said.err) == (said.code, True, True)
    assert (1, False) == (desk.ask("restore", "--all").code, desk.explain(job)["restorable"])


def test_restore_by_filter(desk: Desk) -> None:
    """Filters may be combined; --dry-run changes nothing; many are asked for; a letter that nobody can read stays."""
    acme, blue = desk.late(20, tenant="acme", tag="nightly"), desk.late(2, tenant="blue")
    desk.broker.client.zadd(desk.keys.dead("default"), {"unreadable": 1.0})
    desk.broker.client.hset(desk.keys.dead_msgs("default"), "unreadable", b"\x80pickled")
    plan = desk.ask("restore", "--ended", "expired", "--dry-run", "--json").json
    found = [(group["tenant"], group["ended"], group["jobs"]) for group in plan["groups"]]
    assert (22, 1, [("acme", "expired", 20), ("blue", "expired", 2)]) == (plan["would_restore"], plan["unreadable"], found)
    code, seen = desk.on_terminal("restore", "--task", "answer", "--dry-run")
    assert (0, True, True) == (code, "Would restore 22 jobs." in seen, "1 dead letter cannot be read here" in seen)
    assert (4, 1) == (desk.ask("restore", "--ended-within", "1h").code, desk.ask("restore", "--task", "other").code)
    code, seen = desk.on_terminal("restore", "--task", "answer", typed="n\n")
    assert (4, True) == (code, "Restore 22 jobs? [y/N]" in seen)
    assert {"accepted": 22, "expired": 22} == desk.books()
    some = desk.ask("restore", "--tenant", "blue", "--tag", "", "--ended-within", "1h")
    assert (0, set(ids(blue))) == (some.code, set(some.ids))
    rest = desk.ask("restore", "--all", "--yes", "--expires-in", "never")
    assert (1, set(ids(acme))) == (rest.code, set(rest.ids))
    assert {"accepted": 44, "queued": 22, "expired": 22} == desk.books()


def test_restore_of_thousands_shows_progress(desk: Desk) -> None:
    """On a terminal a bar runs while more than a thousand jobs begin anew."""
    for _ in range(1001):
        desk.other.send(PROMPT)
    while fetched := desk.backlog.fetch("a-worker", "default", 500)[0]:
        for job in fetched:
            assert desk.ledger.settle("a-worker", "default", job.redis_id, job.redis_id, "failed")
    code, seen = desk.on_terminal("restore", "--task", "other", "--yes")
    assert (0, True, True) == (code, "Restoring" in seen, "Restored 1,001 jobs." in seen)
    assert {"accepted": 2002, "queued": 1001, "failed": 1001} == desk.books()


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        (("--ended", "succeeded"), "failed, expired, discarded"),
        (("--ended-within", "2 hours"), "90s, 15m, 2h or 1d"),
        (("0c4f0c4f", "--expires-in", "soon"), "90s, 15m, 2h or 1d"),
        (("0c4f0c4f", "--all"), "Say which jobs"),
        ((), "Say which jobs"),
    ],
)
def test_restore_says_what_is_allowed(desk: Desk, words: tuple[str, ...], allowed: str) -> None:
    """A slip in an option is exit code 2 and one plain sentence."""
    said = desk.ask("restore", *words)
    assert (2, True) == (said.code, allowed in " ".join(said.err.split())), said.err


def test_help_has_examples() -> None:
    said = CliRunner().invoke(main, ["restore", "--help"]).output
    assert ("Examples:" in said, "Exit code" in " ".join(said.split())) == (True, True)
