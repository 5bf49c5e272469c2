# SPDX-License-Identifier: Apache-2.0
"""What a worker makes of what its calls come to: suspicion, evidence in flight, refused keys, spent money, a process apart."""

from __future__ import annotations

import asyncio
import math
import threading
from typing import TYPE_CHECKING, Any

import anthropic
import dramatiq
import pytest

from tideover import Tideover, aclaude, ai_task, claude, clock, ops, text_of, wrap
from tideover import settings as tideover_settings
from tideover.core.breaker import MASS, Breaker, Transition
from tideover.core.latency import UNKNOWN_S
from tideover.core.outcome import of_response
from tideover.core.route import route_key, task_key
from tideover.evidence import Flight
from tideover.health import Health
from tideover.ops import Operator
from tideover.reporting import Reporter
from tideover.store.breakers import Batch
from tideover.testing import Fault, Phase

if TYPE_CHECKING:
    from tests.pipeline.conftest import Shop

OTHER_MODEL = "claude-haiku-4-5"
SLOWLY = {"probe_after_s": 60, "probe_max_s": 60}
"""Nobody asks while a test looks."""
OUTAGE = of_response(529, {}, None)


def health(shop: Shop) -> Health:
    node = next(m.node for m in shop.broker.middleware if isinstance(m, Tideover))
    assert node is not None
    return node.gate.health


def breaker(shop: Shop, key: str) -> Breaker:
    return shop.breakers.read([key])[key]


def key_of(shop: Shop, model: str | None = None) -> str:
    return f"anthropic/{model or shop.model}"


def others_report(shop: Shop, *keys: str, failing: bool = False) -> None:
    """What another process of the fleet says of these breakers."""
    for key in keys:
        era = breaker(shop, key).era
        shop.breakers.report(key, "another", Batch(era=era, runs=[("failed" if failing else "ok", 1)]))


# suspicion


def test_suspicion_keeps_what_can_wait_and_nothing_else(shop: Shop) -> None:
    """A few failures hold deferrable jobs; critical ones go on over the primary."""
    shop.configure(primary_options="probe = false")
    shop.work()
    shop.result(shop.summary.send("first"))
    shop.breakers.report(key_of(shop), "another", Batch(era=0, runs=[("failed", 3)], why="529"))
    doubted = Transition(to="suspect", why="529")
    assert shop.breakers.transition(key_of(shop), breaker(shop, key_of(shop)), doubted, clock.now())
    shop.until(lambda: shop.seen().state == "suspect", "it is heard of")
    waiting = shop.summary.send("can wait")
    shop.until_all("held", [waiting])
    assert ("suspect", 0) == (shop.facts(waiting).reason, shop.breaker().generation)
    assert "anthropic" == shop.result(shop.reply.send("cannot"))


# evidence in flight


def hang(shop: Shop, n: int) -> list[dramatiq.Message[Any]]:
    shop.primary.fail(Fault.HANG)
    return shop.send(shop.areply, n, "hangs")


