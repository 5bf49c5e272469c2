# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a provider, and when.

A `Fault` is one way to fail; a `Phase` is a stretch of time with a probability and a mix of faults; a `Schedule` is phases
one after the other, and health after the last. `phases_of_profile` reads the recorded outages of `outage-profiles.json`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike


class Fault(StrEnum):
    """One way in which a provider fails a call; its value is the outcome in the ledger.

    A stream fault on a plain call: `STREAM_CUT` cuts the body short of its content-length, `STREAM_ERROR` and
    `STREAM_ERROR_FIRST` are `OVERLOADED`, `STREAM_STALL` is `HANG`, and `STREAM_NO_STOP` answers without a stop reason.
    """

    OVERLOADED = "overloaded"
    """529 `overloaded_error`; on chat completions 503, as OpenAI says it."""
    API_ERROR = "api_error"
    """500."""
    BAD_GATEWAY = "bad_gateway"
    """502 with the API's own body."""
    UNAVAILABLE = "unavailable"
    """503."""
    GATEWAY_TIMEOUT = "gateway_timeout"
    """504 `timeout_error`."""
    EDGE_HTML = "edge_html"
    """502 with the HTML page of the edge, so not an answer of the API."""
    UNAUTHORIZED = "unauthorized"
    """401, also for a key that is good: the storm when the provider's auth plane is down."""
    FORBIDDEN = "forbidden"
    """403 `permission_error`."""
    NOT_FOUND = "not_found"
    """404: no such model."""
    BAD_REQUEST = "bad_request"
    """400 `invalid_request_error`."""
    RATE_LIMITED = "rate_limited"
    """429 with retry-after and the rate-limit headers: nothing is left."""
    FALSE_LIMITED = "false_limited"
    """429 although the headers say that most of the limit is left: the provider's fault, as on 2 June 2026 at OpenAI."""
    QUOTA = "quota"
    """402 `billing_error`; on chat completions 429 `insufficient_quota`."""
    HANG = "hang"
    """No byte until the client goes away."""
    RESET = "reset"
    """The connection is closed with RST instead of an answer."""
    STREAM_CUT = "stream_cut"
    """The connection closes in the middle of the stream."""
    STREAM_ERROR = "stream_error"
    """An `overloaded_error` event in the middle of the stream."""
    STREAM_ERROR_FIRST = "stream_error_first"
    """An `overloaded_error` event before any content."""
    STREAM_STALL = "stream_stall"
    """No more bytes in the middle of the stream."""
    STREAM_NO_STOP = "stream_no_stop"
    """The stream ends in good order, but without `message_stop` (or `[DONE]`)."""
    OK_HTML = "ok_html"
    """200 with an HTML page."""
    OK_EMPTY = "ok_empty"
    """200 with nothing."""
    OK_ERROR_BODY = "ok_error_body"
    """200 with an error as its body."""


PROFILE_CLASSES: Final[Mapping[str, Fault]] = MappingProxyType(
    {
        "400": Fault.BAD_REQUEST,
        "401": Fault.UNAUTHORIZED,
        "402": Fault.QUOTA,
        "403": Fault.FORBIDDEN,
        "404": Fault.NOT_FOUND,
        "429": Fault.RATE_LIMITED,
        "429_false": Fault.FALSE_LIMITED,
        "500": Fault.API_ERROR,
        "502": Fault.BAD_GATEWAY,
        "503": Fault.UNAVAILABLE,
        "504": Fault.GATEWAY_TIMEOUT,
        "529": Fault.OVERLOADED,
        "timeout": Fault.HANG,
        "connect": Fault.RESET,
        "stream_abort": Fault.STREAM_CUT,
    }
)
"""The error classes of outage-profiles.json (its `units`), and the other status codes."""


def fault_named(name: str) -> Fault:
    """The fault of this name: its value (`"hang"`), a status code (`"529"`) or a class of the outage profiles.

    Raises ValueError, with the names that exist, for any other.
    """
    known = PROFILE_CLASSES.get(name)
    if known is not None:
        return known
    try:
        return Fault(name)
    except ValueError:
        raise ValueError(f"no fault {name!r}; say one of {', '.join([*Fault, *PROFILE_CLASSES])}") from None


