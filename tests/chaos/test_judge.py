# SPDX-License-Identifier: Apache-2.0
"""The judge can fail: each promise that a run may break is reported, and nothing else is."""

from __future__ import annotations

from typing import Any, TypeAlias

import pytest
from tests.chaos.faults import KINDS, plan
from tests.chaos.judge import Verdict, judge, unfinished
from tests.chaos.ledger import note, read
from tests.chaos.load import units

Fault: TypeAlias = tuple[str, float, float, dict[str, Any]]
"""Kind, from, until, and what else the line says."""


class Tale:
    """Writes the lines of a run that nobody ran."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.runs = 0

    def add(self, what: str, at: float = 0.0, **facts: Any) -> None:
        self.lines.append({"at": at, "what": what, **facts})

    def send(self, *tags: str, kind: str = "single", sure: bool = True) -> None:
        self.add("accepted" if sure else "doubtful", unit=tags[0].partition(".")[0], kind=kind, tags=list(tags))

    def run(self, tag: str, start: float, end: float | None = None, ack: float | None = None, worker: str = "w0.1") -> None:
        """One run; without an end it was interrupted."""
        self.runs += 1
        self.add("started", start, tag=tag, run=str(self.runs), worker=worker)
        if end is not None:
            self.add("finished", end, tag=tag, run=str(self.runs), worker=worker)
        if ack is not None:
            self.add("acked", ack, tag=tag, worker=worker)

    def fault(self, kind: str, start: float, until: float, **facts: Any) -> None:
        self.add("fault", start, until=until, kind=kind, **facts)

    def books(self, accepted: int, difference: int = 0, **ends: int) -> None:
        self.add("account", 90.0, accepted=accepted, difference=difference, ends={"succeeded": accepted, "failed": 0} | ends)

    def judged(self) -> Verdict:
        return judge(sorted(self.lines, key=lambda line: line["at"]))


@pytest.fixture
def tale() -> Tale:
    return Tale()


def members_of(tale: Tale) -> tuple[str, ...]:
    """A group of two, its members run at 1 and 2."""
    tags = ("u1.0", "u1.1", "u1.2")
    tale.send(*tags, kind="group")
    tale.run("u1.0", 1.0, 1.1, 1.2)
    tale.run("u1.1", 2.0, 2.1, 2.2)
    return tags


# A run in which all is well


def test_all_is_well(tale: Tale) -> None:
    tale.send("u0.0")
    tale.run("u0.0", 1.0, 1.1, 1.2)
    _, _, callback = members_of(tale)
    tale.run(callback, 3.0, 3.1, 3.2)
    tale.send("u2.0", "u2.1", kind="pipeline")
    tale.run("u2.0", 1.0, 1.1, 1.2)
    tale.run("u2.1", 2.0, 2.1, 2.2)
    tale.add("result", tag="u0.0", right=True, said="u0.0")
    tale.books(6)
    verdict = tale.judged()
    assert [] == verdict.complaints
    assert (6, 6) == (verdict.accepted, verdict.succeeded)
    assert ({"complete": 1}, {"right": 1}) == (dict(verdict.pipelines), dict(verdict.results))
    assert (1, 0) == (verdict.callbacks["once"], verdict.callbacks["early"])


def test_a_hold_is_no_duplicate(tale: Tale) -> None:
    """A function that was interrupted by a hold, and acknowledged, starts from the top when it is released."""
    tale.send("u0.0")
    tale.run("u0.0", 1.0, None, 1.2)
    tale.run("u0.0", 5.0, 5.1, 5.2)
    assert ([], {}) == (tale.judged().complaints, tale.judged().duplicates)


# Lost, stuck, dead


def test_a_lost_job(tale: Tale) -> None:
    tale.send("u0.0")
    assert ["1 lost: u0.0"] == tale.judged().complaints
    assert ["u0.0"] == unfinished(tale.lines)


def test_a_job_that_started_and_was_never_seen_again(tale: Tale) -> None:
    tale.send("u0.0", sure=False)
    tale.run("u0.0", 1.0)
    assert ["1 lost: u0.0"] == tale.judged().complaints


def test_a_lost_step(tale: Tale) -> None:
    """A step is lost when the step before it has finished; a later one is not missed yet."""
    tale.send("u0.0", "u0.1", "u0.2", kind="pipeline")
    tale.run("u0.0", 1.0, 1.1, 1.2)
    verdict = tale.judged()
    assert ["1 lost: u0.1"] == verdict.complaints
    assert (2, {"incomplete": 1}) == (verdict.accepted, dict(verdict.pipelines))


def test_a_stuck_job(tale: Tale) -> None:
    tale.send("u0.0")
    tale.add("remains", 99.0, place="alive", tags=["u0.0"])
    assert ["1 stuck: u0.0"] == tale.judged().complaints


def test_a_dead_letter(tale: Tale) -> None:
    tale.send("u0.0")
    tale.run("u0.0", 1.0, None, 1.2)
    tale.add("remains", 99.0, place="dead", tags=["u0.0"])
    assert ["1 dead letters: u0.0"] == tale.judged().complaints


def test_a_send_that_raised(tale: Tale) -> None:
    """Nobody misses its jobs, unless they were seen."""
    tale.send("u0.0", sure=False)
    tale.send("u1.0", "u1.1", kind="pipeline", sure=False)
    tale.run("u1.0", 1.0, 1.1, 1.2)
    verdict = tale.judged()
    assert ["1 lost: u1.1"] == verdict.complaints
    assert (2, 1) == (verdict.accepted, verdict.doubtful)


# Duplicates


def ran_twice(tale: Tale, ack: float | None = 1.2, again: str = "w1.1") -> None:
    tale.send("u0.0")
    tale.run("u0.0", 1.0, 1.1, ack)
    tale.run("u0.0", 7.0, 7.1, 7.2, worker=again)


def test_a_duplicate_that_nothing_explains(tale: Tale) -> None:
    ran_twice(tale)
    assert ["1 duplicates that nothing explains: u0.0"] == tale.judged().complaints


@pytest.mark.parametrize(
    ("fault", "explanation"),
    [
        pytest.param(("kill-worker", 1.15, 1.16, {"worker": "w0.1"}), "worker killed", id="killed before its acknowledgement"),
        pytest.param(("kill-worker", 1.205, 1.21, {"worker": "w0.1"}), "worker killed", id="killed in the window of gathering"),
        pytest.param(("kill-worker", 1.5, 1.51, {"worker": "w0.1"}), None, id="killed too late"),
        pytest.param(("kill-worker", 1.15, 1.16, {"worker": "w2.1"}), None, id="another was killed"),
        pytest.param(("stop-worker", 1.05, 5.0, {"worker": "w0.1"}), "worker stopped", id="stopped past the heartbeat"),
        pytest.param(("stop-worker", 1.05, 2.0, {"worker": "w0.1"}), None, id="stopped for less"),
        pytest.param(("stop-worker", 1.05, 5.0, {"worker": "w1.1"}), None, id="the other worker was stopped"),
        pytest.param(("kill-redis", 1.15, 1.9, {"unwritten": False}), "Redis killed", id="Redis killed"),
        pytest.param(("kill-redis", 2.0, 2.5, {"unwritten": False}), None, id="Redis killed afterwards, all written"),
        pytest.param(("kill-redis", 2.0, 2.5, {"unwritten": True}), "Redis undid writes", id="Redis killed, owing a write"),
        pytest.param(("restart-redis", 1.05, 1.9, {}), None, id="Redis restarted in good order"),
        pytest.param(("kill-clients", 1.15, 1.15, {}), None, id="connections cut"),
        pytest.param(("slow-redis", 1.05, 1.9, {}), None, id="Redis slow"),
        pytest.param(("jump-clock", 0.0, 9.0, {}), None, id="clock jumped"),
    ],
)
def test_what_explains_a_duplicate(
    tale: Tale, fault: tuple[str, float, float, dict[str, Any]], explanation: str | None
) -> None:
    """The run from 1.0, acknowledged at 1.2, happened once more: only what DESIGN §5 names explains it."""
    ran_twice(tale)
    kind, start, until, facts = fault
    tale.fault(kind, start, until, **facts)
    assert {"u0.0": explanation} == tale.judged().duplicates


def test_a_worker_without_a_processor_stood_still(tale: Tale) -> None:
    ran_twice(tale)
    for at in (0.9, 4.0):
        tale.add("pulse", at, worker="w0.1")
    assert {"u0.0": "worker stood still"} == tale.judged().duplicates


def test_a_run_that_ends_after_its_successor(tale: Tale) -> None:
    """A stopped worker's run, which another repeats meanwhile."""
    tale.send("u0.0")
    tale.run("u0.0", 1.0, 9.0, 9.1)
    tale.run("u0.0", 5.0, 5.1, 5.2, worker="w1.1")
    tale.fault("stop-worker", 1.5, 8.0, worker="w0.1")
    assert {"u0.0": "worker stopped"} == tale.judged().duplicates


