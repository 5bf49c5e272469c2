# SPDX-License-Identifier: Apache-2.0
"""`ai_task`: a function becomes a task, a dramatiq actor that knows its criticality, expiry and routes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, Final, Literal, ParamSpec, Protocol, TypeVar, cast, overload

import dramatiq
from dramatiq import broker as dramatiq_broker
from dramatiq.broker import Broker
from dramatiq.message import Message

from tideover import clock
from tideover.attempt import Attempt, Held, HoldSignal, current
from tideover.core.admission import Hold
from tideover.core.job import CRITICALITIES, Criticality, is_criticality, lane
from tideover.errors import ConfigurationError, InvalidJob

P = ParamSpec("P")
R = TypeVar("R")

CriticalityOf = Callable[..., Criticality]


STAMP = "tideover"
"""The message option that holds what tideover knows of a job."""


class Unset:
    """For `expires_in`, where None means never."""


UNSET: Final = Unset()

Expiry = timedelta | None
RESULT_TTL_MS = 86_400_000
"""Results of AI tasks are kept for 24 hours from completion."""

PLAIN = (str, int, float, bool, type(None))


class AITask(dramatiq.Actor[P, R]):
    """A dramatiq actor whose jobs tideover may hold or reroute. `ai_task` makes it.

    Attributes:
      criticality: `"critical"`, `"deferrable"`, or a function of the job's arguments.
      expires_in: how long an answer is useful, from the send or the eta of a delayed job; None: for ever; `UNSET`: not said.
      reroute: names of routes that a critical job may use when the primary is down, in order.
      models: names of the models that it calls; empty: tideover learns them.
    """

    def __init__(
        self,
        fn: Callable[P, Any],
        *,
        criticality: Criticality | CriticalityOf,
        expires_in: Expiry | Unset,
        route: str | None,
        reroute: Sequence[str],
        reroute_when_deferrable: bool,
        models: Sequence[str],
        **actor: Any,
    ) -> None:
        self.criticality, self.expires_in, self.models = criticality, expires_in, tuple(models)
        self.route, self.reroute, self.reroute_when_deferrable = route, tuple(reroute), reroute_when_deferrable
        self.coroutine: Callable[..., Awaitable[Any]] | None = async_edge(fn) if iscoroutinefunction(fn) else None
        super().__init__(self.coroutine or sync_edge(fn), **actor)
        self.broker.declare_queue(lane(self.queue_name, "critical"))

    def routes(self) -> tuple[str, ...]:
        """The routes its jobs may use, primary first."""
        from tideover.settings import settings

        return (self.route or settings().primary, *self.reroute)

    def facts(self) -> dict[str, Any]:
        """What tools show of the task."""
        said = self.criticality if isinstance(self.criticality, str) else "by arguments"
        return {"queue": self.queue_name, "criticality": said, "routes": self.routes(), "models": self.models}

    def check_routes(self) -> None:
        """Raises `ConfigurationError` when it names a route that the settings lack. Asked at worker boot and first send."""
        from tideover.settings import settings

        known = settings().routes
        for name in self.routes():
            if name not in known:
                raise ConfigurationError(
                    f"task {self.actor_name} names the route {name!r}, which the settings do not have. "
                    f"Known routes: {', '.join(known)}. Add [routes.{name}] to tideover.toml or correct the task"
                )

    def criticality_for(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Criticality | None:
        """The criticality of a job with these arguments; None when its function needs more of them than are known yet."""
        if not callable(self.criticality):
            return self.criticality
        try:
            said = self.criticality(*args, **kwargs)
        except TypeError:
            return None
        if not is_criticality(said):
            raise InvalidJob(
                f"the criticality function of task {self.actor_name} must return one of {CRITICALITIES}, not {said!r}"
            )
        return said

    def expiry_ms(self, criticality: Criticality, own: Expiry | Unset) -> int | None:
        """Milliseconds that an answer stays useful: the job's own word, else the task's; None: for ever."""
        expires_in = self.expires_in if isinstance(own, Unset) else own
        if isinstance(expires_in, Unset):
            if criticality == "critical":
                raise TypeError(f"a critical job of task {self.actor_name} must state expires_in (None: it never expires)")
            return None
        return None if expires_in is None else round(expires_in.total_seconds() * 1000)

    def message_with_options(
        self,
        *,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        criticality: Criticality | None = None,
        expires_in: Expiry | Unset = UNSET,
        **options: Any,
    ) -> Message[R]:
        """Builds a job. `criticality` and `expires_in` override the task's; the other options are dramatiq's."""
        if criticality is not None and not is_criticality(criticality):
            raise TypeError(f"criticality must be one of {CRITICALITIES}, not {criticality!r}")
        known = criticality or self.criticality_for(args, kwargs or {})
        stamp: dict[str, Any] = {}
        if known is not None:
            stamp = {"criticality": known, "expires_in_ms": self.expiry_ms(known, expires_in)}
        elif not isinstance(expires_in, Unset):
            stamp = {"expires_in_ms": self.expiry_ms("deferrable", expires_in)}
        message = super().message_with_options(args=args, kwargs=kwargs, **{STAMP: stamp}, **options)
        return message if known is None else message.copy(queue_name=lane(self.queue_name, known))

    async def send_async(self, *args: P.args, **kwargs: P.kwargs) -> Message[R]:
        """`send` without blocking the event loop."""
        return await asyncio.to_thread(self.send, *args, **kwargs)

    def stamp(self, message: Message[Any], delay_ms: int | None) -> dict[str, Any]:
        """The stamp of a job at its first enqueue: criticality and the instant of its expiry."""
        early: dict[str, Any] = message.options.get(STAMP) or {}
        criticality = early.get("criticality") or self.criticality_for(message.args, message.kwargs)
        if criticality is None:
            raise InvalidJob(
                f"the criticality function of task {self.actor_name} does not accept this job's arguments. "
                "Correct the arguments or send with criticality=..."
            )
        now_ms = clock.now_ms()
        expires_in_ms = early["expires_in_ms"] if "expires_in_ms" in early else self.expiry_ms(criticality, UNSET)
        expires_ms = None if expires_in_ms is None else now_ms + (delay_ms or 0) + expires_in_ms
        return {"criticality": criticality, "expires_ms": expires_ms, "sent_ms": now_ms}


def check_arguments(message: Message[Any]) -> None:
    """Raises `InvalidJob` unless the arguments come back from dramatiq's encoding exactly as they are."""
    if type(dramatiq.get_encoder()) is dramatiq.JSONEncoder:
        for name, value in [*enumerate(message.args), *message.kwargs.items()]:
            if (path := unfaithful(value)) is not None:
                raise InvalidJob(
                    f"argument {name}{path} of task {message.actor_name} would not come back from JSON as it is. {PLAIN_ONLY}"
                )
    else:
        again = Message.decode(message.encode())
        if (again.args, again.kwargs) != (message.args, message.kwargs):
            raise InvalidJob(f"the arguments of task {message.actor_name} would not come back from the encoder as they are")