FRONT_DOOR = frozenset({Fault.UNAUTHORIZED, Fault.FORBIDDEN, Fault.EDGE_HTML, Fault.RESET, Fault.OK_HTML})
"""Faults of what stands before all models: a phase that touches every model fails `GET /v1/models` with them, too."""


@dataclass(frozen=True)
class Phase:
    """A stretch of time in which a provider fails some calls.

    Attributes:
      name: what `/__phase` says.
      duration_s: seconds; `math.inf` lasts until something else is said.
      p_error: share of the calls that fail, 0 to 1.
      mix: shares of the faults among the failures, of any sum; names as in `fault_named`.
      models: the phase touches calls whose model name contains one of these words; `"*"` is every model. Other models are well.
      latency_factor: how many times slower than usual the calls of these models are.
      p_error_end: when given, the share moves linearly from `p_error` to this over the phase.
      retry_after_s: what a 429 asks the client to wait, in seconds.
      limit_per_s: calls per second beyond which the provider answers with an honest 429, and which its answers tell in
        rate-limit headers; None: no limit.
      capacity_per_s: calls per second that it can bear, which it tells nobody: beyond them it answers 529, and each of those
        costs it a fifth of a call. A pair moves linearly from one to the other over the phase; None: any number.
    """

    name: str
    duration_s: float
    p_error: float
    mix: Mapping[str, float] | Mapping[Fault, float]
    models: Sequence[str] = ("*",)
    latency_factor: float = 1.0
    p_error_end: float | None = None
    retry_after_s: float = 2.0
    limit_per_s: float | None = None
    capacity_per_s: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.duration_s > 0:
            raise ValueError(f"phase {self.name!r}: duration_s must be above 0, not {self.duration_s}")
        for share in (self.p_error, self.p_error_end):
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"phase {self.name!r}: p_error and p_error_end go from 0 to 1, not {share}")
        fails = self.p_error > 0 or self.p_error_end not in (None, 0)
        if min(self.mix.values(), default=0 if fails else 1) <= 0:
            raise ValueError(f"phase {self.name!r}: mix needs a share above 0 for each fault it names, and one fault at least")
        if isinstance(self.models, str):
            raise ValueError(f"phase {self.name!r}: models is a list of words, not {self.models!r}")  # noqa: TRY004
        if self.capacity_per_s is not None and (len(self.capacities) != 2 or min(self.capacities) <= 0):
            raise ValueError(f"phase {self.name!r}: capacity_per_s is a number above 0 or a pair, not {self.capacity_per_s}")
        mix: dict[Fault, float] = {}
        for name, share in self.mix.items():
            mix[fault_named(name)] = mix.get(fault_named(name), 0.0) + share
        object.__setattr__(self, "mix", MappingProxyType(mix))
        object.__setattr__(self, "models", tuple(self.models))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Phase:
        """A phase from decoded JSON with the attributes as keys. An unknown or missing one is a ValueError."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"a phase has no {', '.join(sorted(unknown))}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a phase: {error}") from None

    def touches(self, model: str) -> bool:
        """Whether calls for `model` feel this phase."""
        return any(word == "*" or word in model for word in self.models)

    def p_error_at(self, progress: float) -> float:
        """Share of the calls that fail when `progress` (0 to 1) of the phase is over."""
        if self.p_error_end is None:
            return self.p_error
        return self.p_error + (self.p_error_end - self.p_error) * progress

    @property
    def capacities(self) -> tuple[float, ...]:
        """Its capacity at the beginning and at the end."""
        given = self.capacity_per_s
        if given is None:
            return ()
        return (given, given) if isinstance(given, int | float) else tuple(given)

    def capacity_at(self, progress: float) -> float | None:
        """Calls per second that it can bear when `progress` (0 to 1) of the phase is over; None: any number."""
        if self.capacity_per_s is None:
            return None
        first, last = self.capacities
        return first + (last - first) * progress

    def draw(self, progress: float, *, fails: float, which: float) -> Fault | None:
        """The fault of one call, or None when it goes well; `fails` and `which` are drawn uniformly from 0 to 1."""
        if fails >= self.p_error_at(progress):
            return None
        left = which * sum(self.mix.values())
        fault: Fault | None = None
        for name, share in self.mix.items():
            fault = fault_named(name)
            left -= share
            if left < 0:
                break
        return fault


@dataclass(frozen=True)
class PhaseNow:
    """Where a schedule is: the phase and its place, how much of it is over (0 to 1), and the seconds to go (may be inf)."""

    phase: Phase
    index: int
    progress: float
    remaining_s: float

    @property
    def p_error(self) -> float:
        """Share of the calls that fail now."""
        return self.phase.p_error_at(self.progress)


class Schedule:
    """Phases one after the other, counted from `started_at` on any clock that only goes forward; then health."""

    def __init__(self, phases: Sequence[Phase], started_at: float) -> None:
        self.phases = tuple(phases)
        self.edges_at = [started_at]
        for phase in self.phases:
            self.edges_at.append(self.edges_at[-1] + phase.duration_s)

    def at(self, now: float) -> PhaseNow | None:
        """The phase in force at `now`; None when the provider is well."""
        for index, (start_at, end_at) in enumerate(pairwise(self.edges_at)):
            if now < end_at:
                phase = self.phases[index]
                progress = 0.0 if math.isinf(end_at) else max(0.0, (now - start_at) / phase.duration_s)
                return PhaseNow(phase, index, progress, end_at - now)
        return None


def phases_of_profile(
    path: str | PathLike[str],
    profile_id: str,
    *,
    speed: float = 1.0,
    model_of: Mapping[str, str] | None = None,
    offered_per_s: float | None = None,
) -> tuple[Phase, ...]:
    """The phases of one recorded outage, of a file in the format `tideover-outage-profiles/1`.

    `speed` divides the phases' durations and nothing else: latencies and retry-after stay as they are. `model_of` says which
    word of a model's name stands for a model group of the file (`{"opus-new": "opus-4-8"}`); a group that is not in it stands
    for itself. `offered_per_s` is the load of which a phase lets in its `rate_limit_fraction` and can bear its
    `capacity_fraction`; without it there is no limit, and any capacity. The latency of errors is not played.

    Raises ValueError when the file has no such profile.
    """
    profiles = {profile["id"]: profile for profile in json.loads(Path(path).read_text(encoding="utf-8"))["profiles"]}
    if profile_id not in profiles:
        raise ValueError(f"{path} has no profile {profile_id!r}; it has {', '.join(profiles)}")
    words = model_of if model_of is not None else {}
    return tuple(
        Phase(
            name=phase["name"],
            duration_s=phase["duration_s"] / speed,
            p_error=phase["p_error"],
            mix=phase["mix"],
            models=tuple(words.get(group, group) for group in phase["scope"]["models"]),
            latency_factor=phase.get("ok_latency_factor", 1.0),
            p_error_end=phase.get("p_error_end"),
            retry_after_s=phase.get("retry_after_s", 2.0),
            limit_per_s=share_of(phase.get("rate_limit_fraction"), offered_per_s),
            capacity_per_s=capacity_of(phase.get("capacity_fraction"), offered_per_s),
        )
        for phase in profiles[profile_id]["phases"]
    )


def share_of(share: float | None, offered_per_s: float | None) -> float | None:
    """Calls per second, of those that are offered."""
    return None if share is None or offered_per_s is None else share * offered_per_s


def capacity_of(share: float | Sequence[float] | None, offered_per_s: float | None) -> float | Sequence[float] | None:
    if share is None or offered_per_s is None:
        return None
    return share * offered_per_s if isinstance(share, int | float) else [part * offered_per_s for part in share]
