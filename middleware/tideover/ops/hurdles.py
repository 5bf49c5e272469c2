# SPDX-License-Identifier: Apache-2.0
"""What would keep held jobs although their provider is back: pure, of what was read of a namespace."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tideover.core.job import CRITICAL_SUFFIX
from tideover.core.route import WHOLE, above, is_task_key, split_key
from tideover.ops.breakers import BreakerStatus
from tideover.ops.drain import Order
from tideover.ops.standing import Standing, WorkerStatus
from tideover.ops.verdict import serves
from tideover.store.facts import Group, breaker_keys_of
from tideover.store.paces import ALL

DOWN = ("open", "half-open")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Held jobs that were looked at one by one; Redis ids of those that lack their facts, and of those that lack their body."""

    looked_at: int
    without_facts: tuple[str, ...]
    without_body: tuple[str, ...]


Hurdle = tuple[Literal["order", "breaker", "gone"], str]
"""What keeps a breaker's jobs although its provider answers, and the key that it is at."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was read of a namespace.

    `leader`: the worker that leads the drain; `schema`: the stored one; `option`: what a command needs to mean this namespace.
    """

    standing: Standing
    groups: Sequence[Group]
    orders: Mapping[str, Order]
    leader: str | None
    schema: int | None
    sample: Sample
    option: str = ""

    @cached_property
    def live(self) -> list[WorkerStatus]:
        return [worker for worker in self.standing.workers if not worker.silent]

    @cached_property
    def waiting(self) -> list[Group]:
        """Held jobs but for those that need review."""
        return [group for group in self.groups if group.facet.reason != "review"]

    @cached_property
    def breakers(self) -> dict[str, BreakerStatus]:
        return {breaker.key: breaker for breaker in self.standing.breakers}

    @cached_property
    def hurdles(self) -> dict[str, list[Hurdle]]:
        """By each breaker that jobs wait for and that would not let them go."""
        asked = {key: list(hurdles_of(self, key)) for key in breaker_keys_of(self.waiting)}
        return {key: hurdles for key, hurdles in asked.items() if hurdles}

    @cached_property
    def kept(self) -> Counter[Hurdle]:
        """Jobs that no breaker would let go, by what stands in their way."""
        jobs: Counter[Hurdle] = Counter()
        for group in self.waiting:
            if not self.may_go(group):
                hurdles = {hurdle for key in group.facet.breaker_keys for hurdle in self.hurdles[key]}
                jobs.update(dict.fromkeys(hurdles, group.n))
        return jobs

    @property
    def stay(self) -> int:
        """Held jobs that would not drain."""
        if not self.live or self.leader is None:
            return sum(group.n for group in self.waiting)
        go = (g for g in self.waiting if self.may_go(g) and self.is_served(g.queue) and self.is_known(g))
        return sum(group.n for group in self.waiting) - sum(group.n for group in go)

    def may_go(self, group: Group) -> bool:
        """Whether one of the breakers that it waits for would let it go."""
        return any(key not in self.hurdles for key in group.facet.breaker_keys)

    def crew(self, queue: str) -> list[WorkerStatus]:
        """The live workers that consume a queue; one that does looks after its delayed jobs as well."""
        return [worker for worker in self.live if queue in worker.queues]

    def is_served(self, queue: str) -> bool:
        """Whether somebody takes its jobs. A worker without tideover may, but it does not look into critical lanes."""
        return bool(self.crew(queue)) or (bool(self.standing.strangers) and not queue.endswith(CRITICAL_SUFFIX))

    def is_known(self, group: Group) -> bool:
        """Whether one of the workers of its queue may have imported its task."""
        crew = self.crew(group.queue)
        return not crew or any(worker.tasks is None or group.facet.task in worker.tasks for worker in crew)

    def command(self, words: str, *arguments: str) -> str:
        return f"`tideover {words}{''.join(f' {shlex.quote(argument)}' for argument in arguments)}{self.option}`"


def hurdles_of(seen: Seen, key: str) -> Iterator[Hurdle]:
    """What would keep the jobs of a breaker although its provider answers; nothing: they would go."""
    for name in (key, ALL):
        if name in seen.orders and seen.orders[name].max_rate == 0:
            yield "order", name
    if seen.standing.mode in ("bypass", "observe"):
        return  # every job goes, whatever the breaker
    for name in (key, above(key)):
        breaker = seen.breakers.get(name)
        if breaker is None or (breaker.forced is not None and breaker.forced.state == "closed"):
            continue
        if breaker.forced is not None or (breaker.parked is not None and breaker.computed in DOWN):
            yield "breaker", name
        elif breaker.computed in DOWN and is_gone(seen, name):
            yield "gone", name


def is_gone(seen: Seen, key: str) -> bool:
    """Whether nobody asks if it is back, because the settings know its route, or the model there, no more."""
    name, model = split_key(key)
    route = next((route for route in seen.standing.routes if route.name == name), None)
    return not is_task_key(key) and (route is None or (model != WHOLE and not serves(route, model)))
