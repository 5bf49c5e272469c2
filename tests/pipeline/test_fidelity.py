# SPDX-License-Identifier: Apache-2.0
"""A job runs with exactly the arguments it was sent with, through hold, release and retry; or its send fails and says which."""

from __future__ import annotations

import json
import math
import sys
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

import dramatiq
import pytest
from dramatiq.encoder import MessageData
from pydantic import BaseModel

from tideover import AITask, InvalidJob, ai_task
from tideover.core.fidelity import DEEPEST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.pipeline.conftest import Shop

USUAL_DIGITS = sys.int_info.default_max_str_digits


class Color(Enum):
    RED = "red"


class Address(BaseModel):
    city: str
    lines: list[str] = []


class Customer(BaseModel):
    name: str
    address: Address
    since: date | None = None


class Nameless:
    """It has no `==`: nobody can tell whether one that comes back is the one that was sent."""


ANNA = Customer(name="Anna", address=Address(city="Kiel", lines=["Hafen 1"]), since=date(2026, 6, 2))


def nested(levels: int) -> Any:
    value: Any = "deep"
    for level in range(levels):
        value = [value] if level % 2 else {"in": value}
    return value


JSON_KEEPS: dict[str, Any] = {
    "every character but NUL of the first plane": "".join(map(chr, range(1, 0xD800))),
    "NUL": "a\x00b",
    "emoji": "👩‍👩‍👧‍👦🇩🇪🏴‍☠️",
    "a lone half of a character": ["\ud83d", "\ude00", "\ude00\ud83d", "\ud83d \ude00"],
    "a prompt of a million characters": "p" * 1_000_000,
    "80,000 emoji": "🌊" * 80_000,
    "text that looks like JSON": '{"a": NaN} \\u0041 \\" </script>',
    "the empty ones": ["", [], {}, None, False, 0, 0.0],
    "an integer of as many digits as there may be": -(10**USUAL_DIGITS) + 1,
    "integers around the limits of others": [2**53 + 1, 2**63, -(2**63) - 1, 2**64],
    "floats": [0.1, 1e308 * 10, -math.inf, math.nan, -0.0, 5e-324, 1.7976931348623157e308, 1e22, 1.0],
    "true and one": [True, 1, 1.0, False, 0],
    "keys": {"": 1, " ": 2, "a.b": 3, "ключ": 4, "\x00": 5, "\ud83d": 6, "args": 7, "__class__": "x"},
    "the order of keys": {"z": 1, "a": 2, "m": 3},
    "as deep as may be": nested(DEEPEST),
    "broad": [list(range(1000)), {str(n): n for n in range(1000)}],
}
PICKLE_KEEPS: dict[str, Any] = JSON_KEEPS | {
    "a tuple": (1, (2, [3])),
    "bytes": b"\x00\xff",
    "a datetime": [
        datetime(2026, 6, 2, 12, 30, tzinfo=timezone(timedelta(hours=2))),
        datetime(2026, 6, 2, tzinfo=UTC, fold=1),
    ],
    "a timedelta": timedelta(days=-1),
    "decimals": [Decimal("1.00"), Decimal("NaN")],
    "a set": {1, "a"},
    "nested models": [ANNA, {"customer": ANNA}],
    "an enum": Color.RED,
    "keys that are no strings": {1: "x", None: "y", (1, 2): "z"},
    "both halves of a character": "\ud83d\ude00",
    "an integer of any size": 10 ** (USUAL_DIGITS + 1),
    "a complex number": complex(0.0, -0.0),
}


@pytest.fixture
def encoder() -> Iterator[Callable[[dramatiq.Encoder], None]]:
    """Sets dramatiq's encoder for the length of a test."""
    before = dramatiq.get_encoder()
    yield dramatiq.set_encoder
    dramatiq.set_encoder(before)


Runs = dict[str, list[Any]]


