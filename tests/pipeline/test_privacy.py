# SPDX-License-Identifier: Apache-2.0
"""Prompts are personal data and keys are secrets: neither is in a log, and prompts are only where the job itself is."""

from __future__ import annotations

import logging
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import dramatiq
import pytest

from tideover import aclaude, ai_task, claude, clock, text_of
from tideover.testing import Fault
from tideover_worker import embedded

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.pipeline.conftest import Shop

AT_HOME = (".msgs", ".XQ.msgs")
"""Where the bodies of jobs are: of those that live, and of dead letters."""
RESULT = re.compile(r"[0-9a-f]{32}")
"""dramatiq stores a result under the MD5 of its job's name; a failure's message is a result, too."""


@pytest.fixture
def secret() -> str:
    """A prompt that stands in no source line, because tracebacks show those."""
    return f"prompt-{uuid4().hex}"


@pytest.fixture(autouse=True)
def logs(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Everything that an application would log with our logger at DEBUG and all others at INFO."""
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, "tideover")
    return caplog


def tasks(shop: Shop) -> dict[str, Any]:
    """Tasks whose argument is the prompt, and the content of their call."""

    def asked(prompt: str) -> dict[str, Any]:
        return shop.question("job", messages=[{"role": "user", "content": prompt}], system=prompt)

    @ai_task(criticality="deferrable", models=[shop.model], **shop.quick)
    def wait(prompt: str) -> str:
        return text_of(claude().messages.create(**asked(prompt)))

    @ai_task(criticality="deferrable", models=[shop.model], **shop.quick)
    async def await_(prompt: str) -> str:
        return text_of(await aclaude().messages.create(**asked(prompt)))

    @ai_task(criticality="critical", expires_in=None, reroute=["openai"], **shop.quick)
    def urgent(prompt: str, again: str = "") -> str:
        return text_of(claude().messages.create(**asked(prompt)))

    @ai_task(criticality="critical", expires_in=None, reroute=["openai"], **shop.quick)
    async def aurgent(prompt: str) -> str:
        odd: Any = [{"type": prompt, "name": prompt}, {"name": "x", "input_schema": {}, prompt: prompt}]
        return text_of(await aclaude().messages.create(**asked(prompt), tools=odd))

    @ai_task(criticality="deferrable", **shop.quick)
    def fail(prompt: str) -> None:
        raise ValueError(f"a bug, which quotes {prompt}")

    @ai_task(criticality="deferrable", **shop.quick)
    async def afail(prompt: str) -> None:
        await aclaude().messages.create(**asked(prompt))
        raise ValueError(f"a bug, which quotes {prompt}")

    @ai_task(criticality="deferrable", models=[shop.model], expires_in=timedelta(milliseconds=300))
    def perish(prompt: str) -> None: ...

    return {task.actor_name: task for task in (wait, await_, urgent, aurgent, fail, afail, perish)}


def check_logs(shop: Shop, logs: pytest.LogCaptureFixture, secret: str) -> None:
    """No line, no traceback in it and no argument of it holds the prompt or a key; and something was logged at all."""
    logged = logs.text + "".join(repr(record.args) for record in logs.records)
    assert logs.records
    lines = [
        line for line in logged.splitlines() if any(word in line for word in (secret, shop.primary_key, shop.fallback_key))
    ]
    assert [] == lines


def check_redis(shop: Shop, secret: str) -> None:
    """The prompt is in bodies and results only, the keys are nowhere; and the prompt was there at all, or is gone."""
    found = {name: everything(shop.broker.client, name) for name in shop.broker.client.scan_iter(count=1000)}
    with_prompt = [name.decode() for name, content in found.items() if secret in content or secret in name.decode()]
    assert [] == [name for name in with_prompt if not name.endswith(AT_HOME) and not RESULT.fullmatch(name)]
    assert [] == [name for name, content in found.items() if shop.primary_key in content or shop.fallback_key in content]


def everything(client: Any, name: bytes) -> str:
    readers: dict[bytes, Callable[[], Any]] = {
        b"string": lambda: client.get(name),
        b"list": lambda: client.lrange(name, 0, -1),
        b"set": lambda: client.smembers(name),
        b"zset": lambda: client.zrange(name, 0, -1),
        b"hash": lambda: client.hgetall(name),
        b"none": str,  # it has expired since
    }
    return repr(readers[client.type(name)]())


@pytest.mark.parametrize("kind", ["wait", "await_"])
def test_hold_and_release(shop: Shop, logs: pytest.LogCaptureFixture, secret: str, kind: str) -> None:
    """Held at the gate, held after a failed call, released, answered."""
    task = tasks(shop)[kind]
    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    first = [task.send(secret) for _ in range(3)]
    shop.until_open()
    jobs = [*first, task.send(secret)]
    shop.until_all("held", jobs)
    check_redis(shop, secret)
    shop.heal()
    assert 4 == len([shop.result(job) for job in jobs])
    check_redis(shop, secret)
    check_logs(shop, logs, secret)


@pytest.mark.parametrize("fault", [Fault.OVERLOADED, Fault.UNAUTHORIZED, Fault.RATE_LIMITED, Fault.OK_HTML, Fault.RESET])
def test_reroute(shop: Shop, logs: pytest.LogCaptureFixture, secret: str, fault: Fault) -> None:
    """Rerouted, whatever the reason."""
    task = tasks(shop)["urgent"]
    shop.work()
    shop.primary.fail(fault)
    job = task.send(secret, again=secret)
    assert "openai" == shop.result(job).partition(":")[0]
    check_redis(shop, secret)
    check_logs(shop, logs, secret)


def test_a_request_that_no_fallback_can_carry(shop: Shop, logs: pytest.LogCaptureFixture, secret: str) -> None:
    """The reason names what cannot be carried, not what is in it."""
    task = tasks(shop)["aurgent"]
    shop.work()
    shop.open_breaker()
    job = task.send(secret)
    shop.until_all("held", [job])
    check_redis(shop, secret)
    shop.heal()
    shop.result(job)
    check_logs(shop, logs, secret)


@pytest.mark.parametrize("kind", ["fail", "afail"])
def test_retry_and_failure(shop: Shop, logs: pytest.LogCaptureFixture, secret: str, kind: str) -> None:
    """An unhandled exception is logged by type and place, for its message may quote the prompt; bodies keep it."""
    task = tasks(shop)[kind]
    shop.work()
    task.send(secret)
    shop.until_over()
    assert {"accepted": 1, "failed": 1} == shop.books()
    assert "failed: ValueError < " in logs.text
    check_redis(shop, secret)
    check_logs(shop, logs, secret)


@pytest.mark.parametrize("held", [False, True])
def test_expiry(shop: Shop, logs: pytest.LogCaptureFixture, secret: str, held: bool) -> None:
    """Expired in the queue, or while held."""
    task = tasks(shop)["perish"]
    if held:
        shop.work()
        shop.open_breaker()
    job = task.send(secret)
    if not held:
        shop.until(lambda: clock.now_ms() > job.message_timestamp + 350, "its time is over")
        shop.work()
    shop.until(lambda: shop.books().get("expired") == 1, "it expires")
    shop.until(lambda: "job_expired" in logs.text, "the log says so")
    check_redis(shop, secret)
    check_logs(shop, logs, secret)


def test_a_bad_request(shop: Shop, logs: pytest.LogCaptureFixture, secret: str) -> None:
    """The provider's 400 is the job's failure; its words are the user's to see, the prompt is not in the log."""
    task = tasks(shop)["wait"]
    shop.work()
    shop.primary.fail(Fault.BAD_REQUEST)
    task.send(secret)
    shop.until_over()
    check_redis(shop, secret)
    check_logs(shop, logs, secret)


def test_observe(shop: Shop, logs: pytest.LogCaptureFixture, secret: str) -> None:
    """What would have been done is told by the job's id."""
    shop.configure(mode="observe")
    task = tasks(shop)["wait"]
    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    for _ in range(4):
        task.send(secret)
    shop.until_over()
    check_redis(shop, secret)
    check_logs(shop, logs, secret)


def test_an_unknown_actor(shop: Shop, logs: pytest.LogCaptureFixture, secret: str) -> None:
    """A job that this worker cannot run."""
    shop.work()
    unknown: Any = dramatiq.Message(queue_name="default", actor_name="nobody", args=(secret,), kwargs={"x": secret}, options={})
    shop.broker.enqueue(unknown)
    shop.until_over()
    check_redis(shop, secret)
    check_logs(shop, logs, secret)


def test_an_unreadable_job(shop: Shop, logs: pytest.LogCaptureFixture, secret: str) -> None:
    """A body that is no message, as a stranger may put it there."""
    shop.work()
    shop.broker.client.hset(shop.keys.msgs("default"), "odd-id", f'{{"args": ["{secret}"')
    shop.broker.client.rpush(shop.keys.queue("default"), "odd-id")
    shop.until(lambda: shop.books() == {"accepted": 1, "held": 1}, "it is held")
    check_redis(shop, secret)
    check_logs(shop, logs, secret)


def test_arguments_that_are_refused(shop: Shop, secret: str) -> None:
    """The error of a send says where, not what."""
    task = tasks(shop)["wait"]
    with pytest.raises(TypeError) as unfaithful:
        task.send([(secret,)])
    with pytest.raises(TypeError) as too_large:
        task.send(secret * 500_000)
    assert secret not in f"{unfaithful.value!r} {too_large.value!r}"


@pytest.mark.usefixtures("swift_restarts")
def test_redis_gone_while_a_job_runs(private_shop: Shop, logs: pytest.LogCaptureFixture, secret: str) -> None:
    """The acknowledgement fails and is tried again: dramatiq's warning must not name the arguments."""
    shop = private_shop
    folder = shop.folder / "valkey"

    @ai_task(criticality="deferrable", store_results=False)
    def outlive(prompt: str) -> None:
        if not shop.ran:
            embedded.stop(folder)
        shop.ran.append("ran")

    shop.work()
    outlive.send(secret)
    shop.until(lambda: shop.ran and embedded.running(folder) is None, "the server is gone")
    shop.until(lambda: "post_process_message" in logs.text or "onnection" in logs.text, "dramatiq says so")
    embedded.start(folder)
    shop.until(lambda: shop.books() == {"accepted": 1, "succeeded": 1}, "it has ended")
    check_logs(shop, logs, secret)
