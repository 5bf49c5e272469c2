# SPDX-License-Identifier: Apache-2.0
"""One sentence about how things stand: a pure function of what was read, for the CLI, the dashboard and alerts alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tideover.core.route import breaker_key, split_key
from tideover.ops.breakers import BreakerStatus
from tideover.ops.standing import RouteStatus, Standing, TaskStatus
from tideover.ops.values import about, counted
from tideover.tables import PASSES_NAMES

Level = Literal[
    "lost",
    "bypassed",
    "outage",
    "parked",
    "stranded",
    "suspect",
    "recovering",
    "throttled",
    "draining",
    "review",
    "unexplained",
    "apart",
    "mixed",
    "notice",
    "ok",
]
"""From the worst to the best; *parked*: a route or a task that somebody must mend; *apart*: workers that alone find a route
down; *stranded*: jobs wait and no worker is alive; *review*: jobs wait for a human, and for nothing
else; *mixed*: workers without tideover are about; *notice*: something to know."""

LEVELS: tuple[Level, ...] = get_args(Level)
MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The worst finding as headline, the others as remarks."""

    level: Level
    sentence: str
    remarks: tuple[str, ...]


def verdict(standing: Standing) -> Verdict:
    """What an operator must know first about a namespace."""
    headline, *others = sorted(findings(standing), key=severity) or [all_well(standing)]
    if headline.level == "notice":
        others, headline = [headline, *others], all_well(standing)
    return Verdict(level=headline.level, sentence=headline.sentence, remarks=tuple(other.sentence for other in others))


def severity(finding: Finding | Verdict) -> int:
    return LEVELS.index(finding.level)


def overall(verdicts: Sequence[tuple[str, Verdict]]) -> Verdict:
    """One verdict over several namespaces, each with its name: the worst one."""
    if not verdicts:
        return Verdict(level="ok", sentence="Nothing here: tideover was never used in this Redis.", remarks=())
    name, worst = min(verdicts, key=lambda named: severity(named[1]))
    if len(verdicts) == 1:
        return worst
    if worst.level == "ok":
        return Verdict(level="ok", sentence=f"All well in {len(verdicts)} namespaces.", remarks=())
    return Verdict(level=worst.level, sentence=f"{name}: {worst.sentence}", remarks=())


def all_well(standing: Standing) -> Finding:
    routes = f"{counted(len(standing.routes), 'route')} closed" if standing.routes else "no worker has named its routes yet"
    return Finding("ok", f"All well: {routes}, nothing held.")


def findings(standing: Standing) -> Iterator[Finding]:
    yield from of_account(standing)
    yield from of_mode(standing)
    yield from of_breakers(standing)
    yield from of_review(standing)
    yield from of_workers(standing)
    yield from of_strangers(standing)


def waiting(standing: Standing) -> int:
    """Held jobs that go on by themselves: those that need review do not, whatever becomes of breakers."""
    return max(0, standing.held - standing.needs_review)


def of_account(standing: Standing) -> Iterator[Finding]:
    s, ended = standing, sum(standing.ends.values())
    if s.lost:
        places = f"queued {s.queued:,} + running {s.running:,} + held {s.held:,} + ended {ended:,} = {s.accepted - s.lost:,}"
        yield Finding("lost", f"LOST {counted(s.lost, 'job')}: {s.accepted:,} accepted, but {places}.")
    if unexplained := s.ends["unexplained"]:
        what = "an acknowledgement that nobody explained, please report it as a defect of tideover"
        yield Finding("unexplained", f"UNEXPLAINED: {counted(unexplained, 'job')} ended by {what}.")
    if s.not_adopted:
        yield Finding("notice", f"{counted(s.not_adopted, 'queued job')} from producers without tideover, not adopted yet.")


def of_mode(standing: Standing) -> Iterator[Finding]:
    if (bypass := standing.bypass) is not None:
        since = "" if bypass.since_at is None else f" {about(standing.asked_at - bypass.since_at)} ago"
        ends = "" if bypass.until_at is None else f", for {about(bypass.until_at - standing.asked_at)} more"
        why = "" if bypass.why is None else f" ({bypass.why})"
        n = waiting(standing)
        held = f"{counted(n, 'held job')} to be released" if n else "nothing is held or rerouted"
        yield Finding("bypassed", f"BYPASSED by {bypass.who}{since}{ends}{why}: {held}.")
    elif standing.mode not in ("act", None):
        yield Finding("notice", f"Workers run in mode {standing.mode}: verdicts are told, not carried out.")


