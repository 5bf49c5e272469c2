# SPDX-License-Identifier: Apache-2.0
"""Completes groups exactly once. dramatiq's own hook counts a member again that runs again, after a crash or a lost reply."""

from __future__ import annotations

from typing import Any

from dramatiq.broker import Broker, MessageProxy
from dramatiq.message import Message
from dramatiq.middleware import GroupCallbacks, Middleware
from dramatiq.rate_limits.backends import RedisBackend

from tideover.store.client import Client
from tideover.store.keys import Keys
from tideover.store.scripts import Scripts


def takes_over(middleware: Middleware) -> bool:
    """Whether we count the members of groups instead of this middleware: its barriers are in a Redis."""
    return isinstance(middleware, GroupCallbacks) and isinstance(middleware.rate_limiter_backend, RedisBackend)


def arrive(middleware: GroupCallbacks, keys: Keys, broker: Broker, message: MessageProxy) -> None:
    """A member has succeeded; with the last one the callbacks are enqueued.

    If this is repeated they are enqueued again, and accepted once (see `sending`).
    """
    group, callbacks = message.options.get("group_completion_uuid"), message.options.get("group_completion_callbacks")
    if not group or not callbacks:
        return
    backend: Any = middleware.rate_limiter_backend
    client: Client = backend.client
    members = [group, keys.group(group)]
    if Scripts(client).run("arrive-2", members, [message.message_id, middleware.barrier_ttl]):
        for callback in callbacks:
            broker.enqueue(Message(**callback))
