# SPDX-License-Identifier: Apache-2.0
"""Is it armed? What `doctor` finds where real workers, a real Redis and real outages left something that keeps jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis

from tideover import ai_task, clock, ops
from tideover import settings as tideover_settings
from tideover.core.route import route_key, task_key
from tideover.ops import Check, Diagnosis, NamespaceDiagnosis, Operator
from tideover.ops.checklist import of_servers
from tideover.settings import settings
from tideover.store.client import Safekeeping, safekeeping
from tideover.store.facts import packed_id
from tideover.store.keys import SCHEMA
from tideover.store.paces import ALL, Paces
from tideover.testing import Fault
from tideover_worker import embedded

if TYPE_CHECKING:
    from tests.pipeline.conftest import Job, Shop

SAID: dict[str, Any] = {"who": "me", "why": "the database is full", "since_ms": 0, "until_ms": None}
LANES = ["default", "default.critical"]
FACTS: dict[str, Any] = {"host": "vm", "pid": 7, "since": 0.0, "version": "0.1.0", "mode": "act", "schema": SCHEMA}
MB = 2**20


@pytest.fixture
def operator(shop: Shop) -> Iterator[Operator]:
    shop.registry.announce()
    made = ops.open_operator(settings(), [shop.namespace])
    yield made
    made.close()


@pytest.fixture
def paces(shop: Shop) -> Paces:
    return Paces(shop.broker.client, shop.keys)


def whole(shop: Shop) -> Diagnosis:
    opened = ops.open_operator(settings(), [shop.namespace])
    try:
        return ops.diagnose(opened)
    finally:
        opened.close()


def diagnosed(shop: Shop) -> NamespaceDiagnosis:
    (one,) = whole(shop).namespaces
    return one


def found(shop: Shop) -> list[tuple[str, str]]:
    """Subject and severity of all that is not fine."""
    return [(check.subject, check.severity) for check in diagnosed(shop).checks if check.severity != "ok"]


def the(shop: Shop, subject: str) -> Check:
    """The one check of a subject that is not fine."""
    (one,) = [check for check in diagnosed(shop).checks if check.subject == subject and check.severity != "ok"]
    return one


def outage(shop: Shop, **options: Any) -> list[Job]:
    """Three held jobs of a worker that lives."""
    shop.work(**options)
    held = shop.open_breaker()
    shop.until(lambda: shop.registry.leader("drain"), "somebody leads")
    return held


def keep_alive(shop: Shop, worker: str) -> None:
    """A sign of life that lasts for the test, however slow it is."""
    shop.broker.client.zadd(shop.keys.heartbeats, {worker: clock.now_ms() + 600_000})


def enter(shop: Shop, worker: str, **facts: Any) -> None:
    """A live worker as the registry knows it, which does nothing."""
    keep_alive(shop, worker)
    shop.registry.enter_worker(worker, {**FACTS, "queues": LANES, **facts})


def stays(one: NamespaceDiagnosis) -> tuple[bool, int, int]:
    return one.armed, one.held, one.stay


def test_an_outage_alone_is_no_finding(shop: Shop) -> None:
    """What waits for a provider will go when it is back; every check says that it is fine, and it does go."""
    held = outage(shop)
    one = diagnosed(shop)
    assert ("armed: 3 held jobs would drain", True, 3, 0) == (one.sentence, one.armed, one.held, one.stay)
    fine = [
        "workers",
        "leader",
        "queues",
        "tasks",
        "drain",
        "breakers",
        "mode",
        "review",
        "bodies",
        "account",
        "fleet",
        "schema",
    ]
    assert [(subject, "ok", "") for subject in fine] == [(c.subject, c.severity, c.remedy) for c in one.checks]
    (worker,) = shop.registry.workers().values()
    assert f"worker {worker['host']} {worker['pid']} leads the drain" == one.checks[1].sentence
    shop.heal()
    for job in held:
        assert shop.result(job)


def test_with_nothing_held_it_is_armed(shop: Shop) -> None:
    """The question then is whether a backlog would drain."""
    shop.work()
    shop.until(lambda: shop.registry.leader("drain"), "somebody leads")
    assert "armed: nothing waits, and a backlog would drain" == diagnosed(shop).sentence


def test_no_worker_is_alive(shop: Shop) -> None:
    """It blocks as long as nobody runs, whatever else is well; one without a sign of life is dead."""
    outage(shop)
    shop.stop_working()
    shop.registry.enter_worker("dead", {**FACTS, "queues": LANES, "tasks": ["summary"]})
    shop.summary.send("queued")
    one = diagnosed(shop)
    assert (False, 3, 3) == stays(one)
    why = "no worker is alive: 4 jobs waiting, and nobody probes or releases"
    assert f"not armed: 3 of 3 held jobs would stay: {why}" == one.sentence
    assert "run `tideover worker MODULE`" == the(shop, "workers").remedy


def test_nobody_leads_the_drain(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are alive, and none of them holds the lease."""
    monkeypatch.setattr("tideover.ops.doctor.LOOKS", 2)
    outage(shop)
    shop.stop_working()
    enter(shop, "idle", tasks=["summary"])
    one = diagnosed(shop)
    assert (False, 3, 3) == stays(one)
    assert [("leader", "blocks", 3)] == [(c.subject, c.severity, c.jobs) for c in one.checks if c.severity != "ok"]
    assert "nobody leads the drain: no worker holds its lease; 3 held jobs stay" == the(shop, "leader").sentence


