# SPDX-License-Identifier: Apache-2.0
"""What tideover touches of dramatiq's and the anthropic SDK's inside still is as tideover needs it.

Stock dramatiq on a real Valkey, the real SDK on a transport in memory: nothing of tideover runs here. A failure means that an
upgrade moved something; the test's name says what tideover does with it.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anthropic
import dramatiq
import httpx2
import pytest
import redis
from anthropic._request import APIRequest
from dramatiq import broker as dramatiq_broker
from dramatiq.broker import MessageProxy
from dramatiq.brokers.redis import RedisBroker
from dramatiq.common import dq_name, q_name
from dramatiq.errors import ConnectionClosed
from dramatiq.message import Message
from dramatiq.middleware import Middleware, MiddlewareError, SkipMessage, TimeLimit, default_middleware
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend
from dramatiq.worker import ConsumerThread, Worker, WorkerThread, _WorkQueueItem

from tideover.store.keys import Keys

if TYPE_CHECKING:
    from tests.conftest import WaitUntil


@pytest.fixture
def broker(client: redis.Redis, keys: Keys) -> RedisBroker:
    made = RedisBroker(client=client, namespace=keys.namespace)
    made.declare_queue("default")
    return made


@contextmanager
def working(broker: RedisBroker, prepare: Callable[[Worker], None] = lambda _: None) -> Iterator[Worker]:
    worker = Worker(broker, worker_threads=2, worker_timeout=20)
    prepare(worker)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def message(**options: Any) -> Message[Any]:
    return Message(queue_name="default", actor_name="t", args=(), kwargs={}, options=options)


# keys


def test_redis_keys_are_where_we_look(broker: RedisBroker, client: redis.Redis, keys: Keys) -> None:
    """Queue, bodies, delays, acks, heartbeats and dead letters, all named by `store/keys.py`."""
    sent = broker.enqueue(message())
    delayed = broker.enqueue(message(), delay=60_000)
    redis_id, delayed_id = (m.options["redis_message_id"] for m in (sent, delayed))
    assert [redis_id.encode()] == client.lrange(keys.queue("default"), 0, -1)
    assert sent.encode() == client.hget(keys.msgs("default"), redis_id)
    assert [delayed_id.encode()] == client.lrange(keys.queue("default.DQ"), 0, -1)
    assert client.hexists(keys.msgs("default.DQ"), delayed_id)
    for queue in ("default", "default.DQ"):
        consumer = broker.consume(queue, prefetch=1, timeout=1)
        taken = next(iter(consumer))
        assert 1 == client.scard(keys.acks(broker.broker_id, queue))
        consumer.nack(taken)
    assert [broker.broker_id.encode()] == client.zrange(keys.heartbeats, 0, -1)
    assert {redis_id.encode(), delayed_id.encode()} == set(client.zrange(keys.dead("default"), 0, -1))
    assert {redis_id.encode(), delayed_id.encode()} == set(client.hkeys(keys.dead_msgs("default")))


def test_heartbeats_are_unix_milliseconds(broker: RedisBroker, client: redis.Redis, keys: Keys) -> None:
    """Our script compares them with Redis' clock."""
    broker.enqueue(message())
    seconds, _ = client.time()
    assert seconds * 1000 == pytest.approx(client.zscore(keys.heartbeats, broker.broker_id), abs=5000)


def test_names_of_delay_queues() -> None:
    """`.DQ`, there and back."""
    assert ("default.DQ", "default.DQ", "default") == (dq_name("default"), dq_name("default.DQ"), q_name("default.DQ"))


def test_a_declared_queue_has_a_name_without_colon(broker: RedisBroker) -> None:
    """Our keys below `<ns>:__tideover__:` cannot be the name of a queue."""
    with pytest.raises(ValueError, match="Queue names must"):
        dramatiq.actor(lambda: None, actor_name="t", queue_name="a:b", broker=broker)


# enqueue


def test_an_instance_attribute_takes_the_place_of_do_enqueue(broker: RedisBroker, client: redis.Redis, keys: Keys) -> None:
    """`do_enqueue` is looked up on the instance first, then made up by `__getattr__`; it gets queue, Redis id and body."""
    assert "do_enqueue" not in dir(broker)
    assert callable(broker.do_enqueue)
    calls: list[tuple[str, str, bytes]] = []
    vars(broker)["do_enqueue"] = lambda *args: calls.append(args)
    sent = broker.enqueue(message())
    delayed = broker.enqueue(message(), delay=5)
    assert [("default", sent.options["redis_message_id"], sent.encode())] == calls[:1]
    assert ("default.DQ", delayed.options["redis_message_id"], delayed.encode()) == calls[1]
    assert 0 == client.exists(keys.msgs("default"))