PLAIN_ONLY = "Send strings, numbers, booleans, None, lists, and dicts with string keys; load the rest inside the task"


def unfaithful(value: object) -> str | None:
    """Where in `value` something is that JSON would change, as `[2]["key"]: tuple`; None: nowhere.

    >>> unfaithful({"a": [1, 2.5, None]}), unfaithful([(1, 2)]), unfaithful({1: "x"})
    (None, '[0]: tuple', ': a dict with a key that is no string')
    """
    if type(value) in PLAIN:
        return None
    if type(value) is list:
        parts: list[tuple[object, object]] = list(enumerate(value))
    elif type(value) is dict:
        if not all(type(key) is str for key in value):
            return ": a dict with a key that is no string"
        parts = list(value.items())
    else:
        return f": {type(value).__name__}"
    return next((f"[{key!r}]{path}" for key, part in parts if (path := unfaithful(part)) is not None), None)


def hold_in(error: BaseException | None) -> bool:
    """Whether a hold is among what left the function, task groups included."""
    if isinstance(error, BaseExceptionGroup):
        return any(hold_in(inner) for inner in error.exceptions)
    return isinstance(error, HoldSignal)


def hold_for(attempt: Attempt | None, error: BaseException) -> Hold | None:
    """The hold that a failure of the function means, if it was a provider's and nobody caught it."""
    if attempt is None or attempt.hold is not None or not isinstance(error, Exception):
        return None
    return attempt.health.hold_for(attempt, error)


def leave(attempt: Attempt | None, error: BaseException | None, hold: Hold | None = None) -> None:
    """The task's edge: a hold anywhere below is a hold of the job."""
    if attempt is not None and attempt.hold is None:
        attempt.hold = hold
    if hold_in(error) or (attempt is not None and attempt.hold is not None):
        if attempt is not None:
            attempt.message.options["store_results"] = False  # in memory only: `None` would be taken for the answer
        raise Held("held") from None
    if error is not None:
        raise error