def test_a_queue_that_no_live_worker_consumes(shop: Shop) -> None:
    """Its held, queued and delayed jobs are counted; those of consumed queues, critical lanes included, are no finding."""

    @ai_task(criticality="deferrable", queue_name="bulk", models=[shop.model])
    def bulk(tag: str) -> str:
        return "done"

    outage(shop)
    shop.until_all("held", shop.send(bulk, 2, "b"))
    shop.stop_working()
    shop.work(queues={"default"})
    bulk.send("queued")
    bulk.send_with_options(args=("delayed",), delay=600_000)
    shop.reply.send("critical")
    shop.until(lambda: shop.registry.leader("drain"), "somebody leads")
    one = diagnosed(shop)
    assert (False, 5, 2) == stays(one)
    check = the(shop, "queues")
    assert ("blocks", 4) == (check.severity, check.jobs)
    assert "no live worker consumes bulk: 2 held jobs and 2 queued jobs stay" == check.sentence
    assert "--queues" in check.remedy
    assert f"not armed: 2 of 5 held jobs would stay: {check.sentence}" == one.sentence
    shop.stop_working()
    shop.work()
    shop.until(lambda: diagnosed(shop).armed, "with a worker for all queues it is armed")


def test_a_queue_of_which_nothing_is_held_yet(shop: Shop) -> None:
    """Its queued jobs alone make it a finding."""

    @ai_task(criticality="deferrable", queue_name="bulk", models=[shop.model])
    def bulk(tag: str) -> str:
        return "done"

    shop.work(queues={"default"})
    shop.until(lambda: shop.registry.leader("drain"), "somebody leads")
    bulk.send("queued")
    assert "not armed: no live worker consumes bulk: 1 queued job stays" == diagnosed(shop).sentence


def test_a_queue_that_a_worker_without_tideover_may_consume(shop: Shop) -> None:
    """It is told and blocks nothing; but nobody without tideover looks into a critical lane."""
    outage(shop)
    shop.fallback.fail(Fault.OVERLOADED)
    shop.until_all("held", [shop.reply.send("critical")])
    shop.stop_working()
    shop.work(queues={"elsewhere"})
    shop.summary.send("theirs")
    shop.backlog.fetch("stock", "default", 1)
    keep_alive(shop, "stock")
    shop.until(lambda: shop.registry.leader("drain"), "somebody leads")
    one = diagnosed(shop)
    queues = [(c.severity, c.jobs) for c in one.checks if c.subject == "queues"]
    assert [("blocks", 1), ("warns", 3)] == queues
    assert (False, 4, 1) == stays(one)
    assert "MIXED: 1 worker without tideover" in the(shop, "fleet").sentence
    assert "warns" == the(shop, "fleet").severity


def renamed_task(shop: Shop) -> Any:
    @ai_task(criticality="deferrable", actor_name="renamed", models=[shop.model])
    def renamed(tag: str) -> str:
        return "done"

    return renamed


