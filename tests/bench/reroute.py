# SPDX-License-Identifier: Apache-2.0
"""A critical call while its provider is down: its latency beside the fallback's own, and what the dead provider still gets.

    python tests/bench/reroute.py [jobs] [--litellm PYTHON]

One side after the other: the fallback alone (the openai SDK, which reads a stream), tideover once its breaker is open,
pydantic-ai's FallbackModel and, if the Python of an environment that has it is named, LiteLLM's Router; both as they come.
The primary answers every call with 529. Each side gets a fallback that draws the same latencies.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.worker import Worker

import tideover
from tideover import Tideover, aclaude, ai_task
from tideover import settings as tideover_settings
from tideover.testing import Call, FakeProvider, Fault, Latency
from tideover_worker import embedded

MODEL, OTHER = "claude-opus-4-8", "gpt-5.5"
ASK: dict[str, Any] = {"max_tokens": 20, "messages": [{"role": "user", "content": "A word, please."}]}
WARM = 8
"""Calls before those whose latency is measured, of each side: connections, imports, and for tideover its breaker opens."""

LITELLM = """
import litellm, sys, time
primary, fallback, jobs = sys.argv[1], sys.argv[2], int(sys.argv[3])
claude = {"model": "anthropic/claude-opus-4-8", "api_base": primary, "api_key": "k"}
gpt = {"model": "openai/gpt-5.5", "api_base": fallback, "api_key": "k"}
router = litellm.Router(
    model_list=[{"model_name": "claude", "litellm_params": claude}, {"model_name": "gpt", "litellm_params": gpt}],
    fallbacks=[{"claude": ["gpt"]}],
)
for _ in range(jobs):
    began = time.perf_counter()
    router.completion(model="claude", max_tokens=20, messages=[{"role": "user", "content": "A word, please."}])
    print(time.perf_counter() - began, flush=True)
"""


@contextmanager
def providers() -> Iterator[tuple[FakeProvider, FakeProvider]]:
    """A primary that is down, and a fallback whose latencies are the same each time."""
    swift = Latency(base_s=0.01, per_output_token_s=0.0)
    slow = Latency(base_s=0.05, per_output_token_s=0.001)
    with (
        FakeProvider("anthropic", latency=swift) as primary,
        FakeProvider("openai", dialect="openai-compatible", latency=slow, seed=7) as fallback,
    ):
        primary.fail(Fault.OVERLOADED)
        yield primary, fallback


def alone(jobs: int, primary: FakeProvider, fallback: FakeProvider) -> list[float]:
    from openai import OpenAI

    with OpenAI(api_key="k", base_url=fallback.base_url, max_retries=0) as client:
        return timed(jobs, lambda: list(client.chat.completions.create(model=OTHER, stream=True, **ASK)))


def by_pydantic_ai(jobs: int, primary: FakeProvider, fallback: FakeProvider) -> list[float]:
    from anthropic import AsyncAnthropic
    from openai import AsyncOpenAI
    from pydantic_ai import Agent
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.fallback import FallbackModel
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    async def run() -> list[float]:
        claude = AnthropicProvider(anthropic_client=AsyncAnthropic(api_key="k", base_url=primary.base_url))
        gpt = OpenAIProvider(openai_client=AsyncOpenAI(api_key="k", base_url=fallback.base_url))
        agent = Agent(FallbackModel(AnthropicModel(MODEL, provider=claude), OpenAIChatModel(OTHER, provider=gpt)))
        took = []
        for _ in range(jobs):
            began = time.perf_counter()
            await agent.run("A word, please.", model_settings={"max_tokens": 20})
            took.append(time.perf_counter() - began)
        return took

    return asyncio.run(run())


def by_tideover(jobs: int, primary: FakeProvider, fallback: FakeProvider) -> list[float]:
    """Times each call in the function that makes it."""
    took: list[float] = []
    with private_redis() as url:
        os.environ |= {
            "TIDEOVER_REDIS_URL": url,
            "ANTHROPIC_API_KEY": "k",
            "TIDEOVER_ROUTES__ANTHROPIC__KIND": "anthropic",
            "TIDEOVER_ROUTES__ANTHROPIC__BASE_URL": primary.base_url,
            "TIDEOVER_ROUTES__OPENAI__KIND": "openai-compatible",
            "TIDEOVER_ROUTES__OPENAI__BASE_URL": fallback.base_url,
            "TIDEOVER_ROUTES__OPENAI__MODELS": f'{{"{MODEL}": "{OTHER}"}}',
        }
        tideover_settings.forget()
        broker: Any = RedisBroker(url=url, namespace="bench")  # type: ignore[no-untyped-call]
        broker.add_middleware(Tideover())
        dramatiq.set_broker(broker)

        @ai_task(criticality="critical", expires_in=timedelta(minutes=5), reroute=["openai"], models=[MODEL], broker=broker)
        async def reply(n: int) -> None:
            began = time.perf_counter()
            await aclaude().messages.create(model=MODEL, **ASK, extra_headers={"x-tideover-job": f"{n}"})
            took.append(time.perf_counter() - began)

        worker = Worker(broker, worker_threads=2)  # type: ignore[no-untyped-call]
        worker.start()
        for n in range(jobs):
            tideover.wait_for_sync(reply.send(n), timeout=timedelta(minutes=1), through_holds=True)
        worker.stop()
    return took[-jobs:]


@contextmanager
def private_redis() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        server = embedded.start(Path(folder))
        try:
            yield server.url
        finally:
            embedded.stop(Path(folder))


def by_litellm(python: str, jobs: int, primary: FakeProvider, fallback: FakeProvider) -> list[float]:
    command = [python, "-c", LITELLM, primary.base_url, fallback.base_url, str(jobs)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(line) for line in run.stdout.split() if line.replace(".", "", 1).isdigit()]


def timed(jobs: int, call: Callable[[], object]) -> list[float]:
    took = []
    for _ in range(jobs):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return took


def p95(took: list[float]) -> float:
    return statistics.quantiles(took, n=20)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="?", type=int, default=60)
    parser.add_argument("--litellm", metavar="PYTHON", help="the Python of an environment in which litellm is installed")
    asked = parser.parse_args()
    sides: dict[str, Callable[..., list[float]]] = {"fallback alone": alone, "tideover": by_tideover}
    sides["pydantic-ai FallbackModel"] = by_pydantic_ai
    if asked.litellm:
        sides["LiteLLM Router"] = lambda *args: by_litellm(asked.litellm, *args)
    own = 0.0
    print(f"{'':28}{'p50':>8}{'p95':>9}{'p95 beside its own':>20}  calls to the dead primary, of {asked.jobs + WARM} jobs")
    for name, run in sides.items():
        with ExitStack() as stack:
            primary, fallback = stack.enter_context(providers())
            took = run(asked.jobs + WARM, primary, fallback)[WARM:]
            dead = primary.calls()
        own = own or p95(took)
        beside = f"x {p95(took) / own:.2f} ({(p95(took) - own) * 1000:+.0f} ms)"
        print(
            f"{name:28}{statistics.median(took) * 1000:>5.0f} ms{p95(took) * 1000:>6.0f} ms{beside:>20}  {told(name, dead)}",
            flush=True,
        )


def told(name: str, dead: list[Call]) -> str:
    """What the dead primary saw; of tideover's calls those of jobs are told from probes."""
    if name != "tideover":
        return f"{len(dead)}" if dead else ""
    of_jobs = sum(call.job is not None for call in dead)
    return f"{of_jobs}, until its breaker opened; then 0, and {len(dead) - of_jobs} probes"


if __name__ == "__main__":
    sys.exit(main())
