# SPDX-License-Identifier: Apache-2.0
"""The one place that reads the environment and tideover.toml.

`TIDEOVER_*` variables beat the file, which beats the defaults; tables nest with `__`
(`TIDEOVER_BREAKER__WINDOW_S`, `TIDEOVER_ROUTES__OPENAI__BASE_URL`), and a whole table may be given as a JSON object.
A key that nobody knows is an error: a misspelt setting must not run as its default. Values that may hold a secret are
never repeated in a message.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self, cast, get_args
from urllib.parse import quote

from annotated_types import Ge, Le
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from tideover.core.policy import BreakerPolicy, PacePolicy
from tideover.errors import ConfigurationError
from tideover.sources import FILE_NAME, NOT_SETTINGS, Key, Reading, did_you_mean, dotted, env_name, flatten, mask, read, reason
from tideover.store.address import check_namespace, parse, split_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

Mode = Literal["act", "observe", "bypass"]
RouteName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]*$")]
EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]

SOCKET_PATH_MAX = 100
"""Bytes; `sun_path` holds 108 on Linux and 104 on macOS, the closing NUL included."""
SECRETIVE = frozenset({"redis_url", "base_url", "api_key_env", "api_key_file", "routes"})
"""Keys under which people write a secret, be it by mistake."""
STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
BREAKER = BreakerPolicy()
PACE = PacePolicy()


class RouteSettings(BaseModel):
    """A provider, its credential and its options."""

    model_config = STRICT

    kind: Literal["anthropic", "openai-compatible"]
    base_url: str | None = None
    """None means the SDK's own; an openai-compatible route has no such default."""
    api_key_env: EnvName | None = None
    api_key_file: Path | None = None
    """Relative to the folder of tideover.toml."""
    models: dict[str, str] = Field(default_factory=dict)
    """The model that a task asks for → its name on this route."""
    max_in_flight: Annotated[int | None, Ge(1), Le(100_000)] = None
    """Calls at once, per process; None = no limit."""
    timeout_s: Annotated[float, Ge(0.1), Le(3600)] = 60.0

    @field_validator("base_url")
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
    """When a route's model counts as down, and when as back; see `BreakerPolicy`."""

    model_config = STRICT

    window_s: Annotated[float, Ge(1), Le(3600)] = BREAKER.window_s
    min_calls: Annotated[int, Ge(1), Le(10_000)] = BREAKER.min_calls
    failure_ratio: Annotated[float, Ge(0.01), Le(1)] = BREAKER.failure_ratio
    probe_after_s: Annotated[float, Ge(0.01), Le(3600)] = BREAKER.probe_after_s
    probe_max_s: Annotated[float, Ge(0.01), Le(3600)] = BREAKER.probe_max_s
    probes: Annotated[int, Ge(1), Le(100)] = BREAKER.probes
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
    """How fast held jobs go back; see `PacePolicy`."""

    model_config = STRICT

    start_rate: Annotated[float, Ge(0.01), Le(10_000)] = PACE.start_rate
    max_rate: Annotated[float, Ge(0.01), Le(10_000)] = PACE.max_rate
    double_s: Annotated[float, Ge(0.01), Le(3600)] = PACE.double_s

    @model_validator(mode="after")
    def check_whole(self) -> Self:
        if self.max_rate < self.start_rate:
            raise ValueError(f"max_rate ({self.max_rate}) is below start_rate ({self.start_rate})")
        return self

    def policy(self) -> PacePolicy:
        return PacePolicy(**self.model_dump())


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


