# SPDX-License-Identifier: Apache-2.0
"""How a real worker brings the backlog home: at a pace that it learns, and that operators may overrule."""

from __future__ import annotations

import math
from contextlib import nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, get_args

import pytest

from tideover import aclaude, ai_task, claude, clock, ops, send_many, settings, status, text_of
from tideover.core.pacing import Limit, LimitOf
from tideover.core.route import breaker_key
from tideover.providers.wire import limits_in
from tideover.store.facts import Group
from tideover.store.paces import ALL, Paces
from tideover.testing import Fault, Phase
from tideover_worker.chore import Lease
from tideover_worker.drain import Drain

if TYPE_CHECKING:
    from tests.pipeline.conftest import Shop

FOR_EVER: dict[str, Any] = {"who": "me", "why": "why", "since_ms": 0, "until_ms": None}


@pytest.fixture
def paces(shop: Shop) -> Paces:
    return Paces(shop.broker.client, shop.keys)


def tag_of(job: Any) -> str:
    return str(job.args[0])


def key_of(shop: Shop) -> str:
    return breaker_key("anthropic", shop.model)


def test_a_paused_drain_releases_nothing_until_it_is_resumed(shop: Shop, paces: Paces) -> None:
    """Live critical jobs go on meanwhile, and the pace is computed beneath the pause."""
    paces.order(ALL, {**FOR_EVER, "max_rate": 0.0})
    shop.work()
    held = shop.open_breaker()
    shop.heal()
    shop.until(lambda: shop.breaker().state == "recovering", "it recovers")
    shop.until(lambda: shop.breaker().pace > 0, "its pace is known")
    assert "anthropic" == shop.result(shop.reply.send("live"))
    assert len(held) == shop.books()["held"]
    assert "releases" not in shop.registry.counters()
    assert paces.countermand(ALL)
    for job in held:
        assert shop.result(job)


def test_a_pause_ends_by_itself(shop: Shop, paces: Paces) -> None:
    """At the time that it names, by Redis' clock."""
    paces.order(key_of(shop), {**FOR_EVER, "max_rate": 0.0})
    shop.work()
    held = shop.open_breaker()
    shop.heal()
    shop.until(lambda: shop.seen().state == "recovering", "it recovers")
    ends_ms = clock.now_ms() + 1500
    paces.order(key_of(shop), {**FOR_EVER, "max_rate": 0.0, "until_ms": ends_ms})
    for job in held:
        assert shop.result(job)
    released = [[line.at for line in shop.story(job) if line.event == "released"][-1] for job in held]
    assert ends_ms / 1000 <= min(released)


def test_the_pace_hears_of_every_call(shop: Shop, paces: Paces) -> None:
    """Of released jobs and of live ones, from the beginning of the recovery."""
    shop.work()
    held = shop.open_breaker()
    paces.order(ALL, {**FOR_EVER, "max_rate": 0.0})
    shop.heal()
    shop.until(lambda: shop.breaker().state == "recovering", "it recovers")
    shop.until(lambda: shop.seen().state == "recovering", "the worker knows")
    for n in range(4):
        shop.result(shop.reply.send(f"live{n}"))
    shop.until(lambda: 4 <= paces.read(key_of(shop), clock.now()).felt.ok, "they are heard of")
    paces.countermand(ALL)
    for job in held:
        assert shop.result(job)

    def are_known() -> bool:
        felt = paces.read(key_of(shop), clock.now()).felt
        return felt.ok == 4 + len(held) == felt.sent and felt.jobs == len(held) <= felt.released

    shop.until(are_known, "the released ones are heard of, too")


def test_a_429_in_the_drain_slows_it_and_costs_nobody_an_attempt(shop: Shop, paces: Paces) -> None:
    """It asks for quiet, and everything comes home all the same."""
    paces.order(ALL, {**FOR_EVER, "max_rate": 0.0})
    shop.work()
    held = shop.open_breaker()
    shop.heal()
    shop.until(lambda: shop.seen().state == "recovering", "it recovers")
    shop.primary.fail(Fault.RATE_LIMITED, retry_after_s=0.5)
    paces.countermand(ALL)
    shop.until(lambda: [call.n for call in shop.primary.calls() if call.outcome == "rate_limited"], "one is refused")
    refused = [call for job in held for call in shop.calls(tag_of(job)) if call.outcome == "rate_limited"]
    shop.heal()
    for job in held:
        assert shop.result(job)
    shop.until_over()
    assert refused
    standing = paces.read(key_of(shop), clock.now())
    assert standing.felt.throttled >= 1
    assert standing.pacer is not None
    assert math.isfinite(standing.pacer.cut_at)
    assert {"accepted": len(held), "succeeded": len(held)} == shop.books()