def test_before_enqueue_may_stamp_the_message(broker: RedisBroker) -> None:
    """It comes before `do_enqueue`, after the new Redis id and the eta are set, and what it writes into options is sent."""
    order: list[Any] = []

    class Stamp(Middleware):
        def before_enqueue(self, broker: Any, message: Any, delay: int | None) -> None:
            order.append((message.options["redis_message_id"], delay, "eta" in message.options, message.queue_name))
            message.options["stamp"] = {"by": "us"}

    broker.add_middleware(Stamp())
    vars(broker)["do_enqueue"] = lambda queue, redis_id, body: order.append((redis_id, Message.decode(body).options["stamp"]))
    old = message(redis_message_id="old")
    sent, delayed = broker.enqueue(old), broker.enqueue(old, delay=7)
    new, later = (m.options["redis_message_id"] for m in (sent, delayed))
    stamped = {"by": "us"}
    assert [(new, None, False, "default"), (new, stamped), (later, 7, True, "default.DQ"), (later, stamped)] == order
    assert 3 == len({"old", new, later})
    assert {"redis_message_id": "old"} == old.options


def test_a_middleware_error_stops_a_send_and_any_other_is_swallowed(broker: RedisBroker, client: redis.Redis) -> None:
    """So our hooks raise nothing but subclasses of it."""

    class Refuse(Middleware):
        error: Exception = MiddlewareError("no")

        def before_enqueue(self, broker: Any, message: Any, delay: int | None) -> None:
            raise self.error

    refuse = Refuse()
    broker.add_middleware(refuse)
    with pytest.raises(MiddlewareError):
        broker.enqueue(message())
    assert [] == client.keys("*")
    refuse.error = ValueError("no")
    broker.enqueue(message())
    assert [] != client.keys("*")


def test_a_retry_is_enqueued_with_the_options_of_the_attempt_that_failed(broker: RedisBroker, wait_until: WaitUntil) -> None:
    """In the thread of the attempt, as the proxy, its exception on it and its old Redis id: how we know whom it succeeds."""
    seen: list[tuple[Any, Any, Any, str]] = []
    plain, runs = broker.enqueue, []

    def spy(message: Any, *, delay: int | None = None) -> Any:
        failed = getattr(message, "_exception", None)
        seen.append((type(message), failed, message.options.get("redis_message_id"), threading.current_thread().name))
        return plain(message, delay=delay)

    @dramatiq.actor(broker=broker, max_retries=1, min_backoff=1)
    def fails() -> None:
        runs.append(threading.current_thread().name)
        if len(runs) == 1:
            raise KeyError("once")

    sent = fails.send()
    broker.enqueue = spy  # type: ignore[method-assign]
    with working(broker):
        wait_until(lambda: len(runs) == 2, within_s=60, description="the retry has run")
    kind, failed, redis_id, thread = seen[0]
    assert (MessageProxy, "KeyError('once')", sent.options["redis_message_id"]) == (kind, repr(failed), redis_id)
    assert thread == runs[0]


def test_a_due_delay_goes_through_enqueue_in_its_consumer_thread(broker: RedisBroker, wait_until: WaitUntil) -> None:
    """With its old Redis id and without its eta; its predecessor is acknowledged afterwards. Our handover replaces both."""
    seen: list[tuple[Any, Any, str, Any]] = []
    plain, runs, acks = broker.enqueue, [], []

    @dramatiq.actor(broker=broker)
    def later() -> None:
        runs.append(1)

    class Acks(Middleware):
        def before_ack(self, broker: Any, message: Any) -> None:
            acks.append((message.options["redis_message_id"], len(seen)))

    def spy(message: Any, *, delay: int | None = None) -> Any:
        thread = threading.current_thread()
        assert isinstance(thread, ConsumerThread)
        assert thread.consumer is not None
        seen.append((message.options["redis_message_id"], "eta" in message.options, message.queue_name, thread.queue_name))
        return plain(message, delay=delay)

    sent = later.send_with_options(delay=1)
    broker.add_middleware(Acks())
    broker.enqueue = spy  # type: ignore[method-assign]
    with working(broker):
        wait_until(lambda: len(acks) == 2, within_s=60, description="the delayed job has run")
    redis_id = sent.options["redis_message_id"]
    assert [(redis_id, False, "default", "default.DQ")] == seen
    assert (redis_id, 1) in acks


