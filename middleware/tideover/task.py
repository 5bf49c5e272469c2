# SPDX-License-Identifier: Apache-2.0
"""`ai_task`: a function becomes a task, a dramatiq actor that knows its criticality, expiry and routes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from inspect import iscoroutinefunction
from typing import Any, Final, Literal, ParamSpec, Protocol, TypeVar, cast, overload

import dramatiq
from dramatiq import broker as dramatiq_broker
from dramatiq.broker import Broker
from dramatiq.message import Message

from tideover.core.job import CRITICALITIES, Criticality, is_criticality, lane
from tideover.degrading import NOTHING, Degrade, Nothing
from tideover.edge import Edge, async_edge, sync_edge
from tideover.errors import ConfigurationError, InvalidJob
from tideover.stamp import STAMP, check_label, digest_of, id_of, sent_ms, twin_of
from tideover.store.keys import queue_of

P = ParamSpec("P")
R = TypeVar("R")

CriticalityOf = Callable[..., Criticality]
KeyOf = Callable[..., str | None]


class Unset:
    """For `expires_in`, where None means never."""


UNSET: Final = Unset()

Expiry = timedelta | None
OnExpiry = Literal["discard", "degrade"]
OnLoss = Literal["refuse", "allow"]
Delay = timedelta | int | None
OWN_RESULT = {"store_results", "result_ttl"}
RESULT_TTL_MS = 86_400_000
"""Results of AI tasks are kept for 24 hours from completion."""


class FirstSending(threading.local):
    """The list that the job of this thread's latest send is in, if that had been sent before with its idempotency key."""

    queue = ""


first_sending = FirstSending()


