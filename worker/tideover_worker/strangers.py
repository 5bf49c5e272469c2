# SPDX-License-Identifier: Apache-2.0
"""Looks out for workers without tideover, and counts what they end.

In a rolling deploy old workers fetch from the same lists. Their acknowledgements are dramatiq's own, so a job that they end
leaves its place without an end in the account. While they are about, and for an hour after, what is missing is taken for
theirs: it ended *elsewhere*, and `lost` can say again what it is there to say.
"""

from __future__ import annotations

from collections.abc import Sequence

from tideover import events
from tideover.store.account import Ledger
from tideover.store.orphans import Orphans
from tideover.store.registry import Registry
from tideover_worker.tidy import Tidy


class Watch:
    """One process's look-out over a namespace."""

    def __init__(self, registry: Registry, ledger: Ledger, dead_after_s: float) -> None:
        self.registry, self.ledger, self.dead_after_s = registry, ledger, dead_after_s
        self.tidy = Tidy(Orphans(ledger.client, ledger.keys))
        self._ours: set[str] = set()
        """Workers with tideover that were ever seen: one that was declared dead may wake up, and fetch before it is entered."""

    def look(self, queues: Sequence[str], now: float) -> None:
        """One look at who fetches from these queues, at unix time `now`. An idle worker cannot be told from a producer."""
        heartbeats, noted = self.registry.heartbeats(), self.registry.strangers()
        self._ours.update(
            self.registry.workers()
        )  # after the heartbeats, or one that boots just now would be taken for a stranger
        unknown = [worker for worker in heartbeats if worker not in self._ours]
        fetching = self.registry.with_jobs(unknown, [lane for queue in queues for lane in (queue, f"{queue}.DQ")])
        alive = [worker for worker in unknown if worker in noted and now - heartbeats[worker] < self.dead_after_s]
        for worker in self.registry.note_strangers({worker: heartbeats[worker] for worker in (*fetching, *alive)}):
            events.worker_without_tideover(worker)
        if noted or fetching:
            self.count()
        if not fetching and not alive:
            self.tidy.turn(queues)

    def count(self) -> None:
        """Enters what workers without tideover ended; another process may have done it just now."""
        account = self.ledger.read()
        if account.lost and self.registry.end_elsewhere(account.ends["elsewhere"], account.lost):
            events.jobs_ended_elsewhere(account.lost)
