# SPDX-License-Identifier: Apache-2.0
"""The connection, the scripts, and what counts as Redis being gone."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from traceback import walk_tb
from typing import Any, Final, Literal, Self, TypeAlias

import redis
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.commands.core import Script
from redis.exceptions import (
    BusyLoadingError,
    ClusterError,
    LockNotOwnedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool

from tideover import clock
from tideover.errors import ConfigurationError, StoreUnavailable
from tideover.store.address import Address, parse

Client: TypeAlias = Any
"""A `redis.Redis` or `redis.RedisCluster`. redis-py types each answer as "this, or an awaitable of it"; we say the type where
we read it."""

untyped: Any = redis

GONE: Final[tuple[type[Exception], ...]] = (
    redis.ConnectionError,
    redis.TimeoutError,
    ReadOnlyError,
    BusyLoadingError,
    ClusterError,
    TryAgainError,
    RedisClusterException,
)
"""Redis cannot be asked just now; asking again later may work. A failover shows as any of these."""

FAILED: Final[tuple[type[Exception], ...]] = (RedisError, RedisClusterException)
"""Whatever redis-py raises; what its cluster client raises is no `RedisError`."""

FULL = OutOfMemoryError
"""Redis is at its maxmemory: it takes nothing new, but lets go of what it has."""

LEASE_LOST = LockNotOwnedError
"""A lease cannot be prolonged: it ran out, and another process may have it."""

SOCKET_TIMEOUT_S = 10.0
"""Said, because redis-py 8 made 5 s its silent default."""
SENTINEL_TIMEOUT_S = 2.0
"""Shorter: there is another Sentinel to ask."""
ASK_SENTINELS_S = 0.5
ASKING_SHARE = 10.0
"""Sentinels that are slow or silent are asked so much more seldom."""
TIMEOUTS: Final[Mapping[str, Any]] = {"socket_timeout": SOCKET_TIMEOUT_S, "socket_connect_timeout": SOCKET_TIMEOUT_S}
OLDEST_FOR_CLUSTER = 8
"""redis-py 6.2 to 7.1 close sockets that other threads use when a node fails: seen as EBADF and as 10 s without an answer."""
CLUSTER_TRIES = 3
"""Each asks anew where the slot is, half a second later at most."""


def connect(url: str) -> Client:
    """A client for a URL as `store.address` describes them. Connects at the first command.

    Raises:
      ConfigurationError: the URL has an option that redis-py does not know, or a value that it cannot read.
    """
    try:
        address = parse(url)
        options = {**TIMEOUTS, **options_of(address)}
    except (ValueError, TypeError) as wrong:
        raise ConfigurationError(f"the URL of Redis: {wrong}") from None
    match address.kind:
        case "server":
            return redis.Redis.from_url(url, **TIMEOUTS)
        case "sentinel":
            return client_of_master(address, options)
        case "cluster":
            return LazyClient(partial(client_of_cluster, address, options))


def options_of(address: Address) -> dict[str, Any]:
    """The options in a URL as redis-py reads them. Raises what redis-py does for one that it does not know."""
    own = {"sentinel_username", "sentinel_password"} if address.kind == "sentinel" else set()
    options = dict(untyped.connection.parse_url(address.options))
    connection = options.pop("connection_class", redis.Connection)
    for name in ("host", "port"):
        options.pop(name, None)
    connection(**{name: value for name, value in options.items() if name not in own | {"max_connections"}})
    return options | ({"ssl": True} if issubclass(connection, redis.SSLConnection) else {})


class MasterPool(SentinelConnectionPool):
    """Asks every half second who the master is, and drops idle connections when it is another one.

    redis-py asks before a new connection only, and a planned failover leaves the old ones open for 8 s and more, to a server
    that still accepts what nobody will ever see again.
    """

    ask_at = 0.0

    def get_connection(self, *args: Any, **options: Any) -> Any:
        asked_at = clock.monotonic()
        if asked_at >= self.ask_at:
            self.ask_at = asked_at + ASK_SENTINELS_S
            with suppress(*FAILED):  # the connections that there are may still do
                untyped.sentinel.SentinelConnectionPool.get_master_address(self)
            self.ask_at += ASKING_SHARE * (clock.monotonic() - asked_at)
        return super().get_connection(*args, **options)


class Sentinels(Sentinel):
    """redis-py's, with an error that fits a log line."""

    def discover_master(self, service_name: str) -> Any:
        try:
            return untyped.sentinel.Sentinel.discover_master(self, service_name)
        except MasterNotFoundError as error:
            why = ", ".join(re.findall(r"> - (?:\w+:)?(\w+)", str(error))) or "they know none that is up"
            raise MasterNotFoundError(f"no Sentinel names a master of {service_name!r}: {why}") from None


