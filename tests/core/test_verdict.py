# SPDX-License-Identifier: Apache-2.0
"""The one sentence: what it says first, and what it says of each state. Pure: no store, no clock."""

from __future__ import annotations

from dataclasses import replace

from tideover.core.breaker import State
from tideover.core.job import ENDS
from tideover.ops.held import HeldGroup
from tideover.ops.standing import BreakerStatus, Bypass, RouteStatus, Standing, TaskStatus, WorkerStatus
from tideover.ops.verdict import overall, verdict

NOW = 1_000_000.0
KEY, SPARE = "anthropic/m", "openai/m"

WORKER = WorkerStatus(
    id="w",
    host="vm",
    pid=7,
    mode="act",
    version="0.1.0",
    queues=("default",),
    since_at=NOW - 60,
    seen_at=NOW,
    silent=False,
    apart=(),
)
ROUTES = (
    RouteStatus(name="anthropic", kind="anthropic", models={}),
    RouteStatus(name="openai", kind="openai-compatible", models={"m": "gpt-5.5"}),
)
REPLY = TaskStatus(name="reply", queue="default", criticality="critical", routes=("anthropic", "openai"), models=("m",))
WELL = Standing(
    namespace="shop",
    asked_at=NOW,
    mode="act",
    bypass=None,
    accepted=10,
    queued=0,
    delayed=0,
    running=0,
    held=0,
    needs_review=0,
    ends={**dict.fromkeys(ENDS, 0), "succeeded": 10},
    lost=0,
    not_adopted=0,
    lanes=(),
    breakers=(),
    routes=ROUTES,
    tasks=(REPLY,),
    workers=(WORKER,),
    strangers=(),
    held_groups=(),
    counters={},
)


def breaker(key: str, state: State, since_s: float = 180, quiet_s: float | None = None) -> BreakerStatus:
    return BreakerStatus(
        key=key,
        state=state,
        computed=state,
        parked=None,
        forced=None,
        probes_failed=0,
        probed_at=None,
        probe_said=None,
        brownout=0.0,
        blackout=0.0,
        threshold=12.0,
        calls=0,
        failed=0,
        is_brownout=False,
        usual_failure_rate=0.02,
        calls_per_s=0.0,
        would_close="",
        page=None,
        generation=1,
        since_at=NOW - since_s,
        opened_at=NOW - since_s,
        why="529 overloaded_error",
        throttled_until_at=None if quiet_s is None else NOW + quiet_s,
        next_probe_at=None,
        pace=8.0,
        limited_by="",
    )


def held(n: int, critical: int = 0, waits_for: tuple[str, ...] = (KEY,)) -> HeldGroup:
    return HeldGroup(waits_for=waits_for, reason="outage", jobs=n, critical=critical, oldest_at=NOW - 9, next_expiry_at=None)


DOWN = replace(WELL, held=40, held_groups=(held(40),), breakers=(breaker(KEY, "open"),))


def sentence(standing: Standing) -> str:
    return verdict(standing).sentence


def test_all_well() -> None:
    """Nothing to do is said in so many words."""
    assert sentence(WELL) == "All well: 2 routes closed, nothing held."
    assert sentence(replace(WELL, routes=())) == "All well: no worker has named its routes yet, nothing held."


def test_outage() -> None:
    """What is down, since when, why; what is held; what becomes of critical jobs, as far as tasks and routes tell."""
    head = "OUTAGE: anthropic/m open for 3 min (529 overloaded_error). 40 jobs held"
    assert sentence(DOWN) == f"{head}, critical ones rerouted to openai."
    both = replace(DOWN, breakers=(breaker(KEY, "open"), breaker(SPARE, "half-open")))
    assert sentence(both).endswith("40 jobs held; critical jobs of reply have no usable route.")
    stuck = replace(both, held_groups=(held(38), held(2, 2, (KEY, SPARE))))
    assert sentence(stuck).endswith("40 jobs held, 2 critical ones among them, for want of a usable route.")
    assert sentence(replace(DOWN, tasks=())) == f"{head}."
    no_model = replace(DOWN, routes=(ROUTES[0], replace(ROUTES[1], models={"other": "gpt"})))
    assert sentence(no_model).endswith("; critical jobs of reply have no usable route.")


def test_many_breakers() -> None:
    """A long list is cut."""
    five = replace(DOWN, breakers=tuple(breaker(f"anthropic/m{n}", "open") for n in range(5)), tasks=())
    assert sentence(five).count("open for 3 min") == 3
    assert " and 2 more. 40 jobs held." in sentence(five)


