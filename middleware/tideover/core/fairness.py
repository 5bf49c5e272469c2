# SPDX-License-Identifier: Apache-2.0
"""Who goes first among held jobs: the most urgent, with tenants taking turns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

HEAD_START = 8
"""Turns that an urgent job is ahead of its tenant's others: enough to meet deadlines, too few to starve other tenants."""


def in_turns(waiting: Iterable[T], *, tenant: Callable[[T], str], order: Callable[[T], int], urgent_by: int) -> list[T]:
    """All of `waiting`, as they should go: in each turn one job of each tenant, its earliest; in a turn the earliest first.

    A job whose order is below `urgent_by` goes `HEAD_START` turns earlier than its turn is. With one tenant (or none) this is
    plainly earliest first. The idea is round-robin fair queueing (Nagle, RFC 970).
    """
    turns: defaultdict[str, int] = defaultdict(int)
    placed: list[tuple[int, int, T]] = []
    for job in sorted(waiting, key=order):
        turn = turns[tenant(job)]
        turns[tenant(job)] += 1
        placed.append((turn - HEAD_START if order(job) < urgent_by else turn, order(job), job))
    return [job for *_, job in sorted(placed, key=lambda entry: entry[:2])]
