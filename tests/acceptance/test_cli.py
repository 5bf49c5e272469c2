# SPDX-License-Identifier: Apache-2.0
"""The command line as operators meet it: real processes on a private Valkey that the real library filled."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner
from dramatiq.brokers.redis import RedisBroker
from dramatiq.message import Message

from tideover import Tideover, ai_task, clock
from tideover.core.breaker import State, Transition
from tideover.core.pacing import Factor
from tideover.core.route import FORCED, Mark, Permit
from tideover.settings import forget
from tideover.store.account import Ledger
from tideover.store.backlog import Backlog
from tideover.store.breakers import Batch, Breakers
from tideover.store.facts import TICKS, HeldFacts
from tideover.store.keys import Keys
from tideover.store.registry import Registry
from tideover.store.stories import Stories
from tideover.testing import FakeProvider
from tideover_worker import embedded
from tideover_worker.cli import main
from tideover_worker.cli.drain import LIMITS

TIDEOVER = str(Path(sys.executable).parent / "tideover")
PROMPT = "SECRET-PROMPT"
KEY = "anthropic/claude-opus-4-8"
SPARE = "openai/claude-opus-4-8"
WORKER = "0d5b7c52-worker"
DETAILS = {"failed": "anthropic: 529 overloaded_error", "review": "3 workers died while they had it"}
PATIENCE_S = 30.0
POLL_S = 0.05

ROUTES = """
[routes.anthropic]
kind = "anthropic"
base_url = "{anthropic}"
timeout_s = 10
[routes.openai]
kind = "openai-compatible"
base_url = "{openai}"
models = {{ "claude-opus-4-8" = "gpt-5.5" }}
"""
NOWHERE = ROUTES.format(anthropic="http://127.0.0.1:9", openai="http://127.0.0.1:9/v1")

TASKS = """
from tideover import ai_task, aclaude

@ai_task(criticality="deferrable")
async def tag(prompt: str) -> None:
    message = {"role": "user", "content": prompt}
    await aclaude().messages.create(model="claude-opus-4-8", max_tokens=20, messages=[message])
"""
QUICK = """
[breaker]
probe_after_s = 0.1
probe_max_s = 0.2
settle_s = 0.1
[drain]
start_rate = 50
[worker]
shutdown_grace_s = 1
"""


@dataclass
class Answer:
    """What a command said. That it shows no prompt is checked for each."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        document = json.loads(self.out)
        assert document["schema"] == 1
        return document

    @property
    def rows(self) -> list[dict[str, str]]:
        header, *lines = [line.split("\t") for line in self.out.splitlines()]
        return [dict(zip(header, line, strict=True)) for line in lines]


def environment(**more: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("TIDEOVER_")}
    return {**ours, "ANTHROPIC_API_KEY": "key", "OPENAI_API_KEY": "key", **more}


def tideover(*words: str, cwd: Path, **env: str) -> Answer:
    nothing = subprocess.DEVNULL
    done = subprocess.run([TIDEOVER, *words], cwd=cwd, env=environment(**env), capture_output=True, text=True, stdin=nothing)
    assert PROMPT not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return Answer(done.returncode, done.stdout, done.stderr)


def ask(*words: str) -> Answer:
    """The command within this process, on the settings of its working directory."""
    said = CliRunner().invoke(main, words, catch_exceptions=False)
    assert PROMPT not in said.output
    return Answer(said.exit_code, said.stdout, said.stderr)


def on_terminal(*words: str, cwd: Path, typed: str = "") -> tuple[int, str]:
    """What somebody sees who types the command, and then `typed`, at a terminal."""
    ours, theirs = pty.openpty()
    os.write(ours, typed.encode())
    command = subprocess.Popen(
        [TIDEOVER, *words], cwd=cwd, env=environment(TERM="xterm", COLUMNS="120", NO_COLOR="1"), stdin=theirs, stdout=theirs,
        stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while chunk := read(ours):
        seen += chunk
    os.close(ours)
    assert PROMPT.encode() not in seen
    return command.wait(10), seen.decode()


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536)
    except OSError:  # the other side is closed
        return b""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("valkey")
    yield embedded.start(folder).url
    embedded.stop(folder)