def test_recovering_throttled_draining() -> None:
    """The way back, and a provider that asks for quiet."""
    back = replace(DOWN, breakers=(breaker(KEY, "recovering", 12),))
    assert sentence(back) == "RECOVERING: anthropic/m for 12 s. 40 jobs held, coming home at 8 calls/s, live ones included."
    quiet = replace(DOWN, breakers=(breaker(KEY, "closed", quiet_s=3),))
    assert sentence(quiet) == "THROTTLED: anthropic/m asked for quiet for 3 s more. 40 jobs held."
    assert sentence(replace(DOWN, breakers=())) == "DRAINING: 40 jobs held, and no breaker stands in their way."


def test_lost_comes_first() -> None:
    """A lost job is the headline whatever else is wrong; the sum is shown, and the rest as remarks."""
    told = verdict(replace(DOWN, accepted=51, lost=1))
    assert told.level == "lost"
    assert told.sentence == "LOST 1 job: 51 accepted, but queued 0 + running 0 + held 40 + ended 10 = 50."
    assert [remark.partition(":")[0] for remark in told.remarks] == ["OUTAGE"]


def test_bypassed() -> None:
    """Who, since when, how much longer and why; then nobody is told that critical jobs are rerouted."""
    told = verdict(replace(DOWN, bypass=Bypass(who="mira@vm", why="drill", since_at=NOW - 60, until_at=NOW + 600)))
    assert told.sentence == "BYPASSED by mira@vm 60 s ago, for 10 min more (drill): 40 held jobs to be released."
    assert told.remarks == ("OUTAGE: anthropic/m open for 3 min (529 overloaded_error). 40 jobs held.",)


def test_review() -> None:
    """Jobs that wait for a human are told with the command that lists them, and read neither as an outage nor as a drain."""
    said = "REVIEW: 3 jobs need review: `tideover backlog --reason review`."
    stuck = replace(WELL, held=3, needs_review=3, held_groups=(replace(held(3), waits_for=(), reason="review"),))
    told = verdict(stuck)
    assert ("review", said, ()) == (told.level, told.sentence, told.remarks)
    assert sentence(replace(stuck, held=1, needs_review=1)).startswith("REVIEW: 1 job needs review: ")
    nobody_there = verdict(replace(stuck, workers=(replace(WORKER, silent=True),)))
    assert "review" == nobody_there.level
    beside = verdict(replace(DOWN, held=43, needs_review=3))
    assert ("outage", (said,)) == (beside.level, beside.remarks)
    assert "40 jobs held" in beside.sentence
    assert sentence(replace(stuck, breakers=(breaker(KEY, "recovering", 12),))).endswith("Nothing held.")
    off = verdict(replace(stuck, bypass=Bypass(who="mira@vm", why=None, since_at=None, until_at=None)))
    assert ("BYPASSED by mira@vm: nothing is held or rerouted.", (said,)) == (off.sentence, off.remarks)


def test_nobody_works() -> None:
    """Jobs that wait for workers which are not there are an alarm; without jobs a silent worker is a remark."""
    dead = replace(WORKER, silent=True)
    assert sentence(replace(WELL, workers=(dead,), queued=3)).startswith("NO WORKER is alive: 3 jobs wait")
    assert sentence(replace(WELL, workers=(), held=1, held_groups=(held(1),))).startswith("NO WORKER is alive: 1 job wait")
    told = verdict(replace(WELL, workers=(dead, WORKER)))
    assert (told.level, len(told.remarks)) == ("ok", 1)


def test_notices() -> None:
    """What is to be known but is no trouble stands below; an end that nobody explained is trouble."""
    told = verdict(replace(WELL, not_adopted=2, mode="observe"))
    assert (told.level, len(told.remarks)) == ("ok", 2)
    assert verdict(replace(WELL, ends={**WELL.ends, "unexplained": 1})).level == "unexplained"


def test_workers_without_tideover() -> None:
    """While they are about it is said first, and what is missing is no loss; afterwards it is a remark, for an hour."""
    about = verdict(replace(WELL, strangers=("w2",), strangers_seen_at=NOW, unaccounted=2))
    said = "MIXED: 1 worker without tideover: they hold nothing in an outage, and end jobs outside the account."
    assert ("mixed", f"{said} 2 jobs missing from the sum, maybe by their doing.") == (about.level, about.sentence)
    assert ("outage", said) == (lambda v: (v.level, v.remarks[0]))(verdict(replace(DOWN, strangers=("w2",))))
    gone = verdict(replace(WELL, strangers_seen_at=NOW - 600, ends={**WELL.ends, "elsewhere": 3}))
    told = "Workers without tideover were about until 10 min ago; 3 jobs ended outside the account."
    assert ("ok", (told,)) == (gone.level, gone.remarks)


def test_several_namespaces() -> None:
    """The worst one speaks for all, by name."""
    well, down = verdict(WELL), verdict(DOWN)
    assert overall([("a", well), ("b", down)]).sentence.startswith("b: OUTAGE: ")
    assert overall([("a", well), ("b", well)]).sentence == "All well in 2 namespaces."
    assert overall([("b", down)]) == down
    assert overall([]).level == "ok"
