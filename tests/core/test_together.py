# SPDX-License-Identifier: Apache-2.0
"""What threads ask at one time is asked as one; each gets its own answer, or the error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from tideover.together import MOST, Together

PATIENCE_S = 20.0
N = MOST + 20


class Line:
    """A function of many whose first call goes on only when it is told to; what it was asked, call by call."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.begun, self.go = threading.Event(), threading.Event()

    def double(self, numbers: Sequence[int]) -> list[int]:
        self.asked.append(list(numbers))
        self.begun.set()
        assert self.go.wait(PATIENCE_S)
        if 13 in numbers:
            raise ValueError("unlucky")
        if 99 in numbers and len(self.asked) == 1:
            raise KeyboardInterrupt
        return [2 * number for number in numbers]


def ask_all(line: Line, numbers: Sequence[int], wait_until: Callable[..., object]) -> list[int | str]:
    """Asks for the first, and for the others while its call is under way; the answers, or the names of errors."""
    together = Together(line.double)

    def ask(number: int) -> int | str:
        try:
            return together(number)
        except BaseException as error:
            return type(error).__name__

    with ThreadPoolExecutor(len(numbers)) as pool:
        first = pool.submit(ask, numbers[0])
        assert line.begun.wait(PATIENCE_S)
        others = [pool.submit(ask, number) for number in numbers[1:]]
        wait_until(lambda: len(together._waiting) == len(others), within_s=PATIENCE_S, description="they gather")
        line.go.set()
        return [answer.result(PATIENCE_S) for answer in (first, *others)]


def test_what_gathers_meanwhile_is_asked_as_one(wait_until: Callable[..., object]) -> None:
    """As far as one call may go; each thread gets its own answer."""
    line, numbers = Line(), [*range(100, 100 + N)]
    assert [2 * number for number in numbers] == ask_all(line, numbers, wait_until)
    assert [1, MOST, N - 1 - MOST] == [len(asked) for asked in line.asked]


def test_an_error_is_everybodys(wait_until: Callable[..., object]) -> None:
    """Of those who asked together."""
    assert [2, "ValueError", "ValueError"] == ask_all(Line(), [1, 13, 14], wait_until)


def test_an_interrupted_thread_takes_nobody_along(wait_until: Callable[..., object]) -> None:
    """dramatiq raises into threads: the others are asked for by another one."""
    line = Line()
    assert ["KeyboardInterrupt", 2, 4] == ask_all(line, [99, 1, 2], wait_until)
    assert [[99], [99, 1, 2]] == [line.asked[0], sorted(line.asked[1], reverse=True, key=lambda n: (n == 99, -n))]


def test_one_alone_waits_for_nobody() -> None:
    """Its call is made at once."""
    line = Line()
    line.go.set()
    assert 6 == Together(line.double)(3)
    with pytest.raises(ValueError, match="unlucky"):
        Together(line.double)(13)
