# SPDX-License-Identifier: Apache-2.0
"""The tables of tideover.toml: what may stand in each, with bounds and defaults. `settings` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from annotated_types import Ge, Le, Len
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from tideover.core.policy import BreakerPolicy, PacePolicy
from tideover.store.address import split_url

EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]

RouteKind: TypeAlias = Literal[
    "anthropic",
    "bedrock",
    "bedrock-mantle",
    "vertex",
    "foundry",
    "anthropic-aws",
    "anthropic-google-cloud",
    "openai-compatible",
]
DialectName: TypeAlias = Literal["openai", "gemini", "grok", "mistral", "compatible"]

PASSES_NAMES = frozenset({"anthropic", "anthropic-aws", "anthropic-google-cloud"})
"""Kinds of routes that know every model under Anthropic's own name for it."""

OF_KINDS: Mapping[str, tuple[str, ...]] = {
    "dialect": ("openai-compatible",),
    "region": ("bedrock", "bedrock-mantle", "vertex", "anthropic-aws", "anthropic-google-cloud"),
    "project": ("vertex", "anthropic-google-cloud"),
    "workspace": ("anthropic-aws", "anthropic-google-cloud"),
    "profile": ("bedrock", "bedrock-mantle", "anthropic-aws"),
    "resource": ("foundry",),
}
"""Which kinds of routes have a setting that others have not."""

NEEDED: Mapping[str, tuple[str, ...]] = {
    "bedrock": ("region",),
    "bedrock-mantle": ("region",),
    "vertex": ("region", "project"),
    "anthropic-aws": ("region", "workspace"),
    "anthropic-google-cloud": ("region", "project", "workspace"),
    "openai-compatible": ("base_url",),
}

LIBRARIES: Mapping[str, tuple[str, str]] = {
    "bedrock": ("botocore", "bedrock"),
    "bedrock-mantle": ("botocore", "bedrock"),
    "anthropic-aws": ("botocore", "bedrock"),
    "vertex": ("google.auth", "vertex"),
    "anthropic-google-cloud": ("google.auth", "vertex"),
}
"""What a kind of route needs beside the SDK, and the extra of this package that brings it."""

FAILURE_DOMAINS: Mapping[str, str] = {
    "bedrock": "bedrock",
    "bedrock-mantle": "bedrock",
    "vertex": "vertex",
    "foundry": "anthropic",
    "anthropic-aws": "anthropic",
    "anthropic-google-cloud": "anthropic",
}
"""Who runs the models of a kind of route, as its documentation says. Behind Foundry (where that is hosted on Anthropic's
infrastructure), Claude Platform on AWS, and Anthropic's own service on Google Cloud it is Anthropic."""

STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
BREAKER = BreakerPolicy()
PACE = PacePolicy()


class RouteSettings(BaseModel):
    """A provider, its credential and its options."""

    model_config = STRICT

    kind: RouteKind
    base_url: str | None = None
    """None means the SDK's own; an openai-compatible route has no such default."""
    dialect: DialectName | None = None
    """Which OpenAI-compatible dialect a gateway or a server of your own speaks; unset: its host says it, else what all take."""
    api_key_env: EnvName | None = None
    api_key_file: Path | None = None
    """Relative to the folder of tideover.toml."""
    region: str | None = None
    """Of AWS or Google."""
    project: str | None = None
    """Of Google Cloud."""
    workspace: str | None = None
    """Anthropic's, on AWS or Google Cloud."""
    profile: str | None = None
    """Of AWS' credentials; unset: its usual chain."""
    resource: str | None = None
    """Of Foundry, if base_url is not given."""
    failure_domain: str | None = None
    """Routes of one domain are expected to fail at once; unset: whoever runs the models, as far as kind and host tell."""
    models: dict[str, str] = Field(default_factory=dict)
    """The model that a task asks for → its name on this route."""
    max_in_flight: Annotated[int | None, Ge(1), Le(100_000)] = None
    """Calls at once, per process; None = no limit."""
    max_requests_per_minute: Annotated[float | None, Ge(1), Le(1e9)] = None
    """Over all processes; a call that finds no room waits for it, or its job is rerouted or held. None = no limit."""
    max_tokens_per_minute: Annotated[float | None, Ge(1), Le(1e12)] = None
    """Of input and output together, over all processes: by what calls took on average, set right by what each one tells."""
    timeout_s: Annotated[float, Ge(0.1), Le(3600)] = 60.0
    """The longest silence of a provider. An answer may take longer, as long as it comes along."""
    budget_per_hour: Annotated[float | None, Ge(0)] = None
    """In the currency of `prices`, over all processes. Once it is spent the route is parked until the hour is over."""
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
        for name in NEEDED.get(self.kind, ()):
            if getattr(self, name) is None:
                raise ValueError(f"a route of kind {self.kind} needs {name}")
        for name, kinds in OF_KINDS.items():
            if getattr(self, name) is not None and self.kind not in kinds:
                raise ValueError(f"only a route of kind {' or '.join(kinds)} has a {name}")
        if self.kind == "foundry" and (self.resource is None) == (self.base_url is None):
            raise ValueError("a route of kind foundry needs resource, or base_url, and not both")
        if self.profile is not None and (self.api_key_env or self.api_key_file):
            raise ValueError("give profile, or a key, not both")
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("give api_key_env or api_key_file, not both")
        return self

    def model(self, asked: str) -> str | None:
        """What `asked` is called on this route; None when the route cannot serve it.

        Without a map a route to Anthropic itself serves every model under its own name, others serve none.
        """
        return asked if self.passes_names else self.models.get(asked)

    @property
    def passes_names(self) -> bool:
        return self.kind in PASSES_NAMES and not self.models

    @property
    def domain(self) -> str:
        """Its failure domain."""
        if self.failure_domain is not None:
            return self.failure_domain
        host = "" if self.base_url is None else split_url(self.base_url).netloc
        if self.kind == "anthropic":
            return "anthropic" if host in ("", "api.anthropic.com") else host
        return FAILURE_DOMAINS.get(self.kind, host)


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


class PriceSettings(BaseModel):
    """Of a model, under the name that a route has for it, for a million tokens. Tokens that a cache spared are not counted."""

    model_config = STRICT

    input: Annotated[float, Ge(0)]
    output: Annotated[float, Ge(0)]


class TenantSettings(BaseModel):
    """What jobs of one tenant may do."""

    model_config = STRICT

    routes: Annotated[tuple[str, ...], Len(min_length=1)]
    """The only routes that its jobs may use, of those that their task allows: its prompts go nowhere else."""


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
