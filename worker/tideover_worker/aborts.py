# SPDX-License-Identifier: Apache-2.0
"""dramatiq-abort for coroutines: it raises in the thread of a job, and a coroutine has none, so its task is cancelled."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import Any

from dramatiq.broker import Broker, MessageProxy
from dramatiq.middleware import Middleware, SkipMessage


@dataclass(eq=False, slots=True)
class Abortee:
    """A coroutine in the place of the thread that dramatiq-abort's books have."""

    loop: asyncio.AbstractEventLoop
    task: asyncio.Task[Any] | None = None
    aborted: bool = False

    def abort(self) -> None:
        self.aborted = True
        if self.task is not None:
            self.loop.call_soon_threadsafe(self.task.cancel)


def is_abortable(middleware: Middleware) -> bool:
    return type(middleware).__name__ == "Abortable"


def begin(middleware: Any, broker: Broker, message: MessageProxy, abortee: Abortee) -> None:
    """What its `before_process_message` does, with the coroutine in the place of the thread."""
    mode = sys.modules["dramatiq_abort.middleware"].AbortMode
    if not middleware.is_abortable(broker.get_actor(message.actor_name), message):
        return
    if middleware.backend.poll(middleware.id_to_key(message.message_id, mode.CANCEL)):
        raise SkipMessage("aborted")
    manager = middleware.manager
    if "do_abort" not in vars(manager):
        plain = manager.do_abort
        vars(manager)["do_abort"] = lambda who: who.abort() if isinstance(who, Abortee) else plain(who)
    manager.abortable_messages[message.message_id] = abortee


def aborted() -> BaseException:
    """What the attempt ends with, as a function's does."""
    interrupt: BaseException = sys.modules["dramatiq_abort"].Abort()
    return interrupt
