# SPDX-License-Identifier: Apache-2.0
"""The catalogue of log events: past tense, subject first. None is made up elsewhere, none carries a prompt or a key.

Where an application has configured structlog, events go there; elsewhere to the standard logger `tideover` as key=value lines.
structlog is imported at the first event, because a producer seldom has one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any


@cache
def log() -> Any:
    import structlog

    if structlog.is_configured():
        return structlog.get_logger("tideover")
    plain = structlog.processors.KeyValueRenderer(key_order=["event"])
    return structlog.wrap_logger(logging.getLogger("tideover"), processors=[plain])


def jobs_held(queue: str, n: int, reason: str, wait_key: Sequence[str]) -> None:
    log().info("jobs_held", queue=queue, n=n, reason=reason, waits_for=list(wait_key))


def jobs_released(queue: str, n: int, left: int, key: str, rate: float) -> None:
    log().info("jobs_released", queue=queue, n=n, left=left, breaker=key, jobs_per_s=round(rate, 2))


def job_rerouted(job_id: str, task: str, route: str, why: str) -> None:
    log().info("job_rerouted", job=job_id, task=task, route=route, why=why)


def job_expired(job_id: str, task: str, queue: str) -> None:
    log().warning("job_expired", job=job_id, task=task, queue=queue)


def job_unreadable(queue: str, redis_id: str, error: str) -> None:
    log().error("job_unreadable", queue=queue, redis_id=redis_id, error=error, remedy="it is kept with the dead letters")


def job_body_missing(queue: str, redis_id: str) -> None:
    log().critical(
        "job_body_missing", queue=queue, redis_id=redis_id, remedy="the job is lost: who deleted keys of this database?"
    )


def job_end_unexplained(job_id: str, task: str) -> None:
    log().error("job_end_unexplained", job=job_id, task=task, remedy="please report this as a defect of tideover")


def jobs_adopted(queue: str, n: int) -> None:
    log().info("jobs_adopted", queue=queue, n=n)


def jobs_recovered(worker: str, queue: str, n: int) -> None:
    log().warning("jobs_recovered", worker=worker, queue=queue, n=n)


def jobs_reclaimed(queue: str, n: int) -> None:
    log().warning("jobs_reclaimed", queue=queue, n=n)


def breaker_changed(key: str, old: str, new: str, why: str) -> None:
    names = {"open": "breaker_opened", "half-open": "breaker_half_opened", "recovering": "breaker_recovering"}
    log().warning(names.get(new, "breaker_closed"), breaker=key, was=old, why=why)


def probe_answered(key: str, ok: bool, why: str) -> None:
    log().info("probe_answered", breaker=key, ok=ok, why=why)


def mode_changed(mode: str) -> None:
    log().warning("mode_changed", mode=mode)


def verdict_observed(job_id: str, task: str, verdict: str) -> None:
    log().info("verdict_observed", job=job_id, task=task, would=verdict)


def store_unavailable(doing: str, error: str) -> None:
    log().warning("store_unavailable", doing=doing, error=error)


def fault_inside(doing: str) -> None:
    """A defect of ours; the job runs as stock dramatiq would run it."""
    log().error("fault_inside", doing=doing, exc_info=True)


def holding_unavailable(broker: str) -> None:
    log().warning(
        "holding_unavailable", broker=broker, remedy="tideover holds on dramatiq's RedisBroker only; jobs run as they are"
    )
