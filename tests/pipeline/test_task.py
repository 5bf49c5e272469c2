# SPDX-License-Identifier: Apache-2.0
"""`ai_task`'s rules: what must be said, what may be sent, and what stops a boot."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dramatiq
import pytest
from dramatiq import broker as dramatiq_broker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.message import Message

import tideover
from tideover import (
    AITask,
    ConfigurationError,
    InvalidJob,
    StoreUnavailable,
    Tideover,
    ai_task,
    clock,
)
from tideover import settings as tideover_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.pipeline.conftest import Shop

MINUTE = timedelta(minutes=1)


def stamp(shop: Shop, message: Message[Any]) -> dict[str, Any]:
    """What tideover wrote into an enqueued job."""
    raw = shop.broker.client.hget(shop.keys.msgs(message.queue_name), message.options["redis_message_id"])
    return dict(Message.decode(raw).options["tideover"])


def expires_in_s(shop: Shop, message: Message[Any]) -> float | None:
    found = stamp(shop, message)
    return None if found["expires_ms"] is None else (found["expires_ms"] - int(found["sent_ms"])) / 1000


def accepted(shop: Shop) -> int:
    return shop.ledger.read().accepted


# what must be said


def test_criticality_has_no_default(shop: Shop) -> None:
    """Forgetting it is a TypeError, at the decorator."""
    with pytest.raises(TypeError, match="criticality"):
        ai_task()  # type: ignore[call-overload]


def test_criticality_is_one_of_two_words(shop: Shop) -> None:
    """Any other word is a TypeError that names the two."""
    with pytest.raises(TypeError, match="deferrable"):
        ai_task(criticality="urgent")  # type: ignore[call-overload]


@pytest.mark.parametrize("criticality", ["critical", lambda: "deferrable"])
def test_what_may_be_critical_states_its_expiry(shop: Shop, criticality: Any) -> None:
    """A task that is or may be critical must say how long its answer is useful."""
    with pytest.raises(TypeError, match="expires_in"):
        ai_task(criticality=criticality)


@pytest.mark.parametrize("name", ["reroute", "models"])
def test_one_string_is_no_list_of_names(shop: Shop, name: str) -> None:
    """`reroute="openai"` would be six routes."""
    with pytest.raises(TypeError, match="lists of names"):
        ai_task(criticality="deferrable", **{name: "openai"})


def test_an_unknown_option_is_an_error(shop: Shop) -> None:
    """A misspelt option does not pass in silence."""
    with pytest.raises(ValueError, match="expire_in"):

        @ai_task(criticality="deferrable", expire_in=MINUTE)
        def task() -> None: ...


def test_an_override_to_critical_states_its_expiry(shop: Shop) -> None:
    """A deferrable task without an expiry has none that a critical job could take; the send is a TypeError, nothing is sent."""
    with pytest.raises(TypeError, match="expires_in"):
        shop.summary.send_with_options(args=("x",), criticality="critical")
    assert 0 == accepted(shop)


def test_an_override_to_a_wrong_word(shop: Shop) -> None:
    """The send is a TypeError, and nothing is sent."""
    with pytest.raises(TypeError, match="criticality"):
        shop.summary.send_with_options(args=("x",), criticality="urgent")  # type: ignore[arg-type]
    assert 0 == accepted(shop)


# lanes, criticality and expiry


def test_an_ai_task_is_an_actor(shop: Shop) -> None:
    """It is dramatiq's Actor: callable, with dramatiq's names and options."""
    assert isinstance(shop.summary, AITask | dramatiq.Actor)
    assert ("summary", "default") == (shop.summary.actor_name, shop.summary.queue_name)
    assert 2 == shop.summary.options["max_retries"]


def test_the_criticality_picks_the_lane(shop: Shop) -> None:
    """Deferrable jobs wait in the queue, critical ones in its critical lane."""
    assert ["default", "default.critical"] == [shop.summary.send("x").queue_name, shop.reply.send("x").queue_name]


def test_a_queue_of_one_s_own_has_two_lanes(shop: Shop) -> None:
    """The same for any queue name."""

    @ai_task(criticality="critical", expires_in=None, queue_name="tickets")
    def task() -> None: ...

    assert "tickets.critical" == task.send().queue_name
    assert {"tickets", "tickets.critical"} <= shop.broker.get_declared_queues()


def test_an_override_picks_the_lane(shop: Shop) -> None:
    """One job may be what its task is not."""
    urgent = shop.summary.send_with_options(args=("x",), criticality="critical", expires_in=MINUTE)
    patient = shop.reply.send_with_options(args=("x",), criticality="deferrable")
    assert ("default.critical", "critical", 60.0) == (
        urgent.queue_name,
        stamp(shop, urgent)["criticality"],
        expires_in_s(shop, urgent),
    )
    assert ("default", "deferrable", 300.0) == (
        patient.queue_name,
        stamp(shop, patient)["criticality"],
        expires_in_s(shop, patient),
    )


def test_a_function_of_the_arguments_picks_the_lane(shop: Shop) -> None:
    """It sees positional arguments and names."""

    @ai_task(criticality=lambda tier, vip=False: "critical" if vip or tier == "gold" else "deferrable", expires_in=MINUTE)
    def task(tier: str, vip: bool = False) -> None: ...

    sent = [task.send("gold"), task.send("iron"), task.send("iron", vip=True)]
    assert ["default.critical", "default", "default.critical"] == [message.queue_name for message in sent]
    assert ["critical", "deferrable", "critical"] == [stamp(shop, message)["criticality"] for message in sent]


def test_a_function_of_the_arguments_must_answer(shop: Shop) -> None:
    """Any other answer is an InvalidJob, and nothing is sent."""

    @ai_task(criticality=lambda: "urgent", expires_in=MINUTE)  # type: ignore[arg-type, return-value]
    def task() -> None: ...

    with pytest.raises(InvalidJob, match="urgent"):
        task.send()
    assert 0 == accepted(shop)


def test_a_function_that_does_not_take_the_arguments(shop: Shop) -> None:
    """It is an InvalidJob at the send that says how to go on."""

    @ai_task(criticality=lambda tier: "deferrable", expires_in=MINUTE)
    def task() -> None: ...

    with pytest.raises(InvalidJob, match="criticality="):
        task.send()
    assert 0 == accepted(shop)


def test_expiry_counts_from_the_send(shop: Shop) -> None:
    """Of a job that is not delayed."""
    before = clock.now_ms()
    sent = shop.reply.send("x")
    assert before + 300_000 <= stamp(shop, sent)["expires_ms"] <= clock.now_ms() + 300_000


def test_expiry_of_a_delayed_job_counts_from_its_eta(shop: Shop) -> None:
    """The delay is not taken from the time in which the answer is useful."""
    sent = shop.reply.send_with_options(args=("x",), delay=3_600_000)
    assert 3900.0 == expires_in_s(shop, sent)


def test_expiry_may_be_never(shop: Shop) -> None:
    """None says that the answer never becomes useless; so does saying nothing, of a deferrable job."""
    never = shop.reply.send_with_options(args=("x",), expires_in=None)
    assert [None, None] == [expires_in_s(shop, never), expires_in_s(shop, shop.summary.send("x"))]


def test_expiry_may_be_overridden(shop: Shop) -> None:
    """One job of a deferrable task may have an expiry."""
    assert 60.0 == expires_in_s(shop, shop.summary.send_with_options(args=("x",), expires_in=MINUTE))


def test_a_message_is_stamped_when_it_is_sent(shop: Shop) -> None:
    """A message that was built early expires from its send, not from its building."""
    message = shop.reply.message("x")
    built_at = clock.now_ms()
    shop.until(lambda: clock.now_ms() > built_at + 20, "some time passes")
    assert stamp(shop, shop.broker.enqueue(message))["expires_ms"] >= built_at + 300_020


# exact fidelity

UNFAITHFUL: dict[str, Any] = {
    "a tuple": (1, 2),
    "a tuple in a list": [(1, 2)],
    "a tuple deep down": {"a": [{"b": (1,)}]},
    "a key that is a number": {1: "x"},
    "a key that is None": [{None: "x"}],
    "bytes": b"x",
    "an object": timedelta(1),
    "a set": {1},
    "a path": Path("x"),
    "a subclass of str": type("Name", (str,), {})("x"),
    "an enum that is an int": __import__("enum").IntEnum("Color", "RED").RED,
}


@pytest.mark.parametrize("value", UNFAITHFUL.values(), ids=list(UNFAITHFUL))
@pytest.mark.parametrize("by_name", [False, True])
def test_what_json_would_change_is_refused(shop: Shop, value: Any, by_name: bool) -> None:
    """It is an InvalidJob that says where, without the value; nothing is sent."""

    @ai_task(criticality="deferrable")
    def task(*args: Any, **kwargs: Any) -> None: ...

    with pytest.raises(InvalidJob, match="thing" if by_name else "argument 0"):
        task.send(thing=value) if by_name else task.send(value)
    assert 0 == accepted(shop)


FAITHFUL: dict[str, Any] = {
    "text": "é🌊\x00\u2028 </script>",
    "a large number": 10**40,
    "a small number": 5e-324,
    "a negative zero": -0.0,
    "infinity": math.inf,
    "nothing": None,
    "nested": {"a": [1, {"b": [[], {}, ""]}]},
    "keys of dramatiq": {"__t": "x", "redis_message_id": "y", "tideover": {}},
}


@pytest.mark.parametrize("value", FAITHFUL.values(), ids=list(FAITHFUL))
def test_what_json_keeps_is_sent_as_it_is(shop: Shop, value: Any) -> None:
    """The body in Redis decodes to the very value."""

    @ai_task(criticality="deferrable")
    def task(thing: Any) -> None: ...

    sent = task.send(value)
    raw = shop.broker.client.hget(shop.keys.msgs("default"), sent.options["redis_message_id"])
    assert repr((value,)) == repr(tuple(Message.decode(raw).args))


def test_nan_is_sent(shop: Shop) -> None:
    """NaN survives dramatiq's JSON."""

    @ai_task(criticality="deferrable")
    def task(thing: float) -> None:
        shop.ran.append(str(thing))

    shop.work()
    task.send(math.nan)
    shop.until_over()
    assert ["nan"] == shop.ran


