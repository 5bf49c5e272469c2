# SPDX-License-Identifier: Apache-2.0
"""A critical job does not wait: its calls go to the fallback that its task allows, and nowhere else."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import anthropic
import pytest

import tideover
from tideover import aclaude, ai_task, claude, clock, last_served, text_of, wrap
from tideover.testing import FakeProvider, Fault, Latency

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.pipeline.conftest import Shop

CRITICAL: dict[str, Any] = {
    "criticality": "critical",
    "expires_in": timedelta(minutes=5),
    "reroute": ["openai"],
    "max_retries": 0,
}
FAULTS = [
    Fault.OVERLOADED,
    Fault.API_ERROR,
    Fault.BAD_GATEWAY,
    Fault.UNAVAILABLE,
    Fault.GATEWAY_TIMEOUT,
    Fault.EDGE_HTML,
    Fault.RESET,
    Fault.UNAUTHORIZED,
    Fault.FORBIDDEN,
    Fault.NOT_FOUND,
    Fault.QUOTA,
    Fault.RATE_LIMITED,
    Fault.STREAM_CUT,
    Fault.STREAM_NO_STOP,
    Fault.OK_HTML,
    Fault.OK_EMPTY,
    Fault.OK_ERROR_BODY,
]
TOOLS = [{"name": "look_up", "description": "looks up", "input_schema": {"type": "object", "properties": {}}}]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["reply", "areply"])
def test_the_fallback_answers(shop: Shop, fault: Fault, kind: str) -> None:
    """Whatever way the primary fails, the first critical job that meets it is answered by the fallback, in one attempt."""
    shop.work()
    shop.primary.fail(fault)
    job = getattr(shop, kind).send("r")
    assert "openai" == shop.result(job)
    assert (["r"], 1, 1) == (shop.ran, len(shop.calls("r")), len(shop.calls("r", shop.fallback)))
    shop.until_over()
    assert {"accepted": 1, "succeeded": 1} == shop.books()


@pytest.mark.parametrize("kind", ["reply", "areply"])
def test_a_hang_is_rerouted(shop: Shop, kind: str) -> None:
    """A provider that says nothing is given up at the route's timeout, and the fallback answers."""
    shop.configure(timeout_s=0.4)
    shop.work()
    shop.primary.fail(Fault.HANG)
    assert "openai" == shop.result(getattr(shop, kind).send("r"))


def test_an_open_breaker_spares_the_primary(shop: Shop) -> None:
    """While the primary's breaker is open, critical jobs go to the fallback at once."""
    shop.work()
    shop.open_breaker()
    jobs = shop.send(shop.areply, 10, "r")
    assert ["openai"] * 10 == [shop.result(job) for job in jobs]
    assert [] == [call.job for call in shop.primary.calls() if call.job and call.job.startswith("r")]


def test_the_primary_serves_again_after_the_outage(shop: Shop) -> None:
    """Critical traffic returns to the primary when it has recovered."""
    shop.work()
    shop.open_breaker()
    assert "openai" == shop.result(shop.reply.send("r0"))
    shop.heal()
    shop.until(shop.is_up, "the primary recovers")
    shop.until(lambda: shop.seen().state in ("recovering", "closed"), "this worker knows")
    assert "anthropic" == shop.result(shop.reply.send("r1"))


@pytest.mark.parametrize("down", [False, True])
def test_who_answered_is_said(shop: Shop, down: bool) -> None:
    """`last_served()` names the route, its name for the model, and what was lost on the way."""
    told: list[Any] = []

    @ai_task(**CRITICAL)
    def ask(tag: str) -> str:
        told.append(last_served())
        answer = claude().messages.create(**shop.question(tag), stop_sequences=["END"])
        told.append(last_served())
        return text_of(answer)

    shop.work()
    if down:
        shop.primary.fail(Fault.OVERLOADED)
    answer = shop.result(ask.send("r"))
    before, after = told
    assert before is None
    if down:
        assert ("openai", shop.fallback_model) == (after.route, after.model)
        assert ("stop_sequence",) == after.losses
    else:
        assert ("anthropic", shop.model, ()) == (after.route, after.model, after.losses)
    assert ("openai" if down else "anthropic") == answer.partition(":")[0]


