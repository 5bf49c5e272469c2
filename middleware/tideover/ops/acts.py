# SPDX-License-Identifier: Apache-2.0
"""What an operator may change: release held jobs, and switch tideover off and on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from tideover import clock
from tideover.core.admission import Reason
from tideover.core.breaker import Breaker, State
from tideover.core.job import Criticality
from tideover.core.route import FORCED, NO_PERMIT, Permit
from tideover.errors import JobNotFound, StoreUnavailable
from tideover.ops.access import Operator, Refused, Space, find_job, reaching
from tideover.ops.explanation import in_place, locate
from tideover.ops.search import ANY, Filter, Search
from tideover.ops.standing import Bypass, bypass_of
from tideover.ops.values import counted
from tideover.store.client import FAILED
from tideover.store.facts import GROUP, Facet, HeldFacts
from tideover.store.keys import wait_key_text
from tideover.store.stories import Line, told_by

AT_ONCE = 100
"""Jobs that one script call releases: more would block Redis for longer than 10 ms."""

RUNNABLE: frozenset[State] = frozenset({"closed", "recovering"})

Progress = Callable[[int], None]
"""Told how many more jobs are done with."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Chosen jobs of one queue, as members of its index, in the order in which they shall go; `facets` by member or group."""

    space: Space
    queue: str
    members: Sequence[bytes]
    facets: Mapping[bytes, Facet]

    def facet(self, member: bytes) -> Facet:
        return self.facets.get(member) or self.facets[member[:GROUP]]


@dataclass(frozen=True, slots=True)
class Selection:
    """Held jobs as they were chosen; one that is held later is not in it.

    `in_review`: jobs that were meant, too, but need review, which nobody asked for by id or reason.
    """

    batches: tuple[Batch, ...]
    in_review: int = 0

    @property
    def size(self) -> int:
        return sum(len(batch.members) for batch in self.batches)