# the worker


def test_a_worker_can_be_changed_before_it_boots(broker: RedisBroker) -> None:
    """`before_worker_boot` precedes threads and consumers: it may set prefetch, whitelist, `_add_worker` and `consume`."""
    made, consumed = [], {}
    broker.declare_queue("other")

    class Boot(Middleware):
        def before_worker_boot(self, broker: Any, worker: Any) -> None:
            assert [] == worker.workers
            assert {} == worker.consumers
            worker.queue_prefetch = 77
            vars(worker)["_add_worker"] = lambda: made.append(1)
            plain = broker.consume
            vars(broker)["consume"] = lambda **kwargs: consumed.update({kwargs["queue_name"]: kwargs}) or plain(**kwargs)

    broker.add_middleware(Boot())
    worker = Worker(broker, worker_threads=3, worker_timeout=20, queues={"default"})
    assert {"default"} == worker.consumer_whitelist
    worker.start()
    try:
        assert [1, 1, 1] == made
        assert {"default", "default.DQ"} == set(worker.consumers)
        assert (77, worker.delay_prefetch) == (worker.consumers["default"].prefetch, worker.consumers["default.DQ"].prefetch)
    finally:
        worker.stop()
    assert {"queue_name": "default", "prefetch": 77, "timeout": 20} == consumed["default"]


def test_a_fault_at_boot_stops_the_worker(broker: RedisBroker) -> None:
    """A `MiddlewareError` of `before_worker_boot` leaves `start`, before any thread runs."""

    class Refuse(Middleware):
        def before_worker_boot(self, broker: Any, worker: Any) -> None:
            raise MiddlewareError("no")

    broker.add_middleware(Refuse())
    worker = Worker(broker)
    with pytest.raises(MiddlewareError):
        worker.start()
    assert ([], {}) == (worker.workers, worker.consumers)


def test_a_worker_thread_is_made_of_these_parts() -> None:
    """Our runner is one, and overrides `process_message`."""
    assert {"broker", "consumers", "work_queue", "worker_timeout"} == set(inspect.signature(WorkerThread).parameters)
    assert ["self", "message"] == list(inspect.signature(WorkerThread.process_message).parameters)
    thread = WorkerThread(broker=1, consumers={}, work_queue=2, worker_timeout=1000)  # type: ignore[arg-type]
    assert (1, {}, 2, True) == (thread.broker, thread.consumers, thread.work_queue, thread.daemon)
    assert thread.logger is not None


def test_a_work_queue_item_is_a_priority_and_a_message() -> None:
    """In that order; the lower goes first, and of equals the older."""
    first, second = _WorkQueueItem(0, "a"), _WorkQueueItem(0, "b")  # type: ignore[arg-type]
    assert ("a", 0) == (first.message, first.priority)
    assert first < second < _WorkQueueItem(1, "c")  # type: ignore[arg-type]


def test_a_consumer_thread_has_its_consumer_and_parts_with_messages() -> None:
    """Acknowledgement, rejection and giving back go through these methods, which our runner calls."""
    thread = ConsumerThread(broker=None, queue_name="q", prefetch=1, work_queue=None, worker_timeout=1)  # type: ignore[arg-type]
    assert thread.consumer is None

    parted: list[Any] = []

    class Consumer:
        def ack(self, message: Any) -> None:
            parted.append(("ack", message))

        def nack(self, message: Any) -> None:
            parted.append(("nack", message))

        def requeue(self, messages: Any) -> None:
            parted.append(("requeue", list(messages)))

    thread.broker, thread.consumer = dramatiq_broker.Broker(middleware=[]), Consumer()  # type: ignore[assignment]
    good, bad = MessageProxy(message()), MessageProxy(message())
    bad.fail()
    thread.post_process_message(good)
    thread.post_process_message(bad)
    thread.requeue_messages([good])
    assert [("ack", good), ("nack", bad), ("requeue", [good])] == parted


