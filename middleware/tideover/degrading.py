# SPDX-License-Identifier: Apache-2.0
"""The degraded answer of a task: made without a model, where no route is usable or the job is past its expiry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import dramatiq

from tideover import clock, events
from tideover.attempt import Attempt
from tideover.stamp import digest_of, stamp_of, tenant_of, twin_of
from tideover.store.client import FAILED


class Nothing:
    """For `degrade`, where None is an answer."""


NOTHING: Final = Nothing()


@dataclass(frozen=True, slots=True)
class LastGood:
    """The last good answer to a job of the same task and tenant with the same key; without keys, with the same arguments.

    It is kept in Redis, as results are. Where there is none the job waits as if its task had no degraded answer.
    """

    max_age: timedelta = timedelta(days=1)
    """Older ones are no answers any more."""


@dataclass(frozen=True, slots=True)
class Degraded:
    """An answer (it may be awaitable), and how old it is; None: it was made now."""

    value: Any
    age_s: float | None = None


Degrade = Callable[..., Any] | LastGood | Nothing | Any
"""What a task says of it: a function of the job's arguments, the last good answer, a constant, or nothing."""


def degraded_answer(degrade: Degrade, attempt: Attempt) -> Degraded | None:
    """The answer to a job; None: there is none. Blocks for a moment where it is a kept one."""
    if not isinstance(degrade, LastGood):
        return Degraded(degrade(*attempt.message.args, **attempt.message.kwargs) if callable(degrade) else degrade)
    try:
        found = attempt.health.answers.find(kept_under(attempt.message))
    except FAILED as error:
        events.store_unavailable("looking for the last good answer", type(error).__name__)
        return None
    if found is None:
        return None
    answer, at = found
    return Degraded(dramatiq.get_encoder().decode(answer)["answer"], max(0.0, clock.now() - at))


def keep(degrade: Degrade, attempt: Attempt, message: Any, result: Any) -> None:
    """Keeps a job's answer, where its task falls back on it. What cannot be kept is not: it is no part of the job."""
    if not isinstance(degrade, LastGood) or attempt.degraded:
        return
    try:
        answer = dramatiq.get_encoder().encode({"answer": result})
        if len(answer) <= attempt.health.settings.max_payload_bytes:
            attempt.health.answers.keep(kept_under(message), answer, clock.now(), degrade.max_age.total_seconds())
    except FAILED as error:
        events.store_unavailable("keeping a good answer", type(error).__name__)
    except Exception:  # noqa: BLE001 - whatever an encoder of the user's raises
        events.fault_inside("keeping a good answer")


def kept_under(message: Any) -> str:
    """The digest of a job's task, tenant and key, or arguments."""
    known = stamp_of(message).get("twin")
    if isinstance(known, str):
        return known
    return twin_of(message.actor_name, tenant_of(message), digest_of(message.args, message.kwargs))
