# SPDX-License-Identifier: Apache-2.0
"""The sender of a run, a process of its own: `python -m tests.chaos.send SEED JOBS SECONDS`.

It sends units evenly over the seconds until so many jobs are accepted. A send that raised is *doubtful*: it is left at
that, and the next unit is tried. Told so by a line on its standard input, it reads the results of what was accepted.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import dramatiq
from dramatiq.message import Message
from dramatiq.results import ResultError
from tests.chaos import app
from tests.chaos.ledger import note
from tests.chaos.load import Unit, units

PAUSE_S = 0.05


def send(unit: Unit) -> dict[str, Message[Any]]:
    """Sends one unit; its messages by tag."""
    messages = {tag: app.TASKS[name].message(tag) for tag, name in zip(unit.tags, unit.tasks, strict=True)}
    match unit.kind:
        case "single":
            app.broker.enqueue(*messages.values(), delay=unit.delay_ms)
        case "pipeline":
            dramatiq.pipeline(messages.values()).run()  # type: ignore[no-untyped-call]
        case "group":
            *members, callback = messages.values()
            group: Any = dramatiq.group(members)  # type: ignore[no-untyped-call]
            group.add_completion_callback(callback)
            group.run()
    return messages


def send_all(seed: int, jobs: int, seconds: float) -> Iterator[tuple[Unit, dict[str, Message[Any]]]]:
    """Yields what was accepted."""
    started, accepted, pause = time.monotonic(), 0, threading.Event()
    for unit in units(seed):
        if accepted >= jobs:
            return
        pause.wait(started + seconds * accepted / jobs - time.monotonic())
        facts: dict[str, Any] = {"unit": unit.name, "kind": unit.kind, "tags": unit.tags}
        try:
            messages = send(unit)
        except Exception as error:
            note("doubtful", **facts, why=repr(error)[:200])
            pause.wait(PAUSE_S)
        else:
            note("accepted", **facts)
            accepted += len(unit.tags)
            yield unit, messages


def look_up(unit: Unit, messages: dict[str, Message[Any]]) -> None:
    """Notes the results of a unit beside what they should be."""
    for tag, answer in unit.answers.items():
        try:
            said = messages[tag].get_result()
        except ResultError as error:
            said = type(error).__name__
        note("result", tag=tag, right=said == answer, said=str(said)[:200])


def main() -> None:
    seed, jobs, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    sent = list(send_all(seed, jobs, seconds))
    note("sent")
    sys.stdin.readline()
    for unit, messages in sent:
        look_up(unit, messages)


if __name__ == "__main__":
    main()