def of_breakers(standing: Standing) -> Iterator[Finding]:
    for b in standing.breakers:
        if b.parked is not None:
            yield Finding("parked", f"PARKED: {b.key} ({b.why}): {b.would_close}.")
        elif b.forced is not None:
            ends = about(b.forced.until_at - standing.asked_at)
            yield Finding("notice", f"{b.key} is forced {b.forced.state} by {b.forced.who} for {ends} more: {b.forced.why}.")
    down = [b for b in standing.breakers if b.is_down and b.parked is None]
    doubted = [b for b in standing.breakers if b.state == "suspect"]
    back = [b for b in standing.breakers if b.state == "recovering"]
    quiet = [b for b in standing.breakers if b.throttled_until_at is not None and not b.is_down]
    n = waiting(standing)
    held = f"{counted(n, 'job')} held" if n else "Nothing held"
    if down:
        critical = of_critical(standing, down) if standing.bypass is None else ""
        yield Finding("outage", f"OUTAGE: {named(down, standing.asked_at)}. {held}{critical}.")
    if doubted:
        failing = ", ".join(f"{b.key} ({b.failed} of {counted(b.calls, 'call')} failed)" for b in doubted[:MOST_NAMED])
        word = "BROWN-OUT" if any(b.is_brownout for b in doubted) else "SUSPECT"
        yield Finding("suspect", f"{word}: {failing}{more(len(doubted))}. Critical jobs run, what can wait waits. {held}.")
    if back:
        awaited = {key for group in standing.held_groups for key in group.waits_for}
        pace = sum(b.pace for b in back if b.key in awaited)
        at = f", coming home at {pace:.0f} calls/s, live ones included" if pace else ""
        yield Finding("recovering", f"RECOVERING: {named(back, standing.asked_at)}. {held}{at}.")
    if quiet:
        wait_s = max(b.throttled_until_at for b in quiet if b.throttled_until_at is not None) - standing.asked_at
        yield Finding("throttled", f"THROTTLED: {listed(quiet)} asked for quiet for {about(wait_s)} more. {held}.")
    if n and not down and not back and not quiet and not doubted and not any(b.parked for b in standing.breakers):
        yield Finding("draining", f"DRAINING: {held}, and no breaker stands in their way.")


def of_review(standing: Standing) -> Iterator[Finding]:
    if n := standing.needs_review:
        need = "needs" if n == 1 else "need"
        yield Finding("review", f"REVIEW: {counted(n, 'job')} {need} review: `tideover backlog --reason review`.")


def of_workers(standing: Standing) -> Iterator[Finding]:
    silent = [worker for worker in standing.workers if worker.silent]
    for worker in standing.workers:
        if worker.apart and not worker.silent:
            what = f"alone finds {', '.join(worker.apart)} down, and leaves its jobs to others"
            yield Finding("apart", f"APART: worker {worker.host} {worker.pid} {what}: see to its network and credentials.")
    n = standing.queued + waiting(standing)
    if n and len(silent) == len(standing.workers) and not standing.strangers:
        yield Finding("stranded", f"NO WORKER is alive: {counted(n, 'job')} waiting, and nobody probes or releases.")
    elif silent:
        yield Finding("notice", f"{counted(len(silent), 'worker')} without a sign of life; what they fetched goes back.")


def of_strangers(standing: Standing) -> Iterator[Finding]:
    s = standing
    gap = f" {counted(s.unaccounted, 'job')} missing from the sum, maybe by their doing." if s.unaccounted else ""
    if s.strangers:
        what = "they hold nothing in an outage, and end jobs outside the account"
        yield Finding("mixed", f"MIXED: {counted(len(s.strangers), 'worker')} without tideover: {what}.{gap}")
    elif s.strangers_seen_at is not None:
        ago, ended = about(s.asked_at - s.strangers_seen_at), counted(s.ends["elsewhere"], "job")
        yield Finding("notice", f"Workers without tideover were about until {ago} ago; {ended} ended outside the account.{gap}")


def named(breakers: Sequence[BreakerStatus], now: float) -> str:
    """The first few breakers, each with how long it has been so, and why if it is down."""
    return ", ".join(in_words(breaker, now) for breaker in breakers[:MOST_NAMED]) + more(len(breakers))


def in_words(breaker: BreakerStatus, now: float) -> str:
    since_at = breaker.opened_at if breaker.is_down else breaker.since_at
    since = "" if since_at is None else f" for {about(now - since_at)}"
    return f"{breaker.key} open{since} ({breaker.why})" if breaker.is_down else f"{breaker.key}{since}"


def listed(breakers: Sequence[BreakerStatus]) -> str:
    return ", ".join(b.key for b in breakers[:MOST_NAMED]) + more(len(breakers))


def more(n: int) -> str:
    return f" and {n - MOST_NAMED} more" if n > MOST_NAMED else ""


def of_critical(standing: Standing, down: Sequence[BreakerStatus]) -> str:
    """What becomes of critical jobs meanwhile, as far as tasks and routes tell."""
    keys = {breaker.key for breaker in down}
    held = sum(group.critical for group in standing.held_groups if keys.intersection(group.waits_for))
    if held:
        return f", {held:,} critical ones among them, for want of a usable route"
    ways = {
        task.name: usable(task, model, standing)
        for route, model in map(split_key, sorted(keys))
        for task in standing.tasks
        if task.criticality != "deferrable" and task.routes[0] == route and (not task.models or model in task.models)
    }
    without = sorted(name for name, way in ways.items() if way is None)
    if without:
        return f"; critical jobs of {', '.join(without[:MOST_NAMED])}{more(len(without))} have no usable route"
    to = sorted({way for way in ways.values() if way is not None})
    return f", critical ones rerouted to {', '.join(to)}" if to else ""


def usable(task: TaskStatus, model: str, standing: Standing) -> str | None:
    """The first fallback of a task that knows the model and is not down; None: there is none."""
    down = {b.key for b in standing.breakers if b.is_down}
    routes = {route.name: route for route in standing.routes}
    return next((r for r in task.routes[1:] if breaker_key(r, model) not in down and serves(routes.get(r), model)), None)


def serves(route: RouteStatus | None, model: str) -> bool:
    return route is not None and (model in route.models or (route.kind in PASSES_NAMES and not route.models))