def client_of_master(address: Address, options: dict[str, Any]) -> Client:
    """Goes where the Sentinels say that the master is. User and password are for Redis; TLS is for the Sentinels too."""
    sentinels = {name: value for name, value in options.items() if name.startswith("ssl")}
    for name in ("username", "password"):
        if (value := options.pop(f"sentinel_{name}", None)) is not None:
            sentinels[name] = value
    sentinels |= {"socket_timeout": SENTINEL_TIMEOUT_S, "socket_connect_timeout": SENTINEL_TIMEOUT_S}
    sentinels["retry"] = Retry(NoBackoff(), 0)  # redis-py 8 would ask ten times, for 5 s in all, before it asks the next one
    asked: Any = Sentinels
    sentinel = asked(address.hosts, sentinel_kwargs=sentinels, **options)
    return sentinel.master_for(address.service, connection_pool_class=MasterPool)


class Cluster(redis.RedisCluster):
    """redis-py's cluster client, whose pipelines are transactions unless told otherwise, as those of `redis.Redis`.

    dramatiq's barriers watch a key in a pipeline, and groups stand on barriers; all keys of a transaction must be in one slot.
    """

    def pipeline(self, transaction: bool | None = True, shard_hint: Any = None) -> Any:
        return untyped.RedisCluster.pipeline(self, transaction, shard_hint)


def client_of_cluster(address: Address, options: dict[str, Any]) -> Client:
    """Asks where the slot of a namespace is, and asks again when it has moved."""
    if int(redis.__version__.partition(".")[0]) < OLDEST_FOR_CLUSTER:
        raise ConfigurationError(f"a cluster needs redis-py {OLDEST_FOR_CLUSTER} or newer, and this is {redis.__version__}")
    nodes = [untyped.cluster.ClusterNode(host, port) for host, port in address.hosts]
    options = {name: value for name, value in options.items() if name != "db"}
    retry = Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), CLUSTER_TRIES)
    return Cluster(startup_nodes=nodes, retry=retry, **options)


@contextmanager
def store_errors(doing: str, *, accepts: Literal["a job", "jobs", "nothing"] = "a job") -> Iterator[None]:
    """Turns what redis-py raises into `StoreUnavailable`, which says what failed, what was accepted, and what to do.

    `accepts`: what one command accepts; *jobs*: several commands do it, so that some may have been accepted in any case.
    """
    try:
        yield
    except FAILED as error:
        maybe = accepts == "jobs" or (accepts == "a job" and may_be_done(error))
        raised = StoreUnavailable(
            f"{doing}: Redis did not answer or refused ({type(error).__name__}: {str(error)[:200]}). "
            f"{MAY_BE_ACCEPTED if maybe else 'Nothing was accepted'}. {remedy(error)}"
        )
        raised.may_be_accepted = maybe
        raise raised from error


MAY_BE_ACCEPTED = (
    "It may have been accepted, because only the answer may be lost: with an idempotency_key, sending again adds nothing twice"
)


def may_be_done(error: BaseException) -> bool:
    """Whether Redis may have done what it was asked: it did not refuse, and there was a connection to ask over.

    redis-py repeats a command whose answer was lost, and its error is of the last time. So it is where the first connection was
    sought that tells, not what the error says. A cluster's client seeks another one after an answer was lost.
    """
    if isinstance(error, (ResponseError, BusyLoadingError, redis.AuthenticationError)):
        return False
    calls = [frame.f_code.co_name for frame, _ in walk_tb(error.__traceback__)]
    if "client_of_cluster" in calls:
        return False
    in_cluster = any(frame.f_globals.get("__name__") == "redis.cluster" for frame, _ in walk_tb(error.__traceback__))
    return in_cluster or "get_connection" not in calls


