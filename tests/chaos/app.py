# SPDX-License-Identifier: Apache-2.0
"""The application of the chaos runs: one deferrable task as a coroutine, one as a function, one critical."""

from __future__ import annotations

from datetime import timedelta

from tideover import aclaude, ai_task, claude, text_of

MODEL = "claude-opus-4-8"


def question(tag: str) -> dict[str, object]:
    return {
        "model": MODEL,
        "max_tokens": 8,
        "messages": [{"role": "user", "content": "hello"}],
        "extra_headers": {"x-tideover-job": tag},
    }


@ai_task(criticality="deferrable", max_retries=3)
async def summary(tag: str) -> str:
    return text_of(await aclaude().messages.create(**question(tag)))


@ai_task(criticality="deferrable", max_retries=3)
def report(tag: str) -> str:
    return text_of(claude().messages.create(**question(tag)))


@ai_task(criticality="critical", expires_in=timedelta(minutes=10), reroute=["openai"], max_retries=3)
async def reply(tag: str) -> str:
    return text_of(await aclaude().messages.create(**question(tag)))