class AITask(dramatiq.Actor[P, R]):
    """A dramatiq actor whose jobs tideover may hold or reroute. `ai_task` makes it.

    Attributes:
      criticality: `"critical"`, `"deferrable"`, or a function of the job's arguments.
      expires_in: how long an answer is useful, from the send or the eta of a delayed job; None: for ever; `UNSET`: not said.
      reroute: names of routes that a critical job may use when the primary is down, in order.
      models: names of the models that it calls; empty: tideover learns them.
      key: a function of the job's arguments; held jobs of which it says the same are answered by one run.
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
        on_expiry: OnExpiry,
        degrade: Degrade,
        on_loss: OnLoss,
        budget_per_hour: float | None,
        key: KeyOf | None,
        **actor: Any,
    ) -> None:
        self.criticality, self.expires_in, self.models = criticality, expires_in, tuple(models)
        self.route, self.reroute, self.reroute_when_deferrable = route, tuple(reroute), reroute_when_deferrable
        self.on_expiry, self.key, self.degrade, self.on_loss = on_expiry, key, degrade, on_loss
        self.budget_per_hour = budget_per_hour
        edge = partial(Edge, degrade=degrade, when_late=on_expiry == "degrade")
        self.coroutine: Callable[..., Awaitable[Any]] | None = async_edge(fn, edge) if iscoroutinefunction(fn) else None
        super().__init__(self.coroutine or sync_edge(fn, edge), **actor)
        self.broker.declare_queue(lane(self.queue_name, "critical"))

    def routes(self) -> tuple[str, ...]:
        """The routes its jobs may use, primary first."""
        from tideover.settings import settings

        return (self.route or settings().primary, *self.reroute)

    def facts(self) -> dict[str, Any]:
        """What tools show of the task."""
        said = self.criticality if isinstance(self.criticality, str) else "by arguments"
        return {
            "queue": self.queue_name,
            "criticality": said,
            "routes": self.routes(),
            "models": self.models,
            "on_expiry": self.on_expiry,
            "reroute_when_deferrable": self.reroute_when_deferrable,
            "degrades": self.degrade is not NOTHING,
        }

    def checked(self, routes: Sequence[str]) -> list[str]:
        """The routes that a job is narrowed to; its task must allow each."""
        if isinstance(routes, str) or not routes or not set(routes) <= set(self.routes()):
            raise InvalidJob(f"routes must name some of those of task {self.actor_name}: {', '.join(self.routes())}")
        return list(routes)

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

    def key_for(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """The key of a job with these arguments; None: it has none, or more of them are needed than are known yet."""
        try:
            return None if self.key is None else self.key(*args, **kwargs)
        except TypeError:
            return None

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
        tenant: str = "",
        tag: str = "",
        idempotency_key: str | None = None,
        key: str | None = None,
        routes: Sequence[str] | None = None,
        **options: Any,
    ) -> Message[R]:
        """Builds a job.

        Args:
          criticality: overrides the task's, as does `expires_in`.
          tenant: for whom it is: held jobs of tenants are released in turn, and each tenant has its own room.
          tag: any word to find it by in the backlog.
          idempotency_key: sending with the same key again, within a day, gives the first job and adds none. Keys are each
            task's and tenant's own.
          key: held jobs of this task and tenant with the same key are answered by one run; overrides the task's.
          routes: the only ones of its task's routes that it may use (None: all).
          **options: dramatiq's.
        """
        if tenant != "" or tag != "":
            check_label("tenant", tenant)
            check_label("tag", tag)
        if criticality is not None and not is_criticality(criticality):
            raise TypeError(f"criticality must be one of {CRITICALITIES}, not {criticality!r}")
        known = criticality or self.criticality_for(args, kwargs or {})
        stamp: dict[str, Any] = {}
        if known is not None:
            stamp = {"criticality": known, "expires_in_ms": self.expiry_ms(known, expires_in)}
        elif not isinstance(expires_in, Unset):
            stamp = {"expires_in_ms": self.expiry_ms("deferrable", expires_in)}
        stamp |= {name: value for name, value in (("tenant", tenant), ("tag", tag)) if value}
        stamp |= {} if routes is None else {"routes": self.checked(routes)}
        shared = self.key_for(args, kwargs or {}) if key is None else key
        if shared is not None and not OWN_RESULT & options.keys():  # whose result is another's than its task's
            stamp["twin"] = twin_of(self.actor_name, tenant, shared)
        if idempotency_key is not None:
            stamp["once"] = digest_of(args, kwargs or {})
        message = super().message_with_options(args=args, kwargs=kwargs, **{STAMP: stamp}, **options)
        if idempotency_key is not None:
            message = message.copy(message_id=id_of(self.actor_name, tenant, idempotency_key))
        where = message.queue_name if known is None else lane(self.queue_name, known)
        return message if where == message.queue_name else message.copy(queue_name=where)

    def send_with_options(
        self, *, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, delay: Delay = None, **options: Any
    ) -> Message[R]:
        """Sends a job with options; those of `message_with_options`. `delay`: ms, or a timedelta.

        Raises:
          InvalidJob: it would not run with exactly these arguments, or its idempotency key was used for others.
          CapacityReached: there is no room for it.
          StoreUnavailable: Redis cannot be reached or refuses to write: nothing was accepted. Or its answer was lost
            (`may_be_accepted`): then the job may run. With an idempotency key, sending it again adds nothing twice.
        """
        first_sending.queue = ""
        sent = super().send_with_options(args=args, kwargs=kwargs, delay=delay, **options)
        return sent.copy(queue_name=queue_of(first_sending.queue)) if first_sending.queue else sent

    async def send_async(self, *args: P.args, **kwargs: P.kwargs) -> Message[R]:
        """`send` without blocking the event loop."""
        return await asyncio.to_thread(self.send, *args, **kwargs)

    def stamp(self, message: Message[Any], delay_ms: int | None) -> dict[str, Any]:
        """The stamp of a job at its first enqueue: criticality and the instant of its expiry."""
        from tideover.settings import settings

        early: dict[str, Any] = message.options.get(STAMP) or {}
        criticality = early.get("criticality") or self.criticality_for(message.args, message.kwargs)
        if criticality is None:
            raise InvalidJob(
                f"the criticality function of task {self.actor_name} does not accept this job's arguments. "
                "Correct the arguments or send with criticality=..."
            )
        now_ms = sent_ms()
        expires_in_ms = early["expires_in_ms"] if "expires_in_ms" in early else self.expiry_ms(criticality, UNSET)
        expires_ms = None if expires_in_ms is None else int(now_ms) + (delay_ms or 0) + expires_in_ms
        kept: dict[str, Any] = {name: early[name] for name in ("tenant", "tag", "once", "twin", "routes") if name in early}
        if not settings().narrowed(self.routes(), kept.get("tenant", ""), kept.get("routes")):
            raise InvalidJob(f"no route is left for this job: its tenant's are others than those of task {self.actor_name}")
        return {"criticality": criticality, "expires_ms": expires_ms, "sent_ms": now_ms, **kept}


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
    on_expiry: OnExpiry = ...,
    degrade: Degrade = ...,
    on_loss: OnLoss = ...,
    budget_per_hour: float | None = ...,
    key: KeyOf | None = ...,
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
    on_expiry: OnExpiry = ...,
    degrade: Degrade = ...,
    on_loss: OnLoss = ...,
    budget_per_hour: float | None = ...,
    key: KeyOf | None = ...,
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
    on_expiry: OnExpiry = "discard",
    degrade: Degrade = NOTHING,
    on_loss: OnLoss = "allow",
    budget_per_hour: float | None = None,
    key: KeyOf | None = None,
    broker: Broker | None = None,
    **options: Any,
) -> TaskDecorator:
    """Makes a function a task: `send` enqueues a job, workers run it, tideover holds or reroutes it in an outage.

    Args:
      criticality: `"critical"`, `"deferrable"`, or a function of the job's arguments that returns one of them.
      expires_in: how long the answer is useful, from the send or from the eta of a delayed job; None: for ever. A task that
        is or may be critical must say it.
      route: its primary route; None: the first of the settings.
      reroute: routes that a critical job may use when the primary is down, in order. Naming one allows prompts to go there;
        `reroute_when_deferrable` lets deferrable jobs use them too.
      models: the models it calls; empty: tideover learns them from its calls.
      on_expiry: what becomes of a job that is past its expiry: `"discard"`, or `"degrade"`: its result is from `degrade`.
      degrade: the answer without a model, of a critical job for which no route is usable (and see `on_expiry`): a function of
        the job's arguments, which may not call a model; a `LastGood`; or the answer itself. It is always marked.
      on_loss: `"allow"`: a rerouted request may lose what its meaning does not hang on (a hint for a cache, a user's id), which
        `last_served()` names; `"refuse"`: it goes to no route that would lose anything.
      budget_per_hour: what its rerouted calls may cost in an hour of the clock, by the `prices` of the settings; once it is
        spent its jobs wait for their primary, or degrade. None: no limit.
      key: a function of the job's arguments; held jobs of a tenant with the same key are answered by one run (None: no key).
      broker: the dramatiq broker; None: the one that was set, else one built from the settings.
      **options: dramatiq's actor options (`queue_name`, `max_retries`...). Results are kept 24 h unless `store_results=False`.

    Raises:
      TypeError, ConfigurationError: what is said makes no sense, or the broker has no `Tideover()`.
    """
    said: dict[str, Any] = {
        "criticality": criticality,
        "expires_in": expires_in,
        "route": route,
        "reroute": reroute,
        "reroute_when_deferrable": reroute_when_deferrable,
        "models": models,
        "on_expiry": on_expiry,
        "degrade": degrade,
        "on_loss": on_loss,
        "budget_per_hour": budget_per_hour,
        "key": key,
    }
    check_said(**said)
    on, options = broker_for(broker), {"store_results": True, "result_ttl": RESULT_TTL_MS, **options}

    def make(fn: Callable[..., Any], **actor: Any) -> AITask[Any, Any]:
        return AITask(fn, **said, **actor)

    return cast(TaskDecorator, dramatiq.actor(actor_class=make, broker=on, **options))


def check_said(
    *,
    criticality: Any,
    expires_in: Any,
    on_expiry: Any,
    degrade: Degrade,
    on_loss: Any,
    budget_per_hour: Any,
    reroute: Any,
    models: Any,
    key: Any,
    **_: Any,
) -> None:
    """Raises `TypeError` for what makes no sense in a task."""
    if not callable(criticality) and not is_criticality(criticality):
        raise TypeError(f"criticality must be one of {CRITICALITIES} or a function of the arguments, not {criticality!r}")
    if isinstance(expires_in, Unset) and criticality != "deferrable":
        raise TypeError("a task that is or may be critical must state expires_in (None: its answer never becomes useless)")
    if on_expiry not in ("discard", "degrade") or (on_expiry == "degrade" and isinstance(degrade, Nothing)):
        raise TypeError('on_expiry is "discard", or "degrade" with degrade= a function, a LastGood or the answer itself')
    if on_loss not in ("refuse", "allow"):
        raise TypeError(f'on_loss is "refuse" or "allow", not {on_loss!r}')
    if not (budget_per_hour is None or (isinstance(budget_per_hour, int | float) and budget_per_hour >= 0)):
        raise TypeError(f"budget_per_hour is a number of 0 or more, or None, not {budget_per_hour!r}")
    if isinstance(reroute, str) or isinstance(models, str) or not (key is None or callable(key)):
        raise TypeError("reroute and models are lists of names, not one string; key is a function of the job's arguments")


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
