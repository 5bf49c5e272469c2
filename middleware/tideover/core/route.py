# SPDX-License-Identifier: Apache-2.0
"""A route as a decision sees it: one hop of a job's chain, and the permit that lets a job pass."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tideover.core.breaker import Breaker

FORCED = "*"
TASK = "task:"
WHOLE = "*"
"""In the place of a model: the whole route. No model is called so, because odd characters are replaced."""

ODD = re.compile(r"[^\w.:/@+-]")
LONGEST_MODEL = 120

BUSY = "it has no room just now"
NO_TIME = "the job has no time left for a call"
NO_TURN = "its pace has no room just now"
"""The refusals that pass by themselves: its slots are taken, or it asked for quiet; its pace, or its limits, have no room."""


def breaker_key(route: str, model: str) -> str:
    """The name of the breaker of a route and the model that the task asks for. Odd characters and endless names are cut.

    >>> breaker_key("anthropic", "claude-opus-4-8")
    'anthropic/claude-opus-4-8'
    """
    return f"{route}/{ODD.sub('_', model)[:LONGEST_MODEL]}"


def route_key(route: str) -> str:
    """The name of the breaker of a whole route, which stands above those of its models.

    >>> route_key("anthropic"), above("anthropic/claude-opus-4-8")
    ('anthropic/*', 'anthropic/*')
    """
    return f"{route}/{WHOLE}"


def above(key: str) -> str:
    """The breaker that stands above this one."""
    return route_key(split_key(key)[0])


def task_key(task: str) -> str:
    """The name of the breaker of a task: it opens when most of its jobs are refused as wrong, and only a human closes it."""
    return f"{TASK}{ODD.sub('_', task)[:LONGEST_MODEL]}"


def is_task_key(key: str) -> bool:
    """Whether a breaker is a task's. The name of a route holds no colon."""
    return key.startswith(TASK)


def split_key(key: str) -> tuple[str, str]:
    """
    >>> split_key("ollama/library/llama3")
    ('ollama', 'library/llama3')
    """
    route, _, model = key.partition("/")
    return route, model


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave for one released job to run in one generation of one breaker. An operator's `release --force` is for any.

    One without a key (`NO_PERMIT`) is leave to be judged anew: a job that waited for no breaker passes the gates as any other.
    """

    key: str
    generation: int

    @classmethod
    def parse(cls, text: str) -> Permit:
        """
        >>> Permit.parse("anthropic/claude-opus-4-8@7")
        Permit(key='anthropic/claude-opus-4-8', generation=7)
        >>> str(Permit("anthropic/claude-opus-4-8", 7)), str(NO_PERMIT), Permit.parse("") == NO_PERMIT
        ('anthropic/claude-opus-4-8@7', '', True)
        """
        key, _, generation = text.rpartition("@")
        return cls(key, int(generation or 0))

    def __str__(self) -> str:
        return f"{self.key}@{self.generation}" if self.key else ""

    @property
    def forced(self) -> bool:
        return self.key == FORCED

    def covers(self, key: str, breaker: Breaker) -> bool:
        """Whether it lets a job use `key` now. A higher generation than ours means that our view is the stale one."""
        if self.forced:
            return True
        if self.key != key or self.generation < breaker.generation:
            return False
        return self.generation > breaker.generation or not breaker.is_down


NO_PERMIT = Permit("", 0)
"""Of a job that is released for no breaker: it meets every gate."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What goes with a job from hold to hold: its permit, how often and how long (ms) it was held, workers that died with it.

    `begun_by` is the worker that runs it, noted only after a first death: then the next one may be its doing.
    """

    permit: Permit | None = None
    holds: int = 0
    held_ms: int = 0
    deaths: int = 0
    begun_by: str = ""

    @classmethod
    def parse(cls, text: str) -> Mark:
        """
        >>> Mark.parse("anthropic/claude-opus-4-8@7\\t1\\t60000\\t0\\t")
        Mark(permit=Permit(key='anthropic/claude-opus-4-8', generation=7), holds=1, held_ms=60000, deaths=0, begun_by='')
        """
        permit, holds, held_ms, deaths, begun_by = text.split("\t")
        return cls(Permit.parse(permit) if permit else None, int(holds), int(held_ms), int(deaths), begun_by)

    def __str__(self) -> str:
        return f"{self.permit or ''}\t{self.holds}\t{self.held_ms}\t{self.deaths}\t{self.begun_by}"


@dataclass(frozen=True, slots=True)
class Hop:
    """One route of a job's chain for one model.

    `refused` says why it cannot carry this very call; None: it can. `serves`: it knows the model, so a job may wait for it.
    `apart`: only this process cannot reach it, so the job is better off with another one.
    """

    route: str
    key: str
    breaker: Breaker
    refused: str | None = None
    serves: bool = True
    apart: bool = False
