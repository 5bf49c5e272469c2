# SPDX-License-Identifier: Apache-2.0
"""A chore: a thread that takes a turn again and again, in one process at a time if it has a lease."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tideover import events
from tideover.store.client import FAILED, LEASE_LOST, Client
from tideover.store.scripts import lease


class Lease:
    """Leave to do a chore for the whole fleet; whoever dies with it loses it after `seconds`. It names its `owner`."""

    def __init__(self, client: Client, key: str, seconds: float, owner: str) -> None:
        self._lock, self.owner = lease(client, key, seconds), owner
        self._mine = False

    def hold(self) -> bool:
        """Takes or prolongs it; False: another process has it."""
        if self._mine:
            try:
                self._lock.reacquire()
            except LEASE_LOST:
                self._mine = False
        if not self._mine:
            self._mine = bool(self._lock.acquire(blocking=False, token=self.owner))
        return self._mine

    def give_up(self) -> None:
        if self._mine:
            self._mine = False
            self._lock.release()


class Chore:
    """`turn` every `every_s` seconds, until stopped. A fault is logged, and the next turn comes all the same.

    `alone`: only by who has the lease; else the turn asks for it by itself.
    """

    def __init__(
        self, name: str, every_s: float, turn: Callable[[], None], lease: Lease | None = None, *, alone: bool = True
    ) -> None:
        self.name, self.every_s, self.turn, self.lease, self.alone = name, every_s, turn, lease, alone
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name=f"tideover-{name}")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _loop(self) -> None:
        gone = False
        while not self._stop.wait(self.every_s):
            try:
                if self.lease is None or not self.alone or self.lease.hold():
                    self.turn()
                gone = False
            except FAILED as error:
                if not gone:
                    events.store_unavailable(self.name, f"{type(error).__name__}: {str(error)[:100]}")
                gone = True
            except Exception:  # noqa: BLE001 - a chore outlives its faults
                events.fault_inside(self.name)
        self._give_up()

    def _give_up(self) -> None:
        try:
            if self.lease is not None:
                self.lease.give_up()
        except FAILED as error:
            events.store_unavailable(f"giving up the lease of {self.name}", type(error).__name__)
