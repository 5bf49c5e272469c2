# SPDX-License-Identifier: Apache-2.0
"""Who goes first: tenants take turns, deadlines come before turns, and neither starves the other."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from tideover.core.fairness import HEAD_START, in_turns

URGENT_BY = 100


class Waiting(NamedTuple):
    tenant: str
    order: int
    number: int

    @property
    def urgent(self) -> bool:
        return self.order < URGENT_BY


def turns(waiting: list[Waiting]) -> list[Waiting]:
    return in_turns(waiting, tenant=lambda job: job.tenant, order=lambda job: job.order, urgent_by=URGENT_BY)


def of_tenants(names: str) -> st.SearchStrategy[list[Waiting]]:
    """Jobs of these tenants in any order, many with one order; the first of them has the most."""
    order = st.integers(0, 3 * URGENT_BY) | st.sampled_from((0, URGENT_BY - 1, URGENT_BY))
    jobs = st.lists(st.tuples(st.sampled_from(names[0] * 2 + names), order), max_size=60)
    return jobs.map(lambda made: [Waiting(*job, n) for n, job in enumerate(made)])


def by_tenant(jobs: list[Waiting]) -> dict[str, list[Waiting]]:
    found: defaultdict[str, list[Waiting]] = defaultdict(list)
    for job in jobs:
        found[job.tenant].append(job)
    return found


@given(of_tenants("abc"))
def test_all_go_and_each_once(waiting: list[Waiting]) -> None:
    """Nobody is added, left out or doubled."""
    assert Counter(waiting) == Counter(turns(waiting))


@given(of_tenants("abc"), st.dictionaries(st.sampled_from("abc"), st.sampled_from((0.5, 1.0, 3.0))))
def test_a_tenant_gets_as_many_as_its_weight_says(waiting: list[Waiting], weights: dict[str, float]) -> None:
    """Of those who wait all along, in proportion, within a turn; urgent ones aside."""
    calm = [job for job in waiting if not job.urgent]
    tenant, order = (lambda job: job.tenant), (lambda job: job.order)
    went = in_turns(calm, tenant=tenant, order=order, urgent_by=0, weights=weights)
    left, gone = Counter(job.tenant for job in calm), Counter[str]()
    for job in went:
        shares = {name: gone[name] / weights.get(name, 1.0) for name in left if left[name] > gone[name]}
        assert shares[job.tenant] < min(shares.values()) + max(1.0, 1 / weights.get(job.tenant, 1.0))
        gone[job.tenant] += 1


@given(of_tenants("a"))
def test_one_tenant_goes_by_deadline_alone(waiting: list[Waiting]) -> None:
    """Where nobody says whose a job is, the earliest goes first; of equals, the one that was named first."""
    assert sorted(waiting, key=lambda job: job.order) == turns(waiting)


@given(of_tenants("abc"))
def test_a_tenant_s_own_jobs_keep_their_order(waiting: list[Waiting]) -> None:
    """Turns and head starts decide between tenants, never among the jobs of one."""
    for jobs in by_tenant(turns(waiting)).values():
        assert sorted(jobs, key=lambda job: job.order) == jobs


@given(of_tenants("ab"))
def test_two_tenants_alternate(waiting: list[Waiting]) -> None:
    """Between two jobs of one go two of the other at the most; where its urgent ones end, HEAD_START more."""
    order = turns(waiting)
    for tenant in "ab":
        own = [n for n, job in enumerate(order) if job.tenant == tenant]
        for before, after in pairwise(own):
            between = sum(1 for job in order[before:after] if job.tenant != tenant)
            jump = order[before].urgent and not order[after].urgent
            assert between <= 2 + (HEAD_START if jump else 0)


@given(of_tenants("abc"))
def test_nobody_starves(waiting: list[Waiting]) -> None:
    """Before the k-th job of a tenant, counted from 0, go at most k + 1 + HEAD_START of each other, however many it has."""
    order = turns(waiting)
    for jobs in by_tenant(order).values():
        for k, job in enumerate(jobs):
            ahead = Counter(other.tenant for other in order[: order.index(job)] if other.tenant != job.tenant)
            assert max(ahead.values(), default=0) <= k + 1 + HEAD_START


@given(of_tenants("abc"))
def test_what_is_urgent_is_not_late_for_others_turns(waiting: list[Waiting]) -> None:
    """A tenant's first HEAD_START + 1 urgent jobs go before all that can wait; each after them waits one turn more."""
    order = turns(waiting)
    for jobs in by_tenant(order).values():
        for nth, job in enumerate(job for job in jobs if job.urgent):
            unhurried = Counter(other.tenant for other in order[: order.index(job)] if not other.urgent)
            assert max(unhurried.values(), default=0) <= max(0, nth - HEAD_START)


@given(of_tenants("abc"))
def test_the_most_urgent_of_all_goes_first(waiting: list[Waiting]) -> None:
    """Whatever the tenants: the first place is that of the earliest order."""
    assert min((job.order for job in waiting), default=None) == next((job.order for job in turns(waiting)), None)


def test_a_small_tenant_beside_a_flood() -> None:
    """Two jobs of one tenant, held after a thousand of another, go second and fourth."""
    flood = [Waiting("flood", URGENT_BY + n, n) for n in range(1000)]
    small = [Waiting("small", 9 * URGENT_BY + n, n) for n in range(2)]
    tenants = [job.tenant for job in turns([*flood, *small])]
    assert ["flood", "small", "flood", "small", "flood"] == tenants[:5]
    assert {"flood"} == set(tenants[5:])
