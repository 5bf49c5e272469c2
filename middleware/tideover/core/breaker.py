# SPDX-License-Identifier: Apache-2.0
"""The breaker of one route and model, or of a whole route: one transition table, and the functions that walk it.

                  doubt              most calls fail          probe due
        closed ─────────▶ suspect ──────────────────▶ open ─────────────▶ half-open
         ▲  ▲                │                         ▲ ▲  ◀─────────────   │
         │  └────────────────┘                         │ │   probes failed   │ probes answered
         │       calm                    failed at the │ └───────────────────│─── (closed, too: at once)
         │                                       floor │                     ▼
         └────────────────────────────────────────── recovering ◀────────────┘
                        settled                      └───┘ brake: failures under our own pressure

*suspect* keeps what can wait, *open* reroutes what cannot. A route-level breaker stands above those of its models. An
operator's word (*forced*) is an overlay: the computed state goes on beneath it.

The generation moves at each opening and each closing, and stamps permits: one of an earlier generation is void. The era moves
whenever the charts begin anew, too, and stamps outcomes: what began in an earlier era says nothing of this one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, Literal
from zlib import crc32

from tideover.core.detector import Base, Charts, is_calm, is_down, is_suspect
from tideover.core.policy import BreakerPolicy

State = Literal["closed", "suspect", "open", "half-open", "recovering"]
Parked = Literal["", "auth", "quota", "model", "paused"]
"""Why it is set aside until somebody mends something: a credential that never worked, spent money, a model that the route never
knew; of a task, that most of its jobs are refused as wrong."""

TRANSITIONS: Final[dict[State, frozenset[State]]] = {
    "closed": frozenset({"suspect", "open"}),
    "suspect": frozenset({"closed", "open"}),
    "open": frozenset({"half-open", "recovering"}),
    "half-open": frozenset({"half-open", "open", "recovering"}),
    "recovering": frozenset({"recovering", "open", "closed"}),
}
GRAVITY: Final[dict[State, int]] = {"closed": 0, "recovering": 1, "suspect": 2, "half-open": 3, "open": 4}

FLOOR_S = 10.0
"""How long the pace stays at its floor after a brake. Only failures there open a recovering breaker again."""
FLAP_S = 600.0
"""Who opens again so soon after it recovered flaps: the next ramp is half as steep, and half the evidence opens it."""
DOUBT = 2.0
"""Where the blackout chart must stand for a probe to help: one failure. Where few jobs run, waiting for the next takes long."""
BUSY_PER_S = 2.0
"""With so many calls a second nobody needs to ask."""
SILENT_S = 2.0
"""...unless nobody has called for so long, because what can wait is held."""
LONG_S = 3600.0
"""An outage of so long is asked half as often."""
PROBE_GROWTH, PROBE_JITTER = 1.15, 0.25
EARLY_PROBES = 3
"""So many probes follow each other at the first pause: one outage in ten is over within a minute."""

MASS = 10
"""Distinct jobs of a task that must be refused before the others wait."""

BURST_OK, BURST_FAILED = 0.865, -2.48
"""What an answered and a failed probe weigh: ln(0.95 / 0.4) and ln(0.05 / 0.6), a well route against one that fails 60 %
(Wald 1945)."""
BURST_ACCEPT, BURST_REJECT = 8.2, -1.5
"""Ten in a row close; a first that fails, or a third of them, reopens. Six would do for a provider that is down altogether, but
one that answers every other call would be taken for well seven times in an hour (`tests/bench/detect.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forced:
    """An operator's word: the state, until when (unix time), whose and why."""

    state: Literal["open", "closed"]
    until: float
    who: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What the provider's status page says of it, until when that counts, and what it may change (`core.status_page`)."""

    said: str
    until: float
    shift: float = 0.0
    probe_every_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Breaker:
    """What all processes know of one route and model. Instants are unix time, 0: never.

    `since`: of this state; `opened_at`: the opening of this generation; `recovered_at`: when probes last answered; `braked_at`:
    the last brake; `began_at`: when the charts began; `ok_at`: the last success; `seen_at`: the last
    evidence; `throttled_until`: the provider asked for
    quiet until then; `probing_until`: somebody probes until then, with the number `fence`; `probe_at`: of a parked one, when
    it is asked again (0: not before somebody says so). `why`: the last failure, in a few words; `probed_at`, `probe_said`: the
    end of the last burst of probes; `credential`: digest of the
    one that was refused; `pace`, `limited_by`, `paced_at`: the leader's latest word on how fast it is used (`core.pacing`);
    `version`: moves with all of this but the evidence and the pace.
    """

    state: State = "closed"
    generation: int = 0
    era: int = 0
    since: float = 0.0
    opened_at: float = 0.0
    recovered_at: float = 0.0
    braked_at: float = 0.0
    began_at: float = 0.0
    ok_at: float = 0.0
    seen_at: float = 0.0
    throttled_until: float = 0.0
    probing_until: float = 0.0
    probe_at: float = 0.0
    probed_at: float = 0.0
    probes_failed: int = 0
    fence: int = 0
    version: int = 0
    flaps: int = 0
    parked: Parked = ""
    credential: str = ""
    why: str = ""
    probe_said: str = ""
    pace: float = 0.0
    limited_by: str = ""
    paced_at: float = 0.0
    page: Page | None = None
    forced: Forced | None = None
    charts: Charts = field(default_factory=Charts)
    base: Base = field(default_factory=Base)

    @property
    def is_down(self) -> bool:
        return self.state in ("open", "half-open")


CLOSED = Breaker()


@dataclass(frozen=True, slots=True, kw_only=True)
class Witnesses:
    """Processes that reported on a breaker within the last minute, and those of them whose latest call failed."""

    reporters: int = 1
    failing: int = 1

    @property
    def agree(self) -> bool:
        """Whether this is more than the trouble of one process: where two look, two must see it."""
        return self.reporters < 2 or self.failing >= 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """A change that the store is asked to make, if the breaker is still as it was."""

    to: State
    why: str
    parked: Parked = ""
    probe_at: float = 0.0
    credential: str = ""


class IllegalTransition(ValueError):
    """A change that the table does not have: a defect of the caller."""


def moved(breaker: Breaker, change: Transition, now: float) -> Breaker:
    """The breaker after a change.

    >>> opened = moved(Breaker(state="suspect", generation=4), Transition(to="open", why="529"), 100.0)
    >>> opened.generation, opened.opened_at, moved(opened, Transition(to="half-open", why="529"), 105.0).generation
    (5, 100.0, 5)
    """
    old, new = breaker.state, change.to
    if new not in TRANSITIONS[old]:
        raise IllegalTransition(f"{old} -> {new}")
    probing_until = 0.0 if new == "open" or old == "half-open" else breaker.probing_until
    after = replace(breaker, state=new, since=now, why=change.why, probing_until=probing_until)
    if new != "half-open":  # who asks a parked one still knows why it is parked
        after = replace(after, parked=change.parked, probe_at=change.probe_at, credential=change.credential)
    if old == "half-open" and new != "half-open":
        after = replace(after, probed_at=now, probe_said=change.why)
    match old, new:
        case "half-open", "open":
            return replace(after, probes_failed=breaker.probes_failed + 1)
        case _, "open":
            soon = breaker.recovered_at > 0 and now - breaker.recovered_at < FLAP_S
            after = replace(after, generation=breaker.generation + 1, era=breaker.era + 1, opened_at=now)
            return replace(after, probes_failed=0, flaps=breaker.flaps + 1 if soon else 0)
        case "recovering", "recovering":
            return replace(anew(after, now), since=breaker.since, braked_at=now)
        case _, "recovering":
            return replace(anew(after, now), recovered_at=now)
        case "suspect", "closed":
            return anew(after, now)
        case "recovering", "closed":
            return replace(anew(after, now), generation=breaker.generation + 1)
        case _:
            return after


def anew(breaker: Breaker, now: float) -> Breaker:
    """With charts that begin at 0: nothing that began before counts."""
    return replace(breaker, era=breaker.era + 1, began_at=now, charts=Charts())


def threshold(breaker: Breaker, now: float) -> float:
    """Where a chart must stand for it to open: half as high if it flaps, a little lower if a status page agrees."""
    flapping = breaker.flaps > 0 and now - breaker.recovered_at < FLAP_S
    h = breaker.base.threshold / 2 if flapping else breaker.base.threshold
    return h - breaker.page.shift if breaker.page is not None and now < breaker.page.until else h


def judge(breaker: Breaker, by: Witnesses, *, now: float, waiting: bool, policy: BreakerPolicy) -> Transition | None:
    """What its charts, and the time, do to a breaker; None: nothing. `waiting`: jobs are held for it."""
    if breaker.is_down:
        return None
    h = threshold(breaker, now)
    told = breaker.why or f"{breaker.charts.failed} of {breaker.charts.calls} calls failed"
    match breaker.state:
        case "closed" | "suspect" if by.agree and is_down(breaker.charts, h):
            return Transition(to="open", why=told)
        case "closed" if by.agree and is_suspect(breaker.charts, h, now - breaker.began_at):
            return Transition(to="suspect", why=told)
        case "suspect" if is_calm(breaker.charts, h):
            return Transition(to="closed", why="calm again")
        case "recovering" if by.agree and is_down(breaker.charts, h):
            return Transition(to="open" if is_at_floor(breaker, now) else "recovering", why=told)
        case "recovering" if has_settled(breaker, now, waiting=waiting, policy=policy) and not is_doubted(breaker, now):
            return Transition(to="closed", why="recovered")
    return None


def judge_task(breaker: Breaker, *, now: float, waiting: bool, policy: BreakerPolicy) -> Transition | None:
    """Pauses a task when most of its jobs are refused as wrong, and were not before: a defect that all of them share."""
    charts = breaker.charts
    if breaker.is_down:
        return None
    if charts.failed >= MASS and 2 * charts.failed >= charts.calls and is_down(charts, breaker.base.threshold):
        why = f"{charts.failed} of {charts.calls} jobs were refused as wrong"
        return Transition(to="open", why=why, parked="paused")
    if breaker.state == "recovering" and has_settled(breaker, now, waiting=waiting, policy=policy):
        return Transition(to="closed", why="recovered")
    return None


def has_settled(breaker: Breaker, now: float, *, waiting: bool, policy: BreakerPolicy) -> bool:
    """Whether a recovering breaker has stood its time: not while its backlog comes home, which it paces."""
    return not waiting and now - breaker.since >= policy.settle_s


def is_doubted(breaker: Breaker, now: float) -> bool:
    """Whether a recovering breaker may not close yet, because too many calls fail."""
    h = threshold(breaker, now)
    suspect = is_suspect(breaker.charts, h, now - breaker.began_at) and not is_calm(breaker.charts, h)
    return breaker.state == "recovering" and suspect


def is_at_floor(breaker: Breaker, now: float) -> bool:
    """Whether failures cannot be the doing of our own pressure, because the pace has just been braked to its floor."""
    return breaker.braked_at >= breaker.since and now - breaker.braked_at < FLOOR_S


def probe_wait_s(breaker: Breaker, now: float, policy: BreakerPolicy) -> float:
    """Seconds from the last change of an open breaker to its next probe: growing, and spread, but the same for all processes.

    >>> waits = [probe_wait_s(Breaker(state="open", probes_failed=n), 0.0, BreakerPolicy()) for n in (0, 100)]
    >>> 3.75 <= waits[0] <= 6.25, 11.25 <= waits[1] <= 18.75
    (True, True)
    """
    most = policy.probe_max_s * (2 if now - breaker.opened_at > LONG_S else 1)
    wait_s = min(most, policy.probe_after_s * PROBE_GROWTH ** min(max(0, breaker.probes_failed - EARLY_PROBES), 100))
    if breaker.page is not None and now < breaker.page.until and breaker.page.probe_every_s is not None:
        wait_s = min(wait_s, breaker.page.probe_every_s)
    luck = crc32(f"{breaker.generation} {breaker.probes_failed} {breaker.opened_at:.3f}".encode()) / 2**32
    return float(wait_s * (1 - PROBE_JITTER + 2 * PROBE_JITTER * luck))


def next_probe_at(breaker: Breaker, now: float, policy: BreakerPolicy) -> float | None:
    """When it is probed next; None: it is not, because nothing speaks against it, or because only a human can help it."""
    match breaker.state:
        case "open" if breaker.parked:
            return breaker.probe_at or None
        case "open":
            return max(breaker.since + probe_wait_s(breaker, now, policy), breaker.probing_until)
        case "half-open":
            return breaker.probing_until
        case "closed" | "suspect" | "recovering":
            doubt = breaker.state == "suspect" or breaker.charts.blackout >= DOUBT or is_doubted(breaker, now)
            silent = breaker.base.per_s < BUSY_PER_S or now - breaker.seen_at >= SILENT_S
            return breaker.probing_until if doubt and silent else None


def is_probe_due(breaker: Breaker, now: float, policy: BreakerPolicy) -> bool:
    at = next_probe_at(breaker, now, policy)
    return at is not None and now >= at


def weigh(weight: float, *, answered: bool) -> float:
    """What a burst of probes weighs after one more."""
    return weight + (BURST_OK if answered else BURST_FAILED)


def burst_says(weight: float) -> bool | None:
    """Whether the route is back; None: ask on.

    >>> [burst_says(weigh(0.0, answered=False)), burst_says(9 * BURST_OK), burst_says(10 * BURST_OK)]
    [False, None, True]
    """
    if weight >= BURST_ACCEPT:
        return True
    return False if weight <= BURST_REJECT else None


def in_force(breaker: Breaker, now: float) -> Breaker:
    """The breaker as an operator wants it, if one said so and the time is not over."""
    forced = breaker.forced
    if forced is None or now >= forced.until:
        return breaker
    return replace(breaker, state=forced.state, throttled_until=0.0, why=f"forced {forced.state} by {forced.who}: {forced.why}")


def together(model: Breaker, route: Breaker, now: float) -> Breaker:
    """What a job sees of a model's breaker and the one of its route above it: the graver of the two.

    The generation is the sum of both: it moves when either does. Two alike are so since the later one is.
    """
    one, other = in_force(model, now), in_force(route, now)
    graver = other if GRAVITY[other.state] > GRAVITY[one.state] else one
    return replace(
        graver,
        since=max(one.since, other.since) if one.state == other.state else graver.since,
        generation=one.generation + other.generation,
        throttled_until=max(one.throttled_until, other.throttled_until),
        flaps=max(one.flaps, other.flaps),
    )
