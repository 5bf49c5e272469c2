# SPDX-License-Identifier: Apache-2.0
"""Gives the answer of a job to those that were held with its key and wait for it."""

from __future__ import annotations

from typing import Any

from dramatiq.broker import MessageProxy

from tideover import clock
from tideover.errors import StoreUnavailable
from tideover.gate import Gate, last_line, twin_of
from tideover.results import can_be_stored, store_answer
from tideover.store.client import FAILED
from tideover.store.facts import HeldFacts
from tideover.store.stories import Line, told_by


def answer(gate: Gate, queue: str, message: MessageProxy, result: Any) -> None:
    """Ends everybody who waits with the key of a job that has succeeded, before that job itself is ended.

    If this process dies on the way the job runs again and answers the others; nobody waits for a job that is no more.
    """
    twin, storable = twin_of(message), can_be_stored(gate.broker, result)
    while not gate.twins.is_done(queue, twin):
        waiting = gate.twins.waiting(queue, twin)
        for waiter in waiting if storable else ():
            store(gate, queue, waiter, result)
        ended = gate.twins.answered(queue, waiting) if waiting else []
        gate.tell(*(line for waiter, ok in zip(waiting, ended, strict=True) if ok for line in lines(waiter, message)))


def store(gate: Gate, queue: str, waiter: HeldFacts, result: Any) -> None:
    """Stores the answer for one who waits. `StoreUnavailable`: not just now; the acknowledgement is tried again, and this."""
    try:
        store_answer(gate.broker, queue, waiter.task, waiter.job_id, result)
    except FAILED:
        raise
    except Exception as error:
        raise StoreUnavailable(f"the result backend failed: {type(error).__name__}") from error


def lines(waiter: HeldFacts, message: MessageProxy) -> list[Line]:
    """The story of a job that another one answered."""
    said = last_line(message, "succeeded").facts | {"answered_with": message.message_id}
    return [*told_by(waiter), Line(waiter.job_id, clock.now(), "succeeded", said)]
