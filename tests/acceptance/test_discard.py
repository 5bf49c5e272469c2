# SPDX-License-Identifier: Apache-2.0
"""`tideover discard`: held jobs end by hand, visibly, and can be restored."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from dramatiq.results import ResultFailure

import tideover
from tideover_worker.cli import main

if TYPE_CHECKING:
    from tests.acceptance.conftest import Desk

PROMPT = "SECRET-PROMPT"


def test_a_held_job_is_discarded(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Its waiter, its story, the log and the account say so; it can be restored, and then waits as any other does."""
    caplog.set_level(logging.INFO, "tideover")
    job, other = desk.held(2, tenant="acme")
    refused = desk.ask("discard", job.message_id, "--because", "cancelled")
    assert (4, "--yes" in refused.err) == (refused.code, True)
    assert (2, 2) == (desk.ask("discard", job.message_id, "--yes").code, desk.ask("discard", "--because", "no job named").code)
    assert [job.message_id] == desk.ask("discard", job.message_id[:8], "--because", "the customer cancelled", "--yes").ids
    assert {"accepted": 2, "held": 1, "discarded": 1} == desk.books()
    with pytest.raises(ResultFailure, match="JobFailed"):
        job.get_result(backend=desk.broker.get_results_backend())
    with pytest.raises(tideover.JobFailed, match="discarded: the customer cancelled"):
        desk.result(job)
    assert ("ended", "discarded") == (tideover.status(job).state, tideover.status(job).end)
    told = desk.explain(job)
    assert (True, "enqueued", "held") == (told["restorable"], *(line["event"] for line in told["story"][:-1]))
    assert ": the customer cancelled; it is kept with the dead letters" in told["story"][-1]["words"]
    assert "job_discarded" in caplog.text
    twice = desk.ask("discard", job.message_id, "--because", "again", "--yes")
    assert (4, "is not held: it has ended as discarded" in twice.err) == (twice.code, True)
    assert [job.message_id] == desk.ask("restore", "--ended", "discarded").ids
    assert "job_restored" in caplog.text
    desk.until_books(accepted=3, held=2, discarded=1)
    desk.provider.heal()
    assert {"answer"} == {desk.result(one).split()[0] for one in (job, other)}
    desk.until_books(accepted=3, succeeded=2, discarded=1)


def test_discard_by_filter(desk: Desk) -> None:
    """It asks, shows beforehand what would end, and leaves alone what is not meant."""
    acme, blue = desk.held(2, tenant="acme"), desk.held(1, tenant="blue")
    plan = desk.ask("discard", "--tenant", "acme", "--because", "over", "--dry-run", "--json").json
    assert (2, [("answer", "acme", 2)]) == (
        plan["would_discard"],
        [(group["task"], group["tenant"], group["jobs"]) for group in plan["groups"]],
    )
    assert "Would discard 3 jobs." in desk.on_terminal("discard", "--all", "--because", "over", "--dry-run")[1]
    code, seen = desk.on_terminal("discard", "--tenant", "acme", "--because", "over", typed="n\n")
    assert (4, True) == (code, "Discard 2 held jobs? [y/N]" in seen)
    code, seen = desk.on_terminal("discard", "--tenant", "acme", "--because", "over", typed="y\n")
    assert (0, True) == (code, "Discarded 2 jobs. For 7 days `tideover restore JOB...` puts them back." in seen)
    assert {"discarded"} == {tideover.status(job).end for job in acme}
    assert ["held"] == [tideover.status(job).state for job in blue]
    assert 1 == desk.ask("discard", "--tenant", "acme", "--because", "over", "--yes").code


def test_discard_of_what_needs_review(desk: Desk) -> None:
    """A filter leaves it alone, as release does; its reason means it."""
    desk.held(1)
    (job,) = desk.unreadable(1)
    plain = desk.ask("discard", "--all", "--because", "over", "--yes")
    assert (1, "1 job in need of review stay held; --reason review discards those.\n") == (len(plain.ids), plain.err)
    assert [job] == desk.ask("discard", "--reason", "review", "--because", "nobody can read it", "--yes").ids
    assert {"accepted": 2, "discarded": 2} == desk.books()
    said = desk.ask("restore", job)
    assert (4, "cannot be decoded" in said.err) == (said.code, True)


def test_help_has_examples() -> None:
    said = CliRunner().invoke(main, ["discard", "--help"]).output
    assert ("Examples:" in said, "Exit code" in " ".join(said.split())) == (True, True)
