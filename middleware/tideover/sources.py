# SPDX-License-Identifier: Apache-2.0
"""What was written in tideover.toml and in the environment, and where: settings before anyone judged them."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tideover.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Key = tuple[str, ...]

FILE_NAME = "tideover.toml"
PREFIX = "TIDEOVER_"
NOT_SETTINGS = frozenset({"config", "valkey_bin"})
"""Variables with the prefix that say where to look, not what to do."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value as it was written, and where."""

    value: object
    origin: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read, before anyone judged it."""

    leaves: Mapping[Key, Leaf]
    environ: Mapping[str, str]
    home: Path
    """The folder of tideover.toml, else the working directory."""

    def tree(self) -> dict[str, Any]:
        """The leaves as nested tables; a later leaf beats an earlier one."""
        root: dict[str, Any] = {}
        for key, leaf in self.leaves.items():
            node = root
            for part in key[:-1]:
                if not isinstance(node.get(part), dict):
                    node[part] = {}
                node = node[part]
            if leaf.value == {}:
                node.setdefault(key[-1], {})
            else:
                node[key[-1]] = leaf.value
        return root

    def origin(self, key: Key) -> str:
        """Where a key was written; for one that was not, where its nearest neighbour was."""
        for depth in range(len(key), 0, -1):
            for written, leaf in self.leaves.items():
                if written[:depth] == key[:depth]:
                    return leaf.origin
        return "default"


def read(environ: Mapping[str, str], start: Path, is_table: Callable[[Key], bool]) -> Reading:
    """What these variables and the tideover.toml at or above `start` say; `is_table` knows which keys are tables."""
    file = find_file(environ, start)
    leaves = {} if file is None else read_file(file)
    home = start if file is None else file.parent
    return Reading(leaves | read_environ(environ, is_table), environ, home)


def find_file(environ: Mapping[str, str], start: Path) -> Path | None:
    named = environ.get("TIDEOVER_CONFIG")
    if named is None:
        return next((path for folder in (start, *start.parents) if (path := folder / FILE_NAME).is_file()), None)
    path = start / Path(named).expanduser()
    if not path.is_file():
        raise ConfigurationError(f"TIDEOVER_CONFIG names {path}, which is no file")
    return path


def read_file(path: Path) -> dict[Key, Leaf]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path}: {reason(error)}") from None
    return {key: Leaf(value, str(path)) for key, value in flatten(table).items()}


def read_environ(environ: Mapping[str, str], is_table: Callable[[Key], bool]) -> dict[Key, Leaf]:
    """The settings among the variables, in the order of their names.

    Kubernetes gives each pod variables of every service beside it (`TIDEOVER_WEB_SERVICE_HOST`,
    `TIDEOVER_WEB_PORT...`); those are not ours. A table may be given whole, as a JSON object.
    """
    services = [name.removesuffix("SERVICE_HOST") for name in environ if name.endswith("_SERVICE_HOST")]
    not_ours = tuple(service + end for service in services for end in ("SERVICE_", "PORT"))
    leaves: dict[Key, Leaf] = {}
    for name in sorted(environ):
        key = tuple(name.removeprefix(PREFIX).lower().split("__"))
        if name.startswith(PREFIX) and not name.startswith(not_ours) and key[0] not in NOT_SETTINGS:
            values = flatten(read_json(name, environ[name]), key) if is_table(key) else {key: environ[name]}
            leaves |= {path: Leaf(value, f"env {name}") for path, value in values.items()}
    return leaves


def read_json(name: str, text: str) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except ValueError:
        table = None
    if isinstance(table, dict):
        return table
    raise ConfigurationError(f"env {name}: must be a JSON object, or several variables {name}__...")


def flatten(table: Mapping[str, Any], above: Key = ()) -> dict[Key, object]:
    """Nested tables as one; an empty table stays as a leaf, because it was written."""
    flat: dict[Key, object] = {}
    for name, value in table.items():
        key = (*above, name)
        flat |= flatten(value, key) if isinstance(value, dict) and value else {key: value}
    return flat


def dotted(key: Key) -> str:
    """The key as TOML would write it."""
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else json.dumps(part) for part in key)


def env_name(key: Key) -> str:
    return PREFIX + "__".join(key).upper()


def reason(error: Exception) -> str:
    """The error in words, without the path that the caller names."""
    return str(error.strerror if isinstance(error, OSError) else error)


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    near = get_close_matches(wrong, known := list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"


def mask(url: str) -> str:
    """The URL without its password, which may stand before the host or in the query."""
    scheme, mark, rest = url.partition("://")
    user, at, host = re.split("[/?#]", rest, maxsplit=1)[0].rpartition("@")
    if at:
        name, colon, _ = user.partition(":")
        hidden = f"{name}:***" if colon else "***"  # a name alone is often a password that lacks its colon
        rest = rest.replace(f"{user}@{host}", f"{hidden}@{host}", 1)
    return scheme + mark + re.sub(r"(?i)(password=)[^&#]*", r"\1***", rest)