def test_a_hang_is_seen_while_the_calls_are_open(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls without a first token count as failed before they end: critical jobs are rerouted, and no timeout is waited for."""
    shop.configure(timeout_s=120, **SLOWLY)
    monkeypatch.setattr(Reporter, "limit_s", lambda *_, **__: 0.3)
    monkeypatch.setattr("tideover.reporting.LEAST_S", 0.3)
    shop.work()
    jobs = hang(shop, 6)
    assert ["openai"] * 6 == [shop.result(job) for job in jobs]
    opened = breaker(shop, key_of(shop))
    assert ("open", "no first token within 0 s") == (opened.state, opened.why)


def test_an_overdue_call_that_turns_out_well_is_taken_back(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow answer is an answer."""
    monkeypatch.setattr(Reporter, "limit_s", lambda *_, **__: 0.1)
    monkeypatch.setattr("tideover.reporting.LEAST_S", 0.1)
    shop.configure(primary_options="probe = false")
    shop.work()
    shop.primary.release_hangs = True
    job = hang(shop, 1)[0]
    shop.until(lambda: breaker(shop, key_of(shop)).charts.failed, "it counts as failed")
    shop.primary.heal()
    assert "anthropic" == shop.result(job)
    shop.until(lambda: breaker(shop, key_of(shop)).charts.failed == 0, "it counts as well")


def test_how_long_first_tokens_take_is_learned_by_all(shop: Shop) -> None:
    """From the answers of every process; while nothing is known, a call may take longer."""
    shop.work()
    reporter = health(shop).reporter
    assert UNKNOWN_S == reporter.limit_s(key_of(shop))
    shop.breakers.report(key_of(shop), "another", Batch(era=0, runs=[("ok", 5000)], latencies={"20": 5000}))
    shop.result(shop.summary.send("quick"))
    shop.until(lambda: 5001 == sum(shop.breakers.latencies(key_of(shop)).values()), "its own is among them")
    reporter._studied_at = -1e9
    shop.until(lambda: 32 < reporter.limit_s(key_of(shop)) < 40, "it is known here")


# the whole route


def test_a_front_door_that_is_shut_stops_every_model(shop: Shop) -> None:
    """DNS, TLS, connections: what no model can be blamed for opens the route, for models that nobody called, too."""

    @ai_task(criticality="deferrable", models=[OTHER_MODEL])
    def other(tag: str) -> str:
        return text_of(claude().messages.create(**{**shop.question(tag), "model": OTHER_MODEL}))

    shop.work()
    shop.primary.stop()
    jobs = shop.send(shop.reply, 6, "r")
    assert ["openai"] * 6 == [shop.result(job) for job in jobs]
    shop.until(lambda: breaker(shop, route_key("anthropic")).is_down, "the route is open")
    assert "closed" == breaker(shop, key_of(shop)).state
    idle = other.send("idle")
    shop.until_all("held", [idle])
    shop.primary.start()
    assert shop.result(idle)


# refused credentials, spent money, unknown models


def test_a_key_that_worked_is_refused_by_an_outage(shop: Shop) -> None:
    """When the provider's logins fail, jobs are held and rerouted, and go on by themselves."""
    shop.work()
    shop.result(shop.summary.send("worked"))
    shop.until(lambda: shop.breakers.credentials("anthropic"), "the key is known to work")
    shop.primary.fail(Fault.UNAUTHORIZED)
    jobs = shop.send(shop.reply, 6, "r")
    assert ["openai"] * 6 == [shop.result(job) for job in jobs]
    shop.until(lambda: breaker(shop, route_key("anthropic")).is_down, "the route is open")
    assert "" == breaker(shop, route_key("anthropic")).parked
    held = shop.summary.send("held")
    shop.until_all("held", [held])
    shop.heal()
    assert shop.result(held)


def test_a_key_that_never_worked_parks_its_route(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """One refusal is enough, nothing fails, somebody is told; with the right key it goes on by itself."""
    shop.work()
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-a-wrong-key")
    tideover_settings.forget()
    job = shop.summary.send("held")
    shop.until_all("held", [job])
    shop.until(lambda: breaker(shop, route_key("anthropic")).parked == "auth", "the route is parked")
    shop.until(lambda: {"accepted": 1, "held": 1} == shop.books(), "it is held, and stays so")
    monkeypatch.setenv("ANTHROPIC_API_KEY", shop.primary_key)
    tideover_settings.forget()
    assert shop.result(job)


def test_a_wrong_key_of_one_process_parks_nobody_elses_route(shop: Shop) -> None:
    """Where another process's key works, only this one steps apart."""
    shop.configure(**SLOWLY)
    shop.breakers.note_credential("anthropic", "the right one", shop.registry.now())
    shop.work()
    shop.primary.fail(Fault.UNAUTHORIZED)
    shop.summary.send("elsewhere")
    shop.until(lambda: route_key("anthropic") in health(shop).apart, "it steps apart")
    assert "closed" == breaker(shop, route_key("anthropic")).state


def test_a_customers_key_that_is_refused_is_the_jobs_own_failure(shop: Shop) -> None:
    """Whose client has a key of its own says nothing of the route's, neither when it works nor when it does not."""

    @ai_task(criticality="deferrable", models=[shop.model], max_retries=0)
    def for_customer(tag: str) -> str:
        with anthropic.Anthropic(api_key="sk-ant-a-customers-key", base_url=shop.primary.base_url) as client:
            return text_of(wrap(client).messages.create(**shop.question(tag)))

    shop.work()
    for_customer.send("r")
    shop.until(lambda: shop.books().get("failed") == 1, "it fails")
    assert shop.books() == {"accepted": 1, "failed": 1}
    assert "closed" == breaker(shop, route_key("anthropic")).state == breaker(shop, key_of(shop)).state
    assert {} == shop.breakers.credentials("anthropic")
    assert shop.result(shop.summary.send("the route's own key"))


def test_spent_money_parks_the_route_until_its_date(shop: Shop) -> None:
    """The date that the provider names; the fallback serves meanwhile."""
    shop.configure(probe_max_s=600)
    shop.work()
    shop.primary.fail(Fault.QUOTA)
    assert "openai" == shop.result(shop.reply.send("r"))
    shop.until(lambda: breaker(shop, route_key("anthropic")).parked == "quota", "the route is parked")
    assert 2000 < breaker(shop, route_key("anthropic")).probe_at - shop.registry.now() <= 2400


def test_a_model_that_the_route_never_knew_is_parked_alone(shop: Shop) -> None:
    """Other models of the route go on; of one that answered before, a 404 is an outage like any other."""
    shop.work()
    shop.primary.fail(Fault.NOT_FOUND, models=["opus"])
    job = shop.summary.send("held")
    shop.until(lambda: breaker(shop, key_of(shop)).parked == "model", "the model is parked")
    assert "closed" == breaker(shop, route_key("anthropic")).state
    shop.heal()
    assert shop.result(job)
    shop.primary.fail(Fault.NOT_FOUND, models=["opus"])
    shop.send(shop.reply, 6, "r")
    shop.until(lambda: breaker(shop, key_of(shop)).generation > 1, "it opens again")
    assert "" == breaker(shop, key_of(shop)).parked


def test_made_up_models_make_no_breakers_without_end(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever calls ever new names fills neither memory nor Redis, and parks no route."""
    monkeypatch.setattr("tideover.health.MOST_KEYS", 4)

    @ai_task(criticality="deferrable", max_retries=0)
    def fuzzy(n: int) -> None:
        claude().messages.create(**{**shop.question("fuzzy"), "model": f"model-{n}"})

    shop.work()
    shop.result(shop.summary.send("first"))
    shop.until(lambda: len(health(shop).views) >= 2, "its breakers are known")
    shop.primary.fail(Fault.NOT_FOUND, models=["model-"])
    for n in range(12):
        fuzzy.send(n)
        shop.until(lambda: len(shop.calls("fuzzy")) > n, "it was called")  # noqa: B023
    assert "closed" == breaker(shop, route_key("anthropic")).state
    assert len(shop.breakers.keys_known()) < 12


# throttling


def test_throttling_with_most_of_the_limit_left_is_an_outage(shop: Shop) -> None:
    """On 2 June 2026 a provider refused calls as too many that were not; such refusals open the breaker."""
    shop.work()
    shop.primary.fail(Fault.FALSE_LIMITED, retry_after_s=0.5)
    assert ["openai"] * 8 == [shop.result(job) for job in shop.send(shop.reply, 8, "r")]
    shop.until(lambda: breaker(shop, key_of(shop)).is_down, "it is open")


def test_our_own_throttling_opens_nothing(shop: Shop) -> None:
    """A 429 slows the pace; the calls of jobs that may go elsewhere do."""
    shop.work()
    shop.primary.fail(Fault.RATE_LIMITED, retry_after_s=0.5)
    assert ["openai"] * 8 == [shop.result(job) for job in shop.send(shop.reply, 8, "r")]
    assert ("closed", 0) == (breaker(shop, key_of(shop)).state, breaker(shop, key_of(shop)).charts.failed)


# a task whose requests are refused


def test_a_task_whose_jobs_are_all_refused_is_paused(shop: Shop, operator: Operator) -> None:
    """After ten, the others wait for somebody to look, instead of dying by the thousand; told to resume, they go on."""
    shop.work()
    shop.primary.fail(Fault.BAD_REQUEST)
    jobs = shop.send(shop.summary, 40, "r")
    shop.until(lambda: breaker(shop, task_key("summary")).parked == "paused", "the task is paused")
    shop.until(lambda: shop.books().get("held", 0) + shop.books().get("failed", 0) == 40, "the others are held")
    assert shop.books()["held"] >= 40 - 3 * MASS
    reasons = {facts.reason for job in jobs if (facts := shop.facts_if_held(job)) is not None}
    assert {"paused"} == reasons
    shop.heal()
    ops.resume(operator, task_key("summary"))
    shop.until_over()
    assert {"accepted": 40} | {end: n for end, n in shop.books().items() if end in ("succeeded", "failed")} == shop.books()


# one process of several


def test_a_process_that_alone_finds_a_route_down_leaves_its_jobs_to_others(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reroutes nothing and holds nothing for long: it gives back, says so, asks, and joins the others again."""
    monkeypatch.setattr("tideover_worker.probe.APART_S", 0.2)
    shop.configure(**SLOWLY)
    shop.work()
    shop.result(shop.summary.send("first"))
    shop.primary.fail(Fault.OVERLOADED)
    key = key_of(shop)
    n = 0
    while key not in health(shop).apart:
        others_report(shop, key, route_key("anthropic"))
        shop.summary.send(f"fails{n}")
        shop.until(lambda: shop.calls(f"fails{n}") or key in health(shop).apart, "its call fails")  # noqa: B023
        n += 1
        assert n < 30
    assert "closed" == breaker(shop, key).state
    last = shop.reply.send("for others")
    shop.until(lambda: not shop.broker.client.smembers(shop.keys.acks(shop.broker.broker_id, "default.critical")), "given back")
    shop.heal()
    shop.until(lambda: not health(shop).apart, "it joins the others again")
    assert "anthropic" == shop.result(last)


def test_a_process_apart_is_believed_once_nobody_else_reports(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others ended, or have nothing to call: what its probes find opens the breaker for all, and its jobs are held."""
    monkeypatch.setattr("tideover_worker.probe.APART_S", 0.1)
    shop.configure(probe_after_s=1, probe_max_s=1)
    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    health(shop).step_apart(key_of(shop), "529")
    others_report(shop, key_of(shop), route_key("anthropic"))
    waiting = shop.summary.send("waits")
    shop.until(lambda: shop.registry.counters().get("probes", 0) > 2, "it asks")
    assert "closed" == breaker(shop, key_of(shop)).state
    shop.broker.client.delete(shop.keys.reporters(key_of(shop)))  # as a minute later
    shop.until(lambda: breaker(shop, key_of(shop)).is_down, "it is believed")
    shop.until_all("held", [waiting])
    shop.heal()
    assert shop.result(waiting)


# zero traffic, and no probes


def test_a_route_recovers_with_no_traffic_at_all(shop: Shop) -> None:
    """With no job queued or held, probes alone see that it is back."""
    shop.work()
    shop.open_breaker()
    for group in shop.backlog.groups("default"):
        shop.backlog.expire("default", list(shop.backlog.browse([group])))
    shop.heal()
    shop.until(lambda: shop.breaker().state == "closed", "it is closed")
    assert shop.registry.counters()["probes"] >= 10


def test_a_route_that_may_not_be_probed_is_tried_by_held_jobs(shop: Shop) -> None:
    """Each try costs its job nothing but time."""
    shop.configure(primary_options="probe = false")
    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    shop.send(shop.reply, 6, "r")  # which do not wait for suspicion to pass
    shop.until_open()
    canaries = shop.send(shop.summary, 5, "canary")
    before = len(shop.primary.calls())
    shop.until(lambda: len(shop.primary.calls()) > before, "one of them tries it")
    shop.heal()
    assert 5 == len([shop.result(job) for job in canaries])
    assert all(call.job is not None for call in shop.primary.calls())


# operators


def test_an_operator_forces_a_route_open_and_back(shop: Shop, operator: Operator) -> None:
    """Critical jobs are rerouted at once, deferrable ones held; `auto` returns to what is computed."""
    shop.work()
    assert "anthropic" == shop.result(shop.reply.send("before"))
    forced = ops.force(operator, route_key("anthropic"), "open", for_s=600, who="me", why="their page says so")
    assert ("open", "closed") == (forced.state, forced.computed)
    shop.until(lambda: shop.seen().state == "open", "it is heard of")
    assert "openai" == shop.result(shop.reply.send("during"))
    held = shop.summary.send("held")
    shop.until_all("held", [held])
    gone, now = ops.unforce(operator, route_key("anthropic"))
    assert (True, "closed") == (gone, now.state)
    assert shop.result(held)


def test_an_operator_forces_a_route_closed(shop: Shop, operator: Operator) -> None:
    """Whatever is computed beneath it; it ends by itself."""
    shop.configure(**SLOWLY)
    shop.work()
    canaries = shop.open_breaker()
    shop.heal()
    forced = ops.force(operator, key_of(shop), "closed", for_s=600, who="me", why="it works for us")
    assert ("closed", "open") == (forced.state, forced.computed)
    assert 3 == len([shop.result(job) for job in canaries])


# Redis gone


def test_without_redis_a_process_decides_by_what_it_sees(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last opinion stands for half a minute; then the same rules go by its own calls, and end when Redis is back."""
    shop.work()
    shop.result(shop.reply.send("first"))
    mine = health(shop)
    mine.stop()
    key = key_of(shop)
    for n in range(5):
        mine.end(mine.begin("anthropic", shop.model, f"job {n}"), OUTAGE)
    mine._gone_since = clock.monotonic()
    assert not mine.is_alone
    monkeypatch.setattr("tideover.health.STATIC_S", -1.0)
    mine.reporter.decide_alone()
    assert ("open", "closed") == (mine.view(key).state, breaker(shop, key).state)
    mine._gone_since = None
    mine.refresh()
    assert "closed" == mine.view(key).state


# what an audit found


def test_slow_answers_are_answers_for_a_burst_of_probes(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those under way when enough were asked say nothing yet: it is waited for them, and a few go at once."""
    monkeypatch.setattr("tideover_worker.probe.MOST_UNANSWERED", 3)
    shop.configure(probe_after_s=1, probe_max_s=1)
    shop.work()
    shop.open_breaker()
    shop.primary.play([Phase("slow", math.inf, 0.0, {}, latency_factor=50.0)])
    shop.until(lambda: not shop.breaker().is_down, "it recovers")
    said = shop.breaker().probe_said
    assert "probes answered" == said


def test_a_poison_job_of_a_route_that_nobody_may_probe_fails_by_itself(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried once more after its hold, and not fifty times."""
    monkeypatch.setattr("tideover.plan.PATIENCE_S", (0.1,))
    shop.configure(primary_options="probe = false")

    @ai_task(criticality="deferrable", models=[shop.model], max_retries=0)
    def poison(tag: str) -> str:
        if tag == "well":
            return text_of(claude().messages.create(**shop.question(tag)))
        with anthropic.Anthropic(base_url="http://127.0.0.1:9", max_retries=0) as nowhere:
            return text_of(wrap(nowhere).messages.create(**shop.question(tag)))

    shop.work()
    shop.result(poison.send("well"))
    poison.send("bad")
    shop.until(lambda: shop.books().get("failed") == 1, "it fails")
    assert 2 >= shop.registry.counters().get("holds", 0)


def test_forced_closed_a_failing_job_fails_by_itself(shop: Shop, operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator said that the route works: nothing is held for it in turns until a human must look."""
    monkeypatch.setattr("tideover.plan.PATIENCE_S", (0.1,))
    shop.work()
    ops.force(operator, key_of(shop), "closed", for_s=60.0, who="me", why="it works")
    shop.until(lambda: shop.breaker().forced is not None, "it is heard of")

    @ai_task(criticality="deferrable", models=[shop.model], max_retries=0)
    def insists(tag: str) -> str:
        return text_of(claude().messages.create(**shop.question(tag)))

    shop.primary.fail(Fault.OVERLOADED)
    insists.send("bad")
    shop.until(lambda: shop.books().get("failed") == 1, "it fails")
    assert 2 >= shop.registry.counters().get("holds", 0)


def test_a_standstill_of_our_own_makes_no_call_overdue(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coroutine that blocks the loop delays all the others, and no provider is to blame."""
    monkeypatch.setattr("tideover.reporting.LEAST_S", 2.5)
    monkeypatch.setattr(Reporter, "limit_s", lambda *_, **__: 2.5)
    shop.configure(primary_options="probe = false")
    shop.primary.play([Phase("slow", math.inf, 0.0, {}, latency_factor=10.0)])
    unblocked = threading.Event()
    delayed: list[Flight] = []

    @ai_task(criticality="deferrable", models=[shop.model])
    async def asks(tag: str) -> str:
        return text_of(await aclaude().messages.create(**shop.question(tag)))

    @ai_task(criticality="deferrable", models=[OTHER_MODEL])
    async def blocks(tag: str) -> str:
        delayed.extend(await asyncio.wait_for(one_open(), 20))
        threading.Event().wait(5)
        unblocked.set()
        return "unblocked"

    async def one_open() -> list[Flight]:
        while not (flights := [flight for flight in health(shop).flights._open.values() if flight.first_s is None]):
            await asyncio.sleep(0)
        return flights

    shop.work()
    jobs = [blocks.send("b"), *shop.send(asks, 4, "a")]
    shop.until(unblocked.is_set, "the loop was blocked")
    for job in jobs:
        assert shop.result(job)
    assert "closed" == breaker(shop, route_key("anthropic")).state
    assert [False] * len(delayed) == [flight.counted for flight in delayed]
    assert delayed
