# SPDX-License-Identifier: Apache-2.0
"""What an operator may change: release held jobs, and switch tideover off and on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tideover import clock
from tideover.core.breaker import Breaker, State
from tideover.core.route import FORCED, Permit
from tideover.errors import JobNotFound
from tideover.ops.access import Operator, Refused, Space, find_job, reaching
from tideover.ops.explanation import locate, set_of
from tideover.ops.standing import Bypass, bypass_of
from tideover.store.backlog import HeldFacts, HeldSet
from tideover.store.stories import Line

AT_ONCE = 500
"""Jobs that one script call releases."""

RUNNABLE: frozenset[State] = frozenset({"closed", "recovering"})


@dataclass(frozen=True, slots=True)
class Batch:
    """Chosen jobs of one held set, by Redis id, those first that must go first."""

    space: Space
    held: HeldSet
    redis_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """Held jobs as they were chosen; one that is held later is not in it."""

    batches: tuple[Batch, ...]

    @property
    def size(self) -> int:
        return sum(len(batch.redis_ids) for batch in self.batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedJob:
    id: str
    namespace: str
    task: str
    lane: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """`gone`: chosen, but not held any more when their turn came; `still_held`: their breakers would not let them run."""

    jobs: tuple[ReleasedJob, ...]
    gone: int
    still_held: int
    still_waiting_for: tuple[str, ...]
    forced: bool


def choose_jobs(operator: Operator, ids: Sequence[str]) -> Selection:
    """These held jobs, by id or its first characters.

    Raises:
      JobNotFound: nothing is known of one of them.
      Refused: one of them is not held.
    """
    chosen: dict[tuple[str, HeldSet], tuple[Space, dict[str, None]]] = {}
    with reaching(operator.settings):
        for asked in ids:
            space, job_id = find_job(operator, asked)
            where, _, facts = locate(space, job_id)
            if facts is None:
                raise Refused(f"job {job_id} is not held: it is {where}. `tideover explain {job_id}` says more")
            chosen.setdefault((space.name, set_of(facts)), (space, {}))[1][facts.redis_id] = None
    return Selection(tuple(Batch(space, held, tuple(ids)) for (_, held), (space, ids) in chosen.items()))


def choose_all(operator: Operator, task: str | None) -> Selection:
    """All held jobs of one namespace, or those of one task.

    Raises:
      Refused: the operator has several namespaces.
      JobNotFound: no such job is held.
    """
    with reaching(operator.settings):
        space = operator.the_space("releasing held jobs")
        batches = [batch_of(space, held, task) for held in space.backlog.held_sets()]
    chosen = tuple(batch for batch in batches if batch.redis_ids)
    if not chosen:
        of_task = "" if task is None else f" of task {task}"
        raise JobNotFound(f"no job{of_task} is held in namespace {space.name}. `tideover backlog` lists those that are")
    return Selection(chosen)


def batch_of(space: Space, held: HeldSet, task: str | None) -> Batch:
    return Batch(space, held, tuple(f.redis_id for f in space.backlog.browse(held) if task in (None, f.task)))


def permits(operator: Operator, selection: Selection, *, force: bool) -> dict[Batch, Permit]:
    """Leave for each batch that may run now; those without one must stay.

    Raises:
      Refused: none of the jobs would run now, and nobody forces them.
    """
    if force:
        return dict.fromkeys(selection.batches, Permit(FORCED, 0))
    found: dict[Batch, Permit] = {}
    barred: dict[str, str] = {}
    with reaching(operator.settings):
        now = operator.now()
        for batch in selection.batches:
            breakers = batch.space.breakers.read(batch.held.breaker_keys)
            bypassed = batch.space.registry.bypass() is not None
            open_to_it = [Permit(key, b.generation) for key, b in breakers.items() if bypassed or lets_run(b, now)]
            if open_to_it:
                found[batch] = open_to_it[0]
            else:
                barred |= {key: breaker.state for key, breaker in breakers.items()}
    if barred and not found:
        what = "the job waits" if selection.size == 1 else f"all {selection.size:,} jobs wait"
        states = ", ".join(f"{key} is {'throttled' if state in RUNNABLE else state}" for key, state in sorted(barred.items()))
        raise Refused(
            f"{what} for breakers that let nothing run now: {states}. Once one recovers, jobs are released by themselves; "
            "--force runs them now, whatever the breakers say"
        )
    return found


def lets_run(breaker: Breaker, now: float) -> bool:
    return breaker.state in RUNNABLE and breaker.throttled_until <= now


def release(operator: Operator, selection: Selection, *, who: str, why: str | None, force: bool) -> Release:
    """Puts chosen held jobs back at the head of their queues, at once and not at the pace, and tells their stories so.

    Without `force` a job goes only if one of its breakers lets it run now; with it, it runs whatever the breakers say.

    Raises:
      Refused: none of the jobs would run now, and nobody forces them.
    """
    leave = permits(operator, selection, force=force)
    released: list[ReleasedJob] = []
    with reaching(operator.settings):
        for batch, permit in leave.items():
            for facts in freed(batch, permit):
                batch.space.stories.add([line_of(fact, who, why, force) for fact in facts])
                name = batch.space.name
                released += [ReleasedJob(id=f.job_id, namespace=name, task=f.task, lane=f.queue) for f in facts]
    kept = [batch for batch in selection.batches if batch not in leave]
    still_held = sum(len(batch.redis_ids) for batch in kept)
    return Release(
        jobs=tuple(released),
        gone=selection.size - still_held - len(released),
        still_held=still_held,
        still_waiting_for=tuple(sorted({key for batch in kept for key in batch.held.breaker_keys})),
        forced=force,
    )


def freed(batch: Batch, permit: Permit) -> Iterator[list[HeldFacts]]:
    """Releases a batch in steps, the last first: each goes to the head of the queue, so that the earliest is fetched first."""
    ids = batch.redis_ids
    for start in reversed(range(0, len(ids), AT_ONCE)):
        yield batch.space.backlog.free(batch.held, ids[start : start + AT_ONCE], str(permit))


def line_of(facts: HeldFacts, who: str, why: str | None, force: bool) -> Line:
    return Line(facts.job_id, clock.now(), "released", {"by": "hand", "who": who, "reason": why, "forced": force})


def bypass_on(operator: Operator, *, who: str, why: str | None, for_s: float | None) -> Bypass:
    """Switches tideover off in one namespace, for so many seconds (None: until switched on): jobs run as stock dramatiq's.

    Held jobs are released at the full pace; the account goes on.

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
