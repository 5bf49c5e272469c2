# SPDX-License-Identifier: Apache-2.0
"""AI calls are jobs: held, rerouted and drained when the provider is down. These are the public names, and nothing else."""

from tideover.attempt import Served
from tideover.call import aclaude, claude, last_served, text_of, wrap
from tideover.degrading import LastGood
from tideover.errors import (
    CapacityReached,
    ConfigurationError,
    InvalidJob,
    JobExpired,
    JobFailed,
    JobNotFound,
    NotYet,
    ProviderError,
    StoreUnavailable,
    TideoverError,
)
from tideover.middleware import Tideover
from tideover.sending import Rejected, Sent, send_many
from tideover.task import AITask, ai_task
from tideover.wait import JobStatus, status, wait_for, wait_for_sync

__all__ = [
    "AITask",
    "CapacityReached",
    "ConfigurationError",
    "InvalidJob",
    "JobExpired",
    "JobFailed",
    "JobNotFound",
    "JobStatus",
    "LastGood",
    "NotYet",
    "ProviderError",
    "Rejected",
    "Sent",
    "Served",
    "StoreUnavailable",
    "Tideover",
    "TideoverError",
    "aclaude",
    "ai_task",
    "claude",
    "last_served",
    "send_many",
    "status",
    "text_of",
    "wait_for",
    "wait_for_sync",
    "wrap",
]