def test_nobody_served_outside_a_job() -> None:
    """Outside a job there is nobody to name."""
    assert last_served() is None


def test_the_fallback_s_own_model_is_asked(shop: Shop) -> None:
    """The model map of the route says what the fallback is asked for; the primary is asked for what the task said."""
    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    shop.result(shop.reply.send("r"))
    assert [shop.model] == [call.model for call in shop.calls("r")]
    assert [shop.fallback_model] == [call.model for call in shop.calls("r", shop.fallback)]


def test_each_provider_gets_its_own_key(shop: Shop) -> None:
    """Both demand their key, and each call shows the right one: the primary's never reaches the fallback."""
    shop.work()
    shop.result(shop.areply.send("r0"))
    shop.primary.fail(Fault.OVERLOADED)
    shop.result(shop.areply.send("r1"))
    shop.result(shop.reply.send("r2"))
    assert {True} == {call.key_ok for provider in (shop.primary, shop.fallback) for call in provider.calls()}
    assert 2 == len(shop.fallback.calls())


def raw_create(shop: Shop, tag: str) -> str:
    return text_of(claude().messages.with_raw_response.create(**shop.question(tag)).parse())


def plain_create(shop: Shop, tag: str) -> str:
    return text_of(claude().messages.create(**shop.question(tag)))


def event_stream(shop: Shop, tag: str) -> str:
    with claude().messages.create(**shop.question(tag), stream=True) as events:
        return "".join(event.delta.text for event in events if event.type == "content_block_delta")


def text_stream(shop: Shop, tag: str) -> str:
    with claude().messages.stream(**shop.question(tag)) as stream:
        return "".join(stream.text_stream)


def beta_create(shop: Shop, tag: str) -> str:
    return text_of(claude().beta.messages.create(**shop.question(tag)))


def own_client(shop: Shop, tag: str) -> str:
    with anthropic.Anthropic(api_key=shop.primary_key, base_url=shop.primary.base_url) as client:
        return text_of(wrap(client).messages.create(**shop.question(tag)))


SYNC = [plain_create, raw_create, event_stream, text_stream, beta_create, own_client]


async def aplain_create(shop: Shop, tag: str) -> str:
    return text_of(await aclaude().messages.create(**shop.question(tag)))


async def araw_create(shop: Shop, tag: str) -> str:
    return text_of(await (await aclaude().messages.with_raw_response.create(**shop.question(tag))).parse())


async def aevent_stream(shop: Shop, tag: str) -> str:
    async with await aclaude().messages.create(**shop.question(tag), stream=True) as events:
        return "".join([event.delta.text async for event in events if event.type == "content_block_delta"])


async def atext_stream(shop: Shop, tag: str) -> str:
    async with aclaude().messages.stream(**shop.question(tag)) as stream:
        return "".join([text async for text in stream.text_stream])


async def abeta_create(shop: Shop, tag: str) -> str:
    return text_of(await aclaude().beta.messages.create(**shop.question(tag)))


async def aown_client(shop: Shop, tag: str) -> str:
    async with anthropic.AsyncAnthropic(api_key=shop.primary_key, base_url=shop.primary.base_url) as client:
        return text_of(await wrap(client).messages.create(**shop.question(tag)))


ASYNC = [aplain_create, araw_create, aevent_stream, atext_stream, abeta_create, aown_client]


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("way", SYNC)
def test_every_way_to_call_from_a_function(shop: Shop, way: Callable[[Shop, str], str], down: bool) -> None:
    """create, raw, streams, beta and a wrapped client get the whole answer: from the primary, or from the fallback."""

    @ai_task(**CRITICAL)
    def ask(tag: str) -> str:
        return way(shop, tag)

    shop.work()
    if down:
        shop.primary.fail(Fault.OVERLOADED)
    answer = shop.result(ask.send("r"))
    assert (32, "openai" if down else "anthropic") == (len(answer), answer.partition(":")[0])


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("way", ASYNC)
def test_every_way_to_call_from_a_coroutine(shop: Shop, way: Callable[[Shop, str], Any], down: bool) -> None:
    """The same for coroutines."""

    @ai_task(**CRITICAL)
    async def ask(tag: str) -> str:
        return await way(shop, tag)

    shop.work()
    if down:
        shop.primary.fail(Fault.OVERLOADED)
    answer = shop.result(ask.send("r"))
    assert (32, "openai" if down else "anthropic") == (len(answer), answer.partition(":")[0])


