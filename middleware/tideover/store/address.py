# SPDX-License-Identifier: Apache-2.0
"""Where Redis is, as a URL says it: one server, the master that Sentinels name, or a cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import SplitResult, urlsplit

Kind = Literal["server", "sentinel", "cluster"]

FORMS = (
    "must be redis://host:port/0, rediss://host:port/0, unix:///path/to.sock, redis+sentinel://host:port,host:port/SERVICE/0, "
    "redis+cluster://host:port,host:port (each also as rediss+...) or embedded"
)
SENTINEL_PORT, REDIS_PORT = 26379, 6379
BRACES = str.maketrans("", "", "{}")
SERVICE = re.compile(r"/([^/@]+)(?:/(\d*))?")


@dataclass(frozen=True, slots=True)
class Address:
    """`hosts` and `service` of a Sentinel or a cluster; `options`: a URL of one server with its user, database and query."""

    kind: Kind
    options: str
    hosts: tuple[tuple[str, int], ...] = ()
    service: str = ""


def parse(url: str) -> Address:
    """What a URL means. Raises `ValueError`, which does not repeat the URL: it may hold a password.

    >>> parse("rediss+sentinel://me:pw@a:1,b/shop/2").hosts, parse("redis+sentinel://a/shop").service
    ((('a', 1), ('b', 26379)), 'shop')
    """
    scheme, _, rest = url.partition("://")
    match scheme.split("+"):
        case ["redis" | "rediss" | "unix"]:
            return one_server(url)
        case ["redis" | "rediss" as transport, "sentinel" | "cluster" as kind]:
            return several(transport, kind, rest)
    raise ValueError(FORMS)


def one_server(url: str) -> Address:
    parts = split_url(url)
    if not (parts.path if parts.scheme == "unix" else parts.hostname):
        raise ValueError(FORMS)
    return Address("server", url)


def several(transport: str, kind: Literal["sentinel", "cluster"], rest: str) -> Address:
    """A Sentinel's URL names a service, and maybe a database; a cluster has neither."""
    before_query, mark, query = rest.partition("?")
    authority, slash, path = before_query.partition("/")
    user, at, places = authority.rpartition("@")
    hosts = tuple(places_of(places, SENTINEL_PORT if kind == "sentinel" else REDIS_PORT))
    if kind == "cluster":
        if path not in ("", "0"):
            raise ValueError("names a database, but a cluster has only database 0")
        return Address(kind, f"{transport}://{user}{at}cluster/0{mark}{query}", hosts)
    named = SERVICE.fullmatch(slash + path)
    if named is None:
        raise ValueError("names no service: redis+sentinel://host:port,host:port/SERVICE, as in `sentinel monitor SERVICE`")
    return Address(kind, f"{transport}://{user}{at}sentinel/{named[2] or 0}{mark}{query}", hosts, named[1])


def places_of(places: str, usual_port: int) -> Iterator[tuple[str, int]]:
    for place in places.split(","):
        parts = split_url(f"//{place}")
        if not parts.hostname:
            raise ValueError(FORMS)
        yield parts.hostname, parts.port or usual_port


def split_url(url: str) -> SplitResult:
    """The parts of a URL. Its errors do not repeat it: a password with a `/` in it would be taken for the port."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("is no URL; check the port, and percent-encode the special characters of a password") from None
    return parts


def check_namespace(url: str | None, namespace: str) -> None:
    """Raises `ValueError` for a namespace without a hash tag on a cluster: its keys would be in many slots.

    >>> check_namespace("redis+cluster://a", "{shop}")
    """
    if url is not None and "+cluster://" in url and not has_hash_tag(namespace):
        raise ValueError(
            "must have a hash tag on a cluster, so that one node keeps all its keys and a script can move a job: "
            f'namespace = "{{{namespace.translate(BRACES)}}}"'
        )


def has_hash_tag(namespace: str) -> bool:
    """Whether all keys of a namespace are in one slot of a cluster, by the rule of Redis: the first braces, if not empty.

    >>> has_hash_tag("{shop}"), has_hash_tag("shop"), has_hash_tag("{}{shop}")
    (True, False, False)
    """
    return re.match(r"[^{]*\{[^}]+\}", namespace) is not None
