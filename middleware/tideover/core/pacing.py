# SPDX-License-Identifier: Apache-2.0
"""How fast a route that was down is used again: by all of its traffic, live and held. Rates are model calls per second.

A controller of rates, not of concurrency, because failures come quickly. Where the provider tells its limits (rate-limit
headers) they are a ceiling, steered so that a cushion for bursts is left. Below it the rate grows until the provider cannot
follow: slow start as TCP has it (Jacobson 1988), then carefully around the rate at which it could not follow last (as CUBIC, Ha
et al. 2008). One lost call is no congestion, only a share of them is; and what our own pace made fail opens no breaker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from tideover.core.breaker import FLAP_S, Breaker
from tideover.core.policy import PacePolicy

Factor = Literal[
    "open", "suspect", "quiet", "flapping", "ramp", "congestion", "provider limit", "token limit", "own cap", "workers"
]
"""What keeps the pace from being higher: the breaker is open or suspect, the provider asked for quiet, the route opened often;
the rate still grows, or grew to what the provider could bear; its limit of requests, or of tokens; a setting; no worker has
room for more."""

LimitOf = Literal["requests", "tokens", "input_tokens", "output_tokens"]
"""What a provider counts."""

PATIENCE_S = 60.0
"""How long nothing is released while a breaker is suspect. After that it is a brown-out, whose provider answers most calls."""
FLAPPY = 3
"""Who opened so often in a row, soon after it had recovered, is used at the floor for `FLAP_S`."""

MEMORY_S = 8.0
"""Time constant of what was sent, answered and lost."""
BURST_S = 1.0
"""The same, for what is lost all at once."""
LOSSES, LOSS_SHARE = 3.0, 0.04
"""So many lost calls, and this share of all: the provider cannot follow."""
LOSSES_AT_ONCE, LOSS_SHARE_AT_ONCE = 2.0, 0.10
CUT_TO_BEST, CUT_AGAIN, CUT_TO_DELIVERED, LEAST_CUT = 0.97, 0.85, 0.95, 0.3
"""What is left of the rate then: a little less than the provider could bear so far. If that does not help, a share of the rate,
a little less than was delivered; but never less than so little of what it was."""
LEAST_RATE = 0.2
"""However little a limit leaves: it is asked again now and then."""
LEAST_PAUSE_S = 1.0
"""Between two cuts, however quick the answers are."""
AGAIN = 2.0
"""So many answer times after a cut the next loss says that it did not help."""
BEST_KEPT, BEST_CHANGED = 0.8, 0.2
"""What counts of the rate that was borne so far; one that differs by more replaces it."""
THROTTLED_CUT = 0.9
MOST_QUIET_S = 3.0
"""How long a 429 may keep everything quiet. A pause that is longer is asked again."""
CUSHION_S, STEERING_S = 1.5, 8.0
"""The ceiling leaves so many seconds of the limit unused, and corrects what is missing of that within so long."""
GROWTH_BELOW, GROWTH_AROUND, GROWTH_BEYOND, GROWTH_UNSTEADY = 0.06, 0.004, 0.015, 0.03
"""A second, of the rate: well below the rate at which it could not follow, around it, and beyond; and at or beyond one that was
found once only: the provider may bear more every second."""
BELOW, BEYOND = 0.9, 1.05
MOST_ANSWERS = 50.0
"""How long whole answers take, and how many tokens, is learned of so many."""
JOBS_MEMORY_S = 60.0
"""Time constant of how many calls a released job makes."""
MOST_CALLS_EACH = 100.0
FRESH_S, HALVED_S = 2.0, 5.0
"""A pace that no leader renewed for so long falls: to a half in so long, and to the floor in the end."""
BRAKED_TO = 0.7
"""After a brake slow start ends at this share of what was delivered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Felt:
    """What calls came to since last time. `lost`: overloaded, broken or overdue; `throttled`: 429; `took_s`: of whole answers,
    added up; `input_tokens`, `output_tokens`: of those that say so (`told`); `jobs`: released jobs that began, `again`: calls
    that they made after their first; `released`: jobs that were let go; `quiet_s`: the longest pause that was asked for."""

    sent: float = 0.0
    ok: float = 0.0
    lost: float = 0.0
    throttled: float = 0.0
    took_s: float = 0.0
    told: float = 0.0
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    jobs: float = 0.0
    again: float = 0.0
    released: float = 0.0
    quiet_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Limit:
    """What the provider says of a limit: calls (or tokens) per second, and how many are left just now."""

    per_s: float
    left: float


