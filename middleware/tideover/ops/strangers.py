# SPDX-License-Identifier: Apache-2.0
"""Workers without tideover: who is about, and since when nobody is. While they are, the account cannot tell what they end."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tideover.ops.access import Space
from tideover.store.keys import DELAYED_SUFFIX


@dataclass(frozen=True, slots=True)
class Strangers:
    """`about`: those that live and have, or had, jobs; `seen_at`: when the latest was seen, if that was in the last hour."""

    about: tuple[str, ...]
    seen_at: float | None


def strangers_of(space: Space, ours: Collection[str], alive_since: float) -> Strangers:
    """What housekeeping has noted, and what can be seen now: with no worker of ours nobody keeps house."""
    heartbeats, noted = space.registry.heartbeats(), space.registry.strangers()
    lanes = [name for queue in space.registry.queues() for name in (queue, queue + DELAYED_SUFFIX)]
    unknown = [worker for worker in sorted(heartbeats) if worker not in ours]
    fetching = space.registry.with_jobs(unknown, lanes)
    about = [w for w in unknown if w in fetching or (w in noted and heartbeats[w] >= alive_since)]
    seen = [*(heartbeats[worker] for worker in about), *(facts["seen"] for facts in noted.values())]
    return Strangers(tuple(about), max(seen, default=None))
