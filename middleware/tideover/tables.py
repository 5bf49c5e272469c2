# SPDX-License-Identifier: Apache-2.0
"""The tables of tideover.toml: what may stand in each, with bounds and defaults. `settings` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from tideover.core.policy import BreakerPolicy, PacePolicy
from tideover.store.address import split_url

EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]

DialectName: TypeAlias = Literal["openai", "gemini", "grok", "mistral", "compatible"]

STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
BREAKER = BreakerPolicy()
PACE = PacePolicy()


class RouteSettings(BaseModel):
    """A provider, its credential and its options."""

    model_config = STRICT

    kind: Literal["anthropic", "openai-compatible"]
    base_url: str | None = None
    """None means the SDK's own; an openai-compatible route has no such default."""
    dialect: DialectName | None = None
    """Which OpenAI-compatible dialect a gateway or a server of your own speaks; unset: its host says it, else what all take."""
    api_key_env: EnvName | None = None
    api_key_file: Path | None = None
    """Relative to the folder of tideover.toml."""
    models: dict[str, str] = Field(default_factory=dict)
    """The model that a task asks for → its name on this route."""
    max_in_flight: Annotated[int | None, Ge(1), Le(100_000)] = None
    """Calls at once, per process; None = no limit."""
    timeout_s: Annotated[float, Ge(0.1), Le(3600)] = 60.0
    """The longest silence of a provider. An answer may take longer, as long as it comes along."""
    status_page: str | None = None
    """Its provider's status page (`https://status.claude.com`), asked while the route is in trouble, and never to decide."""
    probe: bool = True
    """Whether one-token calls may ask it if it is back. Without them, a few held jobs try it after each pause."""

    @field_validator("base_url", "status_page")
    @classmethod
    def check_base_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = split_url(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ValueError("must be a URL like https://host/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("must hold no user, password or query; name the credential with api_key_env")
        return url

    @model_validator(mode="after")
    def check_whole(self) -> Self:
        if self.kind == "openai-compatible" and self.base_url is None:
            raise ValueError("a route of kind openai-compatible needs base_url")
        if self.kind != "openai-compatible" and self.dialect is not None:
            raise ValueError("only a route of kind openai-compatible has a dialect")
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("give api_key_env or api_key_file, not both")
        return self

    def model(self, asked: str) -> str | None:
        """What `asked` is called on this route; None when the route cannot serve it.

        An anthropic route without a map serves every model under its own name.
        """
        if self.kind == "anthropic" and not self.models:
            return asked
        return self.models.get(asked)


class BreakerSettings(BaseModel):
    """When a route that is down is asked again, and when it counts as well; see `BreakerPolicy`."""

    model_config = STRICT

    probe_after_s: Annotated[float, Ge(0.01), Le(3600)] = BREAKER.probe_after_s
    probe_max_s: Annotated[float, Ge(0.01), Le(3600)] = BREAKER.probe_max_s
    max_probes_per_hour: Annotated[int, Ge(1), Le(100_000)] = BREAKER.max_probes_per_hour
    settle_s: Annotated[float, Ge(0), Le(3600)] = BREAKER.settle_s
    settle_max_s: Annotated[float, Ge(0), Le(86_400)] = BREAKER.settle_max_s

    @model_validator(mode="after")
    def check_whole(self) -> Self:
        if self.probe_max_s < self.probe_after_s:
            raise ValueError(f"probe_max_s ({self.probe_max_s}) is below probe_after_s ({self.probe_after_s})")
        if self.settle_max_s < self.settle_s:
            raise ValueError(f"settle_max_s ({self.settle_max_s}) is below settle_s ({self.settle_s})")
        return self

    def policy(self) -> BreakerPolicy:
        return BreakerPolicy(**self.model_dump())


class DrainSettings(BaseModel):
    """How fast a route that was down is used again; see `PacePolicy`."""

    model_config = STRICT

    start_rate: Annotated[float, Ge(0.01), Le(10_000)] = PACE.start_rate
    double_s: Annotated[float, Ge(0.01), Le(3600)] = PACE.double_s
    max_rate: Annotated[float, Ge(0.01), Le(10_000)] | None = PACE.max_rate
    max_tokens_per_minute: Annotated[float, Ge(1), Le(1e12)] | None = PACE.max_tokens_per_minute
    share: Annotated[float, Ge(0.01), Le(1)] = PACE.share
    weights: dict[str, Annotated[float, Ge(0.01), Le(1000)]] = {}
    """Tenant → how many of its jobs go in a turn of all tenants; 1 unless said."""

    @model_validator(mode="after")
    def check_whole(self) -> Self:
        if self.max_rate is not None and self.max_rate < self.start_rate:
            raise ValueError(f"max_rate ({self.max_rate}) is below start_rate ({self.start_rate})")
        return self

    def policy(self) -> PacePolicy:
        return PacePolicy(**self.model_dump(exclude={"weights"}))


class CapacitySettings(BaseModel):
    """How many jobs of AI tasks may live at once: queued, running and held ones. Unset: any number."""

    model_config = STRICT

    max_jobs: Annotated[int, Ge(1)] | None = None
    max_jobs_per_tenant: Annotated[int, Ge(1)] | None = None
    """Of each tenant; jobs sent without one are not counted."""
    overflow: Literal["reject", "expire_oldest"] = "reject"
    """Without room a job is refused with `CapacityReached`, or the held job that goes first (by expiry or longest wait) expires
    for it: a deferrable one, if there is one."""


class WorkerSettings(BaseModel):
    """One worker process."""

    model_config = STRICT

    concurrency: Annotated[int, Ge(1), Le(10_000)] = 256
    """Coroutines in flight in one process, and jobs fetched ahead."""
    reserved_for_critical: Annotated[float, Ge(0), Le(0.9)] = 0.25
    """Share of the slots that deferrable jobs never take."""
    heartbeat_timeout_s: Annotated[float, Ge(2), Le(3600)] = 20.0
    """A worker that is silent for longer is dead, and its jobs go back."""
    shutdown_grace_s: Annotated[float, Ge(0), Le(3600)] = 30.0
    """How long running jobs may finish after the first SIGTERM."""
    poll_s: Annotated[float, Ge(0.01), Le(5)] = 0.2
    """Longest sleep of an idle consumer."""
