# SPDX-License-Identifier: Apache-2.0
"""The Lua files keep the house's form: a reader knows from the first lines what goes in, what comes out, and what is safe."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest
import redis

import tideover
import tideover_worker
from tideover.store.scripts import source

SCRIPTS = sorted(Path(str(files("tideover.store") / "lua")).iterdir())
NAMES = [path.stem for path in SCRIPTS]


def header(name: str) -> str:
    found = re.match(r"(--.*\n)+", source(name))
    return "" if found is None else re.sub(r"\n--\s*", " ", found.group())


def code(name: str) -> str:
    return re.sub(r"--.*", "", source(name))


@pytest.mark.parametrize("name", NAMES)
def test_its_first_lines_say_what_it_does(name: str) -> None:
    """One sentence of purpose, then its keys with their types, its arguments, and its answer."""
    purpose, keys, rest = re.split(r" (?=KEYS: |ARGV: )", header(name).removeprefix("-- "), maxsplit=2)
    assert re.match(r"[A-Z].*\.", purpose)
    assert re.search(r"\((list|set|hash|zset|string)\)", keys)
    assert rest.startswith("ARGV: ")
    assert " Returns " in rest


@pytest.mark.parametrize("name", NAMES)
def test_it_says_why_a_repetition_is_safe(name: str) -> None:
    """A reply may be lost, and then the script runs again."""
    reads_only = not re.search(r"call\('(h?set|[sz]add|[lr]push|hincrby|hdel|del|expire|[sz]rem|[lz]pop)", code(name))
    assert reads_only or re.search(r"[Ii]dempotent|Atomic|lost reply", header(name))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("-n")])
def test_its_name_ends_in_the_number_of_its_keys(name: str) -> None:
    """All of them are used, and no other."""
    used = {int(n) for n in re.findall(r"KEYS\[(\d+)\]", code(name))}
    assert set(range(1, int(name.rpartition("-")[2]) + 1)) == used


@pytest.mark.parametrize("name", NAMES)
def test_it_uses_nothing_but_its_keys_and_no_json(name: str) -> None:
    """A name made in Lua would break on a cluster; bodies and facts are read by Python only."""
    assert not re.search(r"cjson|cmsgpack|loadstring|redis\.call\('(keys|scan)'", code(name), re.IGNORECASE)
    firsts = re.findall(r"redis\.p?call\('\w+'(?:, ([\w.\[\]]+))?", code(name))
    assert {first for first in firsts if first} <= {*re.findall(r"KEYS\[\w+\]", code(name)), "ARGV[7]", "ARGV[8]"}


@pytest.mark.parametrize("name", NAMES)
def test_its_lines_can_be_read_without_scrolling(name: str) -> None:
    """As those of our Python."""
    assert [] == [line for line in source(name).splitlines() if len(line) > 128]


@pytest.mark.parametrize("name", NAMES)
def test_it_loads(client: redis.Redis, name: str) -> None:
    """Redis compiles it."""
    assert re.fullmatch(r"[0-9a-f]{40}", client.script_load(source(name)))


def test_every_script_is_run_by_somebody() -> None:
    """No file is left over, and none is missing."""
    folders = [Path(str(files(package))) for package in (tideover, tideover_worker)]
    python = "".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    assert set(NAMES) == set(re.findall(r"run(?:_each)?\(\s*\"([a-z]+-[n\d]+)\"", python))


def test_the_documentation_names_no_script_that_is_gone() -> None:
    """The number in a name moves with its keys."""
    repository = Path(__file__).parents[2]
    text = "".join(path.read_text() for path in [repository / "README.md", *(repository / "docs").rglob("*.md")])
    assert set() == set(re.findall(r"`([a-z]+-[n\d]+)\.lua`", text)) - set(NAMES)