class Settings(BaseSettings):
    """Everything that an owner may choose. Made by `load`, which knows where each value came from."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    redis_url: str | None = Field(default=None, repr=False)
    namespace: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_{}.-]+$")] = Field("dramatiq", validate_default=True)
    mode: Mode = "act"
    routes: dict[RouteName, RouteSettings] = Field(
        default_factory=lambda: {"anthropic": RouteSettings(kind="anthropic")}, min_length=1
    )
    breaker: BreakerSettings = BreakerSettings()
    drain: DrainSettings = DrainSettings()
    worker: WorkerSettings = WorkerSettings()
    capacity: CapacitySettings = CapacitySettings()
    max_wait_s: Annotated[float, Ge(1), Le(31_536_000)] = 86_400.0
    """A held job without an expiry is ordered as if it expired after this long."""
    max_holds: Annotated[int, Ge(1), Le(60_000)] = 50
    """A job that was held so often needs review instead of another hold."""
    max_deliveries: Annotated[int, Ge(1), Le(100)] = 3
    """A job that so many workers died with needs review instead of another run."""
    max_payload_bytes: Annotated[int, Ge(1024), Le(536_870_912)] = 8_388_608
    """The largest job of an AI task that `send` accepts, in bytes as it is stored: dramatiq's JSON writes a character beyond
    ASCII with 6, an emoji with 12."""

    _reading: Reading

    def __init__(self, reading: Reading) -> None:
        super().__init__(reading=reading)
        self._reading = reading

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003  named by pydantic-settings
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what was read: the stock sources forget where a value came from and skip unknown variables."""
        reading = cast(InitSettingsSource, init_settings).init_kwargs["reading"]
        return (InitSettingsSource(settings_cls, reading.tree()),)

    @field_validator("redis_url")
    @classmethod
    def check_redis_url(cls, url: str | None) -> str | None:
        if url is None or url == "embedded":
            return url
        parse(url)
        return url

    @field_validator("namespace")
    @classmethod
    def check_hash_tag(cls, namespace: str, info: ValidationInfo) -> str:
        check_namespace(info.data.get("redis_url"), namespace)
        return namespace

    @property
    def primary(self) -> str:
        """The first route: the one of every task that names no other."""
        return next(iter(self.routes))

    @property
    def data_dir(self) -> Path:
        """Where the private server and other files of this machine live; not created here."""
        return self._reading.home / ".tideover"

    def store_url(self) -> str:
        """The URL to connect to. Starts no server."""
        if self.redis_url is None:
            raise ConfigurationError(
                "redis_url is not set, so there is nowhere to keep jobs. Set TIDEOVER_REDIS_URL, or redis_url in "
                f"{FILE_NAME}; or run `tideover worker --dev` or `tideover demo` for a private server on this machine"
            )
        if self.redis_url == "embedded":
            return f"unix://{quote(str(embedded_socket(self.data_dir)))}"
        return self.redis_url

    def route(self, name: str) -> RouteSettings:
        """The route of this name."""
        if name in self.routes:
            return self.routes[name]
        raise ConfigurationError(f"there is no route {name!r}{did_you_mean(name, self.routes)}")

    def api_key(self, route_name: str) -> str | None:
        """The route's credential, read now, so that a rotated key is seen; None where none is to be sent.

        Anthropic's own key goes to Anthropic and to the primary route only, never to another server.
        """
        route = self.route(route_name)
        if route.api_key_env is not None:
            return self._key_from_env(route_name, route.api_key_env)
        if route.api_key_file is not None:
            return self._key_from_file(route_name, route.api_key_file)
        if route.kind != "anthropic" or (route.base_url is not None and route_name != self.primary):
            return None
        if route.base_url is None:
            return self._key_from_env(route_name, "ANTHROPIC_API_KEY")
        return self._reading.environ.get("ANTHROPIC_API_KEY", "").strip() or None

    def _key_from_env(self, route_name: str, variable: str) -> str:
        if key := self._reading.environ.get(variable, "").strip():
            return key
        raise ConfigurationError(f"route {route_name} takes its key from the variable {variable}, which is not set")

    def _key_from_file(self, route_name: str, named: Path) -> str:
        path = self._reading.home / named.expanduser()
        try:
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"route {route_name} takes its key from {path}: {reason(error)}") from None
        if not key:
            raise ConfigurationError(f"route {route_name} takes its key from {path}, which is empty")
        return key

    def origin(self, key: Key) -> str:
        """Where this value was written: `env TIDEOVER_X`, the path of the file, or `default`."""
        leaf = self._reading.leaves.get(key)
        return "default" if leaf is None else leaf.origin


