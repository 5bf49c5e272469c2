# SPDX-License-Identifier: Apache-2.0
"""Would the backlog drain if the provider came back now? One check after another: pure functions of what was read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tideover.core.job import CRITICAL_SUFFIX
from tideover.ops.breakers import BreakerStatus
from tideover.ops.hurdles import DOWN, Seen
from tideover.ops.standing import WorkerStatus
from tideover.ops.values import about, counted
from tideover.ops.verdict import of_account, of_mode, of_strangers
from tideover.store.client import Safekeeping
from tideover.store.keys import SCHEMA
from tideover.store.paces import ALL

Severity = Literal["blocks", "warns", "unchecked", "ok"]
"""*blocks*: jobs would stay; *warns*: they would go, and something else deserves a look; *unchecked*: nobody could tell."""

SEVERITIES: tuple[Severity, ...] = get_args(Severity)
NEAR_FULL = 0.9
"""Share of its maxmemory that Redis may use before it is told."""
MOST_NAMED = 3
MENDING = {
    "auth": "mend its credential",
    "quota": "top up its account",
    "model": "mend its model map",
    "paused": "mend the task and deploy it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the checklist. `jobs`: how many it concerns; `remedy`: a command or a setting, empty where none is needed."""

    subject: str
    severity: Severity
    sentence: str
    remedy: str = ""
    jobs: int = 0


def checks(seen: Seen) -> list[Check]:
    """The checklist of a namespace, the gravest first."""
    every = [
        of_workers,
        of_queues,
        of_tasks,
        of_orders,
        of_breakers,
        of_domains,
        of_modes,
        of_review,
        of_bodies,
        of_books,
        of_fleet,
        of_schema,
    ]
    return by_severity([check for part in every for check in part(seen)])


def by_severity(found: Sequence[Check]) -> list[Check]:
    return sorted(found, key=lambda check: SEVERITIES.index(check.severity))


def of_workers(seen: Seen) -> Iterator[Check]:
    if not seen.live:
        n = seen.standing.queued + sum(group.n for group in seen.waiting)
        sentence = f"no worker is alive: {counted(n, 'job')} waiting, and nobody probes or releases"
        yield Check(subject="workers", severity="blocks", sentence=sentence, remedy="run `tideover worker MODULE`", jobs=n)
        return
    sentence = f"{counted(len(seen.live), 'worker')} alive"
    yield Check(subject="workers", severity="ok", sentence=sentence)
    if seen.leader is not None:
        name = next((f"worker {worker.host} {worker.pid}" for worker in seen.live if worker.id == seen.leader), "one of them")
        yield Check(subject="leader", severity="ok", sentence=f"{name} leads the drain")
    else:
        n, sentence = sum(group.n for group in seen.waiting), "nobody leads the drain: no worker holds its lease"
        if n:
            sentence += f"; {stays(n)}"
        remedy = "look for store_unavailable and fault_inside in the logs of the workers, and restart them"
        yield Check(subject="leader", severity="blocks", sentence=sentence, remedy=remedy, jobs=n)


def of_queues(seen: Seen) -> Iterator[Check]:
    held: Counter[str] = Counter()
    for group in seen.waiting:
        held[group.queue] += group.n
    busy = [lane for lane in seen.standing.lanes if held[lane.queue] or lane.queued]
    for lane in busy if seen.live else ():
        if seen.crew(lane.queue):
            continue
        base, n = lane.queue.removesuffix(CRITICAL_SUFFIX), held[lane.queue] + lane.queued
        others = " but perhaps one without tideover" if seen.is_served(lane.queue) else ""
        there = [counted(k, f"{what} job") for k, what in ((held[lane.queue], "held"), (lane.queued, "queued")) if k]
        stay = "may stay" if others else "stays" if n == 1 else "stay"
        sentence = f"no live worker consumes {lane.queue}{others}: {' and '.join(there)} {stay}"
        remedy = f"let a worker import the module whose tasks use {base}, and leave {base} in its --queues"
        severity: Severity = "warns" if others else "blocks"
        yield Check(subject="queues", severity=severity, sentence=sentence, remedy=remedy, jobs=n)
    if seen.live and all(seen.crew(lane.queue) for lane in busy):
        what = f"{counted(len(busy), 'lane')} with jobs, each with a live worker" if busy else "no lane has jobs that wait"
        yield Check(subject="queues", severity="ok", sentence=what)


