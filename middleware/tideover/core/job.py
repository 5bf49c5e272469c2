# SPDX-License-Identifier: Apache-2.0
"""What a decision may know of one job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeGuard

Criticality = Literal["critical", "deferrable"]
"""*critical*: somebody waits, so it may be rerouted. *deferrable*: it may wait out an outage."""

CRITICALITIES: tuple[Criticality, ...] = ("critical", "deferrable")

End = Literal["succeeded", "failed", "expired", "discarded", "unexplained", "elsewhere"]
"""How a job ended. *unexplained* is an acknowledgement for which nobody recorded an end: a defect that must show.
*elsewhere*: a worker without tideover had it, so nobody knows."""

ENDS: tuple[End, ...] = ("succeeded", "failed", "expired", "discarded", "unexplained", "elsewhere")

CRITICAL_SUFFIX = ".critical"


def is_criticality(value: object) -> TypeGuard[Criticality]:
    return value in CRITICALITIES


def lane(queue: str, criticality: Criticality) -> str:
    """The list that a job of this criticality waits in: each queue has two, so that critical jobs overtake.

    >>> lane("default", "critical"), lane("default", "deferrable")
    ('default.critical', 'default')
    """
    base = queue.removesuffix(CRITICAL_SUFFIX)
    return base + CRITICAL_SUFFIX if criticality == "critical" else base


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One enqueued request to run a task.

    `routes` are the names of the routes it may use, the first one its primary; `primary` is its task's, which it may be denied
    (empty: the same); `models` those that its task is known to call (empty: not known yet).
    `expires_at` is unix time, None when the answer never becomes useless.
    `refuses_loss`: it goes to no route that would lose a part of its request. `degrades`: its task has a degraded answer.
    `budget_per_hour`: what the task may spend on rerouted calls; None: no limit.
    """

    id: str
    task: str
    criticality: Criticality
    routes: tuple[str, ...]
    models: tuple[str, ...] = ()
    expires_at: float | None = None
    reroute_when_deferrable: bool = False
    degrades: bool = False
    primary: str = ""
    refuses_loss: bool = False
    budget_per_hour: float | None = None

    @property
    def may_reroute(self) -> bool:
        return self.criticality == "critical" or self.reroute_when_deferrable
