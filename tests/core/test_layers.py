# SPDX-License-Identifier: Apache-2.0
"""The house stands as DESIGN §3 draws it: imports point downwards, one place reads the environment, one asks for the time.

The import contracts themselves are in pyproject.toml.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
LIBRARY, WORKER = ROOT / "middleware", ROOT / "worker"
FILES = [str(path.relative_to(ROOT)) for root in (LIBRARY, WORKER) for path in sorted(root.rglob("*.py"))]

MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 40
TABLES = {"middleware/tideover/testing/exchange.py:perform"}
"""Functions that may be long, because they are one `match` or one table."""

PASS_THE_ENVIRONMENT_ON = {"worker/tideover_worker/demo/stage.py"}
"""They start a process and hand it an environment; none of what they do depends on it."""


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def dotted(node: ast.AST) -> str:
    """`os.environ.get` of the nodes that spell it."""
    match node:
        case ast.Attribute(value=value, attr=name):
            return f"{dotted(value)}.{name}"
        case ast.Name(id=name):
            return name
    return ""


def names_read(path: str) -> set[str]:
    """The dotted names that a file reads, and what it imports from modules as `module.name`."""
    found = set()
    written = {id(target.value) for target in assigned(path) if isinstance(target, ast.Subscript)}
    for node in ast.walk(tree(path)):
        match node:
            case ast.ImportFrom(module=str(module), names=names):
                found |= {f"{module}.{alias.name}" for alias in names}
            case ast.Attribute() if id(node) not in written:
                found.add(dotted(node))
    return found


def assigned(path: str) -> Iterator[ast.expr]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Assign):
            yield from node.targets


def functions(path: str) -> Iterator[tuple[str, int]]:
    """Each function, with its lines: docstrings are for free."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node, clean=False) is not None
            doc = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            yield node.name, (node.end_lineno or 0) - node.lineno + 1 - doc


def test_imports_point_downwards() -> None:
    """Every contract of pyproject.toml is kept; the linter says which import breaks one."""
    command = [Path(sys.executable).with_name("lint-imports"), "--config", ROOT / "pyproject.toml", "--no-cache"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )  # it disables all loggers of its process
    assert 0 == done.returncode, done.stdout


def test_the_contracts_would_notice() -> None:
    """The linter sees lazy imports and other people's packages, so that a contract that is kept says something."""
    graph = grimp.build_graph(
        "tideover", "tideover_worker", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )
    assert "tideover.clock" in graph.find_modules_that_directly_import("time")
    assert "tideover.store.client" in graph.find_modules_that_directly_import("redis")
    assert "tideover.providers.wire" in graph.find_modules_that_directly_import("anthropic")
    assert "tideover.middleware" in graph.find_modules_that_directly_import("tideover_worker.boot")
    assert "tideover.health" not in graph.find_modules_that_directly_import("tideover.attempt") - {"tideover.health"}
    assert "tideover.attempt" not in graph.find_modules_that_directly_import("tideover.health")


@pytest.mark.parametrize("path", [path for path in FILES if not path.endswith("tideover/settings.py")])
def test_only_settings_reads_the_environment(path: str) -> None:
    """Whatever an owner may set stands in one place, with its type and its default."""
    readers = ("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.path.expandvars")
    read = {name for name in names_read(path) if name.startswith(readers)}
    assert set() == read or path in PASS_THE_ENVIRONMENT_ON


@pytest.mark.parametrize("path", [path for path in FILES if not path.endswith("tideover/clock.py")])
def test_only_the_clock_asks_for_the_time(path: str) -> None:
    """Decisions are given `now`, shared ones take Redis' time; so tests need not wait, and machines need not agree."""
    asking = {f"time.{name}{unit}" for name in ("time", "monotonic", "perf_counter", "process_time") for unit in ("", "_ns")}
    asking |= {"time.localtime", "time.gmtime", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
    names = {name.removeprefix("datetime.datetime.").removeprefix("datetime.date.") for name in names_read(path)}
    assert set() == asking & names


@pytest.mark.parametrize("path", FILES)
def test_nothing_is_longer_than_a_reader_can_hold(path: str) -> None:
    """A file fits in a head, a function on a screen; a table or a `match` may be longer."""
    assert len((ROOT / path).read_text().splitlines()) <= MOST_LINES_OF_A_FILE
    long = {f"{path}:{name}": lines for name, lines in functions(path) if lines > MOST_LINES_OF_A_FUNCTION}
    assert {} == {name: lines for name, lines in long.items() if name not in TABLES}


@pytest.mark.parametrize("path", FILES)
def test_every_file_names_its_licence_and_its_purpose(path: str) -> None:
    """First the licence, then one docstring that says what the file is for."""
    assert (ROOT / path).read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(tree(path))
