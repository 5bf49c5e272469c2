# SPDX-License-Identifier: Apache-2.0
"""`tideover demo`: it loses nothing, says so only when it is so, refuses what it cannot play, and ends all that it began."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tideover.core.breaker import Breaker, State
from tideover.store.account import Account
from tideover.store.stories import Line
from tideover.testing.ledger import Call
from tideover_worker import embedded
from tideover_worker.demo import demo
from tideover_worker.demo.history import History
from tideover_worker.demo.story import MODELS, PlannedJob, june_second, of_profile, of_traces
from tideover_worker.demo.verdict import verdict
from tideover_worker.demo.watch import Evidence

WITHIN_S = 240
COMMAND = [str(Path(sys.executable).with_name("tideover")), "demo"]
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
OPUS, PRIMARY, FALLBACK = "claude-opus-4-8", "anthropic/claude-opus-4-8", "openai/claude-opus-4-8"


def trace(path: Path, rows: int, every_s: float) -> Path:
    instants = (divmod(row * every_s, 60) for row in range(rows))
    path.write_text(HEADER + "".join(f"2023-11-16 18:{int(m):02d}:{s:010.7f},374,44\n" for m, s in instants))
    return path


def profile(path: Path) -> Path:
    """Half a minute in which every call fails, in the format of outage-profiles.json."""
    whole = {"scope": {"models": ["*"]}, "mix": {"500": 0.5, "529": 0.5}}
    phases = [
        {"name": "healthy", "duration_s": 4, "p_error": 0.0, **whole},
        {"name": "down", "duration_s": 12, "p_error": 0.95, **whole},
        {"name": "healthy", "duration_s": 6, "p_error": 0.0, **whole},
    ]
    path.write_text(json.dumps({"profiles": [{"id": "t1-short", "phases": phases}, {"id": "t2-other", "phases": phases}]}))
    return path


def left_behind(folder: Path) -> list[str]:
    """Commands of processes that still work in the directory of a run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.joinpath("cwd").readlink() == folder:
                found.append(process.joinpath("cmdline").read_text().replace("\0", " "))
        except OSError:  # it ended just now, or belongs to somebody else
            continue
    return found


