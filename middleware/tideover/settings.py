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
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args
from urllib.parse import quote

from annotated_types import Ge, Le
from pydantic import (
    BaseModel,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from tideover.errors import ConfigurationError
from tideover.sources import FILE_NAME, NOT_SETTINGS, Key, Reading, did_you_mean, dotted, env_name, flatten, mask, read, reason
from tideover.store.address import check_namespace, parse
from tideover.tables import (
    LIBRARIES,
    BreakerSettings,
    CapacitySettings,
    DrainSettings,
    PriceSettings,
    RouteSettings,
    TenantSettings,
    WorkerSettings,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

Mode = Literal["act", "observe", "bypass"]
RouteName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]*$")]

SOCKET_PATH_MAX = 100
"""Bytes; `sun_path` holds 108 on Linux and 104 on macOS, the closing NUL included."""
SECRETIVE = frozenset({"redis_url", "base_url", "api_key_env", "api_key_file", "routes"})
"""Keys under which people write a secret, be it by mistake."""


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
    tenants: dict[str, TenantSettings] = {}
    prices: dict[str, PriceSettings] = Field({}, validate_default=True)
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

    @field_validator("prices")
    @classmethod
    def check_prices(cls, prices: dict[str, PriceSettings], info: ValidationInfo) -> dict[str, PriceSettings]:
        for name, route in info.data.get("routes", {}).items():
            missing = sorted(set(route.models.values()) - prices.keys()) or ([] if prices or route.models else ["its models"])
            if route.budget_per_hour is not None and missing:
                raise ValueError(f"the budget_per_hour of route {name} needs the price of {', '.join(missing)}")
        return prices

    @field_validator("tenants")
    @classmethod
    def check_tenants(cls, tenants: dict[str, TenantSettings], info: ValidationInfo) -> dict[str, TenantSettings]:
        routes = info.data.get("routes", {})
        for tenant, name in ((tenant, name) for tenant, table in tenants.items() for name in table.routes):
            if name not in routes:
                raise ValueError(f"routes of {tenant}: there is no route {name!r}{did_you_mean(name, routes)}")
        return tenants

    def narrowed(self, routes: tuple[str, ...], tenant: str, own: Sequence[str] | None) -> tuple[str, ...]:
        """Those of a task's routes that a job may use: its own word (`own`; None: all) and its tenant's leave them in order."""
        allowed = self.tenants.get(tenant)
        return tuple(r for r in routes if (own is None or r in own) and (allowed is None or r in allowed.routes))

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
        if route.kind == "foundry":
            return self._key_from_env(route_name, "ANTHROPIC_FOUNDRY_API_KEY")
        if route.kind != "anthropic" or (route.base_url is not None and route_name != self.primary):
            return None
        if route.base_url is None:
            return self._key_from_env(route_name, "ANTHROPIC_API_KEY")
        return self._reading.environ.get("ANTHROPIC_API_KEY", "").strip() or None

    def check_route(self, route_name: str) -> None:
        """Raises `ConfigurationError` where the route's credential or its cloud's libraries are missing."""
        self.api_key(route_name)
        library, extra = LIBRARIES.get(self.route(route_name).kind, ("", ""))
        with suppress(ModuleNotFoundError):
            if not library or find_spec(library) is not None:
                return
        raise ConfigurationError(f"route {route_name} needs {library}: pip install 'tideover[{extra}]'")

    def headers_of_others(self, route_name: str) -> tuple[str, ...]:
        """Names of headers that the SDK takes from the environment for the primary, and that this route must not send."""
        if route_name == self.primary:
            return ()
        lines = self._reading.environ.get("ANTHROPIC_CUSTOM_HEADERS", "").split("\n")
        return tuple(line.partition(":")[0].strip() for line in lines if ":" in line)

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

OF_NAMES: Mapping[str, type[BaseModel]] = {"routes": RouteSettings, "tenants": TenantSettings, "prices": PriceSettings}
"""Tables of tables, one for each name."""


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
    return OF_NAMES.get(key[0]) if len(key) == 2 and key[0] in OF_NAMES else TABLES.get(key)


def field_at(key: Key) -> FieldInfo | None:
    model = model_at(key[:-1])
    return None if model is None else model.model_fields.get(key[-1])


def is_table(key: Key) -> bool:
    return (
        (len(key) == 1 and key[0] in OF_NAMES)
        or model_at(key) is not None
        or (len(key) == 3 and key[::2] == ("routes", "models"))
    )


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
    tables |= {key[:2]: OF_NAMES[key[0]]} if key[0] in OF_NAMES and len(key) > 1 else {}
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