def of_tasks(seen: Seen) -> Iterator[Check]:
    jobs: Counter[tuple[str, str]] = Counter()
    for group in seen.waiting:
        if seen.crew(group.queue):
            jobs[group.queue, group.facet.task] += group.n
    silent: set[str] = set()
    found = []
    for (queue, task), n in sorted(jobs.items()):
        crew = seen.crew(queue)
        lacking = [worker for worker in crew if worker.tasks is not None and task not in worker.tasks]
        silent |= {worker.id for worker in crew if worker.tasks is None}
        if lacking:
            found.append(of_lacking(seen, queue, task, n, lacking, crew))
    yield from found
    if silent:
        sentence = f"not checked whether {counted(len(silent), 'worker')} imported the tasks of held jobs: they do not tell"
        yield Check(subject="tasks", severity="unchecked", sentence=sentence, remedy="deploy this version to all workers")
    elif not found and jobs:
        names = {task for _, task in jobs}
        yield Check(
            subject="tasks", severity="ok", sentence=f"{counted(len(names), 'task')} of held jobs, imported by all workers"
        )


def of_lacking(
    seen: Seen, queue: str, task: str, n: int, lacking: Sequence[WorkerStatus], crew: Sequence[WorkerStatus]
) -> Check:
    """Workers of a queue that would set jobs aside for review because they do not know their task."""
    alone = len(lacking) == len(crew)
    remedy = "import the module that declares it into the workers"
    if alone:
        sentence = f"no live worker of {queue} has imported the task {task}: {counted(n, 'held job')} would need review"
        remedy += f"; if it is gone for good: {seen.command('discard --because TEXT --task', task)}"
        return Check(subject="tasks", severity="blocks", sentence=sentence, remedy=remedy, jobs=n)
    some = f"{len(lacking)} of {counted(len(crew), 'live worker')} of {queue}"
    sentence = f"{some} have not imported the task {task}: what they fetch of {counted(n, 'held job')} will need review"
    return Check(subject="tasks", severity="warns", sentence=sentence, remedy=remedy, jobs=n)


def of_orders(seen: Seen) -> Iterator[Check]:
    for key, order in sorted(seen.orders.items()):
        ends = "" if order.until_at is None else f" for {about(order.until_at - seen.standing.asked_at)} more"
        which, by = "the drain" if key == ALL else f"the drain of {key}", f"by {order.who}{ends} ({order.why})"
        remedy = seen.command("drain resume", *(() if key == ALL else (key,)))
        if order.max_rate == 0:
            n = seen.kept["order", key]
            sentence = f"{which} is paused {by}; {stays(n)}"
            yield Check(subject="drain", severity="blocks" if n else "warns", sentence=sentence, remedy=remedy, jobs=n)
        else:
            n = sum(group.n for group in seen.waiting if key == ALL or key in group.facet.breaker_keys)
            takes = f"{counted(n, 'held job')} take {about(n / order.max_rate)} at least"
            sentence = f"{which} is capped at {order.max_rate:g} jobs/s {by}: {takes}"
            yield Check(subject="drain", severity="warns", sentence=sentence, remedy=remedy, jobs=n)
    if not seen.orders:
        yield Check(subject="drain", severity="ok", sentence="nobody has paused or capped the drain")


def of_breakers(seen: Seen) -> Iterator[Check]:
    found = [check for breaker in seen.standing.breakers for check in of_breaker(seen, breaker)]
    yield from found
    if not found:
        yield Check(subject="breakers", severity="ok", sentence="no route or task is parked, and no breaker is forced")


