# SPDX-License-Identifier: Apache-2.0
"""Sentinel promotes the replica while jobs are being sent, held and run.

Each script is replicated whole, so that a replica that lags is a consistent past: what was accepted since is gone without a
trace in the account, what ended since runs again, and nothing is stuck.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import redis

from tideover.testing import Fault

if TYPE_CHECKING:
    from tests.topology.conftest import Node, Rack, Shop

MONITOR = """
sentinel monitor jobs 127.0.0.1 {port} 1
sentinel down-after-milliseconds jobs 2000
sentinel failover-timeout jobs 3000
"""
SAFE = 24
MORE = 12


class Sender:
    """Sends all the time, from a thread of its own: a critical job to each two deferrable ones."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.accepted: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def _loop(self) -> None:
        tasks = (self.shop.summary, self.shop.report, self.shop.reply)
        for i in range(100_000):
            if self._stop.wait(0.01):
                return
            if self.shop.try_to_send(tasks[i % 3], f"{tasks[i % 3].actor_name}{i}"):
                self.accepted.append(f"{tasks[i % 3].actor_name}{i}")

    def until_more(self) -> list[str]:
        """What it sent before; then it has sent more."""
        before = list(self.accepted)
        self.shop.until(lambda: len(self.accepted) >= len(before) + MORE, "more jobs are accepted")
        return before

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def knows_replica(sentinel: Node) -> bool:
    with redis.Redis(port=sentinel.port, socket_timeout=10) as client:
        return any("ok" in facts.values() for facts in client.sentinel_slaves("jobs"))  # as the state of its link to the master


def role(node: Node) -> bytes:
    return bytes(node.ask("ROLE")[0])


@pytest.mark.parametrize("how", ["killed", "demoted"])
@pytest.mark.usefixtures("swift_restarts")
def test_failover_in_mid_hold(rack: Rack, open_shop: Callable[[str], Shop], program: str, how: str) -> None:
    """What had reached the replica ends, what is accepted afterwards too, and the account is whole.

    *killed*: the replica is cut off for a moment before `kill -9`, so that accepted jobs are lost. *demoted*: a planned
    failover, in which the old master still accepts what nobody will see again, until tideover asks who the master is.
    """
    master = rack.node(program=program)
    replica = rack.replica(master)
    sentinel = rack.node(program=program, sentinel=MONITOR.format(port=master.port))
    rack.wait(lambda: knows_replica(sentinel), within_s=30, description="the Sentinel knows the replica")
    shop = open_shop(f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel.port}/jobs/0")
    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    safe = {job.args[0] for job in shop.send(SAFE, "safe")}
    shop.until_held(SAFE)
    sender = Sender(shop)
    try:
        safe |= set(sender.until_more())
        shop.until(lambda: replica.follows(master), "the replica has what was sent")
        unsafe = fail_over(how, shop, sender, master, replica, sentinel)
        then = shop.accepted_at(replica)
        shop.until(lambda: shop.accepted_at(replica) > then, "the new master accepts jobs")
        before = sender.until_more()
    finally:
        sender.stop()
    shop.primary.heal()
    account = shop.until_over()
    assert (account.accepted, 0) == (account.ends["succeeded"], account.difference)
    assert safe | set(sender.accepted[len(before) :]) <= shop.answered()
    assert not unsafe & shop.answered()


def fail_over(how: str, shop: Shop, sender: Sender, master: Node, replica: Node, sentinel: Node) -> set[str]:
    """The replica becomes the master. Returns accepted jobs that must be lost by that."""
    lost: set[str] = set()
    if how == "killed":
        replica.ask("REPLICAOF", "127.0.0.1", "1")
        known, after = sender.until_more(), sender.until_more()
        lost = {tag for tag in after[len(known) + 1 :] if not tag.startswith("reply")}
        master.kill()
    else:
        shop.until(lambda: sentinel.ask("SENTINEL", "FAILOVER", "jobs"), "the Sentinel accepts the replica")
    shop.until(lambda: role(replica) == b"master", "the replica is the master")
    return lost