def slowly_recovering(shop: Shop, paces: Paces) -> list[Any]:
    """A primary that is back, and that is used once a second for as long as a backlog waits. Returns that."""
    shop.configure(start_rate=1, drain_options="max_rate = 1")
    shop.work()
    held = shop.open_breaker()
    paces.order(ALL, {**FOR_EVER, "max_rate": 0.0})
    shop.heal()
    shop.until(lambda: shop.seen().state == "recovering", "it recovers")
    shop.until(lambda: shop.breaker().pace > 0, "its pace is known")
    return held


@pytest.mark.parametrize("task", ["reply", "areply"])
def test_critical_jobs_that_would_wait_long_for_the_pace_are_rerouted(shop: Shop, paces: Paces, task: str) -> None:
    """Each is answered at once or after two seconds at the most: the primary gets what it can bear, the fallback the others."""
    held = slowly_recovering(shop, paces)
    jobs = shop.send(getattr(shop, task), 12, "live")
    routes = [shop.result(job) for job in jobs]
    assert {"anthropic", "openai"} == set(routes)
    assert routes.count("anthropic") < routes.count("openai")
    assert not any("held" in shop.events(job) for job in jobs)
    paces.countermand(ALL)
    for job in held:
        assert shop.result(job)


def test_critical_jobs_without_another_route_are_held_for_the_pace_and_go_first(shop: Shop, paces: Paces) -> None:
    """Nothing fails, nothing bounces: each is held once at the most, and goes before the deferrable ones."""

    @ai_task(criticality="critical", expires_in=None, models=[shop.model])
    async def at_once(tag: str) -> str:
        return text_of(await aclaude().messages.create(**shop.question(tag)))

    held = slowly_recovering(shop, paces)
    jobs = [at_once.send(f"urgent{n}") for n in range(8)]
    shop.until(lambda: {status(job).state for job in jobs} <= {"held", "ended"}, "each has been answered, or waits")
    assert shop.ledger.read().held > len(held)
    assert {"pace"} == {facts.reason for job in jobs if (facts := shop.facts_if_held(job)) is not None}
    paces.countermand(ALL)
    for job in [*jobs, *held]:
        assert shop.result(job)
    assert 1 == max(shop.events(job).count("held") for job in jobs)
    urgent = [call.n for job in jobs for call in shop.calls(tag_of(job))]
    others = [call.n for job in held for call in shop.calls(tag_of(job))]
    assert not any(min(urgent) < n < max(urgent) for n in others)


def test_an_outage_that_returns_in_mid_drain_is_cheap(shop: Shop) -> None:
    """What has not started is held again, once, and the few calls that failed are all that it cost."""
    shop.configure(start_rate=10, drain_options="max_rate = 10")
    shop.work()
    held = shop.open_breaker()
    jobs = shop.send(shop.asummary, 80, "j")
    shop.until(lambda: shop.ledger.read().held == len(held) + len(jobs), "they are held")
    shop.heal()
    shop.until(lambda: shop.books().get("succeeded", 0) >= 20, "some are home")
    before = len(shop.primary.calls())
    shop.primary.fail(Fault.OVERLOADED)
    shop.until(lambda: shop.breaker().generation >= 2, "it opens again")
    shop.until(lambda: (account := shop.ledger.read()).queued == account.running == 0, "what had not started is held again")
    failed = [call for call in shop.primary.calls()[before:] if call.job is not None and call.status == 529]
    assert len(failed) <= 40
    shop.heal()
    for job in [*held, *jobs]:
        assert shop.result(job)
    assert {"accepted": 83, "succeeded": 83} == shop.books()
    assert all(len(set(shop.generations(job))) == len(shop.generations(job)) for job in jobs)


def test_a_route_recovers_step_by_step_although_nothing_is_held(shop: Shop, paces: Paces) -> None:
    """Live calls alone go by the pace as well; the breaker does not close while it turns some away, and closes then."""
    shop.configure(start_rate=1, drain_options="max_rate = 1", settle_s=2)
    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    assert ["openai"] * 6 == [shop.result(job) for job in shop.send(shop.areply, 6, "first")]
    shop.until_open()
    assert 0 == shop.ledger.read().held
    shop.heal()
    shop.until(lambda: shop.seen().state == "recovering", "it recovers")
    routes = [shop.result(job) for job in shop.send(shop.areply, 12, "live")]
    assert routes.count("anthropic") < routes.count("openai")
    published: set[float] = set()

    def goes_on() -> bool:
        """Somebody is turned away again and again; four seconds pass, as the leader publishes a pace four times a second."""
        paces.turn(key_of(shop), 0.0, settings.settings().drain.policy())
        published.add(shop.breaker().paced_at)
        return len(published) > 16

    shop.until(goes_on, "the pace goes on")
    assert "recovering" == shop.breaker().state
    shop.until(lambda: shop.breaker().state == "closed", "it closes when nobody is turned away")


