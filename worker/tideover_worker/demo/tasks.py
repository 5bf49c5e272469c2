# SPDX-License-Identifier: Apache-2.0
"""The AI tasks of the demo: what an application would write. The workers run this module; the producer imports it to send."""

from __future__ import annotations

from datetime import timedelta

from tideover import aclaude, ai_task, last_served
from tideover.attempt import current

EXPIRES_IN = timedelta(hours=2)
"""Generous, because the demo shows an outage, not an expiry."""


async def ask(tag: str, model: str, input_tokens: int, output_tokens: int) -> str:
    """One call. Its headers tell the fake provider which job it is for, in which attempt, and how long to take."""
    message = await aclaude().messages.create(
        model=model,
        max_tokens=max(1, output_tokens),
        messages=[{"role": "user", "content": f"Please see to {tag}."}],
        extra_headers={
            "x-tideover-job": f"{tag}/{retries_so_far()}",
            "x-fake-input-tokens": str(input_tokens),
            "x-fake-output-tokens": str(max(1, output_tokens)),
        },
    )
    served = last_served()
    return f"{message.usage.output_tokens} tokens from {'nobody' if served is None else served.route}"


def retries_so_far() -> int:
    """How many attempts of this job were burnt before; stands in the ledger beside the job."""
    attempt = current.get()
    return 0 if attempt is None else int(attempt.message.options.get("retries", 0))


@ai_task(criticality="critical", reroute=["openai"], expires_in=EXPIRES_IN, max_retries=3)
async def reply(tag: str, model: str, input_tokens: int, output_tokens: int) -> str:
    """Somebody waits for it."""
    return await ask(tag, model, input_tokens, output_tokens)


@ai_task(criticality="deferrable", max_retries=3)
async def summary(tag: str, model: str, input_tokens: int, output_tokens: int) -> str:
    """It may wait."""
    return await ask(tag, model, input_tokens, output_tokens)