def of_breaker(seen: Seen, breaker: BreakerStatus) -> Iterator[Check]:
    """What only a human can change about a breaker: one that is open merely comes back by itself."""
    key = breaker.key
    n, resume = seen.kept["breaker", key] + seen.kept["gone", key], seen.command("breaker resume", key)
    if (forced := breaker.forced) is not None:
        for_s = about(forced.until_at - seen.standing.asked_at)
        sentence = f"{key} is forced {forced.state} for {for_s} more by {forced.who} ({forced.why})"
        remedy = seen.command("breaker auto", key)
    elif breaker.parked is not None and breaker.computed in DOWN:
        how = "paused" if breaker.parked == "paused" else f"parked ({breaker.parked})"
        sentence, remedy = f"{key} is {how}: {breaker.why}", f"{MENDING[breaker.parked]}, then {resume}"
    elif n:
        sentence = f"no worker has {key} in its settings any more, so nobody asks whether it is back"
        remedy = f"put the route and its model back into tideover.toml, or {resume}, and its jobs are judged anew"
    else:
        return
    if n:
        sentence += f"; {stays(n)}"
    yield Check(subject="breakers", severity="blocks" if n else "warns", sentence=sentence, remedy=remedy, jobs=n)


def of_domains(seen: Seen) -> Iterator[Check]:
    """Fallbacks that are expected to fail together with the route that they stand in for."""
    domains = {route.name: route.domain for route in seen.standing.routes}
    for task in seen.standing.tasks:
        primary, *others = task.routes
        alike = [route for route in others if domains.get(primary) and domains.get(route) == domains[primary]]
        if alike:
            who = f"{' and '.join(alike[:MOST_NAMED])}{' is' if len(alike) == 1 else ' are'} in the failure domain of {primary}"
            sentence = f"task {task.name} reroutes into the same outage: {who} ({domains[primary]})"
            remedy = "let it reroute to another provider too, or say the route's failure_domain in the settings"
            yield Check(subject="routes", severity="warns", sentence=sentence, remedy=remedy)


def of_modes(seen: Seen) -> Iterator[Check]:
    found = list(of_mode(seen.standing))
    for finding in found:
        remedy = seen.command("bypass off") if finding.level == "bypassed" else 'set mode = "act" for the workers'
        yield Check(subject="mode", severity="warns", sentence=finding.sentence.rstrip("."), remedy=remedy)
    if not found and seen.standing.mode is not None:
        yield Check(subject="mode", severity="ok", sentence="tideover acts: mode is act, and nobody has bypassed it")


def of_review(seen: Seen) -> Iterator[Check]:
    if n := seen.standing.needs_review:
        sentence = f"{counted(n, 'held job')} {'needs' if n == 1 else 'need'} review, and never drain by themselves"
        remedy = f"{seen.command('backlog --reason review')} says why; then `release` or `discard` them"
        yield Check(subject="review", severity="warns", sentence=sentence, remedy=remedy, jobs=n)
    else:
        yield Check(subject="review", severity="ok", sentence="no job needs review")


def of_bodies(seen: Seen) -> Iterator[Check]:
    s = seen.sample
    looked = f"of {counted(s.looked_at, 'held job')} looked at"
    if bare := s.without_body:
        sentence = f"{len(bare)} {looked} have no body ({named(bare)}): they cannot run, and count as lost once released"
        remedy = "send them again, and see who deletes keys in Redis, or what made it lose writes"
        yield Check(subject="bodies", severity="blocks", sentence=sentence, remedy=remedy, jobs=len(bare))
    if unknown := s.without_facts:
        sentence = f"{len(unknown)} {looked} have no facts ({named(unknown)}): they go, but nobody can list or discard them"
        remedy = "see who deletes keys in Redis, or what made it lose writes"
        yield Check(subject="bodies", severity="warns", sentence=sentence, remedy=remedy, jobs=len(unknown))
    if not bare and not unknown and s.looked_at:
        sentence = f"{s.looked_at:,} of {counted(seen.standing.held, 'held job')} looked at: facts and body are there"
        yield Check(subject="bodies", severity="ok", sentence=sentence)


