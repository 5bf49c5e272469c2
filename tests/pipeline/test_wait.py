# SPDX-License-Identifier: Apache-2.0
"""Waiting for what was not enqueued yet, arguments behind a decorator, and prompts as large as they come."""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import dramatiq
import pytest
from dramatiq.results import ResultFailure

import tideover
from tideover import AITask, InvalidJob, JobFailed, NotYet, ai_task

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.pipeline.conftest import Job, Shop

SOON = timedelta(seconds=1)
"""Longer than a job that is gone has for its result to come."""
LONG = timedelta(seconds=20)
MEGABYTE = 1_048_576

# later steps of a pipeline


def length_task(shop: Shop, **options: Any) -> AITask[[str], int]:
    @ai_task(criticality="deferrable", models=["no-such-model"], **shop.quick, **options)
    def length(answer: str) -> int:
        return len(answer)

    return length


def held_pipeline(shop: Shop, last: Job) -> list[Job]:
    """Two steps, of which the first is held."""
    shop.open_breaker()
    steps = (shop.summary.message("first") | last).run().messages
    shop.until_all("held", steps[:1])
    return steps


@pytest.mark.parametrize("through_holds", [False, True])
def test_a_later_step_is_waited_for(shop: Shop, through_holds: bool) -> None:
    """While an earlier step is held, the last one is neither ended nor failed: not yet there, and its answer comes later."""
    length = length_task(shop)
    shop.work()
    first, last = held_pipeline(shop, length.message())
    assert ("unknown", None) == (tideover.status(last).state, tideover.status(last).end)
    with pytest.raises(NotYet) as caught:
        tideover.wait_for_sync(last, timeout=SOON, through_holds=through_holds)
    assert (last.message_id, "timeout") == (caught.value.job_id, caught.value.reason)
    shop.heal()
    assert len(shop.result(first)) == tideover.wait_for_sync(last, timeout=LONG, through_holds=through_holds)
    shop.until_all("ended", [first, last])


def test_a_later_step_that_fails_is_told_with_its_error(shop: Shop) -> None:
    """That it was not enqueued at first takes nothing of the time that its result has to come."""

    @ai_task(criticality="deferrable", models=["no-such-model"], max_retries=0)
    def broken(answer: str) -> None:
        raise ValueError("broken")

    shop.work()
    last = held_pipeline(shop, broken.message())[-1]
    waiting = iter(tideover.wait.Steps(last, LONG, through_holds=True))
    next(waiting)
    shop.heal()
    with pytest.raises(ResultFailure, match="broken"):
        list(waiting)
    shop.until_all("ended", [last])
    assert "failed" == tideover.status(last).end


def test_a_later_step_that_was_seen_has_ended_when_it_is_gone(shop: Shop) -> None:
    """What a wait has once found in a queue can have no result any more when it is in none."""
    length = length_task(shop, store_results=False)
    job = length.message("x")
    shop.broker.enqueue(job)
    waiting = iter(tideover.wait.Steps(job, LONG, through_holds=True))
    next(waiting)
    shop.work()
    shop.until_over()
    with pytest.raises(JobFailed, match="stores no result"):
        list(waiting)
    assert "unknown" == tideover.status(job).state


def test_what_send_returned_is_ended_when_it_is_gone(shop: Shop) -> None:
    """A sent job that stores no result is told as ever."""
    job = length_task(shop, store_results=False).send("x")
    shop.work()
    shop.until_over()
    assert "ended" == tideover.status(job).state
    with pytest.raises(JobFailed, match="stores no result"):
        tideover.wait_for_sync(job, timeout=LONG)


def test_a_broker_without_results_is_asked_all_the_same(shop: Shop) -> None:
    """An application of plain actors may ask where a step is, too."""
    broker = dramatiq.brokers.redis.RedisBroker(url=shop.redis_url, namespace=shop.namespace)
    broker.add_middleware(tideover.Tideover())
    shop.brokers.append(broker)
    dramatiq.set_broker(broker)
    assert "unknown" == tideover.status(dramatiq.Message("default", "plain", (), {}, {})).state


# arguments behind a decorator


