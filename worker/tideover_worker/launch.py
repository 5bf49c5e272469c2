# SPDX-License-Identifier: Apache-2.0
"""Starts worker processes: checks what would fail in each of them, then becomes the stock dramatiq command."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from dramatiq import get_broker

from tideover.errors import ConfigurationError
from tideover.settings import Settings, forget, settings
from tideover_worker import embedded
from tideover_worker.boot import ai_tasks, check_tasks


def run(modules: Sequence[str], *, dev: bool, processes: int, threads: int, queues: Sequence[str]) -> NoReturn:
    """Becomes `dramatiq` for these modules.

    Raises:
      ConfigurationError: there is no Redis to work on, a module cannot be imported, or a task names a route that cannot work.
    """
    start_private_server(dev=dev)
    settings().store_url()
    sys.path.insert(0, str(Path.cwd()))
    for module in modules:
        check_import(module)
    check_tasks(settings(), ai_tasks(get_broker()))
    words = command(settings(), modules, processes, threads, queues)
    sys.stderr.flush()
    os.execv(sys.executable, words)  # noqa: S606 - no shell, on purpose


def start_private_server(*, dev: bool) -> None:
    """Finds or starts the private Valkey where it was asked for, and says what producers need."""
    url = settings().redis_url
    if dev and url not in (None, "embedded"):
        raise ConfigurationError("--dev starts a private Valkey, but redis_url names another server; leave one of them out")
    if not dev and url != "embedded":
        return
    server = embedded.start(settings().data_dir)
    tell(f"private Valkey at {server.url}; it goes on when the workers stop: `tideover embedded stop` ends it")
    if url is None:
        tell("producers in this directory need the line\nexport TIDEOVER_REDIS_URL=embedded")
        os.environ["TIDEOVER_REDIS_URL"] = "embedded"  # for the workers, and for modules that send while they are imported
        forget()


def check_import(module: str) -> None:
    """Imports a module once here, so that its fault is told once, and not by each worker process."""
    name = module.partition(":")[0]
    try:
        import_module(name)
    except Exception as error:
        raise ConfigurationError(f"module {name} cannot be imported: {told(error)}") from error


def told(error: Exception) -> str:
    """What failed and where, in one line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    at = f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}{at}"


def command(config: Settings, modules: Sequence[str], processes: int, threads: int, queues: Sequence[str]) -> list[str]:
    """The command line of dramatiq."""
    grace_ms = round(config.worker.shutdown_grace_s * 1000)
    words = [sys.executable, "-m", "dramatiq", *modules, "--processes", str(processes), "--threads", str(threads)]
    words += ["--worker-shutdown-timeout", str(grace_ms)]
    return [*words, "--queues", *queues] if queues else words


def tell(line: str) -> None:
    """Not a log: it is for the person at the terminal."""
    sys.stderr.write(f"tideover: {line}\n")