def test_a_job_that_is_too_large_is_refused(shop: Shop) -> None:
    """It is an InvalidJob that says both sizes, which argument is large, and what to send instead."""
    with pytest.raises(InvalidJob, match=r"bytes, 8,388,610 of them in argument 0 .*; max_payload_bytes is 8,388,608"):
        shop.summary.send("x" * 8_388_608)
    assert 0 == accepted(shop)


def test_a_plain_actor_s_job_may_be_large(shop: Shop) -> None:
    """The limit is for AI tasks: nothing changes for other actors."""

    @dramatiq.actor
    def plain(text: str) -> None: ...

    plain.send("x" * 8_388_608)
    assert 1 == accepted(shop)


# routes and brokers


def test_an_unknown_route_is_no_matter_at_import(shop: Shop) -> None:
    """The first send finds it, names it, and names those that exist; nothing is sent."""

    @ai_task(criticality="critical", expires_in=None, reroute=["bedrok"])
    def task() -> None: ...

    with pytest.raises(ConfigurationError, match=r"bedrok.*anthropic, openai"):
        task.send()
    assert 0 == accepted(shop)


def test_an_unknown_route_stops_a_worker_in_this_process(shop: Shop) -> None:
    """It is a ConfigurationError of `Worker.start`."""

    @ai_task(criticality="critical", expires_in=None, reroute=["bedrok"])
    def task() -> None: ...

    with pytest.raises(ConfigurationError, match="bedrok"):
        shop.work()


