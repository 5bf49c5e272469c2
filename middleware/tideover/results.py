# SPDX-License-Identifier: Apache-2.0
"""What dramatiq's result backend is told beyond what dramatiq tells it."""

from __future__ import annotations

from typing import Any, Final

from dramatiq.broker import Broker
from dramatiq.message import Message
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from tideover import events
from tideover.errors import JobExpired
from tideover.store.scripts import Scripts
from tideover.task import RESULT_TTL_MS

STORE: Final = "_store"
"""dramatiq's backend stores a result with this method."""


def results_of(broker: Broker) -> Results | None:
    return next((m for m in broker.middleware if isinstance(m, Results)), None)


def store_expired(broker: Broker, queue: str, task: str, job_id: str) -> None:
    """Stores `JobExpired` as the result of a job that no worker will run, for whoever waits for it."""
    results, declared = results_of(broker), broker.actors.get(task)
    if results is not None and (declared is None or declared.options.get("store_results")):
        of: Message[Any] = Message(queue, task, (), {}, {}, message_id=job_id)
        results.backend.store_exception(of, JobExpired(job_id), RESULT_TTL_MS)


def can_be_stored(broker: Broker, result: Any) -> bool:
    """Whether a result can be encoded. One that cannot was not stored for the job itself either."""
    results = results_of(broker)
    try:
        return results is not None and bool(results.backend.encoder.encode(result))
    except Exception:  # noqa: BLE001 - whatever an encoder of the user's raises
        events.fault_inside("storing an answer for those who wait for it")
        return False


def store_answer(broker: Broker, queue: str, task: str, job_id: str, result: Any) -> None:
    """Stores as the result of a job what another one with its key returned."""
    results, declared = results_of(broker), broker.actors.get(task)
    if results is not None and declared is not None and declared.options.get("store_results"):
        of: Message[Any] = Message(queue, task, (), {}, {}, message_id=job_id)
        results.backend.store_result(of, result, declared.options.get("result_ttl", RESULT_TTL_MS))


def store_when_full(broker: Broker) -> None:
    """Lets results be stored while Redis is full, where dramatiq's own backend keeps them in one."""
    results = results_of(broker)
    backend: Any = None if results is None else results.backend
    if isinstance(backend, RedisBackend) and getattr(type(backend), STORE) is getattr(RedisBackend, STORE):
        scripts, encoder = Scripts(backend.client), backend.encoder

        def store(key: str, result: Any, ttl: int) -> None:
            scripts.run("result-1", [key], [encoder.encode(result), ttl])

        vars(backend)[STORE] = store