def of_books(seen: Seen) -> Iterator[Check]:
    wrong = [finding for finding in of_account(seen.standing) if finding.level != "notice"]
    for finding in wrong:
        remedy = seen.command("status")
        yield Check(subject="account", severity="warns", sentence=finding.sentence.rstrip("."), remedy=remedy)
    if not wrong:
        yield Check(subject="account", severity="ok", sentence="the account adds up: no job is lost")


def of_fleet(seen: Seen) -> Iterator[Check]:
    mixed = [finding for finding in of_strangers(seen.standing) if finding.level == "mixed"]
    for finding in mixed:
        remedy = "replace them by workers with tideover (docs/deploys.md)"
        yield Check(subject="fleet", severity="warns", sentence=finding.sentence.rstrip("."), remedy=remedy)
    if not mixed:
        yield Check(subject="fleet", severity="ok", sentence="no worker without tideover is about")


def of_schema(seen: Seen) -> Iterator[Check]:
    workers = Counter(worker.schema for worker in seen.live if worker.schema is not None)
    if {*workers, seen.schema, SCHEMA} - {None} == {SCHEMA}:
        yield Check(subject="schema", severity="ok", sentence=f"schema {SCHEMA} everywhere")
        return
    crew = ", ".join(f"{counted(n, 'worker')} of {schema}" for schema, n in sorted(workers.items()))
    sentence = f"schemas differ: {seen.schema} is stored, {SCHEMA} is that of this command" + (f", {crew}" if crew else "")
    yield Check(subject="schema", severity="warns", sentence=sentence, remedy="end the deploy (docs/deploys.md)")


def of_servers(servers: Sequence[Safekeeping]) -> list[Check]:
    """What is checked of Redis: of the one server, or of each primary of a cluster; what is alike is said once."""
    return by_severity(list(dict.fromkeys(check for server in servers for check in of_server(server))))


def of_server(server: Safekeeping) -> Iterator[Check]:
    risk, remedy = server.risk
    if server.policy is None:
        yield Check(subject="redis", severity="unchecked", sentence=risk, remedy=remedy)
        return
    if server.policy == "noeviction":
        yield Check(subject="redis", severity="ok", sentence="Redis evicts nothing (maxmemory-policy noeviction)")
    else:
        sentence = f"Redis has maxmemory-policy {server.policy}: it may throw jobs away, and a worker refuses to start"
        yield Check(subject="redis", severity="blocks", sentence=sentence, remedy="set maxmemory-policy noeviction")
    if risk:
        yield Check(subject="redis", severity="warns", sentence=risk, remedy=remedy)
    else:
        yield Check(subject="redis", severity="ok", sentence="Redis keeps an append-only file")
    used, most = server.used_bytes, server.most_bytes
    if used is None or not most:
        yield Check(subject="redis", severity="ok", sentence="Redis has no maxmemory that it could reach")
        return
    share = f"Redis uses {used / most:.0%} of its maxmemory"
    if used < NEAR_FULL * most:
        yield Check(subject="redis", severity="ok", sentence=share)
    else:
        sentence = f"{share}: once it is full, nothing can be sent, and held jobs only go"
        yield Check(subject="redis", severity="warns", sentence=sentence, remedy="raise maxmemory")


def stays(held: int) -> str:
    """
    >>> stays(1), stays(1200)
    ('1 held job stays', '1,200 held jobs stay')
    """
    return f"{counted(held, 'held job')} {'stays' if held == 1 else 'stay'}"


def named(ids: Sequence[str]) -> str:
    return ", ".join(ids[:MOST_NAMED]) + (" ..." if len(ids) > MOST_NAMED else "")