def test_a_request_with_tools_is_carried(shop: Shop) -> None:
    @ai_task(**CRITICAL)
    def ask(tag: str) -> list[Any]:
        answer = claude().messages.create(**shop.question(tag), tools=TOOLS, stop_sequences=["END"])
        served = last_served()
        assert served is not None
        return [served.route, *served.losses, text_of(answer).partition(":")[0]]

    shop.work()
    shop.open_breaker()
    assert ["openai", "stop_sequence", "openai"] == shop.result(ask.send("tools"))


def test_a_request_that_the_fallback_cannot_carry_is_held(shop: Shop) -> None:
    """Tools that Anthropic runs are not stripped in silence: the fallback is not asked, the job waits for the primary alone."""

    @ai_task(**CRITICAL)
    def ask(tag: str) -> str:
        search: Any = [{"type": "web_search_20250305", "name": "web_search"}]
        return text_of(claude().messages.create(**shop.question(tag), tools=search))

    shop.work()
    shop.open_breaker()
    job = ask.send("tools")
    shop.until_all("held", [job])
    facts = shop.facts(job)
    assert f"anthropic/{shop.model}" == facts.wait_key
    assert "server tools" in facts.detail
    assert [] == shop.fallback.calls()
    shop.heal()
    assert "anthropic" == shop.result(job).partition(":")[0]


@pytest.mark.parametrize("on_loss", ["allow", "refuse"])
def test_a_task_may_refuse_a_loss(shop: Shop, on_loss: Any) -> None:
    """Which of the stop sequences ended an answer is not told there: that is named, or the job waits for its primary."""

    @ai_task(criticality="critical", expires_in=timedelta(minutes=2), reroute=["openai"], on_loss=on_loss, **shop.quick)
    def careful(tag: str) -> str:
        claude().messages.create(**shop.question(tag), stop_sequences=["###"])
        served = last_served()
        assert served is not None
        return f"{served.route} {served.losses}"

    shop.work()
    shop.open_breaker()
    job = careful.send("r")
    if on_loss == "refuse":
        shop.until_all("held", [job])
        assert [] == [call for call in shop.fallback.calls() if call.job]
        shop.heal()
    expected = "openai ('stop_sequence',)" if on_loss == "allow" else "anthropic ()"
    assert expected == shop.result(job)


def test_a_task_that_allows_no_other_route_waits(shop: Shop) -> None:
    """A critical task without `reroute` is held: its prompts go to no other company."""

    @ai_task(criticality="critical", expires_in=None, max_retries=0)
    def ask(tag: str) -> str:
        return text_of(claude().messages.create(**shop.question(tag)))

    shop.work()
    shop.open_breaker()
    job = ask.send("alone")
    shop.until_all("held", [job])
    assert [] == shop.fallback.calls()
    shop.heal()
    assert "anthropic" == shop.result(job).partition(":")[0]


def test_a_deferrable_job_spends_no_fallback(shop: Shop) -> None:
    """A deferrable job of a task with `reroute` waits, because it can."""

    @ai_task(criticality="deferrable", reroute=["openai"])
    def ask(tag: str) -> str:
        return text_of(claude().messages.create(**shop.question(tag)))

    shop.work()
    shop.open_breaker()
    jobs = shop.send(ask, 3, "d")
    shop.until_all("held", jobs)
    assert [] == shop.fallback.calls()


def test_a_deferrable_job_is_rerouted_when_its_owner_says_so(shop: Shop) -> None:
    """With `reroute_when_deferrable` it goes to the fallback as a critical one does."""

    @ai_task(criticality="deferrable", reroute=["openai"], reroute_when_deferrable=True)
    def ask(tag: str) -> str:
        return text_of(claude().messages.create(**shop.question(tag)))

    shop.work()
    shop.open_breaker()
    assert "openai" == shop.result(ask.send("d")).partition(":")[0]