@dataclass
class Shop:
    """A namespace with two tasks, sent to and held by the library itself."""

    folder: Path
    broker: RedisBroker
    namespace: str
    held: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        client, keys = self.broker.client, Keys(self.namespace)
        self.client, self.keys, self.ledger, self.backlog = client, keys, Ledger(client, keys), Backlog(client, keys)
        self.breakers, self.registry, self.stories = Breakers(client, keys), Registry(client, keys), Stories(client, keys)
        options: dict[str, Any] = {"broker": self.broker, "models": ["claude-opus-4-8"]}
        self.tag = ai_task(criticality="deferrable", **options)(tag)
        self.reply = ai_task(criticality="critical", reroute=["openai"], expires_in=timedelta(minutes=2), **options)(reply)

    def tideover(self, *words: str) -> Answer:
        return tideover(*words, cwd=self.folder)

    def ask(self, *words: str) -> Answer:
        """The same within this process, ten times as quick, for what follows the first question of a test."""
        return ask(*words)

    def staff(self) -> None:
        """A worker that is alive, and the routes it has."""
        self.registry.announce()
        self.registry.beat(WORKER)
        facts = {"host": "vm", "pid": 7, "since": time.time(), "version": "0.1.0", "mode": "act", "queues": ["default"]}
        self.registry.enter_worker(WORKER, facts)
        spare = {"kind": "openai-compatible", "models": {"claude-opus-4-8": "gpt-5.5"}}
        self.registry.enter_routes({"anthropic": {"kind": "anthropic", "models": {}}, "openai": spare})

    def open(self, key: str = KEY) -> None:
        self.breakers.report(key, "p", Batch(era=0, runs=[("failed", 5)], why="529 overloaded_error"))
        self.move(key, "open", "529 overloaded_error")

    def recover(self, key: str = KEY) -> None:
        states: tuple[State, ...] = ("half-open", "recovering")
        for state in states:
            self.move(key, state, "probes answered")

    def move(self, key: str, to: State, why: str) -> None:
        seen = self.breakers.read([key])[key]
        assert self.breakers.transition(key, seen, Transition(to=to, why=why), clock.now())

    def fetch(self, lane: str = "default", n: int = 1) -> list[Message[Any]]:
        """Takes jobs off a lane, as a worker does."""
        jobs, missing = self.backlog.fetch(WORKER, lane, n)
        assert not missing
        messages = [Message.decode(job.body) for job in jobs]
        for message, job in zip(messages, jobs, strict=True):
            message.options["redis_message_id"] = job.redis_id
        return messages

    def permit_of(self, message: Message[Any]) -> Permit | None:
        """The permit that goes with a released job."""
        mark = self.client.hget(self.keys.marks("default"), message.options["redis_message_id"])
        return Mark.parse(mark.decode()).permit

    def hold(self, lane: str = "default", n: int = 1, reason: Any = "outage", **more: Any) -> list[str]:
        """Holds the next jobs of a lane; their ids."""
        facts = [self.facts(message, lane, reason, **more) for message in self.fetch(lane, n)]
        assert all(self.backlog.hold(WORKER, lane, facts))
        return [fact.job_id for fact in facts]

    def facts(self, message: Message[Any], lane: str, reason: Any, **more: Any) -> HeldFacts:
        """As the gate makes them; one ms is added per job, so that no two have the same place in the order."""
        stamp = message.options["tideover"]
        self.held.append(message.message_id)
        held_ms = time.time_ns() // 1_000_000 + len(self.held)
        expires_ms = None if stamp["expires_ms"] is None else stamp["expires_ms"] + len(self.held)
        plain: dict[str, Any] = {
            "redis_id": message.options["redis_message_id"],
            "job_id": message.message_id,
            "task": message.actor_name,
            "queue": lane,
            "criticality": stamp["criticality"],
            "wait_key": "" if reason == "review" else KEY,
            "reason": reason,
            "generation": 1,
            "held_ms": held_ms,
            "sent_ms": message.message_timestamp,
            "expires_ms": expires_ms,
            "detail": DETAILS.get(reason, ""),
        }
        filled = {**plain, **more}
        by_ms = filled["held_ms"] + 86_400_000 if filled["expires_ms"] is None else filled["expires_ms"]
        return HeldFacts(**{"order": by_ms * TICKS, **filled})


def tag(prompt: str) -> None: ...


def reply(prompt: str) -> None: ...


