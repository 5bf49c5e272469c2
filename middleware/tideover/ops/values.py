# SPDX-License-Identifier: Apache-2.0
"""What operators are shown, as plain data and as words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from typing import Any

AT = "_at"
"""The end of the name of each field that holds an instant."""

STEPS = ((120.0, 1.0, "s"), (7200.0, 60.0, "min"), (172_800.0, 3600.0, "h"), (float("inf"), 86_400.0, "days"))


def as_json(value: object) -> Any:
    """A dataclass as plain data for JSON: instants (`..._at`, unix time) become ISO-8601 in UTC, durations stay seconds."""
    if is_dataclass(value):
        return {field.name: as_field(field.name, getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): as_json(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_json(part) for part in value]
    return value


def as_field(name: str, value: object) -> Any:
    return iso(value) if name.endswith(AT) and isinstance(value, int | float) else as_json(value)


def iso(at: float) -> str:
    """
    >>> iso(1780358400.25)
    '2026-06-02T00:00:00.250Z'
    """
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def about(seconds: float) -> str:
    """A duration in words, as exact as a glance needs.

    >>> about(0), about(119), about(125), about(90_000), about(900_000)
    ('0 s', '119 s', '2 min', '25 h', '10 days')
    """
    step, unit = next((step, unit) for below, step, unit in STEPS if seconds < below)
    return f"{max(0.0, seconds) / step:.0f} {unit}"


def counted(n: int, noun: str) -> str:
    """
    >>> counted(1, "job"), counted(1200, "job")
    ('1 job', '1,200 jobs')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
