# SPDX-License-Identifier: Apache-2.0
"""The catalogue of log events: past tense, subject first. None is made up elsewhere, none carries a prompt or a key.

Where an application has configured structlog, events go there; elsewhere to the standard logger `tideover` as key=value lines.
structlog is imported at the first event, because a producer seldom has one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tideover.core.breaker import Breaker, Transition

CHANGES = {
    "closed": "breaker_closed",
    "suspect": "breaker_suspected",
    "open": "breaker_opened",
    "half-open": "breaker_half_opened",
    "recovering": "breaker_recovering",
}
PARKED = {
    "auth": "its credential is refused and never worked: mend it; the route is asked again by itself",
    "quota": "its money is spent: raise the limit; the route is asked again by itself",
    "model": "it never knew this model: mend the route's `models`; it is asked again by itself",
}


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


def pace_changed(key: str, rate: float, factor: str) -> None:
    """Another thing than before keeps the pace from being higher."""
    log().info("pace_changed", breaker=key, calls_per_s=round(rate, 2), limited_by=factor)


def job_rerouted(job_id: str, task: str, route: str, why: str) -> None:
    log().info("job_rerouted", job=job_id, task=task, route=route, why=why)


def budget_spent(route: str, budget: float) -> None:
    log().warning("budget_spent", route=route, budget_per_hour=budget)


def job_degraded(job_id: str, task: str, why: str) -> None:
    log().warning("job_degraded", job=job_id, task=task, why=why)


def job_expired(job_id: str, task: str, queue: str) -> None:
    log().warning("job_expired", job=job_id, task=task, queue=queue)


def job_discarded(job_id: str, task: str, queue: str, who: str, because: str) -> None:
    """Somebody ended a held job by hand."""
    log().info("job_discarded", job=job_id, task=task, queue=queue, who=who, because=because)


def job_restored(job_id: str, task: str, queue: str, who: str) -> None:
    """Somebody put a dead letter back into its queue."""
    log().info("job_restored", job=job_id, task=task, queue=queue, who=who)


def job_needs_review(job_id: str, task: str, why: str) -> None:
    log().error("job_needs_review", job=job_id, task=task, why=why, remedy="mend it, then `tideover release` the job")


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


def job_taken_over(job_id: str, task: str) -> None:
    """This worker was silent for so long that what it had fetched was given to another one; it leaves the job to that."""
    log().warning("job_taken_over", job=job_id, task=task)


def jobs_reclaimed(queue: str, n: int) -> None:
    log().warning("jobs_reclaimed", queue=queue, n=n)


def worker_without_tideover(worker: str) -> None:
    log().warning(
        "worker_without_tideover",
        worker=worker,
        remedy="it holds nothing in an outage, and ends jobs outside the account: replace it by one with tideover",
    )


def jobs_ended_elsewhere(n: int) -> None:
    log().info("jobs_ended_elsewhere", n=n)


def orphans_forgotten(jobs: int, notes: int, tenants: int) -> None:
    """Nothing is left of jobs that ended elsewhere; `tenants`: so many have the places of theirs again."""
    log().info("orphans_forgotten", jobs=jobs, notes=notes, tenants=tenants)


def schema_differs(namespace: str, stored: int, ours: int) -> None:
    log().warning(
        "schema_differs",
        namespace=namespace,
        stored=stored,
        ours=ours,
        remedy="newer processes are at work: upgrade this one soon",
    )


def schema_raised(namespace: str, schema: int) -> None:
    log().info("schema_raised", namespace=namespace, schema=schema)


def breaker_changed(key: str, was: Breaker, change: Transition) -> None:
    """A breaker moved, with the evidence that moved it."""
    charts = was.charts
    said = {
        "breaker": key,
        "was": was.state,
        "why": change.why,
        "calls": charts.calls,
        "failed": charts.failed,
        "brownout": round(charts.brownout, 1),
        "blackout": round(charts.blackout, 1),
        "threshold": round(was.base.threshold, 1),
    }
    if change.parked == "paused":
        log().error("task_paused", **said, remedy="mend the task, then `tideover breaker resume` it")
    elif change.parked:
        log().error("route_parked", **said, cause=change.parked, remedy=PARKED[change.parked])
    else:
        log().warning(CHANGES[change.to] if was.state != change.to else "breaker_braked", **said)


def process_stepped_apart(key: str, why: str) -> None:
    """Only this process finds a route down: its jobs go back to their queue, for others."""
    log().error("process_stepped_apart", breaker=key, why=why, remedy="see to this machine's network and credentials")


def status_page_unreadable(url: str, why: str) -> None:
    log().info("status_page_unreadable", url=url, why=why)


def process_rejoined(key: str) -> None:
    log().warning("process_rejoined", breaker=key)


def probe_answered(key: str, ok: bool, why: str) -> None:
    log().info("probe_answered", breaker=key, ok=ok, why=why)


def mode_changed(mode: str) -> None:
    log().warning("mode_changed", mode=mode)


def verdict_observed(job_id: str, task: str, verdict: str) -> None:
    log().info("verdict_observed", job=job_id, task=task, would=verdict)


def store_unavailable(doing: str, error: str) -> None:
    log().warning("store_unavailable", doing=doing, error=error)


def store_at_risk(risk: str, remedy: str, *, certain: bool) -> None:
    """Redis may lose what it accepted; `certain`: at its next restart it will."""
    (log().critical if certain else log().warning)("store_at_risk", risk=risk, remedy=remedy)


def fault_inside(doing: str) -> None:
    """A defect of ours; the job runs as stock dramatiq would run it."""
    log().error("fault_inside", doing=doing, exc_info=True)


def holding_unavailable(broker: str) -> None:
    log().warning(
        "holding_unavailable",
        broker=broker,
        remedy="jobs run as they are: tideover holds on dramatiq's RedisBroker, and on its StubBroker with tideover[testing]",
    )
