# SPDX-License-Identifier: Apache-2.0
"""How fast a route that was down is used again: by all of its traffic, live and held. Rates are model calls per second.

A controller of rates, not of concurrency, because failures come quickly. Where the provider tells its limits (rate-limit
headers) they are a ceiling, steered so that a cushion for bursts is left. Below it the rate grows until the provider cannot
follow: slow start as TCP has it (Jacobson 1988), then carefully around the rate at which it could not follow last (as CUBIC, Ha
et al. 2008). One lost call is no congestion, only a share of them is; and what our own pace made fail opens no breaker.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from tideover.core.breaker import Breaker
from tideover.core.policy import PacePolicy

Factor = Literal["open", "suspect", "quiet", "flapping", "ramp", "congestion", "provider limit", "own cap"]
"""What keeps the pace from being higher: the breaker is open or suspect, the provider asked for quiet, the route opened often;
the rate still grows, or grew to what the provider could bear; its limit; a setting."""

PATIENCE_S = 60.0
"""How long nothing is released while a breaker is suspect. After that it is a brown-out, whose provider answers most calls."""
FLAPPY = 3
"""Who opened so often in a row, soon after it had recovered, is used at the floor."""

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
GROWTH_BELOW, GROWTH_AROUND, GROWTH_BEYOND = 0.06, 0.004, 0.015
"""A second, of the rate: well below the rate at which it could not follow, around it, and beyond."""
BELOW, BEYOND = 0.9, 1.05
MOST_ANSWERS = 50.0
"""How long whole answers take is learned of so many."""
BRAKED_TO = 0.7
"""After a brake slow start ends at this share of what was delivered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Felt:
    """What calls came to since last time. `lost`: overloaded, broken or overdue; `throttled`: 429; `took_s`: of whole answers,
    added up; `quiet_s`: the longest pause that was asked for."""

    sent: float = 0.0
    ok: float = 0.0
    lost: float = 0.0
    throttled: float = 0.0
    took_s: float = 0.0
    quiet_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Limit:
    """What the provider says of its limit: calls per second, and how many are left just now."""

    per_s: float
    left: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pacer:
    """Where the controller stands. Instants are unix time.

    `rate`: what the provider is believed to bear; `slow_start` ends at the first congestion or at `ssthresh`; `best`: the rate
    at which it could not follow last; `sent`, `ok`, `lost`: fading with `MEMORY_S`, `sent_now`, `lost_now` with `BURST_S`;
    `answer_s`: how long whole answers take, of the last fifty or so (`answers`); `quiet_until`: the provider asked for quiet;
    `deaf_until`: losses until then are of calls that began before a brake.
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


def begun(now: float, policy: PacePolicy) -> Pacer:
    """At the start of a recovery."""
    return Pacer(at=now, rate=policy.start_rate)


def unheard(pacer: Pacer, released: int, usual_per_s: float, *, now: float, policy: PacePolicy) -> Pacer:
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


def after(pacer: Pacer, felt: Felt, limit: Limit | None, *, now: float, policy: PacePolicy) -> Pacer:
    """What the controller believes after more calls. `limit` None: the provider does not tell it.

    >>> policy = PacePolicy(start_rate=2, double_s=6)
    >>> pacer = begun(0.0, policy)
    >>> for second in range(1, 13):
    ...     pacer = after(pacer, Felt(sent=pacer.rate, ok=pacer.rate, took_s=pacer.rate), None, now=second, policy=policy)
    >>> round(pacer.rate)
    8
    """
    elapsed_s = max(0.0, now - pacer.at)
    lost = 0.0 if now < pacer.deaf_until else felt.lost
    fades, fades_now = math.exp(-elapsed_s / MEMORY_S), math.exp(-elapsed_s / BURST_S)
    grown = replace(
        pacer,
        at=now,
        rate=grown_rate(pacer, elapsed_s, policy),
        sent=pacer.sent * fades + felt.sent,
        ok=pacer.ok * fades + felt.ok,
        lost=pacer.lost * fades + lost,
        sent_now=pacer.sent_now * fades_now + felt.sent,
        lost_now=pacer.lost_now * fades_now + lost,
        answers=min(MOST_ANSWERS, pacer.answers + felt.ok),
        answer_s=answer_s(pacer, felt),
    )
    most = most_of(grown, policy)
    most = most if limit is None else min(most, 1.3 * ceiling(limit, policy))
    return cut(replace(grown, rate=min(grown.rate, most)), felt)


def most_of(pacer: Pacer, policy: PacePolicy) -> float:
    """The rate must not run away from what is really sent."""
    lately = max(pacer.sent / MEMORY_S, pacer.sent_now / BURST_S)
    return max(2 * policy.start_rate, 2 * lately + 1)


def answer_s(pacer: Pacer, felt: Felt) -> float:
    if not felt.ok:
        return pacer.answer_s
    weight = felt.ok / min(MOST_ANSWERS + felt.ok, pacer.answers + felt.ok)
    return pacer.answer_s + weight * (felt.took_s / felt.ok - pacer.answer_s)


def grown_rate(pacer: Pacer, elapsed_s: float, policy: PacePolicy) -> float:
    if pacer.at < pacer.quiet_until:
        return pacer.rate
    if pacer.slow_start and pacer.rate < pacer.ssthresh:
        doubles_in_s = max(policy.double_s, 1.5 * pacer.answer_s)
        return min(pacer.rate * math.exp2(elapsed_s / doubles_in_s), max(pacer.ssthresh, pacer.rate))
    if pacer.at - pacer.cut_at <= pacer.answer_s:
        return pacer.rate
    below, around = pacer.rate < BELOW * pacer.best, pacer.rate < BEYOND * pacer.best
    growth = GROWTH_BELOW if below else GROWTH_AROUND if around else GROWTH_BEYOND
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
    if since_s <= AGAIN * pacer.answer_s:
        rate = min(CUT_AGAIN * pacer.rate, max(CUT_TO_DELIVERED * pacer.delivered, least))
    else:
        rate = max(least, min(CUT_TO_DELIVERED * pacer.rate, CUT_TO_BEST * best))
    return replace(pacer, rate=max(0.5, rate), best=best, cut_at=pacer.at, slow_start=False, lost=0.0, lost_now=0.0)


def best_now(pacer: Pacer) -> float:
    """What the provider can bear, as far as is known: what it delivered just now, evened out."""
    found = min(pacer.rate, max(pacer.delivered, 0.5 * pacer.rate))
    if not (1 - BEST_CHANGED) * pacer.best <= found <= pacer.best / (1 - BEST_CHANGED):
        return found
    return BEST_KEPT * pacer.best + (1 - BEST_KEPT) * found


def ceiling(limit: Limit, policy: PacePolicy) -> float:
    """What the provider's own limit allows, less a cushion for bursts of live calls."""
    own = policy.share * limit.per_s
    missing = policy.share * (limit.left - CUSHION_S * limit.per_s) / STEERING_S
    return max(0.2, own + min(max(missing, -0.5 * own), 0.3 * own))


