# SPDX-License-Identifier: Apache-2.0
"""What operators ask of the backlog and do with it, on a real Valkey: filters, pages, counts, releases, jobs under review."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from tideover import clock, ops
from tideover.core.breaker import Transition
from tideover.core.route import FORCED, Mark, Permit
from tideover.errors import JobNotFound
from tideover.ops import Filter, Misasked, Operator, Refused
from tideover.ops.access import open_space
from tideover.settings import load
from tideover.store import backlog as store
from tideover.store.breakers import Batch
from tideover.store.facts import TICKS, HeldFacts
from tideover.store.keys import Keys
from tideover_worker.cli import backlog_screen

if TYPE_CHECKING:
    import redis

KEY, SPARE, OTHER = "anthropic/claude-opus-4-8", "openai/claude-opus-4-8", "anthropic/claude-haiku-4-5"
WORKER = "w1"
HOUR_MS = 3_600_000
ROUTE = '[routes.anthropic]\nkind = "anthropic"\n'


class Desk:
    """One namespace, filled through the store itself, and its operator."""

    def __init__(self, client: redis.Redis, url: str, namespace: str, folder: Path) -> None:
        self.client, self.keys = client, Keys(namespace)
        self.space = open_space(client, namespace)
        self.space.registry.announce()
        self.now_ms = clock.now_ms()
        self.nth = 0
        (folder / "tideover.toml").write_text(f'redis_url = "{url}"\n{ROUTE}')
        self.settings = load(environ={}, start=folder)

    def operator(self, *namespaces: str) -> Operator:
        return ops.open_operator(self.settings, namespaces or [self.keys.namespace])

    def facts(self, **more: Any) -> HeldFacts:
        """A held job; each is a millisecond behind the one before."""
        self.nth += 1
        job_id, held_ms = str(uuid4()), self.now_ms - HOUR_MS + self.nth
        plain: dict[str, Any] = {
            "redis_id": job_id, "job_id": job_id, "task": "tag", "queue": "default", "criticality": "deferrable",
            "wait_key": KEY, "reason": "outage", "generation": 1, "held_ms": held_ms, "sent_ms": held_ms - 5,
            "expires_ms": None,
        }  # fmt: skip
        filled = {**plain, **more}
        by_ms = filled["held_ms"] + 24 * HOUR_MS if filled["expires_ms"] is None else filled["expires_ms"]
        return HeldFacts(**{"order": by_ms * TICKS, **filled})

    def hold(self, n: int = 1, **more: Any) -> list[str]:
        return self.hold_all([self.facts(**more) for _ in range(n)])

    def hold_all(self, facts: list[HeldFacts]) -> list[str]:
        for queue in {fact.queue for fact in facts}:
            mine = [fact for fact in facts if fact.queue == queue]
            self.client.sadd(self.keys.queues, queue)
            self.client.hset(self.keys.msgs(queue), mapping={fact.redis_id: b"{}" for fact in mine})
            self.client.sadd(self.keys.acks(WORKER, queue), *(fact.redis_id for fact in mine))
            assert all(self.space.backlog.hold(WORKER, queue, mine))
        self.client.hincrby(self.keys.account, "accepted", len(facts))
        return [fact.job_id for fact in facts]

    def hold_review(self, n: int = 1, **more: Any) -> list[str]:
        return self.hold(n, **{"reason": "review", "wait_key": "", "detail": "its task is gone", **more})

    def open(self, key: str = KEY) -> None:
        self.space.breakers.report(key, "p", Batch(era=0, runs=[("failed", 5)], why="529"))
        seen = self.space.breakers.read([key])[key]
        assert self.space.breakers.transition(key, seen, Transition(to="open", why="529"), clock.now())

    def queued(self, queue: str = "default") -> list[str]:
        return [raw.decode() for raw in self.client.lrange(self.keys.queue(queue), 0, -1)]

    def permit(self, job_id: str, queue: str = "default") -> Permit | None:
        return Mark.parse(self.client.hget(self.keys.marks(queue), job_id).decode()).permit  # type: ignore[union-attr]

    def found(self, limit: int = 100, **chosen: Any) -> list[str]:
        with closing(self.operator()) as operator:
            return [job.id for job in ops.backlog(operator, Filter(**chosen), limit=limit).jobs]

    def matching(self, **chosen: Any) -> tuple[int, bool]:
        with closing(self.operator()) as operator:
            found = ops.backlog(operator, Filter(**chosen), limit=1)
            return found.matching, found.complete

    def counts(self, by: str, **chosen: Any) -> dict[str, int]:
        with closing(self.operator()) as operator:
            return {one.value: one.jobs for one in ops.breakdown(operator, by, Filter(**chosen)).slices}

    def walk(self, operator: Operator, limit: int, chosen: Filter) -> list[str]:
        """The ids on all pages."""
        found: list[str] = []
        after: str | None = None
        while True:
            page = ops.backlog(operator, chosen, after=after, limit=limit)
            found += [job.id for job in page.jobs]
            after = page.next
            if after is None:
                return found


@pytest.fixture
def desk(client: redis.Redis, valkey_url: str, tmp_path: Path) -> Desk:
    return Desk(client, valkey_url, "shop", tmp_path)


@pytest.fixture
def operator(desk: Desk) -> Iterator[Operator]:
    with closing(desk.operator()) as made:
        yield made


def test_each_filter(desk: Desk) -> None:
    """By task, reason, criticality, wait key, tenant and tag, alone and together; the number is exact."""
    plain = desk.hold(2)
    other_task = desk.hold(task="summarise", tenant="acme", tag="nightly")
    failed = desk.hold(reason="failed", tenant="acme")
    either = desk.hold(wait_key=f"{KEY}|{SPARE}", criticality="critical", queue="default.critical")
    other_model = desk.hold(wait_key=OTHER)
    review = desk.hold_review(tag="nightly")
    everything = [*plain, *other_task, *failed, *either, *other_model, *review]
    assert everything == desk.found()
    expected: list[tuple[dict[str, Any], list[str]]] = [
        ({"task": "summarise"}, other_task),
        ({"reason": "failed"}, failed),
        ({"reason": "review"}, review),
        ({"criticality": "critical"}, either),
        ({"tenant": "acme"}, [*other_task, *failed]),
        ({"tenant": ""}, [*plain, *either, *other_model, *review]),
        ({"tag": "nightly"}, [*other_task, *review]),
        ({"tenant": "acme", "tag": ""}, failed),
        ({"waits_for": "anthropic"}, [*plain, *other_task, *failed, *either, *other_model]),
        ({"waits_for": KEY}, [*plain, *other_task, *failed, *either]),
        ({"waits_for": "anthropic/claude-h"}, other_model),
        ({"waits_for": "openai"}, either),
        ({"waits_for": "anth"}, []),
        ({"waits_for": KEY, "tenant": "acme", "reason": "outage"}, other_task),
        ({"task": "nobody's"}, []),
    ]
    assert [ids for _, ids in expected] == [desk.found(**chosen) for chosen, _ in expected]
    assert [(len(ids), True) for _, ids in expected] == [desk.matching(**chosen) for chosen, _ in expected]


def test_what_a_job_says(desk: Desk, operator: Operator) -> None:
    """All that is known of it comes from its facts: the listing reads no body, and there is none here to read."""
    desk.hold(tenant="acme", tag="nightly", holds=3, detail="529", expires_ms=desk.now_ms + HOUR_MS, task="summarise")
    desk.client.delete(desk.keys.msgs("default"))
    (job,) = ops.backlog(operator).jobs
    assert ("shop", "summarise", "acme", "nightly", 3, "529") == (
        job.namespace, job.task, job.tenant, job.tag, job.holds, job.detail,
    )  # fmt: skip
    assert (desk.now_ms + HOUR_MS) / 1000 == job.expires_at == job.release_by_at
    assert (KEY,) == job.waits_for


def test_ages_and_expiries(desk: Desk) -> None:
    """Exact to the millisecond by facts, and also where the order says something else than the age."""
    now_ms = desk.now_ms
    old_but_last = desk.hold(held_ms=now_ms - 3 * HOUR_MS, order=(now_ms + 48 * HOUR_MS) * TICKS)
    recent = desk.hold(held_ms=now_ms - 60_000, order=(now_ms + HOUR_MS) * TICKS)
    soon = desk.hold(held_ms=now_ms - 60_000, expires_ms=now_ms + 10 * 60_000)
    later = desk.hold(held_ms=now_ms - 3 * HOUR_MS, expires_ms=now_ms + 5 * HOUR_MS)
    assert [*later, *old_but_last] == desk.found(held_for_s=7200)
    assert [*soon, *recent, *later, *old_but_last] == desk.found(held_for_s=1)
    assert soon == desk.found(expires_before_s=1800)
    assert [*soon, *later] == desk.found(expires_before_s=10 * 3600)
    assert later == desk.found(expires_before_s=10 * 3600, held_for_s=7200)
    assert (2, False) == desk.matching(held_for_s=7200)
    with closing(desk.operator()) as operator:
        found = ops.backlog(operator, Filter(held_for_s=7200))
        assert (2, True, 4, False) == (found.matching, found.complete, found.looked_at, found.gave_up)
    assert {"tag": 2} == desk.counts("task", held_for_s=7200)


def test_a_question_gives_up_and_goes_on(desk: Desk, operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """No index knows ages: after so many jobs looked at the answer says so, and its cursor goes on behind them."""
    monkeypatch.setattr("tideover.ops.search.MOST_LOOKED", 600)
    desk.hold_all([desk.facts(held_ms=desk.now_ms - 60_000, order=n) for n in range(1, 1501)])
    old = desk.hold_all([desk.facts(held_ms=desk.now_ms - 3 * HOUR_MS, order=n) for n in (1400, 1500)])
    first = ops.backlog(operator, Filter(held_for_s=7200))
    assert ((), True, False, 600) == (first.jobs, first.gave_up, first.complete, first.looked_at)
    assert first.next is not None
    assert set(old) == set(desk.walk(operator, 50, Filter(held_for_s=7200)))
    counted = ops.breakdown(operator, "task", Filter(held_for_s=7200))
    assert (0, False) == (counted.jobs, counted.complete)
    stopped = "looked at the 600 most urgent held jobs one by one and stopped there; less urgent ones may match, too"
    assert [stopped] == list(backlog_screen.uncounted(counted))
    assert stopped == next(backlog_screen.beyond(first, first=True))
    second = ops.backlog(operator, Filter(held_for_s=7200), after=first.next)
    assert stopped.replace("the 600", "the 600 next") == next(backlog_screen.beyond(second, first=False))


def test_many_tenants_share_groups(desk: Desk, operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the most groups tenants share some; a filter by tenant is exact all the same, and so is a release."""
    monkeypatch.setattr(store, "MOST_GROUPS", 4)
    ids = {f"tenant{n}": desk.hold(2, tenant=f"tenant{n}", tag="t" if n % 2 else "") for n in range(80)}
    groups = desk.space.backlog.groups("default")
    assert any(group.facet.salt for group in groups)
    assert [ids[tenant] for tenant in ids] == [desk.found(tenant=tenant) for tenant in ids]
    assert ids["tenant7"] == desk.found(tenant="tenant7", tag="t")
    assert [] == desk.found(tenant="tenant7", tag="")
    assert [] == desk.found(tenant="~1")
    shared = [one for one in ops.breakdown(operator, "tenant").slices if one.shared]
    assert 160 == sum(desk.counts("tenant").values())
    assert all(one.value.startswith("~") for one in shared)
    assert {"tenant7": 2} == desk.counts("tenant", tenant="tenant7")
    done = ops.release(operator, ops.choose(operator, Filter(tenant="tenant7")), who="t", why=None, force=True)
    assert ids["tenant7"] == [job.id for job in done.jobs] == desk.queued()
    assert [] == desk.found(tenant="tenant7")