@dataclass(frozen=True, slots=True)
class Leave:
    """Which of the chosen jobs may go, and with which permit: by namespace and wait key.

    `barred`: the breakers that let nothing run now, and their states.
    """

    permits: Mapping[tuple[str, str], Permit]
    barred: Mapping[str, State]

    def of(self, batch: Batch, member: bytes) -> Permit | None:
        return self.permits.get((batch.space.name, batch.facet(member).wait_key))


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedJob:
    """A job with which an act is done."""

    id: str
    namespace: str
    task: str
    lane: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """`gone`: chosen, but not held any more when their turn came; `still_held`: their breakers would not let them run.

    `in_review`: not chosen, because a human must look at them first; releasing those takes their ids or their reason.
    `untold`: released, but Redis would not take down their stories.
    """

    jobs: tuple[MovedJob, ...]
    gone: int
    still_held: int
    still_waiting_for: tuple[str, ...]
    in_review: int
    untold: int
    forced: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenGroup:
    """Chosen jobs that are alike."""

    namespace: str
    lane: str
    task: str
    criticality: Criticality
    reason: Reason
    waits_for: tuple[str, ...]
    tenant: str
    tag: str
    jobs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewGroup(ChosenGroup):
    """`goes`: a breaker that they wait for lets them run, or they wait for none."""

    goes: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a release would do now. `barred`: the breakers that let nothing run, and their states."""

    would_go: int
    would_stay: int
    barred: dict[str, State]
    in_review: int
    forced: bool
    groups: tuple[PreviewGroup, ...]


def choose_jobs(operator: Operator, ids: Sequence[str]) -> Selection:
    """These held jobs, by id or its first characters.

    Raises:
      JobNotFound: nothing is known of one of them.
      Refused: one of them is not held.
    """
    chosen: dict[tuple[str, str], tuple[Space, dict[bytes, Facet]]] = {}
    with reaching(operator.settings):
        for asked in ids:
            space, job_id = find_job(operator, asked)
            where, _, facts = locate(space, job_id)
            found = {} if facts is None else space.backlog.members(facts.queue, [facts.redis_id])
            if facts is None or not found:
                raise Refused(
                    f"job {job_id} is not held: {in_place(space, job_id, where)}. `tideover explain {job_id}` says more"
                )
            chosen.setdefault((space.name, facts.queue), (space, {}))[1][found[facts.redis_id]] = facts.facet
    return Selection(
        tuple(Batch(space, queue, in_order(members), members) for (_, queue), (space, members) in chosen.items()),
    )


def in_order(members: Iterable[bytes]) -> tuple[bytes, ...]:
    return tuple(sorted(members, key=lambda member: member[GROUP:]))


def choose(operator: Operator, chosen: Filter = ANY, *, doing: str = "releasing", done: str = "released") -> Selection:
    """All held jobs of one namespace that are meant. Those that need review only if the filter says that reason.

    `doing`, `done`: what they are chosen for, as errors say it.

    Raises:
      Refused: the operator has several namespaces.
      JobNotFound: no such job is held.
    """
    with reaching(operator.settings):
        space = operator.the_space(f"{doing} held jobs")
        search = Search([space], chosen, int(operator.now() * 1000))
        in_review = 0 if chosen.reason == "review" else search.leave_out_review()
        members: dict[str, list[bytes]] = defaultdict(list)
        facets: dict[str, dict[bytes, Facet]] = defaultdict(dict)
        for part, member in search.meant():
            members[part.queue].append(member.raw)
            facets[part.queue][member.group.id] = member.group.facet
    if not members:
        most = f"; {counted(in_review, 'job')} that need review can be {done} with --reason review" if in_review else ""
        raise JobNotFound(f"no such job is held in namespace {space.name}{most}. `tideover backlog` lists those that are")
    batches = (Batch(space, queue, of_queue, facets[queue]) for queue, of_queue in members.items())
    return Selection(tuple(batches), in_review)


def leave_for(operator: Operator, selection: Selection, *, force: bool) -> Leave:
    """Leave for the jobs that may run now; those without one must stay. A job that waits for no breaker may always go."""
    permits: dict[tuple[str, str], Permit] = {}
    barred: dict[str, State] = {}
    with reaching(operator.settings):
        now = operator.now()
        for space in {batch.space.name: batch.space for batch in selection.batches}.values():
            bypassed = space.registry.bypass() is not None
            ours = [facet for batch in selection.batches if batch.space is space for facet in batch.facets.values()]
            breakers = space.breakers.read(sorted({key for facet in ours for key in facet.breaker_keys}))
            for facet in {facet.wait_key: facet for facet in ours}.values():
                able = (key for key in facet.breaker_keys if bypassed or lets_run(breakers[key], now))
                key = FORCED if force else next(able, None) if facet.breaker_keys else ""
                if key is None:
                    barred |= {key: breakers[key].state for key in facet.breaker_keys}
                else:
                    permits[space.name, facet.wait_key] = permit_of(key, breakers)
    return Leave(permits, barred)


def permit_of(key: str, breakers: Mapping[str, Breaker]) -> Permit:
    match key:
        case "":
            return NO_PERMIT
        case "*":
            return Permit(FORCED, 0)
        case _:
            return Permit(key, breakers[key].generation)


def lets_run(breaker: Breaker, now: float) -> bool:
    return breaker.state in RUNNABLE and breaker.throttled_until <= now


def refuse_if_none_may_go(plan: Preview) -> None:
    """Raises `Refused`: none of the jobs would run now, and nobody forces them."""
    if plan.would_go or not plan.would_stay:
        return
    what = "the job waits" if plan.would_stay == 1 else f"all {plan.would_stay:,} jobs wait"
    states = ", ".join(f"{key} is {'throttled' if state in RUNNABLE else state}" for key, state in plan.barred.items())
    raise Refused(
        f"{what} for breakers that let nothing run now: {states}. Once one recovers, jobs are released by themselves; "
        "--force runs them now, whatever the breakers say"
    )


def groups_of(selection: Selection) -> tuple[ChosenGroup, ...]:
    """What the chosen jobs have in common, the largest group first."""
    alike = Counter((batch.space.name, batch.queue, batch.facet(m)) for batch in selection.batches for m in batch.members)
    return tuple(
        ChosenGroup(
            namespace=namespace,
            lane=queue,
            task=facet.task,
            criticality=facet.criticality,
            reason=facet.reason,
            waits_for=facet.breaker_keys,
            tenant=facet.tenant,
            tag=facet.tag,
            jobs=n,
        )
        for (namespace, queue, facet), n in alike.most_common()
    )


def preview(operator: Operator, selection: Selection, *, force: bool) -> Preview:
    """What `release` would do now; it changes nothing."""
    leave = leave_for(operator, selection, force=force)
    groups = tuple(
        PreviewGroup(**asdict(group), goes=(group.namespace, wait_key_text(group.waits_for)) in leave.permits)
        for group in groups_of(selection)
    )
    would_go = sum(group.jobs for group in groups if group.goes)
    return Preview(
        would_go=would_go,
        would_stay=selection.size - would_go,
        barred=dict(sorted(leave.barred.items())),
        in_review=selection.in_review,
        forced=force,
        groups=groups,
    )


def release(
    operator: Operator, selection: Selection, *, who: str, why: str | None, force: bool, progress: Progress = lambda _: None
) -> Release:
    """Puts chosen held jobs back at the head of their queues, at once and not at the pace, and tells their stories so.

    Without `force` a job goes only if one of its breakers lets it run now; with it, it runs whatever the breakers say. One that
    waits for no breaker, because it needs review, goes through the gates as any other.

    Raises:
      StoreUnavailable: Redis does not answer any more; the message says how many were released.
    """
    leave = leave_for(operator, selection, force=force)
    released: list[MovedJob] = []
    told = {"by": "hand", "who": who, "reason": why, "forced": force}
    may_go = untold = 0
    with telling_how_many(operator, released, selection.size, "released"):
        for batch in selection.batches:
            for permit, members in steps(batch, leave):
                may_go += len(members)
                facts = batch.space.backlog.release(batch.queue, members, permit).jobs
                released += [moved_job(batch, fact) for fact in facts]
                untold += tell(batch.space, facts, told)
                progress(len(members))
    return Release(
        jobs=tuple(released),
        gone=may_go - len(released),
        still_held=selection.size - may_go,
        still_waiting_for=tuple(sorted(leave.barred)),
        in_review=selection.in_review,
        untold=untold,
        forced=force,
    )


def steps(batch: Batch, leave: Leave) -> Iterator[tuple[Permit, list[bytes]]]:
    """What one script call releases, the last first: each goes to the head of the queue, so the earliest is fetched first.

    Among the jobs of a step those of one permit go together, those of the earliest job last.
    """
    for start in reversed(range(0, len(batch.members), AT_ONCE)):
        by_permit: dict[Permit, list[bytes]] = {}
        for member in batch.members[start : start + AT_ONCE]:
            permit = leave.of(batch, member)
            if permit is not None:
                by_permit.setdefault(permit, []).append(member)
        yield from reversed(by_permit.items())


@contextmanager
def telling_how_many(operator: Operator, moved: Sized, chosen: int, done: str) -> Iterator[None]:
    """Has `StoreUnavailable` say with how many of the chosen jobs an act was done."""
    try:
        with reaching(operator.settings):
            yield
    except StoreUnavailable as error:
        raise StoreUnavailable(f"{len(moved):,} of {counted(chosen, 'job')} are {done}. {error}") from error


def moved_job(batch: Batch, facts: HeldFacts) -> MovedJob:
    return MovedJob(id=facts.job_id, namespace=batch.space.name, task=facts.task, lane=facts.queue)


def tell(space: Space, released: Sequence[HeldFacts], told: Mapping[str, object]) -> int:
    """Writes down what happened to released jobs; of how many that failed, which is no failure of the release."""
    now = clock.now()
    return tell_lines(space, [line for f in released for line in (*told_by(f), Line(f.job_id, now, "released", dict(told)))])


def tell_lines(space: Space, lines: Sequence[Line]) -> int:
    """Adds to stories; of how many jobs that failed."""
    try:
        space.stories.add(lines)
    except FAILED:
        return len({line.job_id for line in lines})
    return 0


def bypass_on(operator: Operator, *, who: str, why: str | None, for_s: float | None) -> Bypass:
    """Switches tideover off in one namespace, for so many seconds (None: until switched on): jobs run as stock dramatiq's.

    Held jobs are released, a few at first; the account goes on.

    Raises:
      Refused: the operator has several namespaces.
    """
    with reaching(operator.settings):
        space = operator.the_space("switching tideover off")
        since_ms = round(operator.now() * 1000)
        until_ms = None if for_s is None else since_ms + round(for_s * 1000)
        space.registry.set_bypass({"who": who, "why": why, "since_ms": since_ms, "until_ms": until_ms}, for_s)
        return Bypass(who=who, why=why, since_at=since_ms / 1000, until_at=None if until_ms is None else until_ms / 1000)


def bypass_off(operator: Operator) -> Bypass | None:
    """Switches tideover on again in one namespace; the bypass that was, None when there was none.

    Raises:
      Refused: the operator has several namespaces.
    """
    with reaching(operator.settings):
        space = operator.the_space("switching tideover on")
        was = bypass_of(space)
        space.registry.clear_bypass()
        return was