@dataclass(frozen=True, slots=True)
class Pace:
    """Model calls per second, and what keeps it from being higher."""

    rate: float
    factor: Factor


def pace_of(breaker: Breaker, pacer: Pacer, limit: Limit | None, *, now: float, policy: PacePolicy) -> Pace:
    """The pace that a breaker allows just now.

    >>> policy, pacer = PacePolicy(start_rate=2.0), Pacer(at=100.0, rate=8.0)
    >>> pace_of(Breaker(state="recovering", since=100), pacer, None, now=101, policy=policy)
    Pace(rate=8.0, factor='ramp')
    >>> [pace_of(Breaker(state="suspect", since=100), pacer, None, now=at, policy=policy).rate for at in (101, 161)]
    [0.0, 2.0]
    >>> pace_of(Breaker(state="open", since=100), pacer, None, now=200, policy=policy)
    Pace(rate=0.0, factor='open')
    """
    if breaker.is_down:
        return Pace(0.0, "open")
    if max(breaker.throttled_until, pacer.quiet_until) > now:
        return Pace(0.0, "quiet")
    if breaker.state == "suspect":
        return Pace(policy.start_rate if now - breaker.since >= PATIENCE_S else 0.0, "suspect")
    if breaker.state == "recovering" and breaker.flaps >= FLAPPY:
        return Pace(policy.start_rate, "flapping")
    bounds: list[tuple[float, Factor]] = [(pacer.rate, "ramp" if pacer.slow_start else "congestion")]
    if limit is not None:
        bounds.append((ceiling(limit, policy), "provider limit"))
    if policy.max_rate is not None:
        bounds.append((policy.max_rate, "own cap"))
    return Pace(*min(bounds))