def test_an_override_to_critical_is_rerouted(shop: Shop) -> None:
    """One job of a deferrable task that was sent as critical is rerouted; its siblings wait."""

    @ai_task(criticality="deferrable", reroute=["openai"], models=[shop.model])
    def ask(tag: str) -> str:
        return text_of(claude().messages.create(**shop.question(tag)))

    shop.work()
    shop.open_breaker()
    waits = ask.send("waits")
    urgent = ask.send_with_options(args=("urgent",), criticality="critical", expires_in=timedelta(minutes=1))
    assert "openai" == shop.result(urgent).partition(":")[0]
    shop.until_all("held", [waits])
    assert ["urgent"] == [call.job for call in shop.fallback.calls()]


@pytest.mark.parametrize("back", ["anthropic", "openai"])
def test_with_both_down_whichever_is_back_first_frees_the_job(shop: Shop, back: str) -> None:
    """A critical job without any usable route is held, and runs over the first that comes back."""
    shop.work()
    shop.fallback.fail(Fault.OVERLOADED)
    shop.open_breaker()
    jobs = shop.send(shop.reply, 4, "r")
    shop.until(lambda: not shop.is_up("openai"), "the breaker of the fallback opens, too")
    shop.until_all("held", jobs)
    assert {f"anthropic/{shop.model}|openai/{shop.model}"} == {shop.facts(job).wait_key for job in jobs}
    (shop.primary if back == "anthropic" else shop.fallback).heal()
    assert [back] * 4 == [shop.result(job) for job in jobs]


def test_a_fallback_of_the_same_kind(shop: Shop) -> None:
    """A second Messages endpoint is a fallback without translation, with its own names of models and its own key only."""
    second = FakeProvider("second", api_key="the-second-key", latency=Latency(base_s=0.002, per_output_token_s=0.0))
    with second:
        shop.monkeypatch.setenv("SECOND_KEY", "the-second-key")
        shop.configure(
            more=f"""
[routes.second]
kind = "anthropic"
base_url = "{second.base_url}"
api_key_env = "SECOND_KEY"
models = {{ "{shop.model}" = "opus-there" }}
"""
        )

        @ai_task(**{**CRITICAL, "reroute": ["second"]})
        def ask(tag: str) -> tuple[str, ...]:
            question = shop.question(tag)
            question["extra_headers"] |= {"Authorization": f"Bearer {shop.primary_key}", "X-Api-Key": shop.primary_key}
            answer = claude().messages.create(**question, tools=TOOLS)
            served = last_served()
            assert served is not None
            return served.route, text_of(answer).partition(":")[0]

        @ai_task(**{**CRITICAL, "reroute": ["second"]})
        async def aask(tag: str) -> tuple[str, ...]:
            answer = await aclaude().messages.create(**shop.question(tag))
            served = last_served()
            assert served is not None
            return served.route, text_of(answer).partition(":")[0]

        shop.work()
        shop.primary.fail(Fault.OVERLOADED)
        assert ["second", "second"] == shop.result(ask.send("s"))
        assert ["second", "second"] == shop.result(aask.send("a"))
        assert [("opus-there", True)] * 2 == [(call.model, call.key_ok) for call in second.calls()]
        shop.stop_working()


def test_a_call_that_hangs_is_cut_when_the_breaker_opens(shop: Shop) -> None:
    """A critical coroutine does not sit out its timeout on a provider that others have found dead."""
    shop.configure(timeout_s=30)
    shop.work()
    shop.primary.fail(Fault.HANG)
    job = shop.areply.send("hangs")
    shop.until(lambda: shop.calls("hangs"), "its call is under way")
    began = clock.monotonic()
    shop.open_breaker(Fault.OVERLOADED)
    assert "openai" == shop.result(job)
    assert clock.monotonic() - began < 10
    assert 1 == len(shop.calls("hangs"))


