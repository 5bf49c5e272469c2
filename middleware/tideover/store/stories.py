# SPDX-License-Identifier: Apache-2.0
"""What happened to each job that was held, rerouted, expired or failed: a few lines, kept for 7 days, found by job id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from tideover import clock
from tideover.store.client import Client, starting, text
from tideover.store.facts import HeldFacts
from tideover.store.keys import Keys
from tideover.store.scripts import Scripts

DAYS = 7
SCAN = 500
LONGEST = 4096
"""Bytes of one story; the first line and the latest stay."""
MOST = 100_000
"""Stories of one day; of further jobs the account knows."""


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that happened to a job, at unix time `at`."""

    job_id: str
    at: float
    event: str
    facts: dict[str, Any]

    def encode(self) -> str:
        return json.dumps([round(self.at * 1000), self.event, self.facts], separators=(",", ":"))

    @classmethod
    def decode(cls, job_id: str, raw: str) -> Line:
        at_ms, event, facts = json.loads(raw)
        return cls(job_id, at_ms / 1000, event, facts)


def told_by(facts: HeldFacts) -> list[Line]:
    """What the facts of a held job tell. It is written down when the job goes on, so that a hold costs no story."""
    held = {
        "reason": facts.reason,
        "waits_for": facts.breaker_keys,
        "generation": facts.generation,
        "detail": facts.detail,
    }
    first = {"task": facts.task, "criticality": facts.criticality}
    enqueued = [Line(facts.job_id, facts.sent_ms / 1000, "enqueued", first)] if facts.held_before_ms == 0 else []
    return [*enqueued, Line(facts.job_id, facts.held_ms / 1000, "held", held)]


def day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y%m%d")


class Stories:
    def __init__(self, client: Client, keys: Keys) -> None:
        self.client, self.keys, self.scripts = client, keys, Scripts(client)

    def add(self, lines: Sequence[Line]) -> None:
        if lines:
            args = [part for line in lines for part in (line.job_id, line.encode())]
            self.scripts.run("narrate-1", [self.keys.stories(day(clock.now()))], [(DAYS + 1) * 86_400, LONGEST, MOST, *args])

    def of(self, job_id: str) -> list[Line]:
        """A job's lines, oldest first; empty when nothing worth telling happened to it."""
        with self.client.pipeline(transaction=False) as pipe:
            for key in self._days():
                pipe.hget(key, job_id)
            found = pipe.execute()
        lines = [Line.decode(job_id, raw) for story in found if story for raw in text(story).splitlines()]
        return sorted(lines, key=lambda line: line.at)

    def jobs_like(self, prefix: str) -> set[str]:
        """Ids of jobs with a story that begin so."""
        found = (self.client.hscan_iter(key, match=starting(prefix), count=SCAN) for key in self._days())
        return {text(job_id) for day_of in found for job_id, _ in day_of}

    def everything(self) -> dict[str, list[Line]]:
        """All stories by job id, lines oldest first: for a look at a whole run, not at one job."""
        found: dict[str, list[Line]] = {}
        for key in self._days():
            for job_id, raw in self.client.hgetall(key).items():
                lines = (Line.decode(text(job_id), line) for line in text(raw).splitlines())
                found.setdefault(text(job_id), []).extend(lines)
        return {job_id: sorted(lines, key=lambda line: line.at) for job_id, lines in found.items()}

    def _days(self) -> list[str]:
        now = datetime.fromtimestamp(clock.now(), UTC)
        return [self.keys.stories(day((now - timedelta(days=back)).timestamp())) for back in range(DAYS + 1, -1, -1)]