UNKNOWN_ROUTE = """
from tideover import ai_task
@ai_task(criticality="critical", expires_in=None, reroute=["bedrok"])
def task() -> None: ...
"""


def dramatiq_command(folder: Path, module: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dramatiq", module, "-p", "1", "-t", "1", "--path", str(folder)]
    return subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, timeout=30, check=False)


def test_an_unknown_route_stops_the_dramatiq_command(shop: Shop) -> None:
    """`dramatiq shop_tasks` exits with an error and says the reason."""
    (shop.folder / "unknown_route.py").write_text(UNKNOWN_ROUTE)
    ended = dramatiq_command(shop.folder, "unknown_route")
    assert ended.returncode != 0
    assert "bedrok" in ended.stderr


def test_a_missing_key_stops_a_worker(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback's key is named by the settings and is not there: the boot fails and names the variable."""
    monkeypatch.delenv("OPENAI_API_KEY")
    tideover_settings.forget()
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
        shop.work()


def test_a_redis_that_evicts_stops_a_worker(shop: Shop) -> None:
    """A server that may throw jobs away is refused."""
    shop.broker.client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(ConfigurationError, match="noeviction"):
            shop.work()
    finally:
        shop.broker.client.config_set("maxmemory-policy", "noeviction")


def test_a_broker_without_tideover_is_refused(shop: Shop) -> None:
    """An AI task on it is a ConfigurationError that says what to add."""
    plain = shop.new_broker(with_tideover=False)
    with pytest.raises(ConfigurationError, match=r"add_middleware\(Tideover\(\)\)"):

        @ai_task(criticality="deferrable", broker=plain)
        def task() -> None: ...


@pytest.fixture
def no_broker(shop: Shop) -> Iterator[Shop]:
    """An application that set no broker."""
    dramatiq_broker.global_broker = None
    yield shop
    made: Any = dramatiq_broker.global_broker
    if made is not None:
        made.close()
        with suppress(ConfigurationError):  # it was never used, and has no URL
            made.client.close()


def test_without_a_broker_one_is_built_from_the_settings(no_broker: Shop) -> None:
    """It has tideover and results on it, and the Redis and namespace of the settings."""

    @ai_task(criticality="deferrable")
    def task() -> int:
        return 7

    broker: Any = dramatiq.get_broker()
    assert no_broker.namespace == broker.namespace
    assert {"Tideover", "Results"} <= {type(middleware).__name__ for middleware in broker.middleware}
    task.send()
    assert 1 == accepted(no_broker)


def test_a_built_broker_reads_the_settings_when_it_is_first_used(no_broker: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Declaring tasks asks for no settings: they may be set after the import."""
    monkeypatch.setenv("TIDEOVER_CONFIG", str(no_broker.folder / "missing.toml"))
    tideover_settings.forget()

    @ai_task(criticality="deferrable")
    def task() -> None: ...

    no_broker.configure()
    task.send()
    assert 1 == accepted(no_broker)


def test_another_broker_after_the_built_one_is_an_error(no_broker: Shop) -> None:
    """Tasks would send to one Redis and workers fetch from another."""

    @ai_task(criticality="deferrable")
    def task() -> None: ...

    built: Any = dramatiq.get_broker()
    try:
        dramatiq.set_broker(no_broker.broker)
        with pytest.raises(ConfigurationError, match="set_broker"):

            @ai_task(criticality="deferrable")
            def other() -> None: ...
    finally:
        built.close()
        built.client.close()
        dramatiq_broker.global_broker = None


def test_without_a_url_a_send_is_refused(no_broker: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a ConfigurationError that names the ways out: a missing secret must not give each pod a queue of its own."""
    config = no_broker.folder / "tideover.toml"
    config.write_text(config.read_text().replace(f'redis_url = "{no_broker.redis_url}"', ""))
    tideover_settings.forget()

    @ai_task(criticality="deferrable")
    def task() -> None: ...

    with pytest.raises(ConfigurationError, match=r"TIDEOVER_REDIS_URL.*tideover demo"):
        task.send()


def test_an_unreachable_redis_refuses_the_send(shop: Shop) -> None:
    """The send raises StoreUnavailable, which says that nothing was accepted."""
    nowhere = RedisBroker(url=f"unix://{shop.folder}/no-such.sock")
    nowhere.add_middleware(Tideover())

    @ai_task(criticality="deferrable", broker=nowhere)
    def task() -> None: ...

    with pytest.raises(StoreUnavailable, match="Nothing was accepted"):
        task.send()
    nowhere.client.close()


def test_a_redis_that_refuses_writes_refuses_the_send(shop: Shop) -> None:
    """A full server accepts nothing: StoreUnavailable, no half of a job."""
    shop.summary.send("first")
    shop.broker.client.config_set("maxmemory", "1")
    try:
        with pytest.raises(StoreUnavailable):
            shop.summary.send("second")
    finally:
        shop.broker.client.config_set("maxmemory", "0")
    assert {"accepted": 1, "queued": 1} == shop.books()
    assert 1 == shop.broker.client.hlen(shop.keys.msgs("default"))


def test_send_async_sends(shop: Shop) -> None:
    """It sends from an event loop and returns dramatiq's message."""

    async def send() -> Any:
        return await shop.summary.send_async("x")

    message = asyncio.run(send())
    assert ("summary", ("x",), 1) == (message.actor_name, message.args, accepted(shop))


def test_send_async_does_not_block_the_loop(shop: Shop) -> None:
    """The loop goes on while Redis makes the send wait."""
    order: list[str] = []

    async def send() -> None:
        await shop.summary.send_async("x")
        order.append("sent")

    async def both() -> None:
        sending = asyncio.create_task(send())
        shop.broker.client.client_pause(300, all=True)
        await asyncio.sleep(0)
        order.append("the loop goes on")
        await sending

    asyncio.run(both())
    assert ["the loop goes on", "sent"] == order


def test_waiting_in_a_loop_gets_the_result(shop: Shop) -> None:
    """`await wait_for(task.send(...))` is the answer."""

    async def ask() -> Any:
        return await tideover.wait_for(await shop.areply.send_async("x"), timeout=timedelta(seconds=5))

    shop.work()
    assert "anthropic" == asyncio.run(ask())


# types

TYPED = """
from datetime import timedelta
from typing import assert_type

from dramatiq.message import Message

from tideover import Served, aclaude, ai_task, claude, last_served, status, text_of, wait_for, wait_for_sync

@ai_task(criticality="deferrable")
def length(text: str) -> int:
    claude().messages.create(model="m", max_tokens=1, messages=[])
    return len(text)

@ai_task(criticality="critical", expires_in=timedelta(minutes=1), reroute=["openai"], queue_name="q", max_retries=3)
async def reply(ticket: int, *, polite: bool = False) -> str:
    answer = await aclaude().messages.create(model="m", max_tokens=1, messages=[])
    assert_type(last_served(), Served | None)
    return text_of(answer)

assert_type(length.send("x"), Message[int])
assert_type(reply.send(81, polite=True), Message[str])
assert_type(wait_for_sync(length.send("x"), timeout=timedelta(seconds=1)), int)
status(length.send("x")).state

async def main() -> None:
    sent = await reply.send_async(81)
    assert_type(sent, Message[str])
    assert_type(await wait_for(sent, timeout=timedelta(seconds=1), through_holds=True), str)
    length.send_with_options(args=("x",), criticality="critical", expires_in=None, delay=100)
"""
WRONG = {
    "a critical task without an expiry": '@ai_task(criticality="critical")\ndef task() -> None: ...',
    "a task without a criticality": "@ai_task()\ndef task() -> None: ...",
    "a word that is no criticality": '@ai_task(criticality="urgent")\ndef task() -> None: ...',
    "an argument of the wrong type": '@ai_task(criticality="deferrable")\ndef task(n: int) -> None: ...\ntask.send("x")',
    "a missing argument": '@ai_task(criticality="deferrable")\ndef task(n: int) -> None: ...\ntask.send()',
}


MYPY = """
[mypy]
strict = True
[mypy-anthropic.*,httpx2.*,pydantic.*,pydantic_settings.*,redis.*,structlog.*]
follow_imports = skip
"""
"""Their types are not what is looked at, and take a minute to read."""


@pytest.fixture(scope="session")
def typed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What mypy, as strict as it gets, says of users' code, by the name of the file; one run, as each start takes seconds."""
    folder = tmp_path_factory.mktemp("typed")
    files = {"right.py": TYPED} | {
        f"wrong{i}.py": f"from tideover import ai_task\n{code}\n" for i, code in enumerate(WRONG.values())
    }
    for name, code in files.items():
        (folder / name).write_text(code)
    (folder / "mypy.ini").write_text(MYPY)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", str(folder / "cache"), *files]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.splitlines()
    return {name: "\n".join(line for line in said if line.startswith(name)) for name in files}


def test_users_code_passes_strict_mypy(typed: dict[str, str]) -> None:
    """Arguments and results keep their types from the function through `send` to `wait_for`, for functions and coroutines."""
    assert "" == typed["right.py"]


@pytest.mark.parametrize("what", list(WRONG))
def test_users_mistakes_are_type_errors(typed: dict[str, str], what: str) -> None:
    """What would be refused when it runs is refused before."""
    assert "error:" in typed[f"wrong{list(WRONG).index(what)}.py"]