def test_each_of_many_runs_needs_its_explanation(tale: Tale) -> None:
    ran_twice(tale)
    tale.run("u0.0", 8.0, 8.1, 8.2)
    tale.fault("kill-worker", 1.15, 1.16, worker="w0.1")
    assert {"u0.0": None} == tale.judged().duplicates


def test_a_step_repeats_because_the_step_before_did(tale: Tale) -> None:
    tale.send("u0.0", "u0.1", kind="pipeline")
    tale.run("u0.0", 1.0, 1.1)
    tale.fault("kill-worker", 1.15, 1.16, worker="w0.1")
    tale.run("u0.0", 7.0, 7.1, 7.2, worker="w1.1")
    tale.run("u0.1", 2.0, 2.1, 2.2, worker="w1.1")
    tale.run("u0.1", 8.0, 8.1, 8.2, worker="w1.1")
    assert {"u0.0": "worker killed", "u0.1": "the job before it ran again"} == tale.judged().duplicates


def test_a_step_repeats_without_the_step_before(tale: Tale) -> None:
    tale.send("u0.0", "u0.1", kind="pipeline")
    tale.run("u0.0", 1.0, 1.1, 1.2)
    tale.run("u0.1", 2.0, 2.1, 2.2)
    tale.run("u0.1", 8.0, 8.1, 8.2)
    assert {"u0.1": None} == tale.judged().duplicates


