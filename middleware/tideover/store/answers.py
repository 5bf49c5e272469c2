# SPDX-License-Identifier: Apache-2.0
"""The last good answers of tasks that fall back on them: one for each key, tenant and task."""

from __future__ import annotations

import json

from tideover.store.client import Client, text
from tideover.store.keys import Keys


class Answers:
    """Kept answers of one namespace, by digest."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self.client, self.keys = client, keys

    def keep(self, digest: str, answer: bytes, now: float, max_age_s: float) -> None:
        """Keeps an encoded answer for so long, in the place of the one before."""
        held = json.dumps({"at": now, "answer": text(answer)})
        self.client.set(self.keys.answer(digest), held, px=max(1, round(max_age_s * 1000)))

    def find(self, digest: str) -> tuple[bytes, float] | None:
        """An answer as it was kept, and when (unix); None: there is none, or it is too old."""
        held = self.client.get(self.keys.answer(digest))
        if held is None:
            return None
        said = json.loads(held)
        return said["answer"].encode(), said["at"]
