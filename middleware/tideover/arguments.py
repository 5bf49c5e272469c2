# SPDX-License-Identifier: Apache-2.0
"""A job runs with exactly the arguments it was sent with, or it is not accepted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import dramatiq
from dramatiq.message import Message

from tideover.core.fidelity import MOST_SHOWN, same, unfaithful
from tideover.errors import InvalidJob


def check_arguments(message: Message[Any]) -> None:
    """Raises `InvalidJob`, which names the argument, unless each comes back from dramatiq's encoding exactly as it is."""
    if not all(isinstance(name, str) for name in message.kwargs):
        raise InvalidJob(f"an argument of task {message.actor_name} has a name that is no string")
    if type(dramatiq.get_encoder()) is not dramatiq.JSONEncoder:
        check_encoding(message)
        return
    for name, value in named_arguments(message):
        if (path := unfaithful(as_sent(value))) is not None:
            raise InvalidJob(
                f"argument {name}{path}: task {message.actor_name} would not get it back from JSON as it is. {PLAIN_ONLY}"
            )


PLAIN_ONLY = "Send strings, numbers, booleans, None, lists, and dicts with string keys; load the rest inside the task"
MESSAGE_FIELDS = {field.name for field in fields(Message)}


def named_arguments(message: Message[Any]) -> list[tuple[int | str, Any]]:
    """
    >>> named_arguments(Message("default", "task", args=("x",), kwargs={"n": 1}, options={}))
    [(0, 'x'), ('n', 1)]
    """
    return [*enumerate(message.args), *message.kwargs.items()]


def as_sent(value: Any) -> Any:
    """`value`; where it is a message that dramatiq's Callbacks passes on, its arguments are a list, as actors get them."""
    if type(value) is dict and value.keys() == MESSAGE_FIELDS and type(value["args"]) is tuple:
        return {**value, "args": list(value["args"])}
    return value


def check_encoding(message: Message[Any]) -> None:
    """`check_arguments` where the application has set an encoder of its own: it is tried, and equality decides."""
    sent = named_arguments(message)
    try:
        got = named_arguments(Message.decode(message.encode()))
        wrong = [name for (name, value), (also, back) in zip(sent, got, strict=True) if name != also or not same(value, back)]
    except Exception:  # noqa: BLE001 - whatever an encoder or a value's own `==` raises; the error may quote the value
        wrong = [name for name, value in sent if not given_back(value)]
    if wrong:
        raise InvalidJob(
            f"argument {wrong[0]} of task {message.actor_name} cannot be encoded by {type(dramatiq.get_encoder()).__name__}, "
            "or does not come back from it equal to what was sent. Send plain data; load the rest inside the task"
        )


def given_back(value: Any) -> bool:
    """Whether the encoder in use gives back an argument that is sent alone."""
    try:
        return same(value, Message.decode(Message("", "", (value,), {}, {}).encode()).args[0])
    except Exception:  # noqa: BLE001 - as above
        return False


def check_follow_ups(message: Message[Any], is_ai: Callable[[str], bool]) -> None:
    """`check_arguments` for jobs of AI tasks that travel inside another: later steps of a pipeline, callbacks of a group.

    They are encoded with the message that carries them, so when they are enqueued it is too late to see what changed.
    """
    for follow_up in follow_ups(message):
        if is_ai(follow_up.actor_name):
            check_arguments(follow_up)


def follow_ups(message: Message[Any]) -> Iterator[Message[Any]]:
    """The messages that travel inside another, and inside those."""
    carrying = [message.options]
    for options in carrying:
        for carried in [options.get("pipe_target"), *(options.get("group_completion_callbacks") or ())]:
            if isinstance(carried, dict) and carried.keys() == MESSAGE_FIELDS:
                follow_up: Message[Any] = Message(**carried)
                carrying.append(follow_up.options)
                yield follow_up


def largest_argument(message: Message[Any]) -> str:
    """Which argument has most of a job's bytes and how many, as a part of a sentence; those of its later steps are among them.

    It shows no value, nor a name that is long enough to be one. Empty where there are no arguments.
    """
    empty = len(Message("", "", (), {}, {}).encode())
    most, said = 0, ""
    for of in (message, *follow_ups(message)):
        for name, value in named_arguments(of):
            size = len(Message("", "", (value,), {}, {}).encode()) - empty
            if size > most:
                shown = name if len(str(name)) <= MOST_SHOWN else "…"
                most, said = size, f", {size:,} of them in argument {shown} of task {of.actor_name}"
    return said