@pytest.mark.parametrize("kind", ["reply", "areply"])
def test_a_route_has_no_more_calls_in_flight_than_it_may(shop: Shop, kind: str) -> None:
    """`max_in_flight` bounds the calls at once on each route; nothing is lost by the wait."""
    shop.configure(fallback_options="max_in_flight = 2")
    shop.fallback.latency = Latency(base_s=0.05, per_output_token_s=0.0, jitter=0.0)
    shop.work(threads=8)
    shop.primary.fail(Fault.OVERLOADED)
    jobs = shop.send(getattr(shop, kind), 12, "r")
    assert ["openai"] * 12 == [shop.result(job) for job in jobs]
    assert 2 == most_at_once(shop.fallback)


def test_a_primary_has_no_more_calls_in_flight_than_it_may(shop: Shop) -> None:
    """The same for the primary, and for deferrable jobs: they wait their turn, and end well."""
    shop.configure(primary_options="max_in_flight = 2")
    shop.primary.latency = Latency(base_s=0.05, per_output_token_s=0.0, jitter=0.0)
    shop.work()
    jobs = shop.send(shop.asummary, 12, "s")
    assert ["anthropic"] * 12 == [shop.result(job).partition(":")[0] for job in jobs]
    assert 2 == most_at_once(shop.primary)


def most_at_once(provider: FakeProvider) -> int:
    """The most calls that overlapped, by the ledger; it closes a row just before the last byte goes out."""
    calls = [call for call in provider.calls() if call.finished_at is not None]
    moments = sorted([(call.at, 1) for call in calls] + [(call.finished_at or 0.0, -1) for call in calls])
    running = most = 0
    for _, step in moments:
        running += step
        most = max(most, running)
    return most


def test_outside_a_job_the_primary_is_called(shop: Shop) -> None:
    """`claude()` and `aclaude()` outside a job are plain clients of the primary."""

    async def ask() -> str:
        async with aclaude() as client:
            return text_of(await client.messages.create(**shop.question("aside")))

    assert "anthropic" == text_of(claude().messages.create(**shop.question("aside"))).partition(":")[0]
    assert "anthropic" == asyncio.run(ask()).partition(":")[0]


def test_outside_a_job_an_outage_is_an_error(shop: Shop) -> None:
    """There is no job to hold, so the SDK's error is raised, after its own two retries."""
    shop.primary.fail(Fault.OVERLOADED)
    with pytest.raises(anthropic.APIStatusError):
        claude().messages.create(**shop.question("aside"))
    assert 3 == len(shop.primary.calls())


def test_a_reroute_is_in_the_job_s_story(shop: Shop) -> None:
    """Who answered a rerouted job can be told afterwards."""
    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    job = shop.reply.send("r")
    shop.result(job)
    shop.until(lambda: shop.story(job), "its story is told")
    assert [("succeeded", [f"openai:{shop.fallback_model}"])] == [
        (line.event, line.facts["served"]) for line in shop.story(job)
    ]


def test_calls_in_parallel_are_rerouted_each(shop: Shop) -> None:
    """A gather of calls in one critical job: each is answered by the fallback."""

    @ai_task(**CRITICAL)
    async def many(tag: str) -> list[str]:
        calls = (aclaude().messages.create(**shop.question(tag)) for _ in range(5))
        return [text_of(reply).partition(":")[0] for reply in await asyncio.gather(*calls)]

    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    assert ["openai"] * 5 == shop.result(many.send("many"))


def test_calls_in_threads_are_carried_too(shop: Shop) -> None:
    """A client made in the job works in threads that know nothing of the job."""
    from concurrent.futures import ThreadPoolExecutor

    @ai_task(**CRITICAL)
    def many(tag: str) -> list[str]:
        client = claude()
        with ThreadPoolExecutor(3) as pool:
            replies = pool.map(lambda _: client.messages.create(**shop.question(tag)), range(3))
        return [text_of(reply).partition(":")[0] for reply in replies]

    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    assert ["openai"] * 3 == shop.result(many.send("many"))


def test_the_status_of_a_rerouted_job(shop: Shop) -> None:
    """It ended well, and the account knows no difference."""
    shop.work()
    shop.open_breaker()
    job = shop.reply.send("r")
    shop.result(job)
    shop.until_all("ended", [job])
    assert "succeeded" == shop.until(lambda: tideover.status(job).end, "its end is known")