def keeper(shop: Shop, asynchronous: bool) -> tuple[AITask[..., None], Runs]:
    """A task that notes what it gets, and fails at its first attempt."""
    runs: Runs = {}

    def note(name: str, *args: Any, **kwargs: Any) -> None:
        attempts = runs.setdefault(name, [])
        attempts.append((args, kwargs))
        if len(attempts) == 1:
            raise ValueError("the first attempt")

    if asynchronous:

        @ai_task(criticality="deferrable", models=[shop.model], **shop.quick)
        async def keep(name: str, *args: Any, **kwargs: Any) -> None:
            note(name, *args, **kwargs)
    else:

        @ai_task(criticality="deferrable", models=[shop.model], **shop.quick)
        def keep(name: str, *args: Any, **kwargs: Any) -> None:
            note(name, *args, **kwargs)

    return keep, runs


def exactly(value: Any) -> str:
    """A text that tells a value from each that is not the same; sets have no order."""
    kind = type(value).__name__
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{kind} {value:#x}"
    if isinstance(value, dict):
        return f"{kind} <{', '.join(map(exactly, value.items()))}>"
    if isinstance(value, list | tuple | set):
        parts = list(map(exactly, value))
        return f"{kind} <{', '.join(sorted(parts) if isinstance(value, set) else parts)}>"
    return f"{kind} {value!r}"


def run_through_an_outage(shop: Shop, values: dict[str, Any], asynchronous: bool) -> None:
    """Sends each value, by position or by name; each is held, released, fails and is retried, and is each time what it was."""
    keep, runs = keeper(shop, asynchronous)
    shop.work()
    shop.open_breaker()
    by_name = {name for nth, name in enumerate(values) if nth % 2}
    jobs = [keep.send(name, it=value) if name in by_name else keep.send(name, value) for name, value in values.items()]
    shop.until_all("held", jobs)
    shop.heal()
    shop.until_over()
    sent = {name: exactly(((), {"it": value}) if name in by_name else ((value,), {})) for name, value in values.items()}
    got = {name: [exactly(run) for run in attempts] for name, attempts in runs.items()}
    assert [] == [name for name in values if [sent[name]] * 2 != got.get(name)]
    assert {"accepted": 3 + len(values), "succeeded": 3 + len(values)} == shop.books()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_json_keeps_comes_through_an_outage(shop: Shop, asynchronous: bool) -> None:
    """Text of all kinds and sizes, numbers and nested data, with dramatiq's usual encoder."""
    run_through_an_outage(shop, JSON_KEEPS, asynchronous)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_pickle_keeps_comes_through_an_outage(shop: Shop, encoder: Any, asynchronous: bool) -> None:
    """With dramatiq's PickleEncoder: models, dates, bytes and tuples, too."""
    encoder(dramatiq.PickleEncoder())
    run_through_an_outage(shop, PICKLE_KEEPS, asynchronous)


def test_a_delayed_job_keeps_its_arguments(shop: Shop) -> None:
    """A job that waits for its eta is encoded once more when it is due: it changes nothing."""
    values = [JSON_KEEPS[name] for name in ("floats", "keys", "the order of keys", "a lone half of a character")]
    keep, runs = keeper(shop, asynchronous=False)
    shop.work()
    shop.open_breaker()
    job = keep.send_with_options(args=("delayed", *values), delay=50)
    shop.until_all("held", [job])
    shop.heal()
    shop.until_over()
    assert [exactly((tuple(values), {}))] * 2 == [exactly(run) for run in runs["delayed"]]


def test_what_a_failed_attempt_did_to_its_arguments(shop: Shop) -> None:
    """A list that the first attempt emptied is there again for the second."""
    got: list[list[str]] = []

    @ai_task(criticality="deferrable", **shop.quick)
    def work_off(tickets: list[str]) -> None:
        got.append(list(tickets))
        tickets.clear()
        if len(got) == 1:
            raise ValueError("after the work was begun")

    shop.work()
    work_off.send(["a", "b"])
    shop.until_over()
    assert [["a", "b"], ["a", "b"]] == got


# what is refused


def own_end() -> list[Any]:
    ends_in_itself: list[Any] = []
    ends_in_itself += [ends_in_itself, ends_in_itself]
    return ends_in_itself


JSON_CHANGES: dict[str, tuple[Any, str]] = {
    "both halves of a character": ("\ud83d\ude00", "argument thing: text"),
    "both halves in a key": ([{"\ud83d\ude00": 1}], r"argument thing\[0\]: a key"),
    "an integer of too many digits": (
        {"n": 10**USUAL_DIGITS},
        rf"argument thing\['n'\]: an integer of more than {USUAL_DIGITS}",
    ),
    "too deep": (nested(DEEPEST + 1), "argument thing.*levels deep"),
    "far too deep": (nested(100_000), "argument thing.*levels deep"),
    "itself": (own_end(), "argument thing.*contains itself"),
    "a model": (ANNA, "argument thing: Customer"),
    "a model in a list": ([1, {"who": ANNA}], r"argument thing\[1\]\['who'\]: Customer"),
    "a datetime": ({"at": datetime(2026, 6, 2, tzinfo=UTC)}, r"argument thing\['at'\]: datetime"),
    "a decimal": (Decimal(1), "argument thing: Decimal"),
    "an enum": (Color.RED, "argument thing: Color"),
    "a dict of another kind": (type("Table", (dict,), {})(a=1), "argument thing: Table"),
    "keys that become one": ({"1": "a", 1: "b"}, "argument thing: a dict with a key"),
    "true as a key": ({True: "a"}, "argument thing: a dict with a key"),
}


@pytest.fixture
def anything(shop: Shop) -> AITask[..., None]:
    """A task that takes any arguments."""

    @ai_task(criticality="deferrable")
    def anything(*args: Any, **kwargs: Any) -> None: ...

    return anything


@pytest.mark.parametrize(("value", "says"), JSON_CHANGES.values(), ids=list(JSON_CHANGES))
def test_what_json_would_change_is_named(shop: Shop, anything: AITask[..., None], value: Any, says: str) -> None:
    """The send fails, says which argument, where in it and what is wrong with it; nothing was accepted."""
    with pytest.raises(InvalidJob, match=says):
        anything.send("fine", thing=value)
    assert {} == shop.books()


def test_the_name_of_an_argument_is_a_string(shop: Shop, anything: AITask[..., None]) -> None:
    """JSON would make a string of it."""
    kwargs: Any = {1: "x"}
    with pytest.raises(InvalidJob, match="a name that is no string"):
        anything.send_with_options(kwargs=kwargs)
    assert {} == shop.books()


def test_a_deep_stack_sends_what_a_shallow_one_sends(shop: Shop, anything: AITask[..., None]) -> None:
    """What may be sent does not hang on where the caller stands: the check needs no stack of its own."""

    def descend(levels: int) -> None:
        if levels:
            descend(levels - 1)
        else:
            anything.send(nested(DEEPEST))

    descend(500)
    assert {"accepted": 1, "queued": 1} == shop.books()


def test_a_key_that_may_be_content_is_not_told(anything: AITask[..., None]) -> None:
    """The error says where without a key that is long enough to be a prompt."""
    with pytest.raises(InvalidJob, match=r"argument 0\[…\]\['n'\]: tuple") as caught:
        anything.send({"my diagnosis is that of a patient of sixty years": {"n": (1, 2)}})
    assert "diagnosis" not in str(caught.value)


# jobs that travel inside another


def test_a_later_step_of_a_pipeline_is_checked_at_once(shop: Shop, anything: AITask[..., None]) -> None:
    """What would change is refused when the first step is sent, plain actor or AI task: its message carries the others."""

    @dramatiq.actor
    def plain() -> None: ...

    for first in (anything.message(), plain.message()):
        with pytest.raises(InvalidJob, match=r"argument 0: tuple: task anything"):
            (first | plain.message() | anything.message((1, 2))).run()
    assert {} == shop.books()


def test_a_plain_actor_s_step_is_its_own_affair(shop: Shop, anything: AITask[..., None]) -> None:
    """What dramatiq does with the arguments of a plain actor is not tideover's business, behind an AI task either."""

    @dramatiq.actor
    def plain(pair: Any) -> None:
        shop.ran.append(repr(pair))

    shop.work()
    (anything.message() | plain.message_with_options(args=((1, 2),), pipe_ignore=True)).run()
    shop.until_over()
    assert ["[1, 2]"] == shop.ran


def test_an_ai_task_may_be_the_callback_of_another(shop: Shop) -> None:
    """dramatiq's `on_success` passes on the message as a dict; its arguments reach the callback as a list, as ever."""

    @ai_task(criticality="deferrable")
    def after(message: dict[str, Any], result: Any) -> None:
        shop.ran.append(f"{message['actor_name']} {message['args']}: {result[:9]}")

    shop.work()
    shop.summary.send_with_options(args=("one",), on_success=after.actor_name)
    shop.until_over()
    assert {"accepted": 2, "succeeded": 2} == shop.books()
    assert ["one", "summary ['one']: anthropic"] == shop.ran


# encoders of the application's own

PICKLE_CHANGES: dict[str, Any] = {
    "a lambda": lambda: None,
    "a generator": (n for n in ()),
    "no == of its own": Nameless(),
}


@pytest.mark.parametrize("value", PICKLE_CHANGES.values(), ids=list(PICKLE_CHANGES))
def test_what_pickle_does_not_keep_is_named(shop: Shop, encoder: Any, anything: AITask[..., None], value: Any) -> None:
    """The argument and the encoder; the error does not show the value, nor the errors of the encoder, which may quote it."""
    encoder(dramatiq.PickleEncoder())
    with pytest.raises(InvalidJob, match=r"argument thing of task anything .* PickleEncoder") as caught:
        anything.send(ANNA, (1, 2), thing=value, other=b"fine")
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert {} == shop.books()


class Custom(dramatiq.Encoder):
    """JSON with options, as applications write it."""

    def __init__(self, dump: dict[str, Any] | None = None, load: dict[str, Any] | None = None) -> None:
        self.dump, self.load = dump or {}, load or {}

    def encode(self, data: MessageData) -> bytes:
        return json.dumps(data, **self.dump).encode()

    def decode(self, data: bytes) -> MessageData:
        decoded: MessageData = json.loads(data, **self.load)
        return decoded


def plain_model(value: Any) -> Any:
    return value.model_dump(mode="json")


CUSTOM: dict[str, tuple[Custom, Any]] = {
    "a model becomes a dict": (Custom(dump={"default": plain_model}), ANNA),
    "a tuple becomes a list": (Custom(), (1, 2)),
    "a float becomes a Decimal": (Custom(load={"parse_float": Decimal}), [2.5]),
    "an integer becomes a float": (Custom(load={"parse_int": float}), {"n": 1}),
    "keys are sorted": (Custom(dump={"sort_keys": True}), {"b": 1, "a": 2}),
    "a minus is lost": (Custom(load={"parse_float": lambda text: abs(float(text))}), -0.0),
}


@pytest.mark.parametrize(("custom", "value"), CUSTOM.values(), ids=list(CUSTOM))
def test_what_an_encoder_changes_is_named(
    shop: Shop, encoder: Any, anything: AITask[..., None], custom: Custom, value: Any
) -> None:
    """Also where `==` says that nothing changed: a number of another type, another order, another sign of zero."""
    encoder(custom)
    with pytest.raises(InvalidJob, match=r"argument 1 of task anything .* Custom"):
        anything.send("fine", value, "fine")
    assert {} == shop.books()


class Models(Custom):
    """A pydantic encoder, as applications write it: a model travels with its name, and comes back as one."""

    known: ClassVar[dict[str, type[BaseModel]]] = {model.__name__: model for model in (Customer, Address)}

    def __init__(self) -> None:
        super().__init__({"default": self.written}, {"object_hook": self.read})

    def written(self, value: Any) -> Any:
        return {"model": type(value).__name__, "data": value.model_dump(mode="json")}

    def read(self, data: dict[str, Any]) -> Any:
        return self.known[data["model"]].model_validate(data["data"]) if data.keys() == {"model", "data"} else data


@pytest.mark.parametrize("asynchronous", [False, True])
def test_models_come_through_an_outage(shop: Shop, encoder: Any, asynchronous: bool) -> None:
    """With an encoder that knows them, nested pydantic models run as they were sent."""
    encoder(Models())
    run_through_an_outage(shop, {"a model": ANNA, "models": [ANNA, {"at": ANNA.address}], "none": {"a": 1}}, asynchronous)