# Callbacks of groups


def test_a_missing_callback(tale: Tale) -> None:
    members_of(tale)
    verdict = tale.judged()
    assert ["1 group callbacks: u1.2 is missing"] == verdict.complaints
    assert 1 == verdict.callbacks["missing"]


def test_a_callback_that_cannot_come_yet(tale: Tale) -> None:
    """The member is missed, not the callback."""
    tale.send("u1.0", "u1.1", "u1.2", kind="group")
    tale.run("u1.0", 1.0, 1.1, 1.2)
    assert ["1 lost: u1.1"] == tale.judged().complaints


def test_a_double_callback(tale: Tale) -> None:
    _, _, callback = members_of(tale)
    for start in (3.0, 4.0):
        tale.run(callback, start, start + 0.1, start + 0.2)
    verdict = tale.judged()
    assert ["1 duplicates that nothing explains: u1.2", "1 group callbacks: u1.2 ran 2 times"] == verdict.complaints
    assert 1 == verdict.callbacks["twice"]


def test_an_early_callback(tale: Tale) -> None:
    _, _, callback = members_of(tale)
    tale.run(callback, 1.5, 1.6, 1.7)
    verdict = tale.judged()
    assert ["1 group callbacks: u1.2 ran before the last member"] == verdict.complaints
    assert (1, 1) == (verdict.callbacks["once"], verdict.callbacks["early"])


# Results and the account


def test_a_wrong_result(tale: Tale) -> None:
    tale.send("u0.0")
    tale.run("u0.0", 1.0, 1.1, 1.2)
    tale.add("result", tag="u0.0", right=False, said="None")
    assert ["1 results that are wrong or missing: u0.0 said None"] == tale.judged().complaints


@pytest.mark.parametrize(
    ("books", "complaint"),
    [
        ({"accepted": 1, "difference": 1}, "it did not add up 1 times of 1, first by 1"),
        ({"accepted": 1, "succeeded": 0, "failed": 1}, "jobs ended otherwise: {'failed': 1}"),
        ({"accepted": 0}, "it says 0 were accepted, the ledger 1"),
    ],
)
def test_an_account_that_is_wrong(tale: Tale, books: dict[str, int], complaint: str) -> None:
    tale.send("u0.0")
    tale.run("u0.0", 1.0, 1.1, 1.2)
    tale.books(**books)
    assert [f"1 the account: {complaint}"] == tale.judged().complaints


# What a seed means


def test_a_seed_is_a_plan() -> None:
    assert plan(3, 25.0) == plan(3, 25.0)
    assert plan(3, 25.0) != plan(4, 25.0)
    assert next(units(3)).tags == next(units(3)).tags


def test_a_long_plan_has_every_fault_and_ends_in_time() -> None:
    planned = plan(1, 60.0)
    assert set(KINDS) == {fault.kind for fault in planned}
    assert all(0 < fault.from_s <= fault.until_s <= 60.0 for fault in planned)
    assert {"flap"} == {fault.kind for fault in plan(1, 60.0, ["flap"])}


def test_the_ledger_keeps_whole_lines(tmp_path: Any) -> None:
    """A writer that was killed in the middle of a line spoils nothing."""
    path = tmp_path / "ledger.jsonl"
    note("sent", path=path, n=1)
    with path.open("a") as file:
        file.write('{"at": 1, "wh')
    assert [("sent", 1)] == [(line["what"], line["n"]) for line in read(path)]