def test_what_is_in_the_backlog(desk: Desk) -> None:
    """Counts per value, the largest first, of all jobs or of those that a filter means."""
    desk.hold(3, tenant="acme")
    desk.hold(1, task="summarise", tenant="blue", criticality="critical", queue="default.critical")
    desk.hold_review(2, tenant="acme")
    assert [("tag", 5), ("summarise", 1)] == list(desk.counts("task").items())
    assert {"outage": 4, "review": 2} == desk.counts("reason")
    assert {KEY: 4, "": 2} == desk.counts("waits-for")
    assert {"acme": 5, "blue": 1} == desk.counts("tenant")
    assert {"": 6} == desk.counts("tag")
    assert {"deferrable": 5, "critical": 1} == desk.counts("criticality")
    assert {"acme": 3, "blue": 1} == desk.counts("tenant", reason="outage")
    with (
        closing(desk.operator()) as operator,
        pytest.raises(Misasked, match="task, reason, criticality, tenant, tag, waits-for"),
    ):
        ops.breakdown(operator, "weather")


def test_nonsense_is_refused(desk: Desk, operator: Operator) -> None:
    """Each refusal says what is allowed."""
    with pytest.raises(Misasked, match="outage, suspect, pace, failed, paused, coalesced, review"):
        Filter(reason="weather")
    with pytest.raises(Misasked, match="critical, deferrable"):
        Filter(criticality="urgent")
    with pytest.raises(Misasked, match="no duration"):
        Filter(held_for_s=-1)
    desk.hold(2)
    cursor = ops.backlog(operator, limit=1).next
    assert cursor is not None
    for wrong in ("", "x", "é", cursor[:-1], cursor + "A", cursor[1:], "A" * len(cursor)):
        with pytest.raises(Misasked, match="is no cursor"):
            ops.backlog(operator, after=wrong)