def test_a_task_that_no_live_worker_has_imported(shop: Shop) -> None:
    """Its jobs would need review instead of running; a worker that knows it, too, makes that a warning."""
    renamed = renamed_task(shop)
    outage(shop)
    job = renamed.send("r")
    shop.until_all("held", [job])
    assert diagnosed(shop).armed
    del shop.broker.actors["renamed"]
    shop.until(lambda: not diagnosed(shop).armed, "the worker has told that it is gone")
    one, check = diagnosed(shop), the(shop, "tasks")
    assert (False, 4, 1) == stays(one)
    assert ("blocks", 1) == (check.severity, check.jobs)
    assert "no live worker of default has imported the task renamed: 1 held job would need review" == check.sentence
    assert "`tideover discard --because TEXT --task renamed`" in check.remedy
    enter(shop, "newer", tasks=["summary", "renamed"])
    assert (True, 4, 0) == stays(diagnosed(shop))
    check = the(shop, "tasks")
    assert ("warns", 1) == (check.severity, check.jobs)
    assert "1 of 2 live workers of default have not imported the task renamed" in check.sentence


def test_a_worker_that_does_not_tell_its_tasks_is_not_said_to_lack_them(shop: Shop) -> None:
    """One of an older version, or with very many: it is told as not checked, also where it is the only one."""
    outage(shop)
    enter(shop, "older")
    check = the(shop, "tasks")
    assert (True, "unchecked") == (diagnosed(shop).armed, check.severity)
    assert "not checked whether 1 worker imported the tasks of held jobs: they do not tell" == check.sentence
    shop.stop_working()
    shop.broker.client.set(shop.keys.lease("drain"), "theirs", ex=60)
    assert (True, 3, 0) == stays(diagnosed(shop))
    assert [("tasks", "unchecked")] == found(shop)