def remedy(error: Exception) -> str:
    match error:
        case redis.exceptions.MovedError():
            return "It is a cluster: give its URL as redis+cluster://, and a namespace with a hash tag"
        case NoPermissionError():
            return "Grant its user the commands, keys and channels that docs/topologies.md lists"
    return "Check that it runs, the URL, its maxmemory and that it is no replica; then try again"


def text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def starting(prefix: str) -> str:
    """The pattern of SCAN for what begins so.

    >>> starting("0c4f")
    '0c4f*'
    """
    return re.sub(r"([*?\[\\])", r"\\\1", prefix) + "*"


class LazyClient:
    """A client that is made when it is first used; a fork starts anew."""

    def __init__(self, make: Callable[[], Client]) -> None:
        self._make = make
        self._made: tuple[int, Client] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.real(), name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def register_script(self, script: bytes | str) -> Script:
        """dramatiq's broker registers its scripts when it is made, which is when the tasks are declared: that needs no URL."""
        return Script(self, script)  # type: ignore[arg-type]  # it asks a client's methods of it, and we have them all

    def real(self) -> Client:
        if self._made is None or self._made[0] != os.getpid():
            self._made = (os.getpid(), self._make())
        return self._made[1]

    def close(self) -> None:
        if self._made is not None and self._made[0] == os.getpid():
            self._made[1].close()


def lazy_client(url: Callable[[], str]) -> Client:
    """A client that asks for its URL, and connects, when it is first used."""
    return LazyClient(lambda: connect(url()))


@dataclass(frozen=True, slots=True)
class Safekeeping:
    """How a server keeps what it has; None where this user may not ask. `logs`: append-only file; `saves`: snapshots.

    `used_bytes`, `most_bytes`: of its memory; 0: there is no limit.
    """

    policy: str | None
    logs: bool | None
    saves: bool | None
    used_bytes: int | None = None
    most_bytes: int | None = None

    @property
    def risk(self) -> tuple[str, str]:
        """What of its data a crash may cost, as far as is known, and the remedy; empty: nothing."""
        match self.logs, self.saves:
            case None, _:
                risk = "this user may not ask (INFO) for maxmemory-policy and persistence, so they are not checked"
                return risk, "see to maxmemory-policy noeviction and appendonly yes yourself, or grant +info"
            case True, _:
                return "", ""
            case False, False:
                return "Redis keeps nothing on disk: every job is lost when it restarts", "set appendonly yes"
            case _:
                risk = "Redis keeps no append-only file: what came after the last snapshot is lost when it crashes"
                return risk, "set appendonly yes"


def safekeeping(client: Client) -> list[Safekeeping]:
    """Of the one server, or of each primary of a cluster."""
    while isinstance(client, LazyClient):
        client = client.real()
    if isinstance(client, redis.RedisCluster):
        return [safekeeping_of(client, {"target_nodes": node}) for node in untyped.RedisCluster.get_primaries(client)]
    return [safekeeping_of(client, {})]


def safekeeping_of(client: Client, node: Mapping[str, Any]) -> Safekeeping:
    policy: str | None = None
    logs: bool | None = None
    saves: bool | None = None
    used_bytes: int | None = None
    most_bytes: int | None = None
    with suppress(ResponseError):
        memory = client.info("memory", **node)
        policy = text(memory.get("maxmemory_policy", "noeviction"))
        used_bytes, most_bytes = int(memory["used_memory"]), int(memory.get("maxmemory", 0))
        logs = bool(client.info("persistence", **node)["aof_enabled"])
    with suppress(ResponseError):
        saves = client.config_get("save", **node).get("save") != ""
    return Safekeeping(policy, logs, saves, used_bytes, most_bytes)
