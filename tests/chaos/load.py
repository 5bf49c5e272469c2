# SPDX-License-Identifier: Apache-2.0
"""What a run sends: single jobs, pipelines and groups, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["single", "pipeline", "group"]

SINGLES = ["summary"] * 6 + ["report"] * 4 + ["reply"] * 4 + ["decision"] * 2 + ["shaky"] * 2 + ["plain"]
STEPS = ["summary", "report", "reply", "plain"]
CALLBACK = "collect"
MOST_DELAY_MS = 3000


@dataclass(frozen=True, slots=True)
class Unit:
    """Jobs that are sent as one; the last task of a group is its completion callback."""

    name: str
    kind: Kind
    tasks: tuple[str, ...]
    delay_ms: int | None = None

    @property
    def tags(self) -> list[str]:
        """One for each job: the first argument of its function, by which the ledger knows it."""
        return [f"{self.name}.{i}" for i in range(len(self.tasks))]

    @property
    def answers(self) -> dict[str, str]:
        """The results to ask for: of a pipeline its last step's, which has what went before in it; else each job's own."""
        return {self.tags[-1]: ">".join(self.tags)} if self.kind == "pipeline" else {tag: tag for tag in self.tags}


def units(seed: int) -> Iterator[Unit]:
    """Without end. Of the jobs, about a half are single, a fifth are steps of pipelines and a third belong to groups."""
    chance = random.Random(f"load {seed}")
    n = 0
    while True:
        n += 1
        kind: Kind = chance.choices(("single", "pipeline", "group"), (80, 12, 8))[0]
        if kind == "single":
            delay_ms = chance.randrange(100, MOST_DELAY_MS) if chance.random() < 0.1 else None
            yield Unit(f"u{n}", kind, (chance.choice(SINGLES),), delay_ms)
        elif kind == "pipeline":
            yield Unit(f"u{n}", kind, tuple(chance.choices(STEPS, k=3)))
        else:
            yield Unit(f"u{n}", kind, (*chance.choices(STEPS, k=5), CALLBACK))
