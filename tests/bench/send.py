# SPDX-License-Identifier: Apache-2.0
"""What `send` costs beside stock dramatiq: alternating rounds in one process on one private Valkey.

    python tests/bench/send.py [rounds] [sends per round]

Prints microseconds per send (median of the rounds) and the median of the paired ratios.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from tideover import Tideover, ai_task
from tideover_worker import embedded


def timed(send: Callable[[int], object], n: int) -> float:
    started = time.perf_counter()
    for i in range(n):
        send(i)
    return (time.perf_counter() - started) / n * 1e6


def main() -> None:
    rounds, n = (int(arg) for arg in (sys.argv[1:] + ["21", "500"][len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as folder:
        server = embedded.start(Path(folder))
        os.environ["TIDEOVER_REDIS_URL"] = server.url
        try:
            stock = RedisBroker(url=server.url, namespace="stock")
            ours = RedisBroker(url=server.url, namespace="ours")
            ours.add_middleware(Tideover())

            @dramatiq.actor(broker=stock, actor_name="stock")
            def plain(ticket: int, text: str) -> None: ...

            @ai_task(criticality="deferrable", broker=ours, actor_name="ours")
            def task(ticket: int, text: str) -> None: ...

            senders = (lambda i: plain.send(i, "hello"), lambda i: task.send(i, "hello"))
            for send in senders:
                timed(send, n)
            pairs = [(timed(senders[0], n), timed(senders[1], n)) for _ in range(rounds)]
        finally:
            embedded.stop(Path(folder))
    print(f"stock    {statistics.median(a for a, _ in pairs):7.1f} µs per send")
    print(f"tideover {statistics.median(b for _, b in pairs):7.1f} µs per send")
    print(f"ratio    {statistics.median(b / a for a, b in pairs):7.3f}   ({rounds} paired rounds of {n})")


if __name__ == "__main__":
    main()
