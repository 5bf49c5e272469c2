# SPDX-License-Identifier: Apache-2.0
"""`tideover worker`: worker processes, as the stock `dramatiq` command runs them."""

from __future__ import annotations

import click


@click.command(
    epilog="""\b
Examples:
  tideover worker shop.tasks                        two processes, on the Redis of the settings
  tideover worker shop.tasks --dev                  on a private Valkey of this directory
  tideover worker shop.app:broker shop.tasks --processes 4 --queues mail,reports
"""
)
@click.argument("modules", nargs=-1, required=True, metavar="MODULE...")
@click.option("--dev", is_flag=True, help="Start a private Valkey of this directory, and use it.")
@click.option("--processes", type=click.IntRange(1, 1024), default=2, show_default=True, metavar="N", help="Worker processes.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), default=8, show_default=True, metavar="N",
    help="Threads of each process, for tasks that are no coroutines.",
)  # fmt: skip
@click.option("--queues", multiple=True, metavar="Q[,Q...]", help="Only these queues; their critical lanes are included.")
def worker(*, modules: tuple[str, ...], dev: bool, processes: int, threads: int, queues: tuple[str, ...]) -> None:
    """Run worker processes for the tasks of these modules (MODULE or MODULE:BROKER, as for dramatiq).

    The current directory is importable. The first SIGTERM or Ctrl-C lets running jobs finish within
    worker.shutdown_grace_s; a second one ends them, and they go back to their queues. Exit code 2: a module cannot be
    imported, or there is no Redis to work on.
    """
    from tideover_worker import launch

    names = tuple(name for part in queues for name in part.split(",") if name)
    launch.run(modules, dev=dev, processes=processes, threads=threads, queues=names)