@pytest.mark.parametrize("streams", [False, True])
def test_the_pace_learns_what_calls_take_of_a_limit(shop: Shop, paces: Paces, streams: bool) -> None:
    """Their tokens, which whole answers and the ends of streams tell, and how many calls a job makes."""

    @ai_task(criticality="deferrable", models=[shop.model])
    def twice(tag: str) -> str:
        for _ in range(2):
            with claude().messages.stream(**shop.question(tag)) if streams else nullcontext() as stream:
                said = stream.get_final_message() if stream is not None else claude().messages.create(**shop.question(tag))
        return f"{said.usage.input_tokens} {said.usage.output_tokens}"

    shop.configure(settle_s=5)
    shop.work()
    held = shop.open_breaker()
    jobs = shop.send(twice, 4, "t")
    shop.until(lambda: shop.ledger.read().held == len(held) + len(jobs), "they are held")
    shop.primary.play([Phase("limited", math.inf, 0.0, {}, limit_per_s=50.0)])
    (answer,) = {shop.result(job) for job in jobs}
    shop.until_over()

    def is_known() -> bool:
        felt = paces.read(key_of(shop), clock.now()).felt
        return felt.jobs >= 4 and felt.again >= 1

    shop.until(is_known, "they are heard of")
    found = paces.read(key_of(shop), clock.now())
    assert pytest.approx(50.0) == found.limits["requests"].per_s
    each = [found.felt.input_tokens / found.felt.ok, found.felt.output_tokens / found.felt.ok]
    assert all(n > 0 for n in each)
    if not streams:
        assert [pytest.approx(int(n), rel=0.2) for n in answer.split()] == each


def test_calls_of_another_model_do_not_count_for_the_one_that_recovers(shop: Shop, paces: Paces) -> None:
    """Each job asks a well model first: of the one that was down it makes one call."""
    other = "claude-haiku-4-5"

    @ai_task(criticality="deferrable", models=[shop.model])
    def both(tag: str) -> str:
        for model in (other, shop.model):
            said = claude().messages.create(**{**shop.question(tag), "model": model})
        return text_of(said)

    shop.configure(settle_s=5)
    shop.work()
    shop.primary.fail(Fault.OVERLOADED, models=[shop.model])
    jobs = shop.send(both, 8, "b")
    shop.until(lambda: shop.breaker().generation, "its breaker opens")
    shop.until_all("held", jobs)
    shop.heal()
    for job in jobs:
        assert shop.result(job)

    def calls_each() -> float:
        pacer = paces.read(key_of(shop), clock.now()).pacer
        return 0.0 if pacer is None or pacer.jobs < 4 else pacer.calls_each

    assert pytest.approx(1.0, abs=0.3) == shop.until(calls_each, "the pace has heard of them")


def test_limits_are_read_in_each_dialect() -> None:
    """What makes no sense is left out."""
    told = {f"anthropic-ratelimit-{kind}-limit": "600" for kind in ("requests", "input-tokens", "output-tokens", "tokens")}
    told |= {name.replace("-limit", "-remaining"): "60" for name in told}
    assert dict.fromkeys(get_args(LimitOf), Limit(10.0, 60.0)) == limits_in(told)
    openai = {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "0"}
    assert {"requests": Limit(1.0, 0.0)} == limits_in(openai)
    assert {} == limits_in({**openai, "x-ratelimit-limit-requests": "0"})
    assert {} == limits_in({**openai, "x-ratelimit-limit-requests": "many"})
    assert {} == limits_in({"x-ratelimit-limit-tokens": "9" * 40, "x-ratelimit-remaining-tokens": "1"})


def test_a_short_quiet_is_waited_for_by_a_critical_job(shop: Shop) -> None:
    """Of a route that answered 429 a moment ago, and is well otherwise."""
    shop.work()
    shop.primary.fail(Fault.RATE_LIMITED, retry_after_s=1.0)
    first = shop.reply.send("first")
    assert "openai" == shop.result(first)
    shop.until(lambda: shop.seen().throttled_until > clock.now(), "it is to be left in peace")
    shop.heal()
    assert "anthropic" == shop.result(shop.reply.send("second"))