@pytest.fixture
def folder(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with settings, also those of this process."""
    (tmp_path / "tideover.toml").write_text(f'redis_url = "{url}"\n{NOWHERE}')
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("TIDEOVER_")]:
        monkeypatch.delenv(name)
    forget()
    yield tmp_path
    forget()


@pytest.fixture
def open_shop(url: str, folder: Path) -> Iterator[Callable[[str], Shop]]:
    opened: list[Shop] = []

    def make(namespace: str) -> Shop:
        broker = RedisBroker(url=url, namespace=namespace)
        broker.add_middleware(Tideover())
        opened.append(Shop(folder, broker, namespace))
        return opened[-1]

    yield make
    for shop in opened:
        shop.client.flushdb()
        shop.broker.close()
        shop.client.close()


@pytest.fixture
def shop(open_shop: Callable[[str], Shop]) -> Shop:
    made = open_shop("shop")
    made.staff()
    return made


def test_help_is_quick_and_loads_nothing() -> None:
    """No help, not even a command's, pays for Redis, dramatiq, the SDK or the settings; each has examples."""
    probe = """
import sys
from tideover_worker.cli import COMMANDS, main
for words in (["--help"], *([name, "--help"] for name in COMMANDS if name != "demo")):
    try:
        main(words)
    except SystemExit:
        pass
heavy = {"redis", "dramatiq", "anthropic", "pydantic", "tideover", "rich"}
print(sorted({name.partition(".")[0] for name in sys.modules} & heavy))
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_has_examples() -> None:
    """Examples are what people read first."""
    commands = ("status", "backlog", "explain", "release", "worker", "bypass on", "embedded stop", "config show")
    helps = {name: CliRunner().invoke(main, [*name.split(), "--help"]).output for name in commands}
    assert [name for name, text in helps.items() if "Examples:" not in text] == []


def test_all_well(shop: Shop) -> None:
    """One sentence, an account that adds up, and exit code 0, in all three forms."""
    shop.tag.send(PROMPT)
    shop.reply.send(PROMPT)
    said = shop.tideover("status", "--json")
    (one,) = said.json["namespaces"]
    assert (said.code, one["verdict"]["sentence"]) == (0, "All well: 2 routes closed, nothing held.")
    counts = {name: one["standing"][name] for name in ("accepted", "queued", "running", "held", "lost", "not_adopted")}
    assert counts == {"accepted": 2, "queued": 2, "running": 0, "held": 0, "lost": 0, "not_adopted": 0}
    assert [lane["queue"] for lane in one["standing"]["lanes"]] == ["default", "default.critical"]
    assert [worker["host"] for worker in one["standing"]["workers"]] == ["vm"]
    assert one["standing"]["asked_at"].endswith("Z")
    rows = shop.ask("status").rows
    assert {"namespace": "shop", "item": "standing", "name": "", "field": "lost", "value": "0"} in rows
    code, seen = on_terminal("status", cwd=shop.folder)
    assert (code, "✔ All well: 2 routes closed" in seen, "lost 0" in seen) == (0, True, True)


@pytest.mark.parametrize("place", ["list", "acks", "held"])
def test_a_job_deleted_by_hand_is_lost(shop: Shop, place: str) -> None:
    """`lost` is a difference, so it can fail; and then the exit code does, too."""
    for _ in range(3):
        shop.tag.send(PROMPT)
    shop.hold()
    (fetched,) = shop.fetch()
    assert shop.ask("status").code == 0
    match place:
        case "list":
            assert shop.client.lpop(shop.keys.queue("default"))
        case "acks":
            assert shop.client.srem(shop.keys.acks(WORKER, "default"), fetched.options["redis_message_id"])
        case "held":
            assert shop.client.zpopmin(shop.keys.held("default"))
    said = shop.ask("status", "--json")
    assert (said.code, said.json["namespaces"][0]["standing"]["lost"]) == (1, 1)
    assert said.json["verdict"]["level"] == "lost"
    assert said.json["verdict"]["sentence"].startswith("LOST 1 job: 3 accepted, but queued ")


def test_the_job_that_is_lost_says_so(shop: Shop) -> None:
    """A job that once was held and is in no place any more is not said to have ended."""
    shop.tag.send(PROMPT)
    (job_id,) = shop.hold()
    assert shop.client.zpopmin(shop.keys.held("default"))
    assert shop.tideover("explain", job_id, "--json").json["state"] == "lost"


def test_outage_and_recovery(shop: Shop) -> None:
    """The sentence says what is down, for how long, why, what is held and what becomes of critical jobs."""
    shop.reply.send(PROMPT)
    for _ in range(2):
        shop.tag.send(PROMPT)
    shop.hold(n=2)
    shop.open()
    said = shop.tideover("status", "--json").json
    assert said["verdict"]["level"] == "outage"
    assert said["verdict"]["sentence"].startswith(f"OUTAGE: {KEY} open for ")
    assert said["verdict"]["sentence"].endswith("(529 overloaded_error). 2 jobs held, critical ones rerouted to openai.")
    standing = said["namespaces"][0]["standing"]
    assert [(group["waits_for"], group["reason"], group["jobs"]) for group in standing["held_groups"]] == [([KEY], "outage", 2)]
    assert [(breaker["key"], breaker["state"]) for breaker in standing["breakers"]] == [(KEY, "open")]
    assert standing["breakers"][0]["next_probe_at"] > standing["breakers"][0]["since_at"]
    shop.recover()
    assert shop.ask("status", "--json").json["verdict"]["level"] == "recovering"


def test_workers_without_tideover_are_told(shop: Shop) -> None:
    """While such a worker has jobs the sum does not hold, and status says so first."""
    shop.tag.send(PROMPT)
    jobs, _ = shop.backlog.fetch("a-stock-worker", "default", 1)
    assert len(jobs) == 1
    (one,) = shop.tideover("status", "--json").json["namespaces"]
    assert one["standing"]["strangers"] == ["a-stock-worker"]
    assert one["verdict"]["sentence"].startswith("MIXED: 1 worker without tideover: they hold nothing in an outage")


def test_backlog(shop: Shop) -> None:
    """Most urgent first, filtered by task and reason, cut at the limit with the rest counted; never an argument."""
    for _ in range(3):
        shop.tag.send(PROMPT)
        shop.reply.send(PROMPT)
    tags = [*shop.hold(n=2), *shop.hold(reason="failed")]
    replies = shop.hold("default.critical", 3, wait_key=f"{KEY}|{SPARE}")
    rows = shop.tideover("backlog").rows
    assert [row["id"] for row in rows] == [*replies, *tags]
    assert (rows[0]["waits_for"], rows[0]["criticality"]) == (f"{KEY}|{SPARE}", "critical")
    assert [row["id"] for row in shop.ask("backlog", "--task", "tag").rows] == tags
    assert [row["detail"] for row in shop.ask("backlog", "--reason", "failed").rows] == ["anthropic: 529 overloaded_error"]
    few = shop.ask("backlog", "--limit", "2")
    assert ([row["id"] for row in few.rows], few.err.startswith("4 more; --after ")) == (replies[:2], True)
    found = shop.ask("backlog", "--task", "reply", "--limit", "1", "--json").json
    assert (found["matching"], [job["id"] for job in found["jobs"]]) == (3, replies[:1])
    assert {lane["queue"]: lane["held"] for lane in found["namespaces"][0]["lanes"]} == {"default": 3, "default.critical": 3}
    unknown = shop.ask("backlog", "--reason", "weather")
    assert (unknown.code, "outage, suspect, pace, failed, paused, coalesced, review" in unknown.err) == (2, True)


def test_backlog_filters(shop: Shop) -> None:
    """Each filter narrows the list; --by counts; what makes no sense is exit code 2 and says what is allowed."""
    for _ in range(6):
        shop.tag.send(PROMPT)
    acme = shop.hold(n=2, tenant="acme", tag="nightly")
    blue = shop.hold(tenant="blue", holds=3, wait_key=f"{KEY}|{SPARE}")
    review = shop.hold(reason="review")
    old = shop.hold(held_ms=time.time_ns() // 1_000_000 - 7_300_000)
    soon = shop.hold(expires_ms=time.time_ns() // 1_000_000 + 600_000)
    rows = shop.tideover("backlog", "--tenant", "acme").rows
    assert [(row["id"], row["tenant"], row["tag"], row["holds"]) for row in rows] == [
        (job, "acme", "nightly", "1") for job in acme
    ]
    expected = {
        ("--tag", "nightly"): acme,
        ("--tenant", ""): [*soon, *old, *review],
        ("--waits-for", "openai"): blue,
        ("--waits-for", "anthropic", "--tenant", "blue"): blue,
        ("--reason", "review"): review,
        ("--held-for", "2h"): old,
        ("--expires-before", "15m"): soon,
        ("--criticality", "critical"): [],
    }
    assert {words: [row["id"] for row in shop.ask("backlog", *words).rows] for words in expected} == expected
    by_tenant = shop.ask("backlog", "--by", "tenant")
    assert by_tenant.rows == [
        {"tenant": "", "jobs": "3", "critical": "0"},
        {"tenant": "acme", "jobs": "2", "critical": "0"},
        {"tenant": "blue", "jobs": "1", "critical": "0"},
    ]
    found = shop.ask("backlog", "--by", "waits-for", "--tenant", "blue", "--json").json
    assert (found["by"], found["jobs"], found["slices"][0]["value"]) == ("waits-for", 1, f"{KEY}|{SPARE}")


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        (("--reason", "weather"), "outage, suspect, pace, failed, paused, coalesced, review"),
        (("--criticality", "urgent"), "critical, deferrable"),
        (("--by", "weather"), "task, reason, criticality, tenant, tag, waits-for"),
        (("--after", "0QKI3"), "is no cursor"),
        (("--held-for", "2 hours"), "90s, 15m, 2h or 1d"),
        (("--expires-before", "0m"), "90s, 15m, 2h or 1d"),
        (("--by", "task", "--limit", "3"), "leave out --limit and --after"),
        (("--limit", "-1"), "x>=0"),
    ],
)
def test_backlog_says_what_is_allowed(shop: Shop, words: tuple[str, ...], allowed: str) -> None:
    """A slip in an option is exit code 2 and one plain sentence."""
    said = shop.ask("backlog", *words)
    assert (said.code, allowed in " ".join(said.err.split())) == (2, True), said.err


def test_backlog_pages(shop: Shop) -> None:
    """The cursor that a page ends with, piped or as JSON, is where the next one begins; the last has none."""
    for _ in range(5):
        shop.tag.send(PROMPT)
    held = shop.hold(n=5)
    first = shop.tideover("backlog", "--limit", "2")
    assert first.err.startswith("3 more; --after ")
    second = shop.ask("backlog", "--limit", "2", "--json", "--after", first.err.split()[3])
    third = shop.ask("backlog", "--limit", "2", "--after", second.json["next"])
    pages = [[row["id"] for row in first.rows], [job["id"] for job in second.json["jobs"]], [row["id"] for row in third.rows]]
    assert (pages, third.err) == ([held[:2], held[2:4], held[4:]], "")


def test_backlog_on_a_terminal(shop: Shop) -> None:
    """Tenants and tags have a column where there are some; a job in need of review shows why instead of what it waits for."""
    for _ in range(3):
        shop.tag.send(PROMPT)
    shop.hold()
    _, seen = on_terminal("backlog", cwd=shop.folder)
    assert ("TENANT" in seen, "TAG" in seen, KEY in seen) == (False, False, True)
    shop.hold(tenant="acme")
    shop.hold(reason="review")
    _, seen = on_terminal("backlog", cwd=shop.folder)
    assert ("TENANT" in seen, " TAG " in seen, DETAILS["review"] in " ".join(seen.split())) == (True, False, True)
    _, seen = on_terminal("backlog", "--by", "waits-for", cwd=shop.folder)
    assert ("WAITS FOR" in seen, "a human" in seen, "all" in seen) == (True, True, True)


def test_review(shop: Shop) -> None:
    """Jobs that a human must look at: plain in status, explained, left alone by --all, released by their reason."""
    for _ in range(3):
        shop.tag.send(PROMPT)
    review, others = shop.hold(n=2, reason="review"), shop.hold()
    shop.registry.beat(WORKER)
    said = shop.ask("status", "--json").json
    (one,) = said["namespaces"]
    told = "REVIEW: 2 jobs need review: `tideover backlog --reason review`."
    assert (said["verdict"]["level"], one["verdict"]["remarks"], one["standing"]["needs_review"]) == ("draining", [told], 2)
    assert ["a human", "review"] == [
        word for word in ("a human", "review") if word in on_terminal("status", cwd=shop.folder)[1]
    ]
    explained = shop.ask("explain", review[0], "--json").json
    assert (explained["reason"], explained["detail"], explained["ways"]) == ("review", DETAILS["review"], [])
    assert f"tideover release {review[0]}" in explained["remedy"]
    assert [row["event"] for row in shop.ask("explain", review[0]).rows][:4] == ["enqueued", "held", "now", "remedy"]
    everything = shop.ask("release", "--all")
    assert [row["id"] for row in everything.rows] == others
    assert everything.err == "2 jobs in need of review stay held; --reason review releases those.\n"
    assert shop.ask("release", "--all").code == 1
    assert [row["id"] for row in shop.ask("release", "--reason", "review").rows] == review
    assert [message.message_id for message in shop.fetch(n=3)] == [*review, *others]


def test_release_by_filter(shop: Shop) -> None:
    """--dry-run shows what would go and changes nothing; then exactly that goes."""
    for _ in range(4):
        shop.tag.send(PROMPT)
    acme, others = shop.hold(n=2, tenant="acme"), shop.hold(n=2, tenant="blue", wait_key=SPARE)
    shop.open(SPARE)
    plan = shop.tideover("release", "--all", "--dry-run")
    assert [(row["jobs"], row["goes"], row["tenant"], row["waits_for"]) for row in plan.rows] == [
        ("2", "true", "acme", KEY),
        ("2", "false", "blue", SPARE),
    ]
    assert plan.err.splitlines()[0] == "Would release 2 jobs. Nothing was changed."
    assert (shop.ledger.read().held, shop.ask("release", "--all", "--dry-run", "--json").json["would_stay"]) == (4, 2)
    assert "▲ would stay" in on_terminal("release", "--all", "--dry-run", cwd=shop.folder)[1]
    assert shop.ask("release", "--tenant", "blue").code == 4
    assert [row["id"] for row in shop.ask("release", "--tenant", "acme", "--waits-for", "anthropic").rows] == acme
    assert [row["id"] for row in shop.ask("release", "--tag", "", "--force").rows] == others
    assert shop.ask("release", "--reason", "weather").code == 2
    assert shop.ask("release", acme[0], "--tenant", "acme").code == 2
    assert shop.ask("release", "--all", "--task", "tag").code == 2


def test_release_of_thousands_shows_progress(shop: Shop) -> None:
    """On a terminal a bar runs while more than a thousand jobs go."""
    for _ in range(1001):
        shop.tag.send(PROMPT)
    for n in (500, 500, 1):
        shop.hold(n=n)
    code, seen = on_terminal("release", "--all", "--yes", cwd=shop.folder)
    assert (code, "Releasing" in seen, "Released 1,001 jobs." in seen) == (0, True, True)
    assert shop.ledger.read().held == 0


def test_explain(shop: Shop) -> None:
    """The story in words, where the job is, what would free it and when; the beginning of an id is enough."""
    shop.tag.send(PROMPT)
    (job_id,) = shop.hold(reason="failed", tenant="acme", tag="nightly", holds=2)
    shop.open()
    told = shop.tideover("explain", job_id[:8], "--json").json
    assert (told["id"], told["state"], told["reason"], told["ahead"]) == (job_id, "held", "failed", 0)
    assert [line["event"] for line in told["story"]] == ["enqueued", "held"]
    assert told["story"][1]["words"].endswith(f"waits for {KEY}; last failure: anthropic: 529 overloaded_error")
    (way,) = told["ways"]
    assert way["words"].startswith("is open (529 overloaded_error): about ten probes in a row must be answered; next probe in ")
    assert way["expected_at"] is not None
    events = [row["event"] for row in shop.ask("explain", job_id).rows]
    assert events[:6] == ["enqueued", "held", "now", "tenant", "tag", "expected"]
    assert (told["tenant"], told["tag"], told["holds"], told["remedy"]) == ("acme", "nightly", 2, None)
    assert "(held 2 times so far)" in shop.ask("explain", job_id).out
    _, seen = on_terminal("explain", job_id, cwd=shop.folder)
    assert "tenant acme, tag nightly" in seen
    shop.registry.remove_worker(WORKER)
    assert "no worker is alive" in shop.ask("explain", job_id).out


def test_explain_a_job_without_a_story(shop: Shop) -> None:
    """Nothing is made up about a job of which nothing is known; the message says why that may be."""
    shop.tag.send(PROMPT)
    said = shop.tideover("explain", "0c4f0c4f")
    assert (said.code, "succeeded without incident has no story" in said.err) == (1, True)


def test_release(shop: Shop) -> None:
    """Refused while no breaker lets the job run; forced, it goes to the head of its queue with a permit, and is told."""
    for _ in range(3):
        shop.tag.send(PROMPT)
    first, second = shop.hold(n=2)
    shop.open()
    refused = shop.tideover("release", first)
    assert (refused.code, f"{KEY} is open" in refused.err, "--force" in refused.err) == (4, True, True)
    assert shop.ledger.read().held == 2
    forced = shop.ask("release", first, "--force", "--why", "a customer waits", "--json").json
    assert [job["id"] for job in forced["jobs"]] == [first]
    (back,) = shop.fetch()
    assert back.message_id == first
    assert shop.permit_of(back) == Permit(FORCED, 0)
    line = shop.ask("explain", first, "--json").json["story"][-1]
    assert (line["event"], line["facts"]["by"], line["facts"]["forced"]) == ("released", "hand", True)
    assert line["words"].endswith(": a customer waits")
    shop.recover()
    assert [row["id"] for row in shop.ask("release", "--all").rows] == [second]
    (back,) = shop.fetch()
    assert shop.permit_of(back) == Permit(KEY, 1)
    not_held = shop.ask("release", second)
    assert (not_held.code, "it is running" in not_held.err) == (4, True)


def test_release_keeps_the_order(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most urgent job of a selection is fetched first, also when it takes several steps."""
    monkeypatch.setattr("tideover.ops.acts.AT_ONCE", 2)
    for _ in range(5):
        shop.tag.send(PROMPT)
    held = shop.hold(n=5)
    assert len(shop.ask("release", "--task", "tag").rows) == 5
    assert [message.message_id for message in shop.fetch(n=5)] == held


def test_release_of_many_is_asked_for(shop: Shop) -> None:
    """More than 20 jobs need a yes, and where nobody can be asked --yes."""
    for _ in range(21):
        shop.tag.send(PROMPT)
    shop.hold(n=21)
    refused = shop.tideover("release", "--all")
    assert (refused.code, "--yes" in refused.err) == (4, True)
    code, seen = on_terminal("release", "--all", cwd=shop.folder, typed="n\n")
    assert (code, "Release 21 jobs at once? [y/N]" in seen) == (4, True)
    assert shop.ledger.read().held == 21
    assert len(shop.ask("release", "--all", "--yes").rows) == 21


def test_bypass(shop: Shop) -> None:
    """On, shown with who and why, and off again."""
    switched = shop.tideover("bypass", "on", "--for", "30m", "--reason", "holds too much", "--json").json
    assert (switched["bypassed"], switched["bypass"]["why"]) == (True, "holds too much")
    sentence = shop.ask("status", "--json").json["verdict"]["sentence"]
    assert sentence.startswith(f"BYPASSED by {switched['bypass']['who']} ")
    assert sentence.endswith("(holds too much): nothing is held or rerouted.")
    assert 1700 < shop.client.ttl(shop.keys.bypass) <= 1800
    off = shop.ask("bypass", "off")
    assert (off.code, [row["who"] for row in off.rows]) == (0, [switched["bypass"]["who"]])
    assert shop.registry.bypass() is None
    assert shop.ask("bypass", "off", "--json").json["bypass"] is None
    assert shop.ask("bypass", "on", "--for", "soon").code == 2


def test_two_namespaces(shop: Shop, open_shop: Callable[[str], Shop]) -> None:
    """Questions cover all namespaces; an act that names no job wants to know which one is meant."""
    bakery = open_shop("bakery")
    for one in (shop, bakery):
        one.tag.send(PROMPT)
        one.hold()
    found = shop.tideover("status", "--json").json
    assert [(one["namespace"], one["verdict"]["level"]) for one in found["namespaces"]] == [
        ("bakery", "stranded"),
        ("shop", "draining"),
    ]
    assert found["verdict"]["sentence"].startswith("bakery: NO WORKER is alive: 1 job")
    assert {row["namespace"] for row in shop.ask("backlog").rows} == {"bakery", "shop"}
    assert [row["namespace"] for row in shop.ask("backlog", "-n", "shop").rows] == ["shop"]
    refused = shop.ask("release", "--all")
    assert (refused.code, "bakery, shop" in refused.err) == (4, True)
    assert [row["namespace"] for row in shop.ask("release", "--all", "-n", "bakery").rows] == ["bakery"]
    assert shop.ask("bypass", "on").code == 4
    unknown = shop.ask("status", "-n", "shopp")
    assert (unknown.code, unknown.err) == (2, "tideover: there is no namespace 'shopp'; did you mean shop?\n")


def test_operators_mistakes(folder: Path) -> None:
    """One line with the way out, the right exit code, no stack trace and no password."""
    gone = tideover("status", cwd=folder, TIDEOVER_REDIS_URL="redis://:hunter2@127.0.0.1:1/0")
    assert (gone.code, len(gone.err.splitlines()), "hunter2" in gone.err) == (3, 1, False)
    asleep = tideover("status", cwd=folder, TIDEOVER_REDIS_URL="embedded")
    assert (asleep.code, "tideover worker --dev" in asleep.err) == (3, True)
    (folder / "tideover.toml").write_text("redis_ulr = 'x'\n")
    wrong = tideover("status", cwd=folder)
    assert (wrong.code, "did you mean redis_url?" in wrong.err) == (2, True)
    (folder / "tideover.toml").write_text("")
    nowhere = tideover("worker", "shop_tasks", cwd=folder)
    assert (nowhere.code, "tideover worker --dev" in nowhere.err) == (2, True)
    assert tideover("statsu", cwd=folder).err.endswith("Did you mean 'status'?\n")
    assert tideover("release", cwd=folder).code == 2


def test_a_module_that_cannot_be_imported(shop: Shop) -> None:
    """The worker says what is wrong with the module, once, before it starts."""
    missing = shop.tideover("worker", "shop_taks")
    assert (missing.code, missing.err) == (
        2,
        "tideover: module shop_taks cannot be imported: ModuleNotFoundError: No module named 'shop_taks'\n",
    )
    (shop.folder / "broken.py").write_text("import json\nnonsense\n")
    broken = shop.tideover("worker", "broken")
    assert (broken.code, "NameError" in broken.err, "broken.py, line 2" in broken.err) == (2, True, True)


def test_nothing_here_yet(folder: Path) -> None:
    """An empty Redis is no error, and is said to be empty."""
    said = tideover("status", "--json", cwd=folder)
    assert (said.code, said.json["verdict"]["sentence"]) == (0, "Nothing here: tideover was never used in this Redis.")


def test_with_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real worker on a private Valkey: an outage is held and told, the recovery drains it, nothing is lost."""
    (tmp_path / "shop_tasks.py").write_text(TASKS)
    with FakeProvider("anthropic", speed=10) as anthropic:
        settings = f'[routes.anthropic]\nkind = "anthropic"\nbase_url = "{anthropic.base_url}"\n{QUICK}'
        (tmp_path / "tideover.toml").write_text(settings)
        anthropic.fail("529")
        words = [TIDEOVER, "worker", "shop_tasks", "--dev", "--processes", "1", "--threads", "2"]
        with (tmp_path / "worker.log").open("w") as log:
            worker = subprocess.Popen(words, cwd=tmp_path, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        try:
            monkeypatch.chdir(tmp_path)
            monkeypatch.setenv("TIDEOVER_REDIS_URL", "embedded")
            forget()
            walk_through_an_outage(tmp_path, anthropic)
        finally:
            forget()
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(PATIENCE_S) == 0
            assert tideover("embedded", "stop", "--json", cwd=tmp_path).json["stopped"] is True
        assert "export TIDEOVER_REDIS_URL=embedded" in (tmp_path / "worker.log").read_text()


def walk_through_an_outage(folder: Path, anthropic: FakeProvider) -> None:
    until("a worker is there", lambda found: any(one["standing"]["workers"] for one in found["namespaces"]))
    send = f"import shop_tasks\nfor _ in range(8): shop_tasks.tag.send('{PROMPT}')"
    embedded_url = environment(TIDEOVER_REDIS_URL="embedded")
    subprocess.run([sys.executable, "-c", send], cwd=folder, env=embedded_url, check=True)
    until("all are held", lambda found: found["namespaces"][0]["standing"]["held"] == 8)
    seen = tideover("status", "--json", cwd=folder, TIDEOVER_REDIS_URL="embedded")
    assert (seen.code, seen.json["verdict"]["level"]) == (0, "outage")
    job_id = ask("backlog", "--limit", "1").rows[0]["id"]
    anthropic.heal()
    done = until("all succeeded", lambda found: found["namespaces"][0]["standing"]["ends"]["succeeded"] == 8)
    assert done["namespaces"][0]["standing"]["lost"] == 0
    told = ask("explain", job_id, "--json").json
    served = "succeeded, served by anthropic:claude-opus-4-8"
    assert (told["state"], told["end"], told["story"][-1]["words"]) == ("ended", "succeeded", served)


def until(what: str, fact: Callable[[Any], bool]) -> Any:
    """The status in which a fact holds."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        said = ask("status", "--json")
        if said.code == 0 and fact(said.json):
            return said.json
        time.sleep(POLL_S)
    raise AssertionError(f"not within {PATIENCE_S} s: {what}; the last answer was {said}")


def test_whatever_limits_the_pace_has_words() -> None:
    """Else the screen would fail just when somebody looks."""
    assert {*get_args(Factor), "paused"} == set(LIMITS)


def test_a_breaker_is_explained(shop: Shop) -> None:
    """Its charts, the evidence counted, what tripped it and what would close it, in words and as data."""
    shop.open()
    found = shop.ask("breaker", "explain", KEY, "--json").json
    told = found["breaker"]
    assert (KEY, "open", "open", 5, 5) == (told["key"], told["state"], told["computed"], told["calls"], told["failed"])
    assert told["blackout"] >= told["threshold"] == 12
    assert "529 overloaded_error" == told["why"]
    assert "about ten probes in a row must be answered" in told["would_close"]
    assert "5 of 5 calls failed since the charts left zero" in found["evidence"]
    row = shop.ask("breaker", "explain", KEY).rows[0]
    assert (KEY, "open", "5") == (row["key"], row["state"], row["failed"])


def test_a_breaker_is_forced_and_let_go(shop: Shop) -> None:
    """The computed state stays beside it; a whole route may be forced before it saw a call; `auto` returns."""
    shop.staff()
    shop.open()
    forced = shop.ask("breaker", "force", KEY, "closed", "--for", "10m", "--because", "it works", "--json").json["breaker"]
    assert ("closed", "open", "it works") == (forced["state"], forced["computed"], forced["forced"]["why"])
    assert "forced closed" in shop.ask("status").out + json.dumps(shop.ask("status", "--json").json)
    assert "open" == shop.ask("breaker", "auto", KEY, "--json").json["breaker"]["state"]
    whole = shop.ask("breaker", "force", "openai/*", "open", "--for", "1m", "--because", "why", "--json").json["breaker"]
    assert ("open", "closed") == (whole["state"], whole["computed"])


def test_an_open_breaker_is_resumed(shop: Shop) -> None:
    """Held jobs try it at once, at the pace of one that recovers; twice is refused."""
    shop.open()
    assert "recovering" == shop.ask("breaker", "resume", KEY, "--json").json["breaker"]["state"]
    again = shop.ask("breaker", "resume", KEY)
    assert (4, True) == (again.code, "only an open one can be resumed" in again.err)


@pytest.mark.parametrize("words", [("explain",), ("auto",), ("resume",), ("force", "open", "--for", "1m", "--because", "x")])
def test_a_breaker_that_is_none(shop: Shop, words: tuple[str, ...]) -> None:
    """A name that nobody knows is refused, with the one that was meant."""
    shop.staff()
    shop.open()
    asked = shop.ask("breaker", words[0], KEY + "8", *words[1:])
    known = words[0] == "force"  # a route may be forced for a model that it never saw
    assert (0, "") == (asked.code, asked.err) if known else (4, True) == (asked.code, f"did you mean {KEY}" in asked.err)


def test_the_drain_is_told(shop: Shop) -> None:
    """What waits for each breaker, how fast it may go and what keeps it from being faster; and that nothing is held."""
    shop.staff()
    assert [] == shop.ask("drain", "status", "--json").json["drains"]
    shop.open()
    for _ in range(3):
        shop.tag.send(PROMPT)
    shop.hold(n=3)
    told = shop.ask("drain", "status", "--json").json["drains"][0]
    assert (KEY, "open", 3, 0, "open", None) == tuple(
        told[name] for name in ("key", "state", "held", "rate", "limited_by", "latest_at")
    )
    shop.recover()
    row = shop.ask("drain", "status").rows[0]
    assert ("recovering", "3", "ramp") == (row["state"], row["held"], row["limited_by"])
    assert float(row["rate"]) > 0


def test_the_drain_is_paused_capped_and_resumed(shop: Shop) -> None:
    """For one breaker or all; what is computed stays beside an operator's word."""
    shop.staff()
    shop.open()
    shop.tag.send(PROMPT)
    shop.hold()
    shop.recover()
    made = shop.ask("drain", "pause", "--because", "the database is full", "--for", "30m", "--json").json["order"]
    assert (0, "the database is full") == (made["max_rate"], made["why"])
    assert made["until_at"] is not None
    told = shop.ask("drain", "status", "--json").json
    drain = told["drains"][0]
    assert ("paused", 0, True) == (drain["limited_by"], drain["rate"], drain["pace"] > 0)
    assert ["the database is full"] == [order["why"] for order in told["orders"].values()]
    assert 0 == shop.ask("drain", "cap", "0.5", KEY, "--because", "slowly").code
    assert 0 == shop.ask("drain", "resume").code
    drain = shop.ask("drain", "status", "--json").json["drains"][0]
    assert ("own cap", 0.5, "slowly") == (drain["limited_by"], drain["rate"], drain["order"]["why"])
    assert [True, False] == [shop.ask("drain", "resume", KEY, "--json").json["resumed"] for _ in range(2)]
    assert "ramp" == shop.ask("drain", "status").rows[0]["limited_by"]


def test_a_drain_of_nothing_known_is_refused(shop: Shop) -> None:
    """With what was meant; and a cap must be a number above 0."""
    shop.staff()
    shop.open()
    refused = shop.ask("drain", "pause", "antropic/claude", "--because", "why")
    assert (4, True) == (refused.code, "nothing waits for" in refused.err)
    assert 2 == shop.ask("drain", "cap", "0", "--because", "why").code
    assert 4 == shop.ask("drain", "cap", "nan", "--because", "why").code
    assert 2 == shop.ask("drain", "pause").code
