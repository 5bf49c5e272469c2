# SPDX-License-Identifier: Apache-2.0
"""How a dead letter begins anew: its arguments stay, its attempts, age and expiry do not."""

from __future__ import annotations

from typing import Any

import pytest
from dramatiq.message import Message

from tideover.core.job import is_criticality
from tideover.gate import is_ours, unreadable_part
from tideover.ops.renewal import readable, renewed

SENT_MS, NOW_MS = 1_000_000.456, 9_000_000.789
STAMP = {"criticality": "deferrable", "expires_ms": 1_060_000, "sent_ms": SENT_MS, "tenant": "acme", "tag": "nightly"}


def letter(stamp: object = STAMP, queue: str = "default", **options: Any) -> Message[Any]:
    said = {} if stamp is None else {"tideover": stamp}
    return Message(queue, "task", (1, "two"), {"three": 3.0}, {**options, **said}, "job", int(SENT_MS))


def again(message: Message[Any], expires_in_ms: float | None = None, *, same: bool = True) -> Message[Any]:
    return renewed(message, "default", NOW_MS, expires_in_ms, same=same)


def test_what_was_asked_stays() -> None:
    """Task, arguments, id, tenant, tag and what is to follow it."""
    was = letter(pipe_target={"actor_name": "next"}, redis_message_id="r", max_retries=3)
    now = again(was)
    assert (was.actor_name, was.args, was.kwargs, was.message_id) == (now.actor_name, now.args, now.kwargs, now.message_id)
    assert {
        name: was.options[name] for name in ("pipe_target", "redis_message_id", "max_retries")
    }.items() <= now.options.items()
    assert ("acme", "nightly") == (now.options["tideover"]["tenant"], now.options["tideover"]["tag"])
    assert now == readable(now.encode())


def test_what_was_spent_is_forgotten() -> None:
    """Retries, the last error, the delay, the list of delayed jobs, and how old it was."""
    now = again(letter(queue="default.DQ", retries=3, traceback="...", requeue_timestamp=1, eta=2))
    assert ("default", {"tideover"}, int(NOW_MS)) == (now.queue_name, set(now.options), now.message_timestamp)
    assert (NOW_MS, True) == (now.options["tideover"]["sent_ms"], now.options["tideover"]["storied"])


@pytest.mark.parametrize(
    ("stamp", "options", "lasts_ms"),
    [
        pytest.param({}, {}, 60_000, id="counted from the send"),
        pytest.param({}, {"eta": 1_020_000}, 40_000, id="of a delayed job from its time"),
        pytest.param({}, {"eta": 1_020_000, "retries": 1}, 60_000, id="a retry writes over the delay"),
        pytest.param({"expires_ms": None}, {}, None, id="it had none"),
        pytest.param({"expires_ms": 1_000_000}, {}, None, id="it was over when sent: it would expire again at once"),
    ],
)
def test_it_has_the_time_that_it_had(stamp: dict[str, Any], options: dict[str, Any], lasts_ms: int | None) -> None:
    """However often it is restored."""
    for now in (once := again(letter({**STAMP, **stamp}, **options)), again(once)):
        expected = None if lasts_ms is None else int(NOW_MS) + lasts_ms
        assert expected == now.options["tideover"]["expires_ms"]


@pytest.mark.parametrize(("expires_in_ms", "expected"), [(5000.0, int(NOW_MS) + 5000), (None, None)])
@pytest.mark.parametrize("stamp", [STAMP, {"sent_ms": SENT_MS}])
def test_an_operator_may_give_it_another_time(stamp: dict[str, Any], expires_in_ms: float | None, expected: int | None) -> None:
    assert expected == again(letter(stamp), expires_in_ms, same=False).options["tideover"].get("expires_ms")


def test_an_age_limit_forgives_no_longer() -> None:
    """A retry takes along the time that was forgiven to its predecessor; the new job was not held yet."""
    now = again(letter({**STAMP, "forgiven_ms": 700}, max_age=1700))
    assert (1000, False) == (now.options["max_age"], "forgiven_ms" in now.options["tideover"])


@pytest.mark.parametrize("stamp", [None, "scribble", {"sent_ms": SENT_MS}, STAMP])
def test_it_is_counted_once(stamp: object) -> None:
    """Restoring counts it, so it must not be adopted when it is fetched; what nobody could read of it needs review again."""
    now = again(letter(stamp))
    assert (True, stamp == "scribble") == (is_ours(now.options), bool(unreadable_part(now.options["tideover"])))
    assert (stamp is STAMP) == is_criticality(now.options["tideover"].get("criticality"))


@pytest.mark.parametrize("body", [b"", b"\x80pickled", b"[]", b"{}", b'{"args": 1}'])
def test_what_nobody_can_read_is_left(body: bytes) -> None:
    assert readable(body) is None