def traced(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return wrapper


def atraced(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await fn(*args, **kwargs)

    return wrapper


def connected(fn: Callable[..., Any]) -> Callable[..., Any]:
    """It adds an argument that no job has."""

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return fn("connection", *args, **kwargs)

    return wrapper


def plain(text: str) -> str:
    return text


async def aplain(text: str) -> str:
    return text


def run(shop: Shop, fn: Callable[..., Any], *args: Any) -> dict[str, int]:
    """What becomes of one job of this function with these arguments."""
    task: Any = ai_task(criticality="deferrable", models=["no-such-model"], max_retries=0, actor_name="task")(fn)
    task.send(*args)
    shop.work()
    shop.until(lambda: not {"queued", "running"} & shop.books().keys(), "it is held or has ended")
    return shop.books()


@pytest.mark.parametrize("fn", [traced(plain), traced(traced(plain)), atraced(aplain)], ids=["one", "two", "coroutine"])
def test_a_decorated_function_that_takes_other_arguments(shop: Shop, fn: Callable[..., Any]) -> None:
    """The job needs review, as without a decorator, and is no dead letter."""
    assert {"accepted": 1, "held": 1} == run(shop, fn, "a", "b")


def own_error(text: str) -> str:
    return text + 1  # type: ignore[operator]


def own_call(text: str) -> str:
    return plain(text, text)  # type: ignore[call-arg]


def own_error_with(connection: str, text: str) -> str:
    return text + 1  # type: ignore[operator]


@pytest.mark.parametrize("fn", [traced(own_error), traced(own_call), connected(own_error_with)])
def test_a_type_error_behind_a_decorator_is_its_own(shop: Shop, fn: Callable[..., Any]) -> None:
    """Also where the function calls another one wrongly, or where the decorator adds what the arguments lack."""
    assert {"accepted": 1, "failed": 1} == run(shop, fn, "a")


class Opaque:
    """It cannot be asked for its signature, as a compiled function."""

    __name__, __qualname__, __module__, __doc__ = "opaque", "opaque", __name__, None
    __signature__ = "none"

    def __call__(self, text: str) -> str:
        raise TypeError("its own")


@pytest.mark.parametrize(("args", "end"), [(("a",), "failed"), (("a", "b"), "held")])
def test_a_function_without_a_signature(shop: Shop, args: tuple[str, ...], end: str) -> None:
    """Where nobody can tell what a function takes, an error of the call itself means that it does not take these."""
    assert {"accepted": 1, end: 1} == run(shop, Opaque(), *args)


# large prompts


@pytest.mark.parametrize("letter", ["a", "я", "漢", "😀", "\x00"], ids=["ascii", "cyrillic", "chinese", "emoji", "control"])
def test_a_megabyte_of_any_script_comes_through_an_outage(shop: Shop, letter: str) -> None:
    """A prompt of a megabyte is held, released, fails and is retried, and is each time what was sent; by default."""
    prompt = letter * (MEGABYTE // len(letter.encode()))
    same: list[bool] = []

    @ai_task(criticality="deferrable", models=[shop.model], **shop.quick)
    def tell(text: str) -> bool:
        same.append(text == prompt)
        if len(same) == 1:
            raise ValueError("the first attempt")
        return True

    shop.work()
    shop.open_breaker()
    job = tell.send(prompt)
    shop.until_all("held", [job])
    shop.heal()
    assert shop.result(job)
    assert [True, True] == same


@pytest.fixture
def anything(shop: Shop) -> AITask[..., None]:
    """A task that takes any arguments."""
    shop.configure(more="")
    path = shop.folder / "tideover.toml"
    path.write_text("max_payload_bytes = 2000\n" + path.read_text())
    tideover.settings.forget()

    @ai_task(criticality="deferrable")
    def anything(*args: Any, **kwargs: Any) -> None: ...

    return anything


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        (("short", "secret" * 500), {"n": 1}, "3,002 of them in argument 1 of task anything"),
        (("short",), {"text": "\u6f22" * 500, "n": 1}, "3,002 of them in argument text of task anything"),
        ((), {"secret" * 500: "x" * 100}, "102 of them in argument … of task anything"),
    ],
    ids=["position", "name", "a name that may be content"],
)
def test_the_largest_argument_is_named(
    shop: Shop, anything: AITask[..., None], args: tuple[Any, ...], kwargs: dict[str, Any], says: str
) -> None:
    """A job that is too large is refused with the argument that is to blame and its size, and none of its content."""
    with pytest.raises(InvalidJob, match=says) as caught:
        anything.send_with_options(args=args, kwargs=kwargs)
    assert "secret" not in str(caught.value)
    assert {} == shop.books()


def test_an_argument_of_a_later_step_is_named(shop: Shop, anything: AITask[..., None]) -> None:
    """A message carries those of the steps behind it; the first one is not blamed for them."""

    @ai_task(criticality="deferrable")
    def later(text: str) -> None: ...

    with pytest.raises(InvalidJob, match="3,002 of them in argument 0 of task later"):
        (anything.message("short") | anything.message("short") | later.message("x" * 3000)).run()
    assert {} == shop.books()
