# SPDX-License-Identifier: Apache-2.0
"""A dead letter as a job that begins anew: the same task and arguments, no attempt spent, and time until its expiry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from dramatiq.errors import DecodeError
from dramatiq.message import Message

from tideover.stamp import STAMP

NO_MESSAGE = (DecodeError, AttributeError, KeyError, TypeError)
"""What it means to dramatiq that nobody can read a body."""

SPENT: Final = ("retries", "traceback", "requeue_timestamp", "eta")
"""What dramatiq notes of attempts and delays."""

UNREADABLE: Final = "(unreadable)"
"""Stands for what was said of a job that nobody can read, so that the job needs review again."""


def readable(body: bytes) -> Message[Any] | None:
    """The message in a body; None where this process cannot read it."""
    try:
        message = Message.decode(body)
        return message if isinstance(message.options, dict) else None
    except NO_MESSAGE:
        return None


def renewed(message: Message[Any], queue: str, now_ms: float, expires_in_ms: float | None, *, same: bool) -> Message[Any]:
    """The job to put into this queue. `expires_in_ms`: how long its answer is useful from now on, None: for ever; with `same`
    it has the time that it had when it was sent.

    Its age begins anew, too, and its next end belongs to its story, because the story tells of it.
    """
    said = message.options.get(STAMP, {})
    stamp: dict[str, Any] = dict(said) if isinstance(said, Mapping) else {"criticality": UNREADABLE}
    options = {name: value for name, value in message.options.items() if name not in SPENT}
    forgiven_ms = stamp.pop("forgiven_ms", 0)
    if forgiven_ms and isinstance(options.get("max_age"), int):
        options["max_age"] -= forgiven_ms  # this attempt's age limit was longer by the time that it had been held
    lasts_ms = useful_ms(message, stamp) if same else expires_in_ms
    if "expires_ms" in stamp or lasts_ms is not None:
        stamp["expires_ms"] = None if lasts_ms is None else int(now_ms) + round(lasts_ms)
    options[STAMP] = {**stamp, "sent_ms": now_ms, "storied": True}
    return replace(message, queue_name=queue, options=options, message_timestamp=int(now_ms))


def useful_ms(message: Message[Any], stamp: Mapping[str, Any]) -> float | None:
    """How long the answer was useful, from the send or, of a delayed job, from its time. None: for ever, or for no time at all.

    A retry writes over when a delayed job was due; such a job's time counts from the send.
    """
    expires_ms, sent_ms, eta = stamp.get("expires_ms"), stamp.get("sent_ms"), message.options.get("eta")
    if not isinstance(expires_ms, int | float) or not isinstance(sent_ms, int | float):
        return None
    delayed = isinstance(eta, int | float) and not message.options.get("retries") and sent_ms < eta < expires_ms
    lasts_ms = expires_ms - int(eta if isinstance(eta, int | float) and delayed else sent_ms)
    return lasts_ms if lasts_ms > 0 else None
