# SPDX-License-Identifier: Apache-2.0
"""Sends the jobs of a plan on schedule, in a process of its own: `python -m tideover_worker.demo.producer PLAN.json`.

It says `ready` on stdout, begins at the first line on stdin, and exits with 0 when all is sent. It loads no anthropic.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dramatiq

from tideover import clock
from tideover_worker.demo.story import PlannedJob
from tideover_worker.demo.tasks import reply, summary

TASKS = {"reply": reply, "summary": summary}


def send_all(jobs: Sequence[PlannedJob]) -> None:
    """Sends each job when its time has come."""
    started_at = clock.monotonic()
    for job in jobs:
        wait_s = started_at + job.at_s - clock.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)
        TASKS[job.task].send(job.tag, job.model, job.input_tokens, job.output_tokens)


def main(path: Path) -> None:
    jobs = [PlannedJob(*row) for row in json.loads(path.read_text(encoding="utf-8"))]
    broker: Any = dramatiq.get_broker()
    broker.client.ping()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if sys.stdin.readline():
        send_all(jobs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
