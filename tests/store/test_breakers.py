# SPDX-License-Identifier: Apache-2.0
"""Breakers as all processes share them: what is counted, and who may move them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tideover import clock
from tideover.core import detector
from tideover.core.breaker import CLOSED, Breaker, Forced, IllegalTransition, Transition, Witnesses
from tideover.core.detector import Base, Charts, Run, Steps
from tideover.store.breakers import Batch, Reading, breaker_of

if TYPE_CHECKING:
    from tests.conftest import WaitUntil
    from tests.store.conftest import House

KEY = "a/m"


def report(house: House, *runs: Run, era: int = 0, process: str = "p", why: str = "", base: Base | None = None) -> Reading:
    known = None if base is None else Breaker(base=base, version=-1)
    return house.breakers.report(KEY, process, Batch(era=era, runs=runs, why=why), known=known)


RUNS = st.lists(st.tuples(st.sampled_from(["ok", "failed", "back", "lapsed"]), st.integers(1, 9)), max_size=8)


@given(batches=st.lists(RUNS, max_size=5), calls=st.floats(0, 1e6), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_script_moves_the_charts_as_the_core_does(
    house: House, batches: list[list[Run]], calls: float, share: float
) -> None:
    """Whatever comes in, from however many processes: one statistic, computed in one place for all and in each for itself."""
    house.client.flushdb()
    base = Base(calls=calls, failed=calls * share)
    charts = Charts()
    for batch in batches:
        charts = detector.after(charts, batch, Steps.of(base))
        read = report(house, *batch, base=base).breaker.charts
        assert (charts.calls, charts.failed, charts.ok, charts.row) == (read.calls, read.failed, read.ok, read.row)
        now = pytest.approx((charts.brownout, charts.blackout, charts.majority), abs=1e-4)
        assert now == (read.brownout, read.blackout, read.majority)


def test_only_the_current_era_counts(house: House) -> None:
    """A call that began before the breaker opened says nothing of now, and one from the future is nobody's."""
    assert 2 == house.move("open", "half-open", "recovering").era
    for era in (0, 1, 3):
        assert Charts() == report(house, ("failed", 9), era=era, why="old news").breaker.charts
    now = report(house, ("failed", 1), era=2, why="new").breaker
    assert (1, "new") == (now.charts.failed, now.why)


def test_an_open_breaker_takes_no_evidence(house: House) -> None:
    """What calls say that were under way is known already; probes decide."""
    report(house, ("failed", 4))
    opened = house.move("open")
    assert opened.charts == report(house, ("ok", 99), era=opened.era).breaker.charts


def test_what_is_usual_is_learned_in_quiet_times_only(house: House) -> None:
    """A brown-out that lasts for hours must not become what is usual."""
    learned = report(house, ("ok", 900), ("failed", 1), ("ok", 99)).breaker.base
    assert (1000, 1) == (learned.calls, learned.failed)
    assert learned == report(house, ("failed", 5), base=learned).breaker.base
    assert learned.failed == report(house, ("ok", 1), base=learned).breaker.base.failed


def test_processes_that_report_are_counted(house: House) -> None:
    """Each once, and as failing as long as its latest call failed."""
    assert Witnesses(reporters=1, failing=1) == report(house, ("ok", 1), ("failed", 1), process="p1").by
    assert Witnesses(reporters=2, failing=1) == report(house, ("failed", 1), ("ok", 1), process="p2").by
    assert Witnesses(reporters=2, failing=2) == report(house, ("failed", 1), process="p2").by
    assert Witnesses(reporters=2, failing=1) == report(house, ("ok", 1), process="p1").by
    reading = house.breakers.report(KEY, "operator")
    assert Witnesses(reporters=2, failing=1) == reading.by
    for key in (house.keys.reporters(KEY), house.keys.failing(KEY)):
        house.client.zadd(key, {b"p1": (reading.now - 61) * 1000})
    assert Witnesses(reporters=1, failing=1) == house.breakers.report(KEY, "operator").by


def test_latencies_add_up(house: House) -> None:
    """Those of all processes, whatever is thought of the route meanwhile: how long an answer took is a fact."""
    for n in (1, 2):
        house.breakers.report(KEY, "p", Batch(era=0, runs=[("ok", n)], latencies={"s4": n, "p-3": 1}))
    house.breakers.report(KEY, "p", Batch(era=0, runs=[("failed", 9)], latencies={"s4": 100}))
    house.move("open")
    house.breakers.report(KEY, "p", Batch(era=0, runs=[("ok", 1)], latencies={"p21": 1}))
    assert {"s4": 103, "p-3": 2, "p21": 1} == house.breakers.latencies(KEY)


def test_of_many_who_saw_the_same_one_moves_it(house: House, valkey_url: str) -> None:
    """State, generation, era and fence as seen are the fence, so an opening is one opening."""

    def move(_: int) -> bool:
        with redis.Redis.from_url(valkey_url) as own:
            breakers = type(house)(own, house.keys).breakers
            return breakers.transition(KEY, CLOSED, Transition(to="open", why="why"), clock.now())

    with ThreadPoolExecutor(8) as pool:
        assert [False] * 7 + [True] == sorted(pool.map(move, range(8)))
    assert ("open", 1) == (house.breaker().state, house.breaker().generation)
    assert {"openings": 1} == house.registry.counters()