def play(folder: Path, *options: str) -> dict[str, Any]:
    """Plays a demo to its end and returns its verdict, which must be a good one."""
    command = [*COMMAND, "--json", "--keep", str(folder), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            stdout, stderr = running.communicate(timeout=WITHIN_S)
        finally:
            running.terminate()  # not a kill, which would leave its processes behind
    assert stderr == ""
    said: dict[str, Any] = json.loads(stdout)
    against = [check for check in said["checks"] if not check["ok"]]
    assert (against, said["account"]["lost"], said["ok"], running.returncode) == ([], 0, True, 0)
    assert (left_behind(folder), embedded.running(folder / ".tideover")) == ([], None)
    return said


@pytest.mark.slow
def test_june_second(tmp_path: Path) -> None:
    """The story at three times its speed: jobs are held, rerouted and drained, and every one is accounted for."""
    said = play(tmp_path / "run", "--speed", "3")
    numbers, account = said["numbers"], said["account"]
    assert numbers["jobs"] == account["accepted"] == account["succeeded"]
    assert numbers["jobs_held"] > 0
    assert numbers["jobs_rerouted"] > 0
    assert {"before", "since"} == set(said["critical_wait_p99_s"])
    opened = {move["breaker"] for move in said["breakers"] if move["state"] == "open"}
    assert f"anthropic/{OPUS}" in opened <= {f"anthropic/{model}" for model in MODELS}  # of the other few calls are made


@pytest.mark.slow
def test_replays_traces(tmp_path: Path) -> None:
    """Two traces: the first file's calls are critical, the second's deferrable, and the outage lies in the middle."""
    critical, deferrable = trace(tmp_path / "a.csv", 120, 1.0), trace(tmp_path / "b.csv", 80, 1.5)
    said = play(tmp_path / "run", "--trace", str(critical), "--trace", str(deferrable), "--speed", "5")
    assert (said["account"]["succeeded"], said["story"]["speed"]) == (200, 5.0)


@pytest.mark.slow
def test_plays_a_profile(tmp_path: Path) -> None:
    """A recorded outage under a generated workload."""
    said = play(tmp_path / "run", "--profile", f"{profile(tmp_path / 'p.json')}#t1-short", "--speed", "1")
    assert said["story"]["title"] == "outage profile t1-short"
    assert said["numbers"]["jobs_held"] > 0


@contextmanager
def started(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo whose story has begun."""
    with subprocess.Popen(
        [*COMMAND, "--keep", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        assert running.stdout is not None
        try:
            assert any(line.startswith("00:0") for line in running.stdout)
            yield running
        finally:
            running.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(tmp_path: Path, number: signal.Signals) -> None:
    """On Ctrl-C and on SIGTERM every process of the demo ends, and the exit code names the signal."""
    with started(tmp_path) as running:
        assert left_behind(tmp_path) != []
        running.send_signal(number)
        _, said = running.communicate(timeout=WITHIN_S)
    assert (running.returncode, said) == (128 + number, "tideover demo: stopped; nothing is left running\n")
    assert (left_behind(tmp_path), embedded.running(tmp_path / ".tideover")) == ([], None)


@pytest.mark.slow
def test_tells_of_a_process_that_died(tmp_path: Path) -> None:
    """When the providers die, the demo says who died, with the end of its log, and ends with 1."""
    with started(tmp_path) as running:
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        [providers] = [pid for pid in children if "tideover.testing.serve" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(int(providers), signal.SIGKILL)
        _, said = running.communicate(timeout=WITHIN_S)
    assert said.startswith("tideover demo: providers ended unexpectedly with exit code -9. The end of providers.log:")
    assert (running.returncode, left_behind(tmp_path), embedded.running(tmp_path / ".tideover")) == (1, [], None)


def test_the_producer_loads_no_anthropic(tmp_path: Path) -> None:
    """What sends jobs stays small."""
    (tmp_path / "tideover.toml").write_text('redis_url = "unix:///nowhere"\n')
    program = "import sys, tideover_worker.demo.producer; sys.exit('anthropic' in sys.modules)"
    environment = {**os.environ, "TIDEOVER_CONFIG": str(tmp_path / "tideover.toml")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


# What it refuses


def refused(*options: str) -> str:
    """The one line with which the demo refuses these options."""
    ended = CliRunner().invoke(demo, options)
    assert (ended.exit_code, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    return ended.stderr


@pytest.mark.parametrize("speed", ["0", "-1", "nan", "inf"])
def test_refuses_a_speed(speed: str) -> None:
    """A speed is above 0."""
    assert refused("--speed", speed).startswith("tideover demo: --speed must be above 0, not")


def test_refuses_a_missing_trace(tmp_path: Path) -> None:
    """A file that is not there is named."""
    assert refused("--trace", str(tmp_path / "no.csv")) == f"tideover demo: {tmp_path}/no.csv: No such file or directory\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"{HEADER}2023-11-16 18:17:03,10,10\nyesterday,10,10\n", 3),
        (f"{HEADER}2023-11-16 18:17:03,10,many\n", 2),
        (f"{HEADER}2023-11-16 18:17:03,10,-1\n", 2),
        (f"{HEADER}2023-11-16 18:17:03,10\n", 2),
        ("when,in,out\n", 1),
        ("", 1),
    ],
)
def test_refuses_a_bad_row(tmp_path: Path, text: str, line: int) -> None:
    """The first bad row of a trace is named by its line."""
    path = tmp_path / "bad.csv"
    path.write_text(text)
    assert refused("--trace", str(path)).startswith(f"tideover demo: {path}:{line}: ")


def test_refuses_an_empty_trace(tmp_path: Path) -> None:
    """A trace has a row at least."""
    assert "has no rows" in refused("--trace", str(trace(tmp_path / "none.csv", 0, 1)))


def test_refuses_an_unknown_profile(tmp_path: Path) -> None:
    """The profiles that there are stand in the message."""
    assert "it has t1-short, t2-other" in refused("--profile", f"{profile(tmp_path / 'p.json')}#june")


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"profiles": [{"id": "x", "phases": [{"name": "y"}]}]}'])
def test_refuses_a_file_that_has_no_profiles(tmp_path: Path, text: str) -> None:
    """So is any other file."""
    path = tmp_path / "p.json"
    path.write_text(text)
    assert "is no file of outage profiles" in refused("--profile", f"{path}#x")


def test_refuses_a_profile_without_an_id(tmp_path: Path) -> None:
    """A profile is a file and an id."""
    assert "--profile is FILE#ID" in refused("--profile", str(profile(tmp_path / "p.json")))


def test_refuses_a_directory_in_use(tmp_path: Path) -> None:
    """A run is kept in a directory of its own."""
    profile(tmp_path / "p.json")
    assert "must be a new or an empty directory" in refused("--keep", str(tmp_path))


def test_refuses_two_stories(tmp_path: Path) -> None:
    """A trace and a profile are two stories."""
    assert "give one of them" in refused("--trace", "x.csv", "--profile", f"{profile(tmp_path / 'p.json')}#t1-short")


# What it plays


def test_the_outage_lies_in_the_middle_of_a_trace(tmp_path: Path) -> None:
    """From 40 % to 60 % of the replay; speed divides arrivals, phases and latencies."""
    paths = [trace(tmp_path / "a.csv", 101, 0.5), trace(tmp_path / "b.csv", 50, 1.0)]
    for speed in (1.0, 4.0):
        story = of_traces(paths, 1, speed)
        lasts_s = 50.0 / speed
        well, *outage = story.phases
        assert story.jobs[-1].at_s == pytest.approx(lasts_s)
        assert well.duration_s == pytest.approx(0.4 * lasts_s)
        assert sum(phase.duration_s for phase in outage) == pytest.approx(0.2 * lasts_s)
        assert story.latency_speed == speed
    assert [sum(job.task == task for job in story.jobs) for task in ("reply", "summary")] == [101, 50]


def test_a_long_trace_lasts_about_eight_minutes(tmp_path: Path) -> None:
    """Unless a speed is said; a short one is played as it was."""
    assert of_traces([trace(tmp_path / "a.csv", 59, 60.0)], 1, None).lasts_s == pytest.approx(480, abs=5)
    assert of_traces([trace(tmp_path / "b.csv", 10, 1.0)], 1, None).speed == 1.0


def test_a_profile_is_played_as_it_stands(tmp_path: Path) -> None:
    """Speed divides its phases; the generated workload lasts as long as they do."""
    story = of_profile(f"{profile(tmp_path / 'p.json')}#t1-short", 1, 2.0)
    assert [phase.duration_s for phase in story.phases] == [2.0, 6.0, 3.0]
    assert story.jobs[-1].at_s == pytest.approx(11.0)


def test_the_seed_decides() -> None:
    """The same seed is the same workload."""
    assert june_second(1, 1.0) == june_second(1, 1.0)
    assert june_second(1, 1.0).jobs != june_second(2, 1.0).jobs


# Whether the verdict can say no


def call(job: str | None, at: float, outcome: str = "ok") -> Call:
    return Call(1, "p", at, "/v1/messages", OPUS, False, job, True, outcome=outcome, status=200, finished_at=at)


def moved(*states: tuple[float, State, int]) -> History:
    """The history of the primary's breaker."""
    history = History()
    for at, state, generation in states:
        history.see(PRIMARY, Breaker(state=state, generation=generation, since=at))
    return history


def told(job_id: str, criticality: str, *held: tuple[float, Sequence[str], int]) -> list[Line]:
    lines = [Line(job_id, 0.0, "enqueued", {"task": "t", "criticality": criticality})]
    for at, waits_for, generation in held:
        lines.append(Line(job_id, at, "held", {"reason": "outage", "waits_for": list(waits_for), "generation": generation}))
    return lines


def ends(**known: int) -> dict[Any, int]:
    return {"succeeded": 0, "failed": 0, "expired": 0, "discarded": 0, "unexplained": 0, **known}


def good_run() -> Evidence:
    """Two jobs: one was rerouted, one held once and released, while the primary was down from second 10 to second 30."""
    jobs = [PlannedJob(0.0, "reply", "a", OPUS, 1, 1), PlannedJob(0.0, "summary", "b", OPUS, 1, 1)]
    return Evidence(
        jobs={job.tag: job for job in jobs},
        account=Account(accepted=2, ends=ends(succeeded=2)),
        most_lost=0,
        readings=9,
        primary=[call("a/0", 9.9, "overloaded"), call(None, 20.0, "overloaded"), call("b/0", 31.0)],
        fallback=[call("a/0", 10.1)],
        stories={"id-b": told("id-b", "deferrable", (12.0, [PRIMARY], 1))},
        history=moved(
            (10.0, "open", 1), (20.0, "half-open", 1), (20.1, "open", 1), (30.0, "recovering", 1), (40.0, "closed", 2)
        ),
        holds=1,
        dead_letters=0,
        began_at=0.0,
        elapsed_s=50.0,
    )


def claims_against(evidence: Evidence) -> list[int]:
    """The places of the claims that did not hold."""
    return [place for place, check in enumerate(verdict(evidence), 1) if not check.ok]


def test_a_good_run_is_good() -> None:
    """All six claims hold."""
    assert claims_against(good_run()) == []


def changed(**values: Any) -> Callable[[Evidence], Evidence]:
    return lambda run: replace(run, **values)


BOTH = [PRIMARY, FALLBACK]


@pytest.mark.parametrize(
    ("defect", "claims"),
    [
        pytest.param(changed(account=Account(accepted=2, ends=ends(succeeded=1))), [1, 2], id="a job is nowhere"),
        pytest.param(changed(most_lost=1), [1], id="a job was nowhere for a moment"),
        pytest.param(changed(account=Account(accepted=2, ends=ends(succeeded=1, unexplained=1))), [1, 2], id="unexplained"),
        pytest.param(changed(fallback=[]), [2], id="no provider has answered it"),
        pytest.param(changed(fallback=[call("a/0", 10.1), call("a/0", 10.3)]), [2], id="answered twice"),
        pytest.param(changed(fallback=[call("a/0", 10.1), call("c/0", 10.3)]), [2], id="nobody sent it"),
        pytest.param(changed(fallback=[call("a/1", 10.1)]), [3], id="a retry"),
        pytest.param(changed(dead_letters=1), [3], id="a dead letter"),
        pytest.param(changed(account=Account(accepted=2, ends=ends(succeeded=1, failed=1))), [2, 3], id="failed"),
        pytest.param(changed(primary=[call("a/0", 12.0, "overloaded"), call("b/0", 31.0)]), [5], id="called while open"),
        pytest.param(changed(primary=[call("a/0", 20.05, "overloaded"), call("b/0", 31.0)]), [5], id="called while half-open"),
        pytest.param(changed(stories={"id-a": told("id-a", "critical", (12.0, BOTH, 1))}), [4], id="critical held"),
        pytest.param(changed(stories={}), [6], id="a hold without a story"),
        pytest.param(
            changed(stories={"id-b": told("id-b", "deferrable", (12.0, [PRIMARY], 1), (32.0, [PRIMARY], 1))}, holds=2),
            [6],
            id="held twice in a generation",
        ),
    ],
)
def test_a_bad_run_is_bad(defect: Callable[[Evidence], Evidence], claims: list[int]) -> None:
    """Each claim can fail."""
    assert claims_against(defect(good_run())) == claims


@pytest.mark.parametrize(
    "fine",
    [
        pytest.param(changed(primary=[call("a/0", 10.9, "overloaded"), call("b/0", 31.0)]), id="the news was on its way"),
        pytest.param(changed(stories={"id-a": told("id-a", "critical", (12.0, [PRIMARY], 1))}), id="critical without a route"),
        pytest.param(
            changed(stories={"id-b": told("id-b", "deferrable", (9.0, [PRIMARY], 0), (12.0, [PRIMARY], 1))}, holds=2),
            id="held in two generations",
        ),
    ],
)
def test_what_speaks_against_nobody(fine: Callable[[Evidence], Evidence]) -> None:
    """What is allowed is not counted against a run."""
    assert claims_against(fine(good_run())) == []
