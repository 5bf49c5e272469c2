# SPDX-License-Identifier: Apache-2.0
"""A short run of the chaos harness: no job is lost, stuck or doubled, whatever dies. The long lane is `tests.chaos.run`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.chaos.faults import KINDS, plan
from tests.chaos.run import Options, run

SEEDS = (7, 11, 34)
SHORT = Options(jobs=1500, seconds=10.0)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", SEEDS)
def test_chaos(seed: int, tmp_path: Path) -> None:
    row = run(tmp_path / "run", seed, SHORT)
    assert [] == row.verdict.complaints, f"evidence: {row.folder}"
    assert row.verdict.accepted == row.verdict.succeeded >= SHORT.jobs


def test_the_short_runs_have_every_fault() -> None:
    assert set(KINDS) == {fault.kind for seed in SEEDS for fault in plan(seed, SHORT.seconds)}