def test_of_many_who_would_probe_one_does(house: House, valkey_url: str) -> None:
    """And its number is the highest that was ever given out."""
    opened = house.move("open")

    def begin(_: int) -> bool:
        with redis.Redis.from_url(valkey_url) as own:
            return type(house)(own, house.keys).breakers.begin_probe(KEY, opened, 30.0, clock.now()) is not None

    with ThreadPoolExecutor(8) as pool:
        assert [False] * 7 + [True] == sorted(pool.map(begin, range(8)))
    taken = house.breaker()
    assert ("half-open", 1) == (taken.state, taken.fence)
    assert 29 < taken.probing_until - clock.now() <= 31


def test_a_stalled_prober_moves_nothing(house: House) -> None:
    """Its lease was over, another one asks: what it says at last is of no weight."""
    late = house.breakers.begin_probe(KEY, house.move("open"), 0.0, clock.now())
    assert late is not None
    taken = house.breakers.begin_probe(KEY, house.breaker(), 30.0, clock.now())
    assert taken is not None
    for to in ("open", "recovering"):
        assert not house.breakers.transition(KEY, late, Transition(to=to, why="late"), clock.now())  # type: ignore[arg-type]
    house.breakers.end_probe(KEY, late.fence)
    assert house.breaker().probing_until > clock.now()
    assert house.breakers.transition(KEY, house.breaker(), Transition(to="recovering", why="answered"), clock.now())


def test_a_closed_breaker_may_be_probed_without_moving(house: House) -> None:
    """One process at a time asks where there is doubt, and gives the leave back."""
    report(house, ("failed", 1))
    taken = house.breakers.begin_probe(KEY, house.breaker(), 30.0, clock.now())
    assert taken is not None
    assert ("closed", 1, taken.charts) == (house.breaker().state, house.breaker().fence, house.breaker().charts)
    house.breakers.end_probe(KEY, taken.fence)
    assert 0 == house.breaker().probing_until
    house.breakers.end_probe(KEY, taken.fence)  # twice does no harm


@pytest.mark.parametrize(
    "seen",
    [Breaker(generation=2), Breaker(state="recovering"), Breaker(era=1), Breaker(fence=1)],
)
def test_who_saw_it_elsewhere_moves_nothing(house: House, seen: Breaker) -> None:
    """Neither another generation, state, era nor prober will do."""
    assert not house.breakers.transition(KEY, seen, Transition(to="open", why="why"), clock.now())
    assert house.breaker() == CLOSED


def test_an_illegal_change_does_not_reach_redis(house: House) -> None:
    """The table of `core.breaker` is the only one."""
    with pytest.raises(IllegalTransition, match="closed -> recovering"):
        house.breakers.transition(KEY, CLOSED, Transition(to="recovering", why="why"), clock.now())


def test_failed_probes_are_counted_until_the_next_opening(house: House) -> None:
    """The pause between probes grows with them; it starts anew when a route that had recovered fails again."""
    breaker = house.move("open", "half-open", "open", "half-open", "open")
    assert (2, 1) == (breaker.probes_failed, breaker.generation)
    again = house.move("half-open", "recovering", "open")
    assert (0, 2, 1) == (again.probes_failed, again.generation, again.flaps)
    assert breaker.opened_at <= again.opened_at == again.since


def test_a_recovery_forgets_who_failed(house: House) -> None:
    """The processes whose latest call failed before it are no witnesses of what comes after."""
    report(house, ("failed", 1), process="p1")
    report(house, ("failed", 1), process="p2")
    house.move("open", "half-open", "recovering")
    assert 0 == house.breakers.report(KEY, "operator").by.failing


def test_who_asks_a_parked_route_still_knows_why(house: House) -> None:
    """A probe that fails leaves it parked; one that is answered ends that."""
    parking = Transition(to="open", why="401", parked="auth", probe_at=clock.now(), credential="digest")
    assert house.breakers.transition(KEY, house.breaker(), parking, clock.now())
    taken = house.breakers.begin_probe(KEY, house.breaker(), 30.0, clock.now())
    assert taken is not None
    assert ("half-open", "auth", "digest") == (taken.state, taken.parked, taken.credential)
    assert taken.parked == house.breaker().parked
    assert house.breakers.transition(KEY, taken, Transition(to="recovering", why="probes answered"), clock.now())
    assert ("", "") == (house.breaker().parked, house.breaker().credential)


def test_parking_is_written_and_taken_back(house: House) -> None:
    """With its date, and a digest of the credential that was refused."""
    date = float(int(clock.now()) + 3600)
    parking = Transition(to="open", why="402", parked="quota", probe_at=date, credential="digest")
    assert house.breakers.transition(KEY, CLOSED, parking, clock.now())
    assert ("quota", date, "digest") == (house.breaker().parked, house.breaker().probe_at, house.breaker().credential)
    back = house.move("recovering")
    assert ("", 0, "") == (back.parked, back.probe_at, back.credential)


