# SPDX-License-Identifier: Apache-2.0
"""What whoever waits for a job finds, where an operator ends it or puts it back.

Results are in this Redis, under dramatiq's own names, unless an application keeps them elsewhere: of that this process knows
nothing, and `wait_for` goes by the job's story.
"""

from __future__ import annotations

from typing import Any

from dramatiq.message import Message
from dramatiq.results.backends import RedisBackend

from tideover.errors import JobFailed
from tideover.ops.access import Operator
from tideover.task import RESULT_TTL_MS


def fail(operator: Operator, queue: str, task: str, job_id: str, end: str, why: str) -> None:
    """Stores `JobFailed` as the result of a job that ends without one."""
    of: Message[Any] = Message(queue, task, (), {}, {}, message_id=job_id)
    RedisBackend(client=operator.client).store_exception(of, JobFailed(job_id, end, why), RESULT_TTL_MS)


def names_of(operator: Operator, message: Message[Any]) -> list[str]:
    """The names that the result of a job may be kept under: dramatiq makes them readable where it is asked to."""
    plain: Any = RedisBackend(client=operator.client)
    readable: Any = RedisBackend(client=operator.client, use_namespace_prefix_keys=True)
    return [plain.build_message_key(message), readable.build_message_key(message)]
