# SPDX-License-Identifier: Apache-2.0
"""What can be seen of a running demo: a frame for the screen again and again, and the evidence at the end."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tideover import clock
from tideover.core.breaker import Breaker
from tideover.core.route import breaker_key
from tideover.store.account import Account, Ledger
from tideover.store.registry import Registry
from tideover.store.stories import Line, Stories
from tideover.testing.faults import Schedule
from tideover.testing.ledger import Call
from tideover_worker.demo.history import Historian, History, Move
from tideover_worker.demo.stage import FALLBACK, PRIMARY, DemoFailed, Stage
from tideover_worker.demo.story import MODELS, PlannedJob

RATE_OVER_S = 3.0
REROUTED_EVERY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One look at the run.

    `phase`: the name of the first provider's phase, None while it is well; `failing`: for each breaker of the primary whether
    calls for its model may fail now; `rerouted`: jobs that the fallback has seen; `per_s`: jobs that ended, a second.
    """

    at: float
    elapsed_s: float
    lasts_s: float
    phase: str | None
    breakers: Mapping[str, Breaker]
    failing: Mapping[str, bool]
    account: Account
    total: int
    rerouted: int
    per_s: float
    moves: Sequence[Move]

    @property
    def ended(self) -> int:
        return sum(self.account.ends.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything that the verdict is made from.

    Attributes:
      jobs: those that were sent, by tag.
      account: at the end.
      most_lost: the most jobs that any of the `readings` of the account during the run called lost.
      primary, fallback: the providers' ledgers.
      stories: by job id.
      holds: what tideover counted.
      dead_letters: how many there are.
      began_at: unix time.
    """

    jobs: Mapping[str, PlannedJob]
    account: Account
    most_lost: int
    readings: int
    primary: Sequence[Call]
    fallback: Sequence[Call]
    stories: Mapping[str, Sequence[Line]]
    history: History
    holds: int
    dead_letters: int
    began_at: float
    elapsed_s: float


@dataclass(slots=True)
class Rerouted:
    """Counts the jobs that the fallback was asked to do, from its ledger, page by page."""

    seen: int = 0
    tags: set[str] = field(default_factory=set)
    asked_at: float = 0.0

    def count(self, stage: Stage) -> int:
        now = clock.monotonic()
        if now - self.asked_at >= REROUTED_EVERY_S:
            self.asked_at = now
            page = stage.calls(FALLBACK, since=self.seen)
            self.seen += len(page)
            self.tags.update(call.job for call in page if call.job is not None)
        return len(self.tags)


class Watch:
    """Follows one run from its beginning."""

    def __init__(self, stage: Stage, historian: Historian) -> None:
        self.stage, self.historian = stage, historian
        self.ledger = Ledger(stage.client, stage.keys)
        self.began_at, self.began = clock.now(), clock.monotonic()
        self.schedule = Schedule(stage.story.phases, self.began)
        self.readings = self.most_lost = 0
        self._rerouted = Rerouted()
        self._ended: deque[tuple[float, int]] = deque()

    def look(self) -> Frame:
        account = self.ledger.read()
        self.readings += 1
        self.most_lost = max(self.most_lost, account.lost)
        if self.historian.failure is not None:
            raise DemoFailed(f"the private Valkey is gone: {self.historian.failure}")
        now, phase = clock.monotonic(), self.schedule.at(clock.monotonic())
        failing = {
            breaker_key(PRIMARY, model): phase is not None and phase.p_error > 0 and phase.phase.touches(model)
            for model in MODELS
        }
        history = self.historian.history
        return Frame(
            at=clock.now(),
            elapsed_s=now - self.began,
            lasts_s=self.stage.story.lasts_s,
            phase=phase.phase.name if phase is not None and phase.p_error > 0 else None,
            breakers={key: history.now.get(key, Breaker()) for key in failing},
            failing=failing,
            account=account,
            total=len(self.stage.story.jobs),
            rerouted=self._rerouted.count(self.stage),
            per_s=self._per_s(now, sum(account.ends.values())),
            moves=history.all_moves(),
        )

    def evidence(self) -> Evidence:
        """What is known once all is over."""
        self.historian.look()
        stage, client, keys = self.stage, self.stage.client, self.stage.keys
        registry = Registry(client, keys)
        return Evidence(
            jobs={job.tag: job for job in stage.story.jobs},
            account=self.ledger.read(),
            most_lost=self.most_lost,
            readings=self.readings,
            primary=stage.keep_ledger(PRIMARY),
            fallback=stage.keep_ledger(FALLBACK),
            stories=Stories(client, keys).everything(),
            history=self.historian.history,
            holds=registry.counters().get("holds", 0),
            dead_letters=sum(client.zcard(keys.dead(queue)) for queue in registry.queues()),
            began_at=self.began_at,
            elapsed_s=clock.monotonic() - self.began,
        )

    def _per_s(self, now: float, ended: int) -> float:
        self._ended.append((now, ended))
        while now - self._ended[0][0] > RATE_OVER_S:
            self._ended.popleft()
        since, before = self._ended[0]
        return (ended - before) / (now - since) if now > since else 0.0