@pytest.mark.parametrize("limit", [1, 7, 50])
def test_pages(desk: Desk, client: redis.Redis, valkey_url: str, tmp_path: Path, limit: int) -> None:
    """All jobs of several queues and namespaces, in one order, on one page each."""
    bakery = Desk(client, valkey_url, "bakery", tmp_path)
    orders = random.Random(1).sample(range(10_000), 60)
    ids: dict[int, str] = {}
    for nth, order in enumerate(orders):
        of = bakery if nth % 3 == 0 else desk
        more = {"queue": "default.critical"} if nth % 4 == 0 else {}
        ids[order] = of.hold_all([of.facts(order=order, task=f"t{nth % 5}", tenant=f"x{nth % 2}", **more)])[0]
    with closing(desk.operator("shop", "bakery")) as operator:
        assert [ids[order] for order in sorted(ids)] == desk.walk(operator, limit, Filter())
        some = [ids[order] for nth, order in sorted(enumerate(orders), key=lambda pair: pair[1]) if nth % 2]
        assert some == desk.walk(operator, limit, Filter(tenant="x1"))
        assert [] == list(ops.backlog(operator, limit=0).jobs)
        assert 60 == ops.backlog(operator, limit=0).matching


def test_a_walk_on_live_data(desk: Desk) -> None:
    """While others are held and released, a walk neither misses nor repeats a job that stays held all the while."""
    facts = [desk.facts(order=n * 3, tenant=f"x{n % 40}") for n in range(1, 400)]
    steady = desk.hold_all(facts)
    over = threading.Event()
    churn = threading.Thread(target=come_and_go, args=(desk, over))
    churn.start()
    try:
        with closing(desk.operator()) as operator:
            for limit in (3, 10, 50, 200):
                found = desk.walk(operator, limit, Filter())
                assert steady == [job_id for job_id in found if job_id in set(steady)]
                assert len(found) == len(set(found))
    finally:
        over.set()
        churn.join()


