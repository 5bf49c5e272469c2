# SPDX-License-Identifier: Apache-2.0
"""A subscription that says at once when its connection is gone.

redis-py would connect again by itself, silently and after a pause of up to a second, and what was said meanwhile would be
missed.
"""

from __future__ import annotations

from typing import Any

from redis.backoff import NoBackoff
from redis.retry import Retry

from tideover.store.client import Client, text


class News:
    """The messages of one channel."""

    def __init__(self, client: Client, channel: str) -> None:
        self._pubsub: Any = client.pubsub()
        self._pubsub.subscribe(channel)
        self._connection = self._pubsub.connection
        self._retry = getattr(self._connection, "retry", None)
        if self._retry is not None:
            self._connection.retry = Retry(NoBackoff(), 0)

    def heard(self, most_s: float) -> set[str]:
        """All that was said since last time; waits for so long at the most. Raises redis-py's errors."""
        said: set[str] = set()
        message = self._pubsub.get_message(ignore_subscribe_messages=True, timeout=most_s)
        while message is not None:
            said.add(text(message["data"]))
            message = self._pubsub.get_message(ignore_subscribe_messages=True)
        return said

    def close(self) -> None:
        if self._retry is not None:  # the connection goes back to its pool
            self._connection.retry = self._retry
        self._pubsub.close()
