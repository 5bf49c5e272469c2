# SPDX-License-Identifier: Apache-2.0
"""Calls that threads make at one time, made as one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

A = TypeVar("A")
R = TypeVar("R")

MOST = 100


class Call(Generic[A, R]):
    """One thread's call, and what came of it."""

    __slots__ = ("argument", "error", "result")

    def __init__(self, argument: A) -> None:
        self.argument = argument
        self.result: list[R] = []
        self.error: Exception | None = None


class Together(Generic[A, R]):
    """A function of many, called by many threads with one argument each: while one call is under way the others gather.

    The call returns, or raises, when its own argument has been dealt with, as if it had been alone.
    """

    def __init__(self, function: Callable[[Sequence[A]], Sequence[R]]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._waiting: deque[Call[A, R]] = deque()

    def __call__(self, argument: A) -> R:
        call: Call[A, R] = Call(argument)
        self._waiting.append(call)
        with self._lock:
            while not call.result and call.error is None:  # else another thread has made it along with its own
                self._make([self._waiting.popleft() for _ in range(min(len(self._waiting), MOST))])
        if call.error is not None:
            raise call.error
        return call.result[0]

    def _make(self, calls: Sequence[Call[A, R]]) -> None:
        try:
            results = self._function([call.argument for call in calls])
        except Exception as error:  # noqa: BLE001 - it is raised in each thread
            for call in calls:
                call.error = error
        except BaseException:  # dramatiq interrupts this thread: another one makes the calls
            self._waiting.extendleft(reversed(calls))
            raise
        else:
            for call, result in zip(calls, results, strict=True):
                call.result.append(result)
