# SPDX-License-Identifier: Apache-2.0
"""Fake providers in a process of their own: `python -m tideover.testing.serve --config FILE.json`.

The file says which: `{"providers": [{"name": "anthropic", "seed": 7, "latency": {"base_s": 0.1}}, ...]}`, where the keys are
the arguments of `FakeProvider` and `latency` has those of `Latency`. When all of them listen, one line of JSON tells where:
`{"base_urls": {"anthropic": ...}, "control_urls": {"anthropic": ...}}`; `tideover.testing.control` says what to do with the
latter. SIGTERM and SIGINT stop it. Exit codes: 0 stopped, 2 a configuration that cannot work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tideover.testing.latency import Latency
from tideover.testing.provider import FakeProvider

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def providers_of(config: Mapping[str, Any]) -> list[FakeProvider]:
    """The providers that a decoded configuration file describes. TypeError or ValueError says what is wrong with it."""
    entries = config.get("providers")
    if not entries or set(config) != {"providers"}:
        raise ValueError('the file is {"providers": [...]} with one provider at least')
    providers = []
    for entry in entries:
        latency = Latency(**entry["latency"]) if "latency" in entry else None
        providers.append(FakeProvider(**{**entry, "latency": latency}))
    if len({provider.name for provider in providers}) < len(providers):
        raise ValueError("two providers have the same name")
    return providers


async def serve(providers: Sequence[FakeProvider]) -> None:
    """Serve until a signal says stop."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    try:
        for provider in providers:
            await provider.open()
        base_urls = {provider.name: provider.base_url for provider in providers}
        control_urls = {provider.name: provider.root_url for provider in providers}
        sys.stdout.write(json.dumps({"base_urls": base_urls, "control_urls": control_urls}) + "\n")
        sys.stdout.flush()
        await stopping.wait()
    finally:
        for provider in providers:
            await provider.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tideover.testing.serve", description="Fake providers on 127.0.0.1.")
    parser.add_argument("--config", required=True, type=Path, metavar="FILE.json")
    path: Path = parser.parse_args(argv).config
    try:
        providers = providers_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        sys.stderr.write(f"{path}: {error}\n")
        return 2
    try:
        asyncio.run(serve(providers))
    except OSError as error:
        sys.stderr.write(f"{path}: cannot listen: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