TABLES: Mapping[Key, type[BaseModel]] = {
    (): Settings,
    ("breaker",): BreakerSettings,
    ("drain",): DrainSettings,
    ("worker",): WorkerSettings,
    ("capacity",): CapacitySettings,
}


@cache
def settings() -> Settings:
    """This process's settings, read once."""
    return load(environ=os.environ, start=Path.cwd())


def forget() -> None:
    """Read again at the next use; for tests."""
    settings.cache_clear()


def load(*, environ: Mapping[str, str], start: Path) -> Settings:
    """Settings from these variables and the tideover.toml at or above `start`; nothing is cached."""
    reading = read(environ, start.resolve(), is_table)
    try:
        return Settings(reading)
    except ValidationError as invalid:
        complaints = [complaint(error, reading) for error in invalid.errors(include_url=False)]
        raise ConfigurationError("\n".join(complaints)) from None


def explain_settings(of: Settings) -> dict[str, tuple[object, str]]:
    """Each value that counts: dotted key → (value, origin as of `Settings.origin`). Passwords are masked."""
    shown = of.model_dump(mode="json")
    if of.redis_url is not None:
        shown["redis_url"] = mask(of.redis_url)
    return {dotted(key): (value, of.origin(key)) for key, value in flatten(shown).items()}


def embedded_socket(data_dir: Path) -> Path:
    """Where the private server of this data directory listens; a path too long for a socket moves to `$TMPDIR`."""
    path = data_dir.resolve() / "valkey.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_MAX:
        return path
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"tideover-{os.getuid()}-{digest}.sock"


def valkey_binary() -> str | None:
    """The server that TIDEOVER_VALKEY_BIN names for the private store; None when it is not set."""
    return os.environ.get("TIDEOVER_VALKEY_BIN")


def model_at(key: Key) -> type[BaseModel] | None:
    return RouteSettings if len(key) == 2 and key[0] == "routes" else TABLES.get(key)


def field_at(key: Key) -> FieldInfo | None:
    model = model_at(key[:-1])
    return None if model is None else model.model_fields.get(key[-1])


def is_table(key: Key) -> bool:
    return key == ("routes",) or model_at(key) is not None or (len(key) == 3 and key[::2] == ("routes", "models"))


def complaint(error: ErrorDetails, reading: Reading) -> str:
    """One line: which key, where it was written, what is wrong with it and what is allowed."""
    key = tuple(str(part) for part in error["loc"] if part != "[key]")
    origin = reading.origin(key)
    head = f"{dotted(key)} ({origin})"
    if error["type"] == "extra_forbidden":
        return f"{head}: {unknown(key, from_env=origin.startswith('env '))}"
    field = field_at(key)
    plain = field is not None and key[-1] not in SECRETIVE and isinstance(error["input"], str | int | float)
    echo = f"is {error['input']!r}, " if plain else ""
    return f"{head}: {echo}{wanted(error, field)}"


def unknown(key: Key, *, from_env: bool) -> str:
    if key[-1] == "api_key":
        return 'a key has no place in the settings; name the variable that holds it: api_key_env = "..."'
    route = key[1] if key[0] == "routes" and len(key) > 1 else "anthropic"
    tables: dict[Key, type[BaseModel]] = {**TABLES, ("routes", route): RouteSettings}
    known: list[Key] = [(*table, name) for table, model in tables.items() for name in model.model_fields]
    if from_env:
        known += [(name,) for name in NOT_SETTINGS]
    spell = env_name if from_env else dotted
    return f"unknown key{did_you_mean(spell(key), [spell(other) for other in known])}"


def wanted(error: ErrorDetails, field: FieldInfo | None) -> str:
    """What would be right, both ends of a range included."""
    match [] if field is None else field.metadata:
        case [Ge(ge=low), Le(le=high)]:
            return f"must be a number from {low} to {high}"
    if error["type"] == "missing" and field is not None:
        return f"is missing, must be {' or '.join(map(repr, get_args(field.annotation)))}"
    if error["type"] in ("model_type", "dict_type"):
        return "must be a table"
    return error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