Limits = Mapping[LimitOf, Limit]
"""All that a provider tells; empty: nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pacer:
    """Where the controller stands. Instants are unix time.

    `rate`: what the provider is believed to bear; `slow_start` ends at the first congestion or at `ssthresh`; `best`: the rate
    at which it could not follow last, `steady`: as the time before that; `sent`, `ok`, `lost`: fading with `MEMORY_S`,
    `sent_now`, `lost_now` with `BURST_S`;
    `answer_s`: how long whole answers take, of the last fifty or so (`answers`); `input_tokens`, `output_tokens`: of
    each, of those that said so (`told`);
    `jobs`, `again`: released jobs and the calls that they made after their first, fading with `JOBS_MEMORY_S`;
    `quiet_until`: the provider asked for quiet; `deaf_until`: losses until then are of calls that began before a brake.
    """

    at: float
    rate: float
    slow_start: bool = True
    ssthresh: float = math.inf
    best: float = math.inf
    sent: float = 0.0
    ok: float = 0.0
    lost: float = 0.0
    sent_now: float = 0.0
    lost_now: float = 0.0
    answer_s: float = 5.0
    answers: float = 0.0
    told: float = 0.0
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    jobs: float = 0.0
    again: float = 0.0
    steady: bool = False
    cut_at: float = -math.inf
    quiet_until: float = -math.inf
    deaf_until: float = -math.inf

    @property
    def delivered(self) -> float:
        """Good answers per second."""
        return self.ok / MEMORY_S

    @property
    def is_congested(self) -> bool:
        """Whether more is lost than a well provider loses now and then."""
        lasting = self.lost >= LOSSES and self.lost > LOSS_SHARE * (self.ok + self.lost)
        return lasting or (self.lost_now >= LOSSES_AT_ONCE and self.lost_now > LOSS_SHARE_AT_ONCE * self.sent_now)

    @property
    def calls_each(self) -> float:
        """Calls that a released job makes over this route, on average.

        >>> Pacer(at=0, rate=2, jobs=4, again=12).calls_each
        4.0
        """
        return min(MOST_CALLS_EACH, 1 + self.again / self.jobs) if self.jobs >= 1 else 1.0

    def each(self, kind: LimitOf) -> float:
        """How much of a limit one call takes; 0: not known yet."""
        match kind:
            case "requests":
                return 1.0
            case "tokens":
                return self.input_tokens + self.output_tokens
            case "input_tokens":
                return self.input_tokens
            case "output_tokens":
                return self.output_tokens


def begun(now: float, policy: PacePolicy, before: Pacer | None = None) -> Pacer:
    """At the start of a recovery. What its calls are like is known from the one before."""
    fresh = Pacer(at=now, rate=policy.start_rate)
    names = ("answer_s", "answers", "told", "input_tokens", "output_tokens", "jobs", "again")
    return fresh if before is None else replace(fresh, **{name: getattr(before, name) for name in names})


def unheard(pacer: Pacer, released: float, usual_per_s: float, *, now: float, policy: PacePolicy) -> Pacer:
    """Later, of a route that is well, as after a doubt that passed: it bears what it usually has.

    How its calls fare nobody tells. The pace grows with what is really released: after a pause it starts low again.
    """
    elapsed_s = max(0.0, now - pacer.at)
    grown = replace(
        pacer,
        at=now,
        rate=grown_rate(pacer, elapsed_s, policy),
        sent=pacer.sent * math.exp(-elapsed_s / MEMORY_S) + released,
        sent_now=pacer.sent_now * math.exp(-elapsed_s / BURST_S) + released,
    )
    return replace(grown, rate=max(min(grown.rate, most_of(grown, policy)), usual_per_s))


def braked(pacer: Pacer, now: float, policy: PacePolicy) -> Pacer:
    """Back at the floor, because calls fail that our own pace may have made fail; it grows quickly to a part of what was."""
    best = max(pacer.delivered, LEAST_CUT * pacer.rate)
    slow = replace(pacer, rate=policy.start_rate, slow_start=True, best=best, ssthresh=BRAKED_TO * best, cut_at=now)
    return replace(slow, lost=0.0, lost_now=0.0, deaf_until=now + pacer.answer_s)


def after(pacer: Pacer, felt: Felt, limits: Limits, *, now: float, policy: PacePolicy) -> Pacer:
    """What the controller believes after more calls.

    >>> policy = PacePolicy(start_rate=2, double_s=6)
    >>> pacer = begun(0.0, policy)
    >>> for second in range(1, 13):
    ...     pacer = after(pacer, Felt(sent=pacer.rate, ok=pacer.rate, took_s=pacer.rate), {}, now=second, policy=policy)
    >>> round(pacer.rate)
    8
    """
    elapsed_s = max(0.0, now - pacer.at)
    lost = 0.0 if now < pacer.deaf_until else felt.lost
    fades, fades_now, fades_slowly = (math.exp(-elapsed_s / memory_s) for memory_s in (MEMORY_S, BURST_S, JOBS_MEMORY_S))
    grown = replace(
        pacer,
        at=now,
        rate=grown_rate(pacer, elapsed_s, policy),
        sent=pacer.sent * fades + felt.sent,
        ok=pacer.ok * fades + felt.ok,
        lost=pacer.lost * fades + lost,
        sent_now=pacer.sent_now * fades_now + felt.sent,
        lost_now=pacer.lost_now * fades_now + lost,
        jobs=pacer.jobs * fades_slowly + felt.jobs,
        again=pacer.again * fades_slowly + felt.again,
    )
    grown = studied(grown, felt)
    most = min([most_of(grown, policy), *(1.3 * rate for rate, _ in ceilings(grown, limits, policy))])
    return cut(replace(grown, rate=min(grown.rate, most)), felt)


def most_of(pacer: Pacer, policy: PacePolicy) -> float:
    """The rate must not run away from what is really sent."""
    lately = max(pacer.sent / MEMORY_S, pacer.sent_now / BURST_S)
    return max(2 * policy.start_rate, 2 * lately + 1)


def studied(pacer: Pacer, felt: Felt) -> Pacer:
    """With what whole answers were like."""
    if felt.ok:
        answer_s = mean(pacer.answer_s, pacer.answers, felt.took_s, felt.ok)
        pacer = replace(pacer, answers=min(MOST_ANSWERS, pacer.answers + felt.ok), answer_s=answer_s)
    if felt.told:
        read, written = (
            mean(known, pacer.told, new, felt.told)
            for known, new in ((pacer.input_tokens, felt.input_tokens), (pacer.output_tokens, felt.output_tokens))
        )
        told = min(MOST_ANSWERS, pacer.told + felt.told)
        pacer = replace(pacer, told=told, input_tokens=read, output_tokens=written)
    return pacer


def mean(known: float, of: float, new: float, n: float) -> float:
    """What was known of so many, with n more that come to `new` altogether.

    >>> mean(10.0, 3, 2.0, 1)
    8.0
    """
    return known + n / min(MOST_ANSWERS + n, of + n) * (new / n - known)


def grown_rate(pacer: Pacer, elapsed_s: float, policy: PacePolicy) -> float:
    if pacer.at < pacer.quiet_until:
        return pacer.rate
    if pacer.slow_start and pacer.rate < pacer.ssthresh:
        doubles_in_s = max(policy.double_s, 1.5 * pacer.answer_s)
        return min(pacer.rate * math.exp2(elapsed_s / doubles_in_s), max(pacer.ssthresh, pacer.rate))
    if pacer.at - pacer.cut_at <= pacer.answer_s:
        return pacer.rate
    below, around = pacer.rate < BELOW * pacer.best, pacer.rate < BEYOND * pacer.best
    usual = GROWTH_AROUND if around else GROWTH_BEYOND
    growth = GROWTH_BELOW if below else usual if pacer.steady else GROWTH_UNSTEADY
    return pacer.rate + growth * max(2.0, pacer.rate) * elapsed_s


def cut(pacer: Pacer, felt: Felt) -> Pacer:
    """Less, if the provider cannot follow: at most once in the time that its answer to that takes, and of each loss once."""
    since_s = pacer.at - pacer.cut_at
    if felt.throttled:
        quiet_until = max(pacer.quiet_until, pacer.at + min(felt.quiet_s, MOST_QUIET_S))
        pacer = replace(pacer, quiet_until=quiet_until)
        if since_s > 0.5 * pacer.answer_s:
            return replace(pacer, rate=THROTTLED_CUT * pacer.rate, cut_at=pacer.at, slow_start=False)
    if not pacer.is_congested or since_s <= max(LEAST_PAUSE_S, 0.6 * pacer.answer_s):
        return pacer
    best, least = best_now(pacer), LEAST_CUT * pacer.rate
    steady = pacer.steady
    if since_s > MEMORY_S:
        more = 1 / (1 - BEST_CHANGED) if steady else BEYOND  # who was steady is so until it clearly bears more
        steady = borne(pacer) <= more * pacer.best < math.inf
    if since_s <= AGAIN * pacer.answer_s:
        rate = min(CUT_AGAIN * pacer.rate, max(CUT_TO_DELIVERED * pacer.delivered, least))
    else:
        rate = max(least, min(CUT_TO_DELIVERED * pacer.rate, CUT_TO_BEST * best))
    return replace(
        pacer,
        rate=max(min(0.5, pacer.rate), rate),
        best=best,
        steady=steady,
        cut_at=pacer.at,
        slow_start=False,
        lost=0.0,
        lost_now=0.0,
    )


def borne(pacer: Pacer) -> float:
    """What the provider delivers just now."""
    return min(pacer.rate, max(pacer.delivered, 0.5 * pacer.rate))


def best_now(pacer: Pacer) -> float:
    """What the provider can bear, as far as is known: what it delivers just now, evened out."""
    found = borne(pacer)
    if not (1 - BEST_CHANGED) * pacer.best <= found <= pacer.best / (1 - BEST_CHANGED):
        return found
    return BEST_KEPT * pacer.best + (1 - BEST_KEPT) * found


def ceiling(limit: Limit, policy: PacePolicy) -> float:
    """What the provider's own limit allows, less a cushion for bursts of live calls."""
    own = policy.share * limit.per_s
    missing = policy.share * (limit.left - CUSHION_S * limit.per_s) / STEERING_S
    return own + min(max(missing, -0.5 * own), 0.3 * own)


