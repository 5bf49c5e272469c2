# SPDX-License-Identifier: Apache-2.0
"""Who goes first among held jobs: the most urgent, with tenants taking turns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TypeVar

T = TypeVar("T")

HEAD_START = 8
"""Turns that an urgent job is ahead of its tenant's others: enough to meet deadlines, too few to starve other tenants."""


def in_turns(
    waiting: Iterable[T],
    *,
    tenant: Callable[[T], str],
    order: Callable[[T], int],
    urgent_by: int,
    weights: Mapping[str, float] = MappingProxyType({}),
) -> list[T]:
    """All of `waiting`, as they should go: in each turn one job of each tenant, its earliest; in a turn the earliest first.

    A job whose order is below `urgent_by` goes `HEAD_START` turns earlier than its turn is. With one tenant (or none) this is
    plainly earliest first. A tenant has as many jobs in a turn as `weights` says, one if it says nothing. The idea is
    round-robin fair queueing (Nagle, RFC 970), the weights are those of Shreedhar and Varghese (1995).

    >>> in_turns(["a1", "a2", "a3", "b4", "b5"], tenant=lambda j: j[0], order=lambda j: int(j[1]), urgent_by=0,
    ...          weights={"b": 2})
    ['a1', 'b4', 'b5', 'a2', 'a3']
    """
    turns: defaultdict[str, int] = defaultdict(int)
    placed: list[tuple[float, int, T]] = []
    for job in sorted(waiting, key=order):
        turn = int(turns[tenant(job)] / weights.get(tenant(job), 1.0))
        turns[tenant(job)] += 1
        placed.append((turn - HEAD_START if order(job) < urgent_by else turn, order(job), job))
    return [job for *_, job in sorted(placed, key=lambda entry: entry[:2])]