def test_a_worker_tells_its_tasks_unless_they_are_very_many(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice a second is too often for a megabyte of names."""
    shop.work()
    (facts,) = shop.registry.workers().values()
    assert ["areply", "asummary", "reply", "summary"] == facts["tasks"]
    monkeypatch.setattr("tideover_worker.housekeeping.MOST_OF_TASKS", 10)
    shop.until(lambda: all("tasks" not in facts for facts in shop.registry.workers().values()), "it tells them no more")


def test_a_paused_drain(shop: Shop, paces: Paces) -> None:
    """Who paused it, why, until when, and how many jobs stay for it; a pause whose time is over is no finding."""
    outage(shop)
    paces.order(ALL, {**SAID, "max_rate": 0.0, "until_ms": clock.now_ms() + 3_600_000})
    check = the(shop, "drain")
    assert ("blocks", 3, "`tideover drain resume`") == (check.severity, check.jobs, check.remedy)
    assert "the drain is paused by me for 60 min more (the database is full); 3 held jobs stay" == check.sentence
    assert (False, 3, 3) == stays(diagnosed(shop))
    paces.order(ALL, {**SAID, "max_rate": 0.0, "until_ms": 1})
    assert [] == found(shop)


def test_a_paused_breaker_keeps_only_jobs_that_no_other_frees(shop: Shop, paces: Paces) -> None:
    """A critical job that waits for two routes goes with the other one."""
    outage(shop)
    shop.fallback.fail(Fault.OVERLOADED)
    shop.until_all("held", [shop.reply.send("critical")])
    key = f"anthropic/{shop.model}"
    paces.order(key, {**SAID, "max_rate": 0.0})
    assert (False, 4, 3) == stays(diagnosed(shop))
    check = the(shop, "drain")
    assert (3, f"`tideover drain resume {key}`") == (check.jobs, check.remedy)


def test_everything_that_keeps_a_job_is_told_at_once(shop: Shop, paces: Paces, operator: Operator) -> None:
    """Whoever mends one thing must not find the next one afterwards."""
    outage(shop)
    key = f"anthropic/{shop.model}"
    for name in (ALL, key):
        paces.order(name, {**SAID, "max_rate": 0.0})
    for name in (key, route_key("anthropic")):
        ops.force(operator, name, "open", for_s=3600, who="me", why="why")
    found = [(c.subject, c.severity, c.jobs) for c in diagnosed(shop).checks if c.severity != "ok"]
    assert [("drain", "blocks", 3)] * 2 + [("breakers", "blocks", 3)] * 2 == found
    assert 3 == diagnosed(shop).stay


def test_a_capped_drain_warns(shop: Shop, paces: Paces) -> None:
    """It says how long that takes at least."""
    outage(shop)
    paces.order(ALL, {**SAID, "max_rate": 0.01})
    assert (True, 3, 0) == stays(diagnosed(shop))
    check = the(shop, "drain")
    assert "warns" == check.severity
    assert "capped at 0.01 jobs/s by me (the database is full): 3 held jobs take 5 min at least" in check.sentence


def test_a_route_that_is_parked_for_its_key(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider's return does not mend it."""
    shop.work()
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-a-wrong-key")
    tideover_settings.forget()
    shop.until_all("held", [shop.summary.send("held")])
    shop.until(lambda: diagnosed(shop).stay == 1, "it is known that the route is parked")
    check = the(shop, "breakers")
    assert ("blocks", 1) == (check.severity, check.jobs)
    assert check.sentence.startswith("anthropic/* is parked (auth): ")
    assert "mend its credential, then `tideover breaker resume 'anthropic/*'`" == check.remedy


@pytest.mark.parametrize(("fault", "parked"), [(Fault.QUOTA, "quota"), (Fault.NOT_FOUND, "model")])
def test_a_route_that_is_parked_for_money_or_a_model(shop: Shop, fault: Fault, parked: str) -> None:
    """Both are told with their remedy."""
    shop.work()
    shop.primary.fail(fault, **({"models": ["opus"]} if parked == "model" else {}))
    shop.until_all("held", [shop.summary.send("held")])
    shop.until(lambda: diagnosed(shop).stay == 1, "it is known that the route is parked")
    assert f"is parked ({parked})" in the(shop, "breakers").sentence


def test_a_paused_task(shop: Shop, operator: Operator) -> None:
    """Its jobs wait for somebody to mend it and say so."""
    shop.work()
    shop.primary.fail(Fault.BAD_REQUEST)
    shop.send(shop.summary, 40, "r")
    shop.until(lambda: shop.breakers.read([task_key("summary")])[task_key("summary")].parked == "paused", "it is paused")
    shop.until(lambda: shop.books().get("held", 0) + shop.books().get("failed", 0) == 40, "the others are held")
    shop.heal()
    one, check = diagnosed(shop), the(shop, "breakers")
    assert (False, shop.books()["held"], shop.books()["held"]) == stays(one)
    assert check.sentence.startswith("task:summary is paused: ")
    assert "mend the task and deploy it, then `tideover breaker resume task:summary`" == check.remedy
    ops.resume(operator, task_key("summary"))
    shop.until(lambda: diagnosed(shop).armed, "told to resume, its jobs would go")


@pytest.mark.parametrize("whole_route", [False, True])
def test_a_breaker_that_is_forced_open(shop: Shop, operator: Operator, *, whole_route: bool) -> None:
    """By whom and for how long; that of a route stands above those of its models."""
    outage(shop)
    key = route_key("anthropic") if whole_route else f"anthropic/{shop.model}"
    ops.force(operator, key, "open", for_s=3600, who="me", why="they said so")
    check = the(shop, "breakers")
    assert ("blocks", 3) == (check.severity, check.jobs)
    assert f"{key} is forced open for 60 min more by me (they said so); 3 held jobs stay" == check.sentence
    assert check.remedy.startswith("`tideover breaker auto ")
    ops.unforce(operator, key)
    assert [] == found(shop)


def test_a_breaker_that_is_forced_closed_lets_jobs_go(shop: Shop, operator: Operator) -> None:
    """It is told all the same: calls that fail open nothing."""
    outage(shop)
    ops.cap_drain(operator, ALL, 0.01, for_s=None, who="me", why="so that they stay held")
    ops.force(operator, f"anthropic/{shop.model}", "closed", for_s=3600, who="me", why="why")
    assert ("warns", 0) == (the(shop, "breakers").severity, the(shop, "breakers").jobs)
    assert diagnosed(shop).armed


@pytest.mark.parametrize("routes", [{}, {"anthropic": {"kind": "anthropic", "models": {"claude-haiku-4-5": "h"}}}])
def test_a_route_that_is_gone_from_the_settings(shop: Shop, routes: dict[str, Any]) -> None:
    """Or only the model from the map of its route: nobody asks whether it is back."""
    outage(shop)
    shop.registry.enter_routes({**routes, "openai": {"kind": "openai-compatible", "models": {}}})
    check = the(shop, "breakers")
    assert ("blocks", 3) == (check.severity, check.jobs)
    assert f"no worker has anthropic/{shop.model} in its settings any more" in check.sentence
    assert f"`tideover breaker resume anthropic/{shop.model}`" in check.remedy


def test_a_fallback_in_the_same_failure_domain(shop: Shop) -> None:
    """It fails when the primary does, so a warning says so, and a setting ends it where the owner knows better."""
    same = '[routes.{name}]\nkind = "anthropic-aws"\nregion = "r"\nworkspace = "w"\napi_key_env = "OPENAI_API_KEY"\n{more}'
    other = same.format(name="apart", more='failure_domain = "aws"')
    shop.configure(more=f"{same.format(name='near', more='')}\n{other}", primary_options='failure_domain = "anthropic"')
    options: Any = {"criticality": "critical", "expires_in": None, **shop.quick}
    ai_task(reroute=["near", "openai"], actor_name="twice", **options)(lambda: None)
    ai_task(reroute=["apart", "openai"], actor_name="well", **options)(lambda: None)
    shop.work()
    check = the(shop, "routes")
    assert ("warns", "task twice reroutes into the same outage: near is in the failure domain of anthropic (anthropic)") == (
        check.severity,
        check.sentence,
    )


def test_in_mode_observe_no_breaker_keeps_jobs(shop: Shop, operator: Operator) -> None:
    """They go whatever it says, and nothing would be held in the next outage: that is told."""
    outage(shop)
    ops.force(operator, f"anthropic/{shop.model}", "open", for_s=3600, who="me", why="why")
    shop.stop_working()
    ops.cap_drain(operator, ALL, 0.01, for_s=None, who="me", why="so that they stay held")
    shop.configure(mode="observe")
    shop.work()
    shop.until(lambda: shop.registry.leader("drain"), "somebody leads")
    assert diagnosed(shop).armed
    check = the(shop, "mode")
    assert ("warns", 'set mode = "act" for the workers') == (check.severity, check.remedy)


def test_a_bypass_is_told(shop: Shop) -> None:
    """By whom and why."""
    shop.work()
    shop.until(lambda: shop.registry.leader("drain"), "somebody leads")
    shop.registry.set_bypass({"who": "me", "why": "why", "since_ms": clock.now_ms()}, None)
    assert ("warns", "`tideover bypass off`") == (the(shop, "mode").severity, the(shop, "mode").remedy)
    assert "BYPASSED by me" in the(shop, "mode").sentence


def test_jobs_that_need_review_never_drain(shop: Shop) -> None:
    """They wait for a human: the others are armed all the same, and the sentence tells of them."""
    renamed = renamed_task(shop)
    job = renamed.send("r")
    del shop.broker.actors["renamed"]
    outage(shop)
    shop.until_all("held", [job])
    one, check = diagnosed(shop), the(shop, "review")
    assert "armed: 3 held jobs would drain; 1 more job in need of review would stay" == one.sentence
    assert ("warns", 1) == (check.severity, check.jobs)
    assert "`tideover backlog --reason review`" in check.remedy


def test_a_held_job_without_a_body(shop: Shop) -> None:
    """Somebody deleted it by hand: it can never run."""
    job, *_ = outage(shop)
    shop.broker.client.hdel(shop.keys.msgs("default"), job.message_id)
    check = the(shop, "bodies")
    assert ("blocks", 1) == (check.severity, check.jobs)
    assert f"1 of 3 held jobs looked at have no body ({job.message_id})" in check.sentence
    assert check.remedy.startswith("send them again")
    assert f"not armed: {check.sentence}" == diagnosed(shop).sentence


def test_a_held_job_without_facts(shop: Shop) -> None:
    """It goes with the others, so it only warns."""
    job, *_ = outage(shop)
    shop.broker.client.hdel(shop.keys.facts("default"), packed_id(job.message_id))
    check = the(shop, "bodies")
    assert ("warns", 1) == (check.severity, check.jobs)
    assert f"1 of 3 held jobs looked at have no facts ({job.message_id})" in check.sentence


def test_a_job_that_leaves_meanwhile_lacks_nothing(shop: Shop) -> None:
    """What is not held any more may have neither facts nor body."""
    job, *_ = outage(shop)
    members = shop.backlog.page(shop.backlog.groups("default"), 10)
    shop.broker.client.hdel(shop.keys.msgs("default"), job.message_id)
    shop.broker.client.hdel(shop.keys.facts("default"), packed_id(job.message_id))
    assert ([job.message_id], [job.message_id]) == shop.backlog.incomplete(members)
    shop.broker.client.zremrangebylex(shop.keys.held("default"), "-", "+")
    assert ([], []) == shop.backlog.incomplete(members)


def test_only_a_sample_of_bodies_is_looked_for(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million held jobs are counted by groups; how many were looked at is told."""
    monkeypatch.setattr("tideover.ops.doctor.MOST_SAMPLED", 2)
    outage(shop)
    (check,) = [check for check in diagnosed(shop).checks if check.subject == "bodies"]
    assert ("ok", "2 of 3 held jobs looked at: facts and body are there") == (check.severity, check.sentence)


def test_a_lost_job_is_told(shop: Shop) -> None:
    """It is nowhere, so it would not come home; `status` says the same."""
    outage(shop)
    shop.broker.client.zpopmin(shop.keys.held("default"))
    assert ("warns", True) == (the(shop, "account").severity, "LOST 1 job" in the(shop, "account").sentence)


def test_schemas_that_differ(shop: Shop) -> None:
    """Of what is stored, of this command, or of a worker."""
    shop.work()
    shop.until(lambda: shop.registry.leader("drain"), "somebody leads")
    assert [] == found(shop)
    enter(shop, "older", schema=SCHEMA - 1)
    check = the(shop, "schema")
    assert ("warns", True) == (check.severity, f"1 worker of {SCHEMA - 1}" in check.sentence)
    shop.registry.remove_worker("older")
    shop.broker.client.set(shop.keys.schema, SCHEMA + 1)
    assert f"{SCHEMA + 1} is stored, {SCHEMA} is that of this command" in the(shop, "schema").sentence


# Redis itself


def judged(checks: Sequence[Check]) -> list[tuple[str, str]]:
    return [(check.severity, check.sentence) for check in checks]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[redis.Redis]:
    """One of its own, whose settings a test may change."""
    with redis.Redis.from_url(embedded.start(tmp_path / "valkey").url) as client:
        yield client
    embedded.stop(tmp_path / "valkey")


def test_a_server_as_it_should_be(server: redis.Redis) -> None:
    """Each point says that it is fine."""
    expected = [
        "evicts nothing (maxmemory-policy noeviction)",
        "keeps an append-only file",
        "has no maxmemory that it could reach",
    ]
    assert [("ok", f"Redis {what}") for what in expected] == judged(of_servers(safekeeping(server)))


def test_a_server_that_evicts_forgets_and_is_full(server: redis.Redis) -> None:
    """Throwing jobs away blocks; the rest warns. What three servers of a cluster have in common is said once."""
    server.config_set("maxmemory-policy", "allkeys-lru")
    server.config_set("appendonly", "no")
    server.config_set("save", "")
    server.config_set("maxmemory", int(server.info("memory")["used_memory"] / 0.97))
    checks = of_servers([one for one in safekeeping(server) for _ in range(3)])
    assert ["blocks", "warns", "warns"] == [check.severity for check in checks]
    assert "Redis has maxmemory-policy allkeys-lru: it may throw jobs away, and a worker refuses to start" == checks[0].sentence
    assert ("set maxmemory-policy noeviction", "set appendonly yes", "raise maxmemory") == tuple(c.remedy for c in checks)
    assert "Redis keeps nothing on disk" in checks[1].sentence


@pytest.mark.parametrize(("used", "severity"), [(89, "ok"), (90, "warns"), (101, "warns")])
def test_memory_near_its_limit(used: int, severity: str) -> None:
    """From nine tenths on."""
    server = Safekeeping("noeviction", logs=True, saves=True, used_bytes=used * MB, most_bytes=100 * MB)
    last = next(check for check in of_servers([server]) if f"uses {used}% of its maxmemory" in check.sentence)
    assert severity == last.severity


def test_a_user_who_may_not_ask(server: redis.Redis) -> None:
    """What he may not ask is not checked, and nothing is claimed."""
    server.acl_setuser("few", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-@dangerous"])
    path = server.connection_pool.connection_kwargs["path"]
    with redis.Redis(unix_socket_path=path, username="few", password="any") as client:
        (check,) = of_servers(safekeeping(client))
    assert ("unchecked", True) == (check.severity, "may not ask (INFO)" in check.sentence)


def test_a_server_that_evicts_disarms_every_namespace(private_shop: Shop) -> None:
    """Whatever else is well."""
    private_shop.work()
    private_shop.until(lambda: whole(private_shop).armed, "it is armed")
    private_shop.broker.client.config_set("maxmemory-policy", "allkeys-lru")
    said = whole(private_shop)
    assert (False, True) == (said.armed, said.namespaces[0].armed)
    assert said.sentence.startswith("not armed: Redis has maxmemory-policy allkeys-lru")
