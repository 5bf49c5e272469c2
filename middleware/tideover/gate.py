# SPDX-License-Identifier: Apache-2.0
"""Admission for one worker process: it asks before a worker takes a job, and makes the moves that follow."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dramatiq.broker import Broker, MessageProxy
from dramatiq.middleware import AgeLimit

from tideover import clock, events
from tideover.attempt import note_of
from tideover.core.admission import Expire, GiveBack, Hold, decide, needs_review, unless_one_runs
from tideover.core.job import Criticality, End, Job, is_criticality
from tideover.core.route import breaker_key
from tideover.degrading import NOTHING, Degrade
from tideover.stamp import STAMP, stamp_of, tenant_of
from tideover.store.account import Ended, Ledger
from tideover.store.backlog import Backlog, Fetched
from tideover.store.client import FAILED
from tideover.store.facts import DIGEST, TICKS, HeldFacts, order_of
from tideover.store.keys import breaker_keys_in, wait_key_text
from tideover.store.stories import Line, Stories
from tideover.store.twins import Twins
from tideover.task import AITask
from tideover.together import Together

if TYPE_CHECKING:
    from tideover.health import Health

TWIN = re.compile(rf"[0-9a-f]{{{DIGEST}}}")
FOLLOWED = {"pipe_target", "group_completion_uuid", "on_success"}
"""Options of dramatiq by which something follows a job."""
STANDING_S = 0.05
"""How long a verdict is good for other jobs of its kind, if no breaker moves."""


def criticality_of(message: Any, task: AITask[Any, Any]) -> Criticality:
    """A job's criticality: as stamped, else as its task says for these arguments, else *deferrable*, which can lose nothing."""
    stamped = stamp_of(message).get("criticality")
    if is_criticality(stamped):
        return stamped
    return task.criticality_for(message.args, message.kwargs) or "deferrable"


def unreadable_part(stamp: object) -> str:
    """What of a stamp makes no sense; empty: all of it does."""
    if not isinstance(stamp, dict):
        return f"a {type(stamp).__name__} instead of a table"
    if "criticality" in stamp and not is_criticality(stamp["criticality"]):
        return "its criticality is neither critical nor deferrable"
    expires_ms = stamp.get("expires_ms")
    if expires_ms is not None and (type(expires_ms) is not int or not 0 <= expires_ms < 2**48):
        return "its expiry is no instant"
    if not isinstance(stamp.get("tenant", ""), str):
        return "its tenant is no text"
    routes = stamp.get("routes", [])
    if not isinstance(routes, list) or not all(isinstance(route, str) for route in routes):
        return "its routes are no list of names"
    return "" if isinstance(stamp.get("tag", ""), str) else "its tag is no text"


def told(verdict: Hold | GiveBack | Expire) -> str:
    match verdict:
        case Hold():
            return f"hold ({verdict.reason})"
        case GiveBack():
            return "give back"
        case Expire():
            return "expire"


class Settling(dict[str, Together[Ended, bool]]):
    """By list: how a worker's threads end jobs, together."""

    def __init__(self, ledger: Ledger, worker: str) -> None:
        self.ledger, self.worker = ledger, worker

    def __missing__(self, queue: str) -> Together[Ended, bool]:
        return self.setdefault(queue, Together(partial(self.ledger.settle_all, self.worker, queue)))