def test_the_earliest_deadline_goes_first_whatever_its_queue(shop: Shop) -> None:
    """A long backlog of one queue does not let the few urgent jobs of another expire."""
    shop.configure(start_rate=4, drain_options="max_rate = 4")

    def task_of(queue: str) -> Any:
        @ai_task(criticality="deferrable", models=[shop.model], queue_name=queue, actor_name=queue, **shop.quick)
        def tagged(tag: str) -> str:
            shop.ran.append(tag)
            return text_of(claude().messages.create(**shop.question(tag)))

        return tagged

    many, few = task_of("alpha"), task_of("zeta")
    shop.work()
    shop.open_breaker()
    before = shop.ledger.read().held
    shop.send(many, 40, "many")
    urgent = [few.send_with_options(args=(f"few{n}",), expires_in=timedelta(seconds=60)) for n in range(6)]
    shop.until(lambda: shop.ledger.read().held == before + 46, "they are held")
    shop.heal()
    for job in urgent:
        assert shop.result(job)
    assert sum(tag.startswith("many") for tag in shop.ran) <= 10


def test_a_queue_that_nobody_works_on_takes_nothing_of_the_pace(shop: Shop) -> None:
    """Its jobs stay held, and those of the others come home."""

    @ai_task(criticality="deferrable", models=[shop.model], queue_name="aside", **shop.quick)
    def aside(tag: str) -> str:
        return tag

    shop.work()
    held = shop.open_breaker()
    jobs = shop.send(aside, 5, "aside")
    shop.until(lambda: shop.ledger.read().held == len(held) + len(jobs), "they are held")
    shop.stop_working()
    shop.work(queues={"default"})
    shop.heal()
    for job in held:
        assert shop.result(job)
    assert len(jobs) == shop.ledger.read().held
    assert 0 == shop.ledger.read().queued


def test_a_held_job_is_told_whether_its_turn_can_come_in_time(shop: Shop) -> None:
    """While its route is down: the first of many is in time if that ends soon, the last would be late even now."""
    shop.configure(start_rate=2, drain_options="max_rate = 2")
    shop.work()
    held = shop.open_breaker()
    lasting = timedelta(seconds=100)
    task = shop.summary
    sent = send_many(task.message_with_options(args=(f"b{n}",), expires_in=lasting) for n in range(400)).accepted
    shop.until(lambda: shop.ledger.read().held == len(held) + len(sent), "they are held")
    with shop.operator() as operator:
        first, last = (ops.explain(operator, job.message_id).ways[0] for job in (sent[0], sent[-1]))
        will_miss = ops.drains(operator).drains[0].will_miss
    assert first.back_by_at is not None
    assert 60 < first.back_by_at - clock.now() <= 100
    assert "in time if it is back within" in first.words
    assert last.back_by_at is not None
    assert last.back_by_at < clock.now()
    assert "its turn comes after its expiry even if it were back now" in last.words
    assert 150 <= will_miss <= 250
    shop.heal()


def test_who_cannot_be_answered_in_time_gives_way(shop: Shop) -> None:
    """Whose expiry comes before an answer could goes only when there is nobody else: it would make another one late."""
    shop.work()
    held = shop.open_breaker()
    due = {"late": 50, "later": 60, "in time": 500}
    jobs = [*held]
    for tag, seconds in due.items():
        jobs.append(shop.summary.send_with_options(args=(tag,), expires_in=timedelta(seconds=seconds)))
    shop.until(lambda: shop.ledger.read().held == len(held) + len(due), "they are held")
    bringing = Drain(shop.node.gate, shop.registry, Lease(shop.broker.client, shop.keys.lease("test"), 1.0, "test"))

    def going(groups: list[Group], answer_s: float) -> set[str]:
        ids = {facts.job_id for facts in shop.backlog.facts_of(bringing.in_time(groups, answer_s))}
        return {tag_of(job) for job in jobs if job.message_id in ids}

    groups = shop.backlog.groups("default")
    canaries = {tag_of(job) for job in held}
    assert {*canaries, *due} == going(groups, 1.0)
    assert {*canaries, "in time"} == going(groups, 100.0)
    shop.heal()
    shop.until_over()


def test_a_backlog_larger_than_a_worker_comes_home(shop: Shop) -> None:
    """Everything once, and the progress is told."""

    @ai_task(criticality="deferrable", models=[shop.model])
    def bulk(tag: str) -> str:
        return "done"

    shop.work()
    shop.open_breaker()
    shop.send(bulk, 60, "b")
    shop.until(lambda: shop.ledger.read().held >= 60, "they are held")
    shop.heal()
    shop.until_over()
    paces = Paces(shop.broker.client, shop.keys)

    def is_told() -> bool:
        progress = paces.read(key_of(shop), clock.now()).progress
        return progress is not None and (0, progress.most) == (progress.held, progress.released) and progress.most >= 60

    shop.until(is_told, "what went and what ever waited are the same")
