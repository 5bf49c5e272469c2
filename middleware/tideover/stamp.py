# SPDX-License-Identifier: Apache-2.0
"""What tideover writes into a message: what was said of the job when it was sent."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any
from uuid import UUID

import dramatiq

from tideover import clock
from tideover.errors import InvalidJob
from tideover.store.facts import DIGEST

STAMP = "tideover"
"""The message option that holds what tideover knows of a job."""


MOST_LABEL = 64
LABEL = re.compile(rf"(?:\w[\w ._:@/+-]{{0,{MOST_LABEL - 1}}})?")
MOST_KEY = 512


def stamp_of(message: Any) -> dict[str, Any]:
    """What tideover wrote into a message's options; empty where it wrote nothing that makes sense."""
    stamp = message.options.get(STAMP)
    return stamp if isinstance(stamp, dict) else {}


def tenant_of(message: Any) -> str:
    tenant = stamp_of(message).get("tenant", "")
    return tenant if isinstance(tenant, str) else ""


def check_label(name: str, value: str) -> None:
    """Raises `InvalidJob` unless a tenant or tag can be shown, counted and grouped by."""
    if not isinstance(value, str) or not LABEL.fullmatch(value):
        raise InvalidJob(
            f"{name} must be at most {MOST_LABEL} letters, digits, spaces or any of ._:@/+- and begin with a letter, digit or _"
        )


def digest_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Tells the arguments of two jobs apart; nothing can be read from it."""
    return blake2b(dramatiq.get_encoder().encode({"args": list(args), "kwargs": dict(kwargs)}), digest_size=8).hexdigest()


def id_of(task: str, tenant: str, idempotency_key: str) -> str:
    """The job id that stands for an idempotency key: the same for the same key, and nothing of the key can be read from it."""
    if not isinstance(idempotency_key, str) or not 0 < len(idempotency_key) <= MOST_KEY:
        raise InvalidJob(f"idempotency_key must be a text of 1 to {MOST_KEY} characters")
    said = json.dumps([task, tenant, idempotency_key]).encode()
    return str(UUID(bytes=blake2b(said, digest_size=16, person=b"tideover").digest(), version=4))


def twin_of(task: str, tenant: str, key: str) -> str:
    """What jobs have in common that one run may answer; nothing of the key can be read from it."""
    if not isinstance(key, str) or not 0 < len(key) <= MOST_KEY:
        raise InvalidJob(f"key must be a text of 1 to {MOST_KEY} characters")
    return blake2b(json.dumps([task, tenant, key]).encode(), digest_size=DIGEST // 2, person=b"twin").hexdigest()


def sent_ms() -> float:
    """Now, to the microsecond: it tells one sending of a message from the next."""
    return round(clock.now() * 1000, 3)