def come_and_go(desk: Desk, over: threading.Event) -> None:
    """Holds and releases jobs of the same groups, at random places in the order, until it is over."""
    chance, here = random.Random(2), list[HeldFacts]()
    while not over.is_set():
        new = [desk.facts(order=chance.randrange(1200), tenant=f"x{chance.randrange(40)}") for _ in range(20)]
        desk.hold_all(new)
        here += new
        chance.shuffle(here)
        gone, here = here[40:], here[:40]
        members = desk.space.backlog.members("default", [fact.redis_id for fact in gone])
        if members:
            desk.space.backlog.release("default", list(members.values()), Permit(FORCED, 0))


def test_status_counts_exactly(desk: Desk, operator: Operator) -> None:
    """Numbers by wait key and reason come from the groups, the oldest and the next expiry from the first jobs of each."""
    now_ms = desk.now_ms
    desk.hold(30, tenant="a", held_ms=now_ms - HOUR_MS)
    desk.hold(5, tenant="b", held_ms=now_ms - 2 * HOUR_MS, expires_ms=now_ms + HOUR_MS)
    desk.hold(2, criticality="critical", queue="default.critical", expires_ms=now_ms + 60_000, held_ms=now_ms - 1000)
    desk.hold(4, reason="pace", held_ms=now_ms - 500)
    desk.hold_review(3, held_ms=now_ms - 400)
    (one,) = ops.status(operator).namespaces
    assert [
        ((), "review", 3, 0, (now_ms - 400) / 1000, None),
        ((KEY,), "outage", 37, 2, (now_ms - 2 * HOUR_MS) / 1000, (now_ms + 60_000) / 1000),
        ((KEY,), "pace", 4, 0, (now_ms - 500) / 1000, None),
    ] == [(g.waits_for, g.reason, g.jobs, g.critical, g.oldest_at, g.next_expiry_at) for g in one.standing.held_groups]
    assert (44, 3) == (one.standing.held, one.standing.needs_review)


