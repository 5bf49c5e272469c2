# SPDX-License-Identifier: Apache-2.0
"""The breaker of one route and model: one transition table, and the functions that walk it.

                    failures                probe due
        closed ───────────────▶ open ◀───────────────▶ half-open
          ▲                      ▲      probe failed       │
          │ settled              │ failures                │ probes succeeded
          └────────────────── recovering ◀─────────────────┘

The generation moves at each opening and each closing. It stamps outcomes and permits: an outcome of an earlier generation moves
nothing, a permit of an earlier one is void.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tideover.core.policy import BreakerPolicy

State = Literal["closed", "open", "half-open", "recovering"]

TRANSITIONS: dict[State, frozenset[State]] = {
    "closed": frozenset({"open"}),
    "open": frozenset({"half-open"}),
    "half-open": frozenset({"open", "recovering"}),
    "recovering": frozenset({"open", "closed"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Breaker:
    """What all processes know of one route and model.

    `since`: unix time of the last change of state; `opened_at`: of the opening of this generation, 0 if never;
    `throttled_until`: the provider asked for quiet until then; `why`: the last failure, in a few words.
    """

    state: State = "closed"
    generation: int = 0
    since: float = 0.0
    opened_at: float = 0.0
    probes_failed: int = 0
    throttled_until: float = 0.0
    why: str = ""


CLOSED = Breaker()


@dataclass(frozen=True, slots=True)
class Window:
    """Calls of the current generation that ended within the policy's window."""

    ok: int
    failed: int


@dataclass(frozen=True, slots=True)
class Transition:
    """A change that the store is asked to make, if the breaker is still as it was."""

    to: State
    why: str


class IllegalTransition(ValueError):
    """A change that the table does not have: a defect of the caller."""


def generation_after(breaker: Breaker, to: State) -> int:
    """The generation once `breaker` is in state `to`.

    >>> generation_after(Breaker(state="closed", generation=4), "open")
    5
    >>> generation_after(Breaker(state="half-open", generation=5), "open")
    5
    """
    if to not in TRANSITIONS[breaker.state]:
        raise IllegalTransition(f"{breaker.state} -> {to}")
    opens = to == "open" and breaker.state != "half-open"
    return breaker.generation + (1 if opens or to == "closed" else 0)


def judge(breaker: Breaker, window: Window, *, now: float, waiting: bool, policy: BreakerPolicy) -> Transition | None:
    """What the calls of the window, and the time, do to a breaker; None: nothing. `waiting`: jobs are held for it."""
    if breaker.state in ("open", "half-open"):
        return None
    calls = window.ok + window.failed
    if calls >= policy.min_calls and window.failed >= policy.failure_ratio * calls:
        return Transition("open", breaker.why or f"{window.failed} of {calls} calls failed")
    if breaker.state == "recovering":
        quiet_s = now - breaker.since
        if quiet_s >= (policy.settle_max_s if waiting else policy.settle_s):
            return Transition("closed", "recovered")
    return None


def probe_wait_s(breaker: Breaker, policy: BreakerPolicy) -> float:
    """Seconds from the last change of an open breaker to its next probe.

    >>> [probe_wait_s(Breaker(state="open", probes_failed=n), BreakerPolicy()) for n in range(4)]
    [5.0, 7.5, 11.25, 15.0]
    """
    growth = 1.5 ** min(breaker.probes_failed, 50)
    return float(min(policy.probe_max_s, policy.probe_after_s * growth))


def probe_due(breaker: Breaker, *, now: float, policy: BreakerPolicy) -> bool:
    """Whether it is time to probe. A half-open breaker whose prober died is probed again after `probe_max_s`."""
    if breaker.state == "half-open":
        return now - breaker.since >= policy.probe_max_s
    return breaker.state == "open" and now - breaker.since >= probe_wait_s(breaker, policy)