class Gate:
    """Admission for one worker process, and the moves that follow from it."""

    def __init__(self, broker: Broker, worker: str, health: Health, ledger: Ledger, backlog: Backlog, stories: Stories) -> None:
        self.broker, self.worker, self.health = broker, worker, health
        self.ledger, self.backlog, self.stories, self.twins = ledger, backlog, stories, Twins(backlog.client, backlog.keys)
        self.max_ages = [m.max_age for m in broker.middleware if isinstance(m, AgeLimit)]
        self.beaten_at = self.doubted_at = clock.monotonic()
        """Latest sign of life, and the latest end of a silence after which what was fetched before may be another's by now."""
        self.leaving = False
        """Set when the grace is over: nobody waits for Redis any more."""
        self.closing = False
        """Set at the first SIGTERM: nothing more is fetched, and what was not begun goes back."""
        self._settling = Settling(ledger, worker)
        self._standing: tuple[object, float, dict[object, Hold | GiveBack | None]] = (None, 0.0, {})
        """Verdicts by kind of job: of which views of the breakers, until when (monotonic), and those asked for so far."""
        self.taken: dict[str, dict[str, MessageProxy]] = defaultdict(dict)
        """By queue: what this process has fetched and not yet parted with, over all consumers that dramatiq builds."""

    def degrade_of(self, message: Any) -> Degrade:
        """What the task of a message says of its degraded answer."""
        task = self.broker.actors.get(message.actor_name)
        return task.degrade if isinstance(task, AITask) else NOTHING

    def job(self, message: Any) -> Job | None:
        """What admission may know of a message; None when it is no AI task's."""
        task = self.broker.actors.get(message.actor_name)
        if not isinstance(task, AITask):
            return None
        expires_ms = stamp_of(message).get("expires_ms")
        primary, routes = task.routes()[0], self.routes_of(message, task)
        return Job(
            id=message.message_id,
            task=message.actor_name,
            criticality=criticality_of(message, task),
            routes=routes,
            primary=primary,
            models=tuple(task.models or self.learned(message.actor_name, routes[0])),
            expires_at=expires_ms / 1000 if isinstance(expires_ms, int | float) else None,
            reroute_when_deferrable=task.reroute_when_deferrable,
            degrades=task.degrade is not NOTHING,
            refuses_loss=task.on_loss == "refuse",
            budget_per_hour=task.budget_per_hour,
        )

    def routes_of(self, message: Any, task: AITask[Any, Any]) -> tuple[str, ...]:
        """The routes that a job may use, as its task, its tenant and its own word allow; never empty."""
        if not self.is_narrowed(message):
            return task.routes()
        return self.health.settings.narrowed(task.routes(), tenant_of(message), stamp_of(message).get("routes"))

    def is_narrowed(self, message: Any) -> bool:
        """Whether a job may lack some of its task's routes."""
        return bool(self.health.settings.tenants) or "routes" in stamp_of(message)

    def learned(self, task: str, primary: str) -> list[str]:
        """The models that a task was seen to call. One that its route never knew says nothing of its other jobs."""
        models = sorted(self.health.models.get(task, ()))
        return [model for model in models if self.health.view(breaker_key(primary, model)).parked != "model"]

    def verdict(self, message: MessageProxy) -> Hold | GiveBack | Expire | None:
        """Whether a message must not run now. None: let it run; where to is decided call by call."""
        try:
            verdict = self._verdict(message)
        except Exception:  # noqa: BLE001 - a fault of ours lets the job run as stock dramatiq would
            events.fault_inside("admission")
            return None
        if verdict is None or self.health.mode == "bypass":
            return None
        if self.health.mode == "observe":
            events.verdict_observed(message.message_id, message.actor_name, told(verdict))
            return None
        return verdict

    def _verdict(self, message: MessageProxy) -> Hold | GiveBack | Expire | None:
        if why := self.question(message):
            return needs_review(why)
        task = self.broker.actors.get(message.actor_name)
        if not isinstance(task, AITask):
            return None
        expires_ms = stamp_of(message).get("expires_ms")
        if expires_ms is not None and clock.now_ms() >= expires_ms:
            return None if task.on_expiry == "degrade" else Expire()  # the task's edge makes that answer, and no call
        views, until, known = self._standing
        if views is not self.health.seen or clock.monotonic() > until:
            views, until, known = self._standing = self.health.seen, clock.monotonic() + STANDING_S, {}
        routes = self.routes_of(message, task) if self.is_narrowed(message) else ()
        alike = message.actor_name, criticality_of(message, task), note_of(message).mark.permit, routes
        if alike not in known:
            known[alike] = self.hold_for_its_kind(message)
        return known[alike]

    def hold_for_its_kind(self, message: MessageProxy) -> Hold | GiveBack | None:
        """What speaks against running jobs of this task, criticality and permit just now: a hold, over the models it calls."""
        asked = self.job(message)
        if asked is None:
            return None
        if paused := self.health.hold_while_paused(message.actor_name):
            return paused
        job, now, permit = replace(asked, expires_at=None), clock.now(), note_of(message).mark.permit
        return unless_one_runs([decide(job, self.health.chain(job, model, {}), now=now, permit=permit) for model in job.models])

    def question(self, message: MessageProxy) -> str:
        """Why a human must look at a job before it may run; empty: nobody must."""
        stamp = message.options.get(STAMP)
        if stamp is None:
            return ""
        if unreadable := unreadable_part(stamp):
            return f"tideover cannot read what was said of it: {unreadable}"
        if "criticality" not in stamp:
            return ""
        if not isinstance(self.broker.actors.get(message.actor_name), AITask):
            return f"no AI task {message.actor_name!r} is declared in this worker: it was removed, renamed or not imported"
        task = self.broker.actors[message.actor_name]
        if isinstance(task, AITask) and self.is_narrowed(message) and not self.routes_of(message, task):
            return f"no route is left for it: its tenant, or its own word, allows none of {', '.join(task.routes())}"
        deaths, most = note_of(message).mark.deaths, self.health.settings.max_deliveries
        return f"{deaths} workers died while they had it (max_deliveries is {most})" if deaths >= most else ""

    def hold(self, queue: str, held: Iterable[tuple[MessageProxy, Hold]]) -> None:
        """Holds fetched messages; this is their acknowledgement. One that was held too often needs review."""
        facts: list[HeldFacts] = []
        claimed = self.twins.claimed(queue, self._facts_of_each(queue, held))
        ours = self.backlog.hold(self.worker, queue, noted(claimed, facts))
        done = [fact for fact, ok in zip(facts, ours, strict=True) if ok]
        for (reason, wait_key), n in Counter((fact.reason, fact.wait_key) for fact in done).items():
            events.jobs_held(queue, n, reason, breaker_keys_in(wait_key))
        for fact in done:
            if fact.reason == "review":
                events.job_needs_review(fact.job_id, fact.task, fact.detail)

    def hold_unreadable(self, queue: str, job: Fetched, error: str) -> None:
        """Holds a fetched job whose body nobody can read, for review."""
        if b'"sent_ms"' not in job.body:  # nobody can read whose it is; ours carry this
            self.ledger.adopt(self.worker, queue, [job.redis_id])
        now_ms = clock.now_ms()
        facts = HeldFacts(
            redis_id=job.redis_id,
            job_id=job.redis_id,
            task="(unreadable)",
            queue=queue,
            criticality="deferrable",
            wait_key="",
            reason="review",
            generation=0,
            held_ms=now_ms,
            sent_ms=now_ms,
            expires_ms=None,
            order=now_ms * TICKS,
            holds=job.mark.holds + 1,
            held_before_ms=job.mark.held_ms,
            deaths=job.mark.deaths,
            detail=f"its message cannot be decoded ({error})",
        )
        if all(self.backlog.hold(self.worker, queue, [facts])):
            events.job_needs_review(facts.job_id, facts.task, facts.detail)

    def note_beat(self, begun_at: float) -> None:
        """Notes a sign of life that was begun at this (monotonic) instant."""
        if begun_at - self.beaten_at > self.longest_silence_s:
            self.doubted_at = clock.monotonic()
        self.beaten_at = begun_at

    @property
    def longest_silence_s(self) -> float:
        return self.health.settings.worker.heartbeat_timeout_s / 2

    def still_has(self, message: MessageProxy) -> bool:
        """Whether a fetched message is still this worker's. Asks Redis only after a silence, in which it may have lost it."""
        return self.surely_has(message) or self.backlog.has(self.worker, message.queue_name, redis_id(message))

    def surely_has(self, message: MessageProxy) -> bool:
        """Whether there was no silence since it was fetched, so that nobody needs to be asked."""
        doubtful = note_of(message).fetched_at < self.doubted_at
        return not doubtful and clock.monotonic() - self.beaten_at <= self.longest_silence_s

    def forget(self, message: MessageProxy) -> None:
        """Parts with a message that is another worker's by now."""
        events.job_taken_over(message.message_id, message.actor_name)
        taken = self.taken[message.queue_name]
        if taken.get(redis_id(message)) is message:
            del taken[redis_id(message)]

    def settle(self, queue: str, message: MessageProxy, end: End) -> None:
        """Ends a fetched message in the account; this is its acknowledgement."""
        attempt = note_of(message).attempt
        rerouted = attempt is not None and attempt.rerouted
        if end == "expired":  # told first, because whoever waits for an expired job finds no result, and reads its story
            self.tell(last_line(message, end))
        if not self._settling[queue](Ended(redis_id(message), message.message_id, end, tenant_of(message))):
            return
        self.note_degraded(message)
        match end:
            case "unexplained":
                events.job_end_unexplained(message.message_id, message.actor_name)
            case "expired":
                events.job_expired(message.message_id, message.actor_name, queue)
            case "succeeded" | "failed" | "discarded":
                degraded = attempt is not None and attempt.degraded
                if end == "failed" or rerouted or degraded or is_storied(message):
                    self.tell(last_line(message, end))

    def note_degraded(self, message: MessageProxy) -> None:
        """Counts an answer that was made without a model."""
        attempt = note_of(message).attempt
        if attempt is not None and attempt.degraded:
            try:
                self.health.registry.count("degraded")
            except FAILED as error:
                events.store_unavailable("counting degraded answers", type(error).__name__)

    def tell(self, *lines: Line) -> None:
        """Adds to stories. They explain; they decide nothing, so failing to tell is no failure of the job."""
        try:
            self.stories.add(lines)
        except FAILED as error:
            events.store_unavailable("telling stories of jobs", type(error).__name__)

    def _facts_of_each(self, queue: str, held: Iterable[tuple[MessageProxy, Hold]]) -> Iterator[HeldFacts]:
        most, held_ms = self.health.settings.max_holds, clock.now_ms()
        often = needs_review(f"it was held {most:,} times before (max_holds)")
        for nth, (message, verdict) in enumerate(held):
            why = often if note_of(message).mark.holds >= most else verdict
            yield self._facts(queue, message, why, held_ms, nth)

    def _facts(self, queue: str, message: MessageProxy, verdict: Hold, held_ms: int, nth: int) -> HeldFacts:
        """`held_ms`: now. `nth`: of those held in one go."""
        note, stamp = note_of(message), stamp_of(message)
        if verdict.reason == "review" and unreadable_part(stamp):
            stamp = {}
        task, expires_ms = self.broker.actors.get(message.actor_name), stamp.get("expires_ms")
        by = order_of(
            held_ms=held_ms,
            held_before_ms=note.mark.held_ms,
            expires_ms=expires_ms,
            max_wait_s=self.health.settings.max_wait_s,
            nth=nth,
        )
        return HeldFacts(
            redis_id=redis_id(message),
            job_id=message.message_id,
            task=message.actor_name,
            queue=queue,
            criticality=criticality_of(message, task) if isinstance(task, AITask) else "deferrable",
            wait_key=wait_key_text(verdict.wait_key),
            reason=verdict.reason,
            generation=verdict.generation,
            held_ms=held_ms,
            sent_ms=message.message_timestamp,
            expires_ms=expires_ms,
            order=by,
            tenant=stamp.get("tenant", ""),
            tag=stamp.get("tag", ""),
            holds=note.mark.holds + 1,
            held_before_ms=note.mark.held_ms,
            deaths=note.mark.deaths,
            detail=verdict.detail or (note.attempt.detail if note.attempt else ""),
            twin="" if isinstance(task, AITask) and task.options.get("on_success") else twin_of(message),
        )