def test_an_operators_word_lies_over_what_is_computed(house: House) -> None:
    """It has an end by Redis' clock, moves no generation, and goes without a trace."""
    opened = house.move("open")
    forced = house.breakers.force(KEY, "closed", 60.0, "me", "I know better")
    assert forced.forced is not None
    assert Forced(state="closed", until=forced.forced.until, who="me", why="I know better") == forced.forced
    assert 59 < forced.forced.until - clock.now() <= 61
    assert opened == replace(forced, forced=None, version=opened.version)
    assert [True, False] == [house.breakers.unforce(KEY), house.breakers.unforce(KEY)]
    assert opened == replace(house.breaker(), version=opened.version)


def test_who_knows_a_breaker_is_told_what_is_new(house: House) -> None:
    """The evidence only; all of it as soon as something else has changed, whoever changed it."""
    known = house.breakers.report(KEY, "p1", Batch(era=0, runs=[("ok", 5), ("failed", 1)], why="529")).breaker
    for changes in (0, 1):
        told = house.breakers.report(KEY, "p1", Batch(era=0, runs=[("ok", 1), ("failed", 1)], why="500"), known=known).breaker
        assert house.breaker() == told
        assert (changes, "500") == (told.version - known.version, told.why)
        known = told
        house.breakers.force(KEY, "open", 60.0, "me", "why")
    house.breakers.unforce(KEY)
    house.breakers.report(KEY, "p2", quiet_s=5)
    told = house.breakers.report(KEY, "p1", Batch(era=0, runs=[("ok", 1)]), known=known).breaker
    assert house.breaker() == told


def test_what_others_reported_is_told_too(house: House) -> None:
    """However old the caller's view is, and even if its own evidence comes too late to count: it judges by what is true."""
    report(house, ("failed", 2), process="p2", why="529")
    late = Batch(era=7, runs=[("failed", 1)])
    assert house.breaker() == house.breakers.report(KEY, "p1", late, known=CLOSED).breaker
    known = house.breaker()
    report(house, ("ok", 40), process="p2")
    for batch in (late, None):
        told = house.breakers.report(KEY, "p1", batch, known=known).breaker
        assert house.breaker() == told != known


def test_credentials_are_known_by_digest(house: House) -> None:
    """Each with the time when it last worked; those of other routes are no concern."""
    house.breakers.note_credential("a", "one", 5.0)
    house.breakers.note_credential("a", "two", 6.0)
    house.breakers.note_credential("ab", "three", 7.0)
    assert {"one": 5.0, "two": 6.0} == house.breakers.credentials("a")


def test_quiet_that_a_provider_asked_for_is_never_shortened(house: House) -> None:
    """The longest pause stands; nobody who did not ask moves it."""
    now = house.breakers.report(KEY, "p", quiet_s=30).now
    house.breakers.report(KEY, "p", quiet_s=2)
    house.breakers.report(KEY, "p")
    assert now + 30 == pytest.approx(house.breaker().throttled_until, abs=0.01)


def test_news_name_the_breaker_that_changed(house: House, wait_until: WaitUntil) -> None:
    """Who follows the breakers hears of each change and each longer quiet, and of nothing else."""
    news = house.breakers.listen()
    heard: set[str] = set()

    def listen(n: int) -> bool:
        heard.update(news.heard(0.01))
        return len(heard) >= n

    report(house, ("failed", 1))
    house.move("open")
    house.breakers.report("b/m", "p", quiet_s=5)
    house.breakers.report("b/m", "p", quiet_s=1)
    house.breakers.force("b/*", "open", 5.0, "me", "why")
    house.registry.set_bypass({}, None)
    wait_until(lambda: listen(4), within_s=5, description="four news")
    news.close()
    assert {"a/m", "b/m", "b/*", "bypass"} == heard


def test_a_breaker_is_read_as_it_was_written(house: House) -> None:
    """All readers see the same; one that nobody ever reported is closed, and asking for it leaves no trace."""
    report(house, ("failed", 1), why="529")
    breaker = house.move("open")
    assert {KEY: breaker, "never/seen": CLOSED} == house.breakers.read([KEY, "never/seen"])
    assert breaker == house.breakers.report(KEY, "p").breaker
    house.breakers.report("never/seen", "p")
    assert [KEY] == house.breakers.keys_known()
    assert CLOSED == breaker_of({})


def test_the_last_burst_of_probes_is_remembered(house: House) -> None:
    """When it ended, and what it said."""
    house.move("open", "half-open")
    assert house.breakers.transition(KEY, house.breaker(), Transition(to="open", why="529"), clock.now())
    failed = house.breaker()
    assert ("529", 1) == (failed.probe_said, failed.probes_failed)
    assert clock.now() - 5 < failed.probed_at <= clock.now() + 1
    house.move("half-open", "recovering", "closed")
    assert ("why", True) == (house.breaker().probe_said, house.breaker().probed_at >= failed.probed_at)
