# SPDX-License-Identifier: Apache-2.0
"""dramatiq's hooks around one attempt."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

from dramatiq.broker import MessageProxy
from dramatiq.middleware import GroupCallbacks, Middleware, MiddlewareError
from dramatiq.results import Results

from tideover.attempt import note_of
from tideover.errors import StoreUnavailable
from tideover.gate import Gate
from tideover.store.client import FAILED, FULL, GONE
from tideover_worker import aborts, groups

THREAD_BOUND = frozenset({"TimeLimit", "ShutdownNotifications"})
"""Middlewares that raise into the thread that called them; for a coroutine the runner does their work."""

SUCCEEDED = "after_process_message"


@lru_cache(maxsize=64)
def having(middleware: tuple[Middleware, ...], hook: str, bound: bool) -> tuple[Middleware, ...]:
    """Those of these middlewares that do something at a hook; `bound`: also those that are bound to the calling thread."""
    does_nothing = getattr(Middleware, hook)
    doing = (m for m in middleware if bound or type(m).__name__ not in THREAD_BOUND)
    return tuple(m for m in doing if getattr(getattr(m, hook), "__func__", None) is not does_nothing)


class Hooks:
    """dramatiq's emit for one job; `bound`: also the middlewares that are bound to the calling thread."""

    def __init__(self, gate: Gate, *, bound: bool, abortee: aborts.Abortee | None = None) -> None:
        self.broker, self.keys = gate.broker, gate.ledger.keys
        self.bound, self.abortee = bound, abortee

    def before(self, message: MessageProxy) -> None:
        for middleware in having(tuple(self.broker.middleware), "before_process_message", self.bound):
            self._call(middleware, "before_process_message", message, {})

    def after(self, signal: str, message: MessageProxy, **kwargs: Any) -> None:
        note_of(message).concluding = True
        for middleware in reversed(having(tuple(self.broker.middleware), f"after_{signal}", self.bound)):
            self._call(middleware, f"after_{signal}", message, kwargs)

    def _run(self, middleware: Middleware, hook: str, message: MessageProxy, kwargs: dict[str, Any]) -> None:
        if hook == "before_process_message" and self.abortee is not None and aborts.is_abortable(middleware):
            aborts.begin(middleware, self.broker, message, self.abortee)
        elif hook == "after_skip_message" and type(middleware).__name__ == "Prometheus" and is_held(message):
            not_processed(middleware, message)
        elif hook == SUCCEEDED and isinstance(middleware, GroupCallbacks) and groups.takes_over(middleware):
            if kwargs.get("exception") is None:
                groups.arrive(middleware, self.keys, self.broker, message)
        else:
            getattr(middleware, hook)(self.broker, message, **kwargs)

    def _call(self, middleware: Middleware, hook: str, message: MessageProxy, kwargs: dict[str, Any]) -> None:
        try:
            self._run(middleware, hook, message, kwargs)
        except Exception as error:
            if isinstance(error, MiddlewareError) and hook.startswith("before_"):
                raise
            if hook == SUCCEEDED and may_repeat(middleware, error, kwargs.get("exception")):
                note_of(message).again.append(partial(self._run, middleware, hook, message, kwargs))
                note_of(message).follow_up_failed = False
            self.broker.logger.critical("Unexpected failure in %s of %r.", hook, middleware, exc_info=True)


def is_held(message: MessageProxy) -> bool:
    attempt = note_of(message).attempt
    return attempt is not None and (attempt.hold is not None or attempt.give_back)


def not_processed(metrics: Any, message: MessageProxy) -> None:
    """What dramatiq's Prometheus does after a job, without counting it: a held job is counted when it has ended."""
    metrics.message_start_times.pop(message.message_id, None)
    metrics.inprogress_messages.labels(message.queue_name, message.actor_name).dec()


def may_repeat(middleware: Middleware, error: Exception, failure: BaseException | None) -> bool:
    """Whether dramatiq's own hook runs again before the acknowledgement: Redis failed it, and the answer has been paid for."""
    if isinstance(middleware, Results):
        return isinstance(error, FAILED)
    ours = type(middleware).__module__.startswith("dramatiq.")
    return ours and failure is None and isinstance(error, (*GONE, FULL, StoreUnavailable))
