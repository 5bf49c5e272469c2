# SPDX-License-Identifier: Apache-2.0
"""The application of the chaos runs, written once: AI tasks of tideover, or with CHAOS_STOCK plain dramatiq actors.

Each function notes its start and its end in the ledger, and the broker notes when a message was acknowledged.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import (
    AgeLimit,
    AsyncIO,
    Callbacks,
    GroupCallbacks,
    Pipelines,
    Retries,
    ShutdownNotifications,
    TimeLimit,
)
from dramatiq.rate_limits.backends import RedisBackend as BarrierBackend
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from tests.chaos.ledger import VARIABLE, note

import tideover

if TYPE_CHECKING:
    from anthropic import Anthropic, AsyncAnthropic

STOCK = "CHAOS_STOCK" in os.environ
URL = os.environ["CHAOS_REDIS_URL"]
WORKER = os.environ.get("CHAOS_WORKER", "sender")
MODEL = "claude-opus-4-8"
TIMEOUT_S = 3.0
PULSE_S = 0.5
RETRIES = 1000 if STOCK else 3
BEST_FOR_STOCK = {"heartbeat_timeout": 3000, "maintenance_chance": 1_000_000}
"""Stock dramatiq looks for dead workers at every command; its thousand retries outlast any outage."""


class Notes(dramatiq.Middleware):
    """Tells the ledger what the functions cannot see: boot, acknowledgements, and a pulse, which is missing while the process
    stands still, be it stopped or without a processor."""

    def after_worker_boot(self, broker: Any, worker: Any) -> None:
        note("booted", worker=WORKER)
        threading.Thread(target=self.pulse, daemon=True).start()

    @staticmethod
    def pulse() -> None:
        while True:
            note("pulse", worker=WORKER)
            time.sleep(PULSE_S)

    def after_ack(self, broker: Any, message: Any) -> None:
        note("acked", tag=message.args[0], worker=WORKER)

    after_nack = after_ack


def make_broker() -> RedisBroker:
    usual: list[Any] = [AgeLimit(), TimeLimit(), ShutdownNotifications(), Callbacks(), Pipelines()]
    usual += [Retries(max_retries=RETRIES, min_backoff=200, max_backoff=2000), GroupCallbacks(BarrierBackend(url=URL))]
    usual += [Results(backend=RedisBackend(url=URL)), Notes()]  # type: ignore[no-untyped-call]
    if STOCK:
        return RedisBroker(url=URL, middleware=[AsyncIO(), *usual], **BEST_FOR_STOCK)  # type: ignore[no-untyped-call]
    broker = RedisBroker(url=URL, middleware=usual)  # type: ignore[no-untyped-call]
    broker.add_middleware(tideover.Tideover())
    return broker


broker = make_broker()
dramatiq.set_broker(broker)


def task(**options: Any) -> Callable[[Callable[..., Any]], dramatiq.Actor[..., Any]]:
    return dramatiq.actor(store_results=True) if STOCK else tideover.ai_task(**options)


@cache
def stock_client() -> Anthropic:
    from anthropic import Anthropic

    return Anthropic(max_retries=0, timeout=TIMEOUT_S)


@cache
def stock_aclient() -> AsyncAnthropic:
    from anthropic import AsyncAnthropic

    return AsyncAnthropic(max_retries=0, timeout=TIMEOUT_S)


claude, aclaude = (stock_client, stock_aclient) if STOCK else (tideover.claude, tideover.aclaude)


def question(tag: str) -> Any:
    return {
        "model": MODEL,
        "max_tokens": 8,
        "messages": [{"role": "user", "content": "hello"}],
        "extra_headers": {"x-tideover-job": tag},
    }


@contextmanager
def noted(tag: str) -> Iterator[None]:
    run = uuid4().hex[:8]
    note("started", tag=tag, run=run, worker=WORKER)
    yield
    note("finished", tag=tag, run=run, worker=WORKER)


def after(previous: str, tag: str) -> str:
    """What a step of a pipeline returns: all tags up to its own."""
    return f"{previous}>{tag}" if previous else tag


@task(criticality="deferrable")
async def summary(tag: str, previous: str = "") -> str:
    with noted(tag):
        assert (await aclaude().messages.create(**question(tag))).content
    return after(previous, tag)


@task(criticality="deferrable")
def report(tag: str, previous: str = "") -> str:
    with noted(tag):
        assert claude().messages.create(**question(tag)).content
    return after(previous, tag)


@task(criticality="critical", expires_in=timedelta(hours=2), reroute=["openai"])
async def reply(tag: str, previous: str = "") -> str:
    with noted(tag):
        assert (await aclaude().messages.create(**question(tag))).content
    return after(previous, tag)


@task(criticality="critical", expires_in=None, reroute=["openai"])
def decision(tag: str, previous: str = "") -> str:
    with noted(tag):
        assert claude().messages.create(**question(tag)).content
    return after(previous, tag)


@dramatiq.actor(store_results=True)
def plain(tag: str, previous: str = "") -> str:
    """No AI, as most jobs of an application."""
    with noted(tag):
        return after(previous, tag)


@dramatiq.actor(store_results=True)
def shaky(tag: str) -> str:
    """Fails the first time, so that it is retried."""
    with noted(tag):
        try:
            (Path(os.environ[VARIABLE]).parent / "shaky" / tag).touch(exist_ok=False)
        except FileExistsError:
            return tag
        raise ValueError("fails the first time")


@task(criticality="deferrable")
async def collect(tag: str) -> str:
    """Runs when a group is complete."""
    with noted(tag):
        assert (await aclaude().messages.create(**question(tag))).content
    return tag


TASKS = {actor.actor_name: actor for actor in (summary, report, reply, decision, plain, shaky, collect)}