def ceilings(pacer: Pacer, limits: Limits, policy: PacePolicy) -> list[tuple[float, Factor]]:
    """What each of the provider's limits allows, in calls per second."""
    found: list[tuple[float, Factor]] = []
    for kind, limit in limits.items():
        if each := pacer.each(kind):
            factor: Factor = "provider limit" if kind == "requests" else "token limit"
            found.append((max(LEAST_RATE, ceiling(limit, policy) / each), factor))
    return found


def decayed(rate: float, age_s: float, policy: PacePolicy) -> float:
    """A pace that nobody has renewed for so long: nobody knows whether the provider still bears it.

    >>> [decayed(40.0, age_s, PacePolicy(start_rate=2.0)) for age_s in (1.0, 7.0, 3600.0)]
    [40.0, 20.0, 2.0]
    """
    return max(min(rate, policy.start_rate), rate * math.exp2(-max(0.0, age_s - FRESH_S) / HALVED_S))


@dataclass(frozen=True, slots=True)
class Pace:
    """Model calls per second, and what keeps it from being higher."""

    rate: float
    factor: Factor


def pace_of(
    breaker: Breaker, pacer: Pacer, limits: Limits, *, now: float, policy: PacePolicy, most_in_flight: float = math.inf
) -> Pace:
    """The pace that a breaker allows just now. `most_in_flight`: calls that the settings allow at one time, of all processes.

    >>> policy, pacer = PacePolicy(start_rate=2.0), Pacer(at=100.0, rate=8.0)
    >>> pace_of(Breaker(state="recovering", since=100), pacer, {}, now=101, policy=policy)
    Pace(rate=8.0, factor='ramp')
    >>> [pace_of(Breaker(state="suspect", since=100), pacer, {}, now=at, policy=policy).rate for at in (101, 161)]
    [0.0, 2.0]
    >>> pace_of(Breaker(state="open", since=100), pacer, {}, now=200, policy=policy)
    Pace(rate=0.0, factor='open')
    """
    if breaker.is_down:
        return Pace(0.0, "open")
    if max(breaker.throttled_until, pacer.quiet_until) > now:
        return Pace(0.0, "quiet")
    if breaker.state == "suspect":
        return Pace(policy.start_rate if now - breaker.since >= PATIENCE_S else 0.0, "suspect")
    if breaker.state == "recovering" and breaker.flaps >= FLAPPY and now - breaker.recovered_at < FLAP_S:
        return Pace(policy.start_rate, "flapping")
    bounds: list[tuple[float, Factor]] = [(pacer.rate, "ramp" if pacer.slow_start else "congestion")]
    bounds += ceilings(pacer, limits, policy)
    caps = [
        policy.max_rate,
        most_in_flight / max(0.01, pacer.answer_s) if pacer.answers else None,
    ]  # Little 1961: L = rate x time
    if policy.max_tokens_per_minute is not None and (each := pacer.each("tokens")):
        caps.append(policy.max_tokens_per_minute / 60 / each)
    bounds += [(cap, "own cap") for cap in caps if cap is not None]
    return Pace(*min(bounds))
