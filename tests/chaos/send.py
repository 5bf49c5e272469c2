# SPDX-License-Identifier: Apache-2.0
"""Sends so many jobs and prints their tags: `python send.py 200 prefix`."""

from __future__ import annotations

import sys

import app


def main() -> None:
    n, prefix = int(sys.argv[1]), sys.argv[2]
    tasks = (app.summary, app.report, app.reply)
    for i in range(n):
        tag = f"{prefix}{i}"
        tasks[i % 3].send(tag)
        print(tag)


if __name__ == "__main__":
    main()