def noted(jobs: Iterable[HeldFacts], into: list[HeldFacts]) -> Iterator[HeldFacts]:
    for job in jobs:
        into.append(job)
        yield job


def twin_of(message: Any) -> str:
    """The digest of a job's key; empty: it has none, or its end means something to a group or pipeline, so that it runs."""
    twin = stamp_of(message).get("twin", "")
    return twin if isinstance(twin, str) and TWIN.fullmatch(twin) and not FOLLOWED & message.options.keys() else ""


def last_line(message: MessageProxy, end: End) -> Line:
    """The end of a job, for its story."""
    attempt = note_of(message).attempt
    said: dict[str, Any] = {"task": message.actor_name, "served": []}
    if attempt is not None:
        said["served"] = [f"{served.route}:{served.model}" for served in attempt.served]
        if attempt.degraded:
            said["degraded"] = attempt.degraded
            said |= {} if attempt.age_s is None else {"age_s": round(attempt.age_s, 1)}
    return Line(message.message_id, clock.now(), end, said)


def redis_id(message: Any) -> str:
    """dramatiq's name of one copy of a message in Redis; a retry has another."""
    return str(message.options["redis_message_id"])


def is_ours(options: Mapping[str, Any]) -> bool:
    """Whether a producer with tideover sent it, so that it is in the account already."""
    stamp = options.get(STAMP)
    return isinstance(stamp, dict) and "sent_ms" in stamp


def is_storied(message: Any) -> bool:
    """Whether this job has a story: then its end belongs to it."""
    return stamp_of(message).get("storied") is True


def mark_storied(message: Any) -> None:
    """In memory; a retry takes the mark along."""
    message.options[STAMP] = {**stamp_of(message), "storied": True}
