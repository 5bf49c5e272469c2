# SPDX-License-Identifier: Apache-2.0
"""A fake provider: a real HTTP server on 127.0.0.1 that speaks both dialects and fails when told to."""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import random
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from tideover import clock
from tideover.testing import answers, clouds, control
from tideover.testing.answers import DIALECTS, Ask, Dialect
from tideover.testing.exchange import Exchange
from tideover.testing.faults import FRONT_DOOR, Fault, Phase, PhaseNow, Schedule, fault_named
from tideover.testing.latency import Latency, Wait
from tideover.testing.ledger import CLIENT_GONE, STOPPED, Call, Ledger
from tideover.testing.wire import ClientGone, Connection, Listener, Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self


LIMIT_WINDOW_S = 5.0
CAPACITY_BURST_S = 2.0
REFUSAL_COST = 0.2
"""Of a call that it cannot bear, in calls."""


class FakeProvider:
    """One provider, for use as a context manager (a thread of its own serves) or on a running loop (`open`, `close`).

    `POST .../v1/messages` and `POST .../chat/completions` answer on any path prefix, whatever the dialect, and so do the paths
    of Bedrock and Vertex; `dialect` only picks which `base_url` is reported. `fail`, `play`, `heal`, `phase` and `calls` may
    be used from any thread and also while it is stopped. A stopped provider refuses connections, keeps its port and ledger,
    and may be started again.

    Args:
      name: stands in the ledger and at the start of each answer's text.
      dialect: which SDK is to talk to it.
      seed: of the draws; the same calls in the same order then meet the same faults and latencies.
      port: 0 for any free one.
      prefix: path that `base_url` carries after the host (`"/anthropic"`).
      api_key: the only key that is let in, as a bearer token or as x-api-key; None lets everybody in.
      latency: how long answers take; None for the defaults of `Latency`.
      speed: divides all latencies.
      release_hangs: whether calls that hang are answered once the provider is well; if not they hang until the client leaves.
    """

    def __init__(
        self,
        name: str,
        *,
        dialect: Dialect = "anthropic",
        seed: int = 0,
        port: int = 0,
        prefix: str = "",
        api_key: str | None = None,
        latency: Latency | None = None,
        speed: float = 1.0,
        release_hangs: bool = False,
    ) -> None:
        if dialect not in DIALECTS:
            raise ValueError(f"dialect is {' or '.join(DIALECTS)}, not {dialect!r}")
        if not 0 < speed < math.inf:
            raise ValueError(f"speed is above 0, not {speed}")
        self.name, self.dialect, self.api_key, self.release_hangs = name, dialect, api_key, release_hangs
        self.prefix = prefix.rstrip("/")
        self.latency = latency if latency is not None else Latency()
        self.speed = speed
        self.random, self.random_aside = random.Random(seed), random.Random(seed)
        self.bucket = (math.inf, 0.0)
        """Calls that are left of a limit, and as of when."""
        self.strength = (0.0, 0.0)
        """Calls that it can bear at once, and as of when."""
        self.port = port
        self.ledger = Ledger(name)
        self.schedule = Schedule((), 0.0)
        self.listener = Listener(self.serve)
        self.thread: threading.Thread | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.stopping: asyncio.Event | None = None

    # Where it is

    @property
    def root_url(self) -> str:
        """`http://127.0.0.1:PORT`, where the control endpoints are. RuntimeError before the first start."""
        if self.port == 0:
            raise RuntimeError(f"{self!r} has no address yet; start it first")
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        """What the SDK of its dialect wants as `base_url`: with `/v1` for OpenAI's, without for Anthropic's."""
        version = "/v1" if self.dialect == "openai-compatible" else ""
        return f"{self.root_url}{self.prefix}{version}"

    def __repr__(self) -> str:
        return f"FakeProvider({self.name!r}, dialect={self.dialect!r}, port={self.port})"

    # What it is told

    def fail(self, fault: Fault | str, *, p: float = 1.0, models: Sequence[str] = ("*",), retry_after_s: float = 2.0) -> None:
        """From now on, fail this share of the calls for these models (see `Phase`) in this way, until told otherwise."""
        named = fault_named(fault)
        self.play([Phase(named, math.inf, p, {named: 1.0}, models, retry_after_s=retry_after_s)])

    def play(self, phases: Sequence[Phase]) -> None:
        """Start these phases now, instead of whatever was in force; the provider is well after the last."""
        self.schedule = Schedule(phases, clock.monotonic())

    def heal(self) -> None:
        """Be well from now on."""
        self.schedule = Schedule((), 0.0)

    @property
    def phase(self) -> PhaseNow | None:
        """The phase in force; None when the provider is well."""
        return self.schedule.at(clock.monotonic())

    def calls(self) -> list[Call]:
        """Every call so far, in the order of arrival."""
        return self.ledger.since(0)

    # Its life

    async def open(self) -> None:
        """Listen on the running loop."""
        self.port = await self.listener.open(self.port)

    async def close(self) -> None:
        """Drop all connections and stop listening. Calls that were being answered end as `"stopped"`."""
        await self.listener.close()

    def start(self) -> None:
        """Serve from a thread of its own; returns when it listens. OSError when the port is taken."""
        if self.thread is not None:
            raise RuntimeError(f"{self!r} is started already")
        listening: Future[None] = Future()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.live(listening)), name=f"fake-{self.name}", daemon=True)
        self.thread.start()
        try:
            listening.result()
        except BaseException:
            self.thread.join()
            self.thread = None
            raise

    async def live(self, listening: Future[None]) -> None:
        """Serve until `stop`."""
        self.loop, self.stopping = asyncio.get_running_loop(), asyncio.Event()
        try:
            await self.open()
        except OSError as error:
            listening.set_exception(error)
            return
        listening.set_result(None)
        await self.stopping.wait()
        await self.close()

    def stop(self) -> None:
        """Stop serving; returns when the thread and all sockets are gone. Nothing happens when it is stopped already."""
        if self.thread is None or self.loop is None or self.stopping is None:
            return
        self.loop.call_soon_threadsafe(self.stopping.set)
        self.thread.join()
        self.thread = self.loop = self.stopping = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    # What it does with a request

    async def serve(self, connection: Connection, request: Request) -> None:
        """Answer one request."""
        path = request.path.rstrip("/")
        if control.is_control(path):
            status, body = control.answer(self, request)
            await connection.respond(status, json.dumps(body).encode(), {"content-type": "application/json"})
        elif request.method == "POST" and (path.endswith("/v1/messages") or clouds.as_messages(request) is not None):
            await self.infer(connection, request, "anthropic")
        elif request.method == "POST" and path.endswith("/chat/completions"):
            await self.infer(connection, request, "openai-compatible")
        elif (shut := self.shut()) is Fault.RESET:
            connection.reset()
        elif shut in (Fault.EDGE_HTML, Fault.OK_HTML):
            status = 502 if shut is Fault.EDGE_HTML else 200
            await connection.respond(status, answers.EDGE_PAGE, {"content-type": "text/html; charset=UTF-8"})
        else:
            dialect: Dialect = "anthropic" if "anthropic-version" in request.headers else "openai-compatible"
            if shut is not None:
                problem = answers.problem_of(dialect, shut)
                refusal = answers.problem_body(dialect, problem, model=path, n=0)
                await connection.respond(problem.status, json.dumps(refusal).encode(), answers.headers_of(dialect, 0))
                return
            status, body = self.answer_aside(request, dialect)
            await connection.respond(status, json.dumps(body).encode(), answers.headers_of(dialect, 0))

    async def infer(self, connection: Connection, request: Request, dialect: Dialect) -> None:
        """Answer one call and keep its row."""
        n = self.ledger.next_n
        read = clouds.as_messages(request) or request
        ask = answers.read_ask(dialect, read.body, request.headers, speaker=self.name, n=n)
        key_ok = self.lets_in(request.headers)
        drawn, wait, retry_after_s = self.draw(ask)
        limits = self.limit_headers(dialect, ask.model)
        fault = drawn if key_ok else Fault.UNAUTHORIZED
        if key_ok and ask.refusal is not None:
            fault = Fault.BAD_REQUEST
        entry = self.ledger.begin(
            path=request.path,
            model=ask.model,
            stream=ask.stream,
            job=request.headers.get("x-tideover-job"),
            key_ok=key_ok,
            fault=fault,
        )
        hang_over = (lambda: not self.fails(ask.model)) if self.release_hangs else None
        try:
            frames = clouds.wants_frames(request)
            await Exchange(connection, ask, entry, wait, retry_after_s, hang_over, limits, frames).perform(fault)
        except (ClientGone, ConnectionError):
            entry.end(CLIENT_GONE, None)
            raise
        finally:
            entry.end(STOPPED, None)  # only where no outcome was written: the provider was stopped

    def draw(self, ask: Ask) -> tuple[Fault | None, Wait, float]:
        """The fault, the waits and the retry-after of one call. Always three draws, so that no call shifts another's luck."""
        fails, which, luck = (self.random.random() for _ in range(3))
        now = self.phase
        if now is None or not now.phase.touches(ask.model):
            return None, self.latency.of(ask.input_tokens, ask.output_tokens, luck=luck, slower=1 / self.speed), 0.0
        slower = now.phase.latency_factor / self.speed
        wait = self.latency.of(ask.input_tokens, ask.output_tokens, luck=luck, slower=slower)
        fault = now.phase.draw(now.progress, fails=fails, which=which)
        if fault is None and now.phase.limit_per_s is not None and not self.room(now.phase.limit_per_s):
            fault = Fault.RATE_LIMITED
        capacity = now.phase.capacity_at(now.progress)
        if fault is None and capacity is not None and not self.bears(capacity):
            fault = Fault.OVERLOADED
        return fault, wait, now.phase.retry_after_s

    def bears(self, capacity_per_s: float) -> bool:
        """Whether it can take one more call. What it cannot take costs it, too."""
        now, (left, at) = clock.monotonic(), self.strength
        left = min(capacity_per_s * CAPACITY_BURST_S, left + (now - at) * capacity_per_s)
        taken = left >= 1
        self.strength = (left - 1 if taken else max(-3 * capacity_per_s, left - REFUSAL_COST), now)
        return taken

    def limit_headers(self, dialect: Dialect, model: str) -> dict[str, str]:
        """What an answer tells of the limit, if there is one."""
        now = self.phase
        if now is None or now.phase.limit_per_s is None or not now.phase.touches(model):
            return {}
        per_s = now.phase.limit_per_s
        return answers.limit_headers(dialect, max(1, round(per_s * 60)), int(self.left(per_s)))

    def room(self, limit_per_s: float) -> bool:
        """Whether one more call is within the limit: a bucket that holds some seconds of it, as real ones are."""
        left = self.left(limit_per_s)
        self.bucket = (left - 1 if left >= 1 else left, clock.monotonic())
        return left >= 1

    def left(self, limit_per_s: float) -> float:
        """Calls that the limit allows just now."""
        left, at = self.bucket
        return min(limit_per_s * LIMIT_WINDOW_S, left + (clock.monotonic() - at) * limit_per_s)

    def fails(self, model: str) -> bool:
        """Whether calls for this model may fail now."""
        now = self.phase
        return now is not None and now.phase.touches(model) and now.p_error > 0

    def shut(self) -> Fault | None:
        """The fault of the front door just now, in a phase that touches every model; None: it is open."""
        now = self.phase
        if now is None or "*" not in now.phase.models:
            return None
        fails, which = self.random_aside.random(), self.random_aside.random()
        fault = now.phase.draw(now.progress, fails=fails, which=which)
        return fault if fault in FRONT_DOOR else None

    def lets_in(self, headers: Mapping[str, str]) -> bool:
        """Whether the request shows the key."""
        if self.api_key is None:
            return True
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        shown = headers.get("x-api-key", headers.get("api-key", bearer))  # Azure's name, and everybody's
        return hmac.compare_digest(shown.encode(), self.api_key.encode())

    def answer_aside(self, request: Request, dialect: Dialect) -> tuple[int, Mapping[str, Any]]:
        """Answer what is no call to a model: it costs nothing, stands in no ledger, and works unless the front door is shut."""
        path = request.path.rstrip("/")
        aside = Fault.NOT_FOUND if self.lets_in(request.headers) else Fault.UNAUTHORIZED
        if aside is Fault.NOT_FOUND and request.method == "GET" and path.endswith("/models"):
            return 200, answers.models(dialect)
        if aside is Fault.NOT_FOUND and request.method == "POST" and path.endswith("/v1/messages/count_tokens"):
            ask = answers.read_ask("anthropic", request.body, request.headers, speaker=self.name, n=0)
            return 200, {"input_tokens": ask.input_tokens}
        problem = answers.problem_of(dialect, aside)
        return problem.status, answers.problem_body(dialect, problem, model=path, n=0)
