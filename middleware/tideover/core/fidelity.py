# SPDX-License-Identifier: Apache-2.0
"""Whether a value comes back from an encoding exactly as it is: a job must run with the very arguments it was sent with."""

from __future__ import annotations

import re
import sys
from datetime import datetime, time
from decimal import Decimal
from itertools import islice
from typing import Any, Final

DEEPEST: Final = 200
"""Levels of lists and dicts in an argument. Python's JSON gives up below 1000, and earlier the deeper the stack that calls it:
what a producer can write, every worker and every tool must be able to read."""

SHORT_INT_BITS: Final = 2000
"""An integer of fewer bits has fewer digits than any limit that Python allows (640)."""

HALVES: Final = re.compile(r"[\ud800-\udbff][\udc00-\udfff]")
"""Two surrogates, each a character of its own in this text, that JSON reads as one. A lone one comes back as it is."""

TOLD_BY_REPR: Final = (float, complex, Decimal, datetime, time)
"""Their values may be equal and yet differ: 0.0 and -0.0, Decimal("1") and Decimal("1.0"), one instant in two time zones. And
NaN, which equals nothing, comes back all the same."""

MOST_SHOWN: Final = 40
LONGEST_PATH: Final = 8

Way = tuple[Any, object, int] | None
"""How a part was reached: the way to what contains it, its key there, its depth."""


def unfaithful(value: object) -> str | None:
    """Where in `value` something is that JSON would change, and what it is; None: nowhere. It shows no value.

    >>> unfaithful({"a": [1, 2.5, None]}), unfaithful([0, (1, 2)]), unfaithful({"b": {1: "x"}})
    (None, '[1]: tuple', "['b']: a dict with a key that is no string")
    """
    todo: list[tuple[Any, Way]] = [(value, None)]
    while todo:
        part, way = todo.pop()
        depth = 0 if way is None else way[2]
        why = f"more than {DEEPEST} levels deep, or it contains itself" if depth > DEEPEST else changed(part)
        if why is not None:
            return f"{shown(way)}: {why}"
        if type(part) is list:
            todo += [(inner, (way, key, depth + 1)) for key, inner in enumerate(part)][::-1]
        elif type(part) is dict:
            todo += [(inner, (way, key, depth + 1)) for key, inner in part.items()][::-1]
    return None


def changed(value: object) -> str | None:
    """What JSON would change of a value, its parts apart; None: nothing."""
    if type(value) is str:
        return None if value.isascii() or HALVES.search(value) is None else "text with a character in two halves"
    if type(value) is int:
        long = value.bit_length() > SHORT_INT_BITS and abs(value) >= 10 ** most_digits()
        return f"an integer of more than {most_digits()} digits" if long else None
    if type(value) is dict:
        if not all(type(key) is str for key in value):
            return "a dict with a key that is no string"
        return next((f"a key that is {why}" for key in value if (why := changed(key)) is not None), None)
    return None if type(value) in (float, bool, type(None), list) else type(value).__name__


def most_digits() -> int:
    """Digits of an integer that Python reads without being asked to; here, and in a worker with the usual limit."""
    usual = sys.int_info.default_max_str_digits
    return min(sys.get_int_max_str_digits() or usual, usual)


def shown(way: Way) -> str:
    """A way as Python would write it, without its far end where it is long, and without long keys: they may be content."""
    keys: list[object] = []
    while way is not None:
        way, key, _ = way
        keys.append(key)
    steps = [f"[{text if len(text := repr(key)) <= MOST_SHOWN else '…'}]" for key in islice(reversed(keys), LONGEST_PATH)]
    return "".join(steps) + ("…" if len(keys) > LONGEST_PATH else "")


def same(sent: Any, got: Any) -> bool:
    """Whether what came back is what was sent: equal, of the same type, with parts of the same types in the same order.

    >>> same([1, -0.0], [1, -0.0]), same([1], [True]), same([1], (1,)), same({"a": 0.0}, {"a": -0.0})
    (True, False, False, False)
    """
    if type(sent) is not type(got):
        return False
    if isinstance(sent, list | tuple):
        return len(sent) == len(got) and all(map(same, sent, got))
    if isinstance(sent, dict):
        return same(list(sent.items()), list(got.items()))
    return repr(sent) == repr(got) if isinstance(sent, TOLD_BY_REPR) else bool(sent == got)