def test_a_lost_connection_rebuilds_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ConnectionClosed` from a consumer means: make a new one. Ours then reclaims what it does not know."""
    monkeypatch.setattr("dramatiq.worker.CONSUMER_RESTART_DELAY_SECS", 0)
    made: list[int] = []

    class Lost:
        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            made.append(1)
            if len(made) == 3:
                thread.stop()
                return None
            raise ConnectionClosed(OSError())

        def requeue(self, messages: Any) -> None:
            assert [] == list(messages)

        def close(self) -> None: ...

    broker: Any = dramatiq_broker.Broker(middleware=[])
    broker.consume = lambda queue_name, prefetch, timeout: Lost()
    thread = ConsumerThread(broker=broker, queue_name="q", prefetch=1, work_queue=None, worker_timeout=1)  # type: ignore[arg-type]
    thread.run()
    assert [1, 1, 1] == made


# messages


def test_a_proxy_carries_an_exception_and_whatever_we_hang_on_it() -> None:
    """`_exception` is there from the start; our note rides in its `__dict__`; its options are the message's own."""
    proxy = MessageProxy(message(a=1))
    assert proxy._exception is None
    error = ValueError()
    proxy.stuff_exception(error)
    assert error is proxy._exception
    proxy.clear_exception()
    assert proxy._exception is None
    body = proxy.encode()
    proxy.__dict__["our_note"] = 1
    assert body == proxy.encode()
    proxy.options["b"] = 2
    assert {"a": 1, "b": 2} == proxy._message.options
    assert (False, None) == (proxy.failed, proxy.fail())
    assert proxy.failed


def test_a_copy_merges_options_and_replaces_the_queue() -> None:
    """`message_with_options` of an AI task relies on it to choose the lane."""
    copy = message(a=1).copy(queue_name="default.critical", options={"b": 2})
    assert ("default.critical", {"a": 1, "b": 2}) == (copy.queue_name, copy.options)


def test_a_held_job_stores_no_result(client: redis.Redis) -> None:
    """dramatiq stores None for a skipped message, unless its own option says no: we set it on the proxy when we hold."""
    backend = StubBackend()
    broker = RedisBroker(client=client, middleware=[Results(backend=backend)])
    dramatiq.actor(lambda: None, actor_name="t", broker=broker, store_results=True)
    skipped, held = MessageProxy(message()), MessageProxy(message())
    held.options["store_results"] = False
    for proxy in (skipped, held):
        broker.emit_after("skip_message", proxy)
    assert backend.get_result(skipped) is None
    with pytest.raises(dramatiq.results.ResultMissing):
        backend.get_result(held)


def test_a_skip_is_no_failure() -> None:
    """A hold leaves the task as one, so it must be what dramatiq takes for neither success nor error."""
    assert issubclass(SkipMessage, MiddlewareError)


def test_the_middlewares_that_raise_into_threads_have_these_names() -> None:
    """The runner leaves them out for coroutines, and does the work of `TimeLimit` itself."""
    names = {kind.__name__ for kind in default_middleware}
    assert {"TimeLimit", "ShutdownNotifications"} <= names
    assert TimeLimit(time_limit=5).time_limit == 5


def test_the_global_broker_is_none_until_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """`get_broker` would make one; we look at the variable, to know whether the application has chosen."""
    monkeypatch.setattr(dramatiq_broker, "global_broker", None)
    assert dramatiq_broker.global_broker is None
    made = dramatiq_broker.Broker(middleware=[])
    dramatiq.set_broker(made)
    assert made is dramatiq_broker.global_broker is dramatiq.get_broker()


def test_the_encoder_can_be_asked_for() -> None:
    """With the stock one we know exactly which arguments come back unchanged."""
    assert type(dramatiq.get_encoder()) is dramatiq.JSONEncoder


# the anthropic SDK


ANSWER = {
    "id": "m", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": "end_turn",
    "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1},
}  # fmt: skip
CALL: dict[str, Any] = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}


def answering(*statuses: int) -> httpx2.MockTransport:
    left = list(statuses)
    return httpx2.MockTransport(lambda _: httpx2.Response(left.pop(0), json=ANSWER))


@pytest.fixture
def seen() -> list[tuple[APIRequest, Any]]:
    return []


def test_the_carrier_sees_every_attempt_and_its_answer_whatever_the_status(seen: list[tuple[APIRequest, Any]]) -> None:
    """A middleware gets the request, and from `call_next` an `APIResponse`: a 529 too, which is raised only further out."""

    def carry(request: APIRequest, call_next: Any) -> Any:
        seen.append((request, call_next(request)))
        return seen[-1][1]

    with anthropic.Anthropic(api_key="k", http_client=httpx2.Client(transport=answering(529, 200)), max_retries=0) as plain:
        client = plain.with_options(middleware=[*plain.middleware, carry], max_retries=0)
        with pytest.raises(anthropic.InternalServerError):
            client.messages.create(**CALL)
        assert "end_turn" == client.messages.create(**CALL).stop_reason
    assert [529, 200] == [response.http_response.status_code for _, response in seen]
    assert all(type(response) is anthropic.APIResponse for _, response in seen)
    request = seen[0][0]
    assert ("post", "/v1/messages", CALL, False) == (request.method, request.url, request.json, request.stream)
    assert {"cast_to", "stream", "stream_cls", "options", "headers"} <= {*dir(request), *vars(request)}


def test_the_carrier_sees_the_same_on_an_event_loop(seen: list[tuple[APIRequest, Any]]) -> None:
    """With an `AsyncAPIResponse`."""

    async def carry(request: APIRequest, call_next: Any) -> Any:
        seen.append((request, await call_next(request)))
        return seen[-1][1]

    async def call() -> None:
        http = httpx2.AsyncClient(transport=answering(200))
        async with anthropic.AsyncAnthropic(api_key="k", http_client=http).with_middleware(carry) as client:
            await client.messages.create(**CALL)

    asyncio.run(call())
    assert [anthropic.AsyncAPIResponse] == [type(response) for _, response in seen]


def test_a_request_can_be_sent_again_by_another_client(seen: list[tuple[APIRequest, Any]]) -> None:
    """With its own body and headers: how the carrier reroutes to another Messages route."""

    def carry(request: APIRequest, call_next: Any) -> Any:
        changed = request.copy(body={**request.json, "model": "other"}, headers={"x-ours": "1"})  # type: ignore[dict-item]
        assert ("m", "other") == (request.json["model"], changed.json["model"])  # type: ignore[index,call-overload]
        options: Any = {"stream": changed.stream, "stream_cls": changed.stream_cls}
        tapped = other.with_middleware(lambda inner, call_next: seen.append((inner, call_next(inner))) or seen[-1][1])
        tapped.request(changed.cast_to, changed.options, **options)
        return seen[-1][1]

    def transport(status: int) -> httpx2.Client:
        return httpx2.Client(transport=answering(status))

    with (
        anthropic.Anthropic(api_key="k", http_client=transport(500)) as first,
        anthropic.Anthropic(api_key="k2", http_client=transport(200)) as other,
    ):
        assert "end_turn" == first.with_middleware(carry).messages.create(**CALL).stop_reason
    sent = seen[0][1].http_response.request
    assert ("1", "Bearer k2") == (sent.headers["x-ours"], sent.headers["authorization"])


@pytest.mark.parametrize("kind", [anthropic.APIResponse, anthropic.AsyncAPIResponse])
def test_a_response_can_be_made_of_these_parts(kind: type) -> None:
    """How an answer of another dialect becomes one of the SDK's."""
    wanted = {"raw", "client", "cast_to", "stream", "stream_cls", "options"}
    parameters = inspect.signature(kind).parameters
    assert wanted <= set(parameters)
    assert wanted == {name for name, parameter in parameters.items() if parameter.default is parameter.empty}


@pytest.mark.parametrize("kind", [anthropic.Anthropic, anthropic.AsyncAnthropic])
def test_a_client_can_be_derived_with_more_middleware(kind: Any) -> None:
    """Ours comes after the user's own, and the SDK's retries can be switched off."""

    async def carry(request: Any, call_next: Any) -> Any: ...

    users, carrier = (carry, carry) if kind is anthropic.AsyncAnthropic else (lambda *_: None, lambda *_: None)
    plain = kind(api_key="k", middleware=[users])
    derived = plain.with_options(middleware=[*plain.middleware, carrier], max_retries=0)
    assert [*plain.middleware, carrier] == list(derived.middleware)
    assert (0, 2) == (derived.max_retries, plain.max_retries)
    again = plain.with_middleware(carrier)
    assert [*plain.middleware, carrier] == list(again.middleware)
    assert type(plain) is type(derived) is type(again)