def test_status_of_thousands_of_groups(desk: Desk, operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers stay exact where not every group's first job is read."""
    monkeypatch.setattr("tideover.ops.held.MOST_READ", 10)
    desk.hold_all([desk.facts(tenant=f"x{n}") for n in range(150) for _ in range(1 + n % 2)])
    (group,) = ops.status(operator).namespaces[0].standing.held_groups
    assert (225, True) == (group.jobs, group.oldest_at is not None)


def test_release_in_order(desk: Desk, operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several script calls the most urgent is fetched first; each job takes the permit of its own breaker along."""
    monkeypatch.setattr("tideover.ops.acts.AT_ONCE", 3)
    ids = [desk.hold(wait_key=OTHER if n % 4 == 0 else KEY)[0] for n in range(10)]
    done = ops.release(operator, ops.choose(operator), who="t", why="drill", force=True)
    assert ids == desk.queued()
    assert {Permit(FORCED, 0)} == {desk.permit(job_id) for job_id in ids}
    assert (10, 0, 0, 0) == (len(done.jobs), done.gone, done.still_held, done.untold)
    again = [desk.hold(wait_key=OTHER if n % 4 == 0 else KEY)[0] for n in range(10)]
    ops.release(operator, ops.choose(operator), who="t", why="drill", force=False)
    ahead = desk.queued()[:10]
    assert [set(again[start : start + 3]) for start in range(0, 10, 3)] == [
        set(ahead[start : start + 3]) for start in range(0, 10, 3)
    ]
    assert {Permit(KEY, 0), Permit(OTHER, 0)} == {desk.permit(job_id) for job_id in again}
    told = ops.explain(operator, ids[0]).story
    assert ["enqueued", "held", "released"] == [line.event for line in told]
    assert told[-1].words.endswith("by force by t: drill")


def test_release_of_what_may_run(desk: Desk, operator: Operator) -> None:
    """Jobs whose breakers are down stay; a preview says so beforehand, and changes nothing."""
    stays, goes = desk.hold(2), desk.hold(3, wait_key=OTHER)
    desk.open()
    plan = ops.preview(operator, ops.choose(operator), force=False)
    assert (3, 2, {KEY: "open"}) == (plan.would_go, plan.would_stay, plan.barred)
    assert [(3, True), (2, False)] == [(group.jobs, group.goes) for group in plan.groups]
    assert [] == desk.queued()
    done = ops.release(operator, ops.choose(operator), who="t", why=None, force=False)
    assert (goes, 2, (KEY,)) == (desk.queued(), done.still_held, done.still_waiting_for)
    assert stays == desk.found()
    barred = ops.preview(operator, ops.choose_jobs(operator, stays), force=False)
    with pytest.raises(Refused, match=r"2 jobs wait for breakers that let nothing run now: .* is open"):
        ops.refuse_if_none_may_go(barred)
    ops.refuse_if_none_may_go(ops.preview(operator, ops.choose_jobs(operator, stays), force=True))


def test_release_by_id_of_two_lanes(desk: Desk, operator: Operator) -> None:
    """Each job goes back to its own lane, the most urgent first however they were named; one named twice goes once."""
    early, late = desk.hold(2)
    critical = desk.hold(queue="default.critical", criticality="critical")[0]
    chosen = ops.choose_jobs(operator, [late, critical, early[:12], late])
    assert 3 == chosen.size
    ops.release(operator, chosen, who="t", why=None, force=False)
    assert ([early, late], [critical]) == (desk.queued(), desk.queued("default.critical"))


def test_review(desk: Desk, operator: Operator) -> None:
    """No breaker frees such a job and a release of everything leaves it; asked for, it goes, to be judged as any other job."""
    review, others = desk.hold_review(2), desk.hold(1)
    desk.open()
    chosen = ops.choose(operator)
    assert (1, 2) == (chosen.size, chosen.in_review)
    ops.release(operator, chosen, who="t", why=None, force=True)
    assert (others, review) == (desk.queued(), desk.found())
    with pytest.raises(JobNotFound, match="2 jobs that need review"):
        ops.choose(operator)
    told = ops.explain(operator, review[0])
    assert ("review", "its task is gone", (), None, 1) == (told.reason, told.detail, told.ways, told.ahead, told.holds)
    assert told.remedy is not None
    assert f"`tideover release {review[0]}`" in told.remedy
    (one,) = ops.status(operator).namespaces
    assert "REVIEW: 2 jobs need review: `tideover backlog --reason review`." in (one.verdict.sentence, *one.verdict.remarks)
    done = ops.release(operator, ops.choose(operator, Filter(reason="review")), who="t", why=None, force=False)
    assert (2, [*review, *others]) == (len(done.jobs), desk.queued())
    assert [None, None] == [desk.permit(job_id) for job_id in review]


def test_explain_a_held_job(desk: Desk, operator: Operator) -> None:
    """Whose it is and how often it was held; how many go before it."""
    desk.hold(4, tenant="blue")
    job_id = desk.hold(tenant="acme", tag="nightly", holds=3)[0]
    told = ops.explain(operator, job_id[:8])
    assert (job_id, "acme", "nightly", 3, 4) == (told.id, told.tenant, told.tag, told.holds, told.ahead)
    assert (None, 1) == (told.remedy, len(told.ways))


def test_a_release_that_redis_cannot_tell(desk: Desk, operator: Operator) -> None:
    """A full Redis takes no stories; the jobs go all the same, and the answer says so."""
    ids = desk.hold(3)
    chosen = ops.choose(operator)
    desk.client.config_set("maxmemory", 1)
    try:
        done = ops.release(operator, chosen, who="t", why=None, force=False)
    finally:
        desk.client.config_set("maxmemory", 0)
    assert (3, 3) == (len(done.jobs), done.untold)
    assert ids == desk.queued()


def test_jobs_that_left_meanwhile(desk: Desk, operator: Operator) -> None:
    """What was chosen and is not held any more when its turn comes is counted, and nothing else is touched."""
    ids = desk.hold(3)
    chosen = ops.choose(operator)
    ops.release(operator, ops.choose_jobs(operator, ids[:1]), who="t", why=None, force=False)
    done = ops.release(operator, chosen, who="t", why=None, force=False)
    assert (ids[1:], 1) == ([job.id for job in done.jobs], done.gone)
