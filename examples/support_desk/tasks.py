# SPDX-License-Identifier: Apache-2.0
"""A support desk: somebody waits for triage, nobody waits for summaries."""

from datetime import timedelta

from tideover import aclaude, ai_task, claude, last_served, text_of

MODEL = "claude-sonnet-5"


@ai_task(criticality="critical", reroute=["openai"], expires_in=timedelta(minutes=2))
async def triage(ticket: str) -> str:
    """Which team should take this ticket? The customer sees the answer, so it may come from the fallback."""
    question = f"Which team should take this ticket: billing, product or security? {ticket}"
    reply = await aclaude().messages.create(model=MODEL, max_tokens=10, messages=[{"role": "user", "content": question}])
    served = last_served()
    assert served is not None
    return f"{text_of(reply)} (answered by {served.route})"


@ai_task(criticality="deferrable")
def summarise(ticket: str) -> str:
    """One line for the weekly report. It may wait, and it never spends money at the fallback."""
    question = f"Summarise in one line: {ticket}"
    reply = claude().messages.create(model=MODEL, max_tokens=60, messages=[{"role": "user", "content": question}])
    return text_of(reply)