def async_edge(fn: Callable[..., Awaitable[R]]) -> Callable[..., Awaitable[R]]:
    @wraps(fn)
    async def run(*args: Any, **kwargs: Any) -> R:
        try:
            result = await fn(*args, **kwargs)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            leave(current.get(), error, await asyncio.to_thread(hold_for, current.get(), error))
            raise
        leave(current.get(), None)
        return result

    return run


def sync_edge(fn: Callable[..., R]) -> Callable[..., R]:
    @wraps(fn)
    def run(*args: Any, **kwargs: Any) -> R:
        try:
            result = fn(*args, **kwargs)
        except BaseException as error:
            leave(current.get(), error, hold_for(current.get(), error))
            raise
        leave(current.get(), None)
        return result

    return run


class TaskDecorator(Protocol):
    """What `ai_task(...)` returns."""

    @overload
    def __call__(self, fn: Callable[P, Awaitable[R]]) -> AITask[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R]) -> AITask[P, R]: ...


@overload
def ai_task(
    *,
    criticality: Literal["deferrable"],
    expires_in: Expiry | Unset = ...,
    route: str | None = ...,
    reroute: Sequence[str] = ...,
    reroute_when_deferrable: bool = ...,
    models: Sequence[str] = ...,
    broker: Broker | None = ...,
    **options: Any,
) -> TaskDecorator: ...
@overload
def ai_task(
    *,
    criticality: Literal["critical"] | CriticalityOf,
    expires_in: Expiry,
    route: str | None = ...,
    reroute: Sequence[str] = ...,
    reroute_when_deferrable: bool = ...,
    models: Sequence[str] = ...,
    broker: Broker | None = ...,
    **options: Any,
) -> TaskDecorator: ...
def ai_task(
    *,
    criticality: Criticality | CriticalityOf,
    expires_in: Expiry | Unset = UNSET,
    route: str | None = None,
    reroute: Sequence[str] = (),
    reroute_when_deferrable: bool = False,
    models: Sequence[str] = (),
    broker: Broker | None = None,
    **options: Any,
) -> TaskDecorator:
    """Makes a function a task: `send` enqueues a job, workers run it, tideover holds or reroutes it in an outage.

    Args:
      criticality: `"critical"`, `"deferrable"`, or a function of the job's arguments that returns one of them.
      expires_in: how long the answer is useful, from the send or from the eta of a delayed job; None: for ever. A task that
        is or may be critical must say it.
      route: its primary route; None: the first of the settings.
      reroute: routes that a critical job may use when the primary is down, in order. Naming one allows prompts to go there.
      reroute_when_deferrable: lets deferrable jobs use them too.
      models: the models it calls; empty: tideover learns them from its calls.
      broker: the dramatiq broker; None: the one that was set, else one built from the settings.
      **options: dramatiq's actor options (`queue_name`, `max_retries`...). Results are kept 24 h unless `store_results=False`.

    Raises:
      TypeError: a critical task without `expires_in`.
      ConfigurationError: the broker has no `Tideover()`, or a route or criticality makes no sense.
    """
    if not callable(criticality) and not is_criticality(criticality):
        raise TypeError(f"criticality must be one of {CRITICALITIES} or a function of the arguments, not {criticality!r}")
    if isinstance(expires_in, Unset) and criticality != "deferrable":
        raise TypeError("a task that is or may be critical must state expires_in (None: its answer never becomes useless)")
    if isinstance(reroute, str) or isinstance(models, str):
        raise TypeError("reroute and models are lists of names, not one string")
    on = broker_for(broker)
    options.setdefault("store_results", True)
    options.setdefault("result_ttl", RESULT_TTL_MS)

    def make(fn: Callable[..., Any], **actor: Any) -> AITask[Any, Any]:
        return AITask(
            fn,
            criticality=criticality,
            expires_in=expires_in,
            route=route,
            reroute=reroute,
            reroute_when_deferrable=reroute_when_deferrable,
            models=models,
            **actor,
        )

    return cast(TaskDecorator, dramatiq.actor(actor_class=make, broker=on, **options))


def broker_for(broker: Broker | None) -> Broker:
    """The broker that a task is declared on: the given one, the one that was set, else one built from the settings."""
    from tideover import middleware

    on = broker or dramatiq_broker.global_broker
    if on is None:
        on = middleware.broker_from_settings()
        dramatiq.set_broker(on)
    if broker is None:
        middleware.check_only_broker(on)
    if not any(isinstance(m, middleware.Tideover) for m in on.middleware):
        raise ConfigurationError(
            f"an AI task needs a broker with tideover on it, and this {type(on).__name__} has none. "
            "Add broker.add_middleware(Tideover()) before the tasks are declared"
        )
    middleware.ensure_results(on)
    return on
