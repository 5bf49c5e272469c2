# SPDX-License-Identifier: Apache-2.0
"""A crash, and a lost reply, at every single step of a job's walk: no job is lost, none stuck, none ends twice.

Each walk goes once undisturbed, which enumerates its steps. Then it goes once for each step and each way to go wrong there, and
a worker that lives finishes the work. The account judges, and a diary outside Redis.
"""

from __future__ import annotations

import gc
import os
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import pytest
import redis
from dramatiq.brokers.redis import RedisBroker
from redis.exceptions import BusyLoadingError, ReadOnlyError
from tests.chaos.crew import SETTINGS, swiftly
from tests.chaos.steps import Diary, Tap, load_scripts, only_reads, scripts
from tests.chaos.walks import SAID_AGAIN, WALKS, Firm

from tideover import settings
from tideover.core.job import ENDS
from tideover.errors import TideoverError
from tideover.store.account import Ledger
from tideover.store.client import text
from tideover.store.keys import Keys
from tideover.store.registry import Registry

Way = Literal["dies before", "dies after", "lost", "repeated", "gone"]
"""How a step goes wrong. The process dies before Redis hears of it, or once Redis has done it. Or it lives: Redis has done it,
and the reply is lost; the same, and redis-py sends it again by itself; or no reply comes to some steps on end, which Redis has
done, or not: by turns."""

WAYS: tuple[Way, ...] = ("dies before", "dies after", "lost", "repeated", "gone")
ERRORS: dict[Way, tuple[type[Exception], ...]] = {
    "lost": (redis.ConnectionError, redis.TimeoutError, ReadOnlyError),
    "repeated": (redis.ConnectionError, redis.TimeoutError),
    "gone": (redis.ConnectionError, BusyLoadingError, redis.TimeoutError, ReadOnlyError),
}
"""By turns: one for each step."""
GONE_FOR = 3
NEVER = 10**9
CRASHED = 99
QUEUES = ("default", "default.critical")

NO_PART_OF_A_WALK = {
    "ahead-1": "reads, for `tideover explain`",
    "allow-1": "takes a call's room under the limits of a route, and moves no job",
    "took-1": "the same",
    "bury-4": "`tideover uninstall`, which runs when no worker does",
    "merge-4": "the same",
    "rewrite-1": "the same",
    "turn-2": "takes a live call's turn in the pace of a recovering route, and moves no job",
    "tidy-n": "forgets what workers without tideover left behind, and moves no job",
    "recount-1": "the same",
}


def is_late(tag: str) -> bool:
    return tag.startswith("late")


def nothing(crew: Firm) -> None:
    """What operators mostly do."""


@dataclass
class Run:
    """One run of a walk, with a step at which it goes wrong."""

    url: str
    admin: redis.Redis
    folder: Path
    walk: Callable[[Firm], None]
    way: Way | None = None
    at: int = -1

    def __post_init__(self) -> None:
        namespace = f"steps-{uuid4().hex[:8]}"
        self.diary = Diary(self.folder / namespace)
        self.keys = Keys(namespace)
        self.cut_short = ""
        """The job that may run once more, because its attempt was cut short."""
        self.tap = Tap(self.diary)
        self.faults: list[str] = []

    # how it goes

    def go(self) -> None:
        """Goes to its end, and says in `faults` what is wrong then."""
        self.admin.flushdb()
        with swiftly():
            if self.way in ("dies before", "dies after"):
                self.die()
                crew = self.successor()
            else:
                crew = self.live()
                if crew.stopped:
                    crew.close()
                    crew = self.successor()
            try:
                SAID_AGAIN.get(self.walk.__name__, nothing)(crew)
                crew.finish()
            finally:
                crew.close()
        self.judge()

    def crew(self, worker: str, tap: Tap) -> Firm:
        return Firm(self.url, self.admin, self.keys.namespace, worker, self.diary, tap, repeats=int(self.way == "repeated"))

    def first(self) -> Firm:
        before = self.way == "dies before" or (self.way == "gone" and self.at % 2 == 0)
        times = GONE_FOR if self.way == "gone" else 1
        return self.crew("first", Tap(self.diary, self.at, self.strike, before=before, times=times))

    def successor(self) -> Firm:
        crew = self.crew("second", Tap(self.diary))
        crew.boot()
        return crew

    def strike(self) -> None:
        if self.way in ERRORS:
            errors = ERRORS[self.way]
            raise errors[self.at % len(errors)](self.way)
        os._exit(CRASHED)

    def live(self) -> Firm:
        """Walks in this process, which survives."""
        crew = self.first()
        try:
            self.walk(crew)
        except TideoverError:  # it could not boot, so whatever looks after processes starts another
            crew.stopped = True
        crew.tap.counting = False
        self.tap = crew.tap
        if self.way == "gone":
            self.cut_short = self.in_flight()
        return crew

    def die(self) -> None:
        """Walks in a process that dies on its way."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 minds our other threads; the child needs none
            child = os.fork()
        if child == 0:
            self.be_the_child()
        _, status = os.waitpid(child, 0)
        self.expect(CRASHED, os.waitstatus_to_exitcode(status), "the process's end")
        tag, aboard = self.in_flight(), {i for key in self.acks() for i in self.admin.smembers(key)}
        redis_ids = [facts[1] for event, *facts in self.diary.read() if event == "began" and facts[0] == tag]
        self.cut_short = tag if redis_ids and redis_ids[-1].encode() in aboard else ""
        self.check_at_rest()

    def be_the_child(self) -> None:
        gc.disable()  # it would touch, and so copy, all that was forked
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        try:
            self.walk(self.first())
        except BaseException:
            self.diary.note("fault", traceback.format_exc())
        os._exit(0)

    def in_flight(self) -> str:
        """The job whose attempt was under way when it struck; empty: none."""
        tag = ""
        for event, *facts in self.diary.read():
            match event:
                case "began":
                    tag = facts[0]
                case "parted":
                    tag = ""
                case "struck":
                    return tag
        return ""

    def acks(self) -> list[Any]:
        return self.admin.keys(f"{self.keys.namespace}:__acks__*")

    # what is said of it

    def expect(self, expected: object, actual: object, what: str) -> None:
        if expected != actual:
            self.faults.append(f"{what}: expected {expected}, not {actual}")

    def check_at_rest(self) -> None:
        """What is true after each single step: nobody is lost, and the index of the held jobs agrees with itself."""
        account = Ledger(self.admin, self.keys).read()
        self.expect(len(self.diary.tags("elsewhere")) - account.ends["elsewhere"], account.lost, "lost")
        for queue in Registry(self.admin, self.keys).queues():
            counts = [int(n) for n in self.admin.hvals(self.keys.counts(queue))]
            held, facts = self.admin.zcard(self.keys.held(queue)), self.admin.hlen(self.keys.facts(queue))
            self.expect((held, held), (sum(counts), facts), f"counts and facts of held jobs of {queue}")
            self.expect(len(counts), self.admin.hlen(self.keys.groups(queue)), f"groups of {queue}")

    def judge(self) -> None:
        """What is true when all is over: each job has ended once, and nothing is left of it."""
        self.check_at_rest()
        self.check_ends()
        self.check_follow_ups()
        self.check_special_ends()
        self.check_leaks()
        self.faults += [f"{event}: {facts}" for event, *facts in self.diary.read() if event in ("fault", "thread died")]

    def check_ends(self) -> None:
        account = Ledger(self.admin, self.keys).read()
        places = (account.queued, account.running, account.held, account.difference)
        self.expect((0, 0, 0, 0), places, "queued, running, held, difference")
        sent, sending, began, answered, elsewhere = (
            set(self.diary.tags(event)) for event in ("sent", "sending", "began", "answered", "elsewhere")
        )
        restored = Registry(self.admin, self.keys).counters().get("restored", 0)
        in_doubt, accepted = sending - sent, account.accepted - restored
        if not len(sent | in_doubt & began) <= accepted <= len(sending):
            self.faults.append(f"{accepted} were accepted, {len(sent)} sent; in doubt are {in_doubt}, begun {in_doubt & began}")
        failing = {tag for tag in sent | began if tag.startswith("fails")}
        late = {tag for tag in sending if is_late(tag)}
        dropped = {tag for tag in sent if tag.startswith("dropped")}
        shared = {tag for tag in sent if tag.startswith("twin")}
        if shared & answered:  # the others had its answer
            shared, answered = set(), answered | shared
        self.expect(set(), sent - answered - failing - late - dropped - elsewhere, "jobs that ended in no known way")
        ends = {"succeeded": len(answered), "failed": len(failing) + restored, "elsewhere": len(elsewhere)}
        ends["discarded"] = len(dropped)
        if any(tag.startswith("twin") for tag in answered):  # and those that were sent in doubt
            ends["succeeded"] = account.accepted - ends["failed"] - ends["elsewhere"] - ends["discarded"]
        ends["expired"] = account.accepted - sum(ends.values())
        self.expect({end: ends.get(end, 0) for end in ENDS}, account.ends, "ends")

    def check_follow_ups(self) -> None:
        """What follows other jobs came if all of those had succeeded, and not before."""
        first: dict[tuple[str, str], int] = {}
        for at, (event, tag, *_) in enumerate(self.diary.read()):
            first.setdefault((event, str(tag)), at)
        for then, jobs in (facts for event, *facts in self.diary.read() if event == "follow"):
            done_at = max(first.get(("answered", job), NEVER) for job in jobs)
            came = [tag for tag in then if ("answered", tag) in first]
            self.expect(then if done_at < NEVER else [], came, f"what follows {jobs}")
            early = [tag for tag in then if first.get(("began", tag), NEVER) < done_at]
            self.expect([], early, f"what began before {jobs} had all succeeded")

    def check_special_ends(self) -> None:
        """What was late when it ran made no call, but its degraded answer; what had failed was restored once."""
        answered, degraded, sent = (set(self.diary.tags(event)) for event in ("answered", "degraded", "sent"))
        late = {tag for tag in answered if is_late(tag)}
        self.expect(set(), late, "late jobs that made a call")
        self.expect({tag for tag in sent if is_late(tag) and tag.endswith("digest")}, degraded, "degraded answers")
        if mended := [tag for tag in sent if tag.startswith("buggy")]:
            self.expect(len(mended), Registry(self.admin, self.keys).counters().get("restored", 0), "restored")

    def check_leaks(self) -> None:
        k = self.keys
        lasting = [k.account, k.counters, k.queues, k.tasks, k.models, k.routes, k.workers, k.breakers, k.heartbeats]
        lasting += [key for queue in QUEUES for key in (k.dead(queue), k.dead_msgs(queue))]
        kept = ("breaker:", "reporters:", "failing:", "latencies:", "credentials", "bucket:", "pace:")
        prefixes = (*kept, "stories:", "once:", "lease:", "schema", "strangers", "group:")
        left = [text(key) for key in self.admin.keys(f"{k.namespace}:*")]
        left = [key for key in left if key not in lasting and not key.startswith(tuple(map(k.own, prefixes)))]
        self.expect([], sorted(left), "keys left over")

    def runs(self) -> Counter[str]:
        """How often the function of each job came to its end; an attempt that was held did not."""
        return Counter([*self.diary.tags("answered"), *self.diary.tags("degraded"), *self.diary.tags("failed")])


@dataclass
class Place:
    """Where runs take place."""

    url: str
    admin: redis.Redis
    folder: Path

    def run(self, walk: str, way: Way | None = None, at: int = -1) -> Run:
        run = Run(self.url, self.admin, self.folder, WALKS[walk], way, at)
        try:
            run.go()
        except Exception:
            run.faults.append(traceback.format_exc())
        return run

    def run_that_strikes(self, name: str, walk: str, way: Way, at: int) -> Run:
        """Where the machine stood still for a second, breakers are read once more, and another step comes at this place."""
        for _ in range(3):
            run = self.run(walk, way, at)
            if run.faults or [name] == run.diary.tags("struck")[:1]:
                break
        return run

    def undisturbed(self, walk: str) -> Run:
        run = self.run(walk)
        assert [] == run.faults
        return run


@pytest.fixture
def place(valkey_url: str, client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    (tmp_path / "tideover.toml").write_text(SETTINGS)
    monkeypatch.setenv("TIDEOVER_CONFIG", str(tmp_path / "tideover.toml"))
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key")
    settings.forget()
    load_scripts(client)
    stock: Any = RedisBroker
    stock(client=client)._max_unpack_size()  # dramatiq asks Redis once in each process
    yield Place(valkey_url, client, tmp_path)
    settings.forget()


def places_for(way: Way, tap: Tap) -> list[int]:
    """The steps at which one way to go wrong makes a difference."""
    wrote = [at for at, name in enumerate(tap.names) if not only_reads(name)]
    match way:
        case "lost" | "repeated":
            return wrote
        case "gone":
            return list(range(0, len(tap.names), GONE_FOR))
        case "dies before" | "dies after":
            known: dict[tuple[int, int], tuple[Way, int]] = {}
            for at, (before, after) in enumerate(zip(tap.befores, tap.afters, strict=True)):
                known.setdefault(before, ("dies before", at))
                known.setdefault(after, ("dies after", at))
            return [at for like, at in known.values() if like == way]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("walk", WALKS)
def test_each_step_may_go_wrong(walk: str, way: Way, place: Place, record_property: Callable[[str, object], None]) -> None:
    """Whatever goes wrong at whichever step: every job ends, once, and runs again only if its attempt was cut short."""
    usual = place.undisturbed(walk)
    at_most = usual.runs() | Counter(usual.diary.tags("sent"))
    places = places_for(way, usual.tap)
    faults: list[str] = []
    for at in places:
        name = usual.tap.names[at]
        run = place.run_that_strikes(name, walk, way, at)
        run.expect({}, dict(run.runs() - at_most - Counter([run.cut_short])), "ran too often")
        run.expect([name], run.diary.tags("struck")[:1], "it struck at")
        faults += [f"{walk}, step {at} ({name}), {way}: {fault}" for fault in run.faults[:3]]
    record_property("struck", len(places))
    assert [] == faults, "\n".join(faults)


def test_the_walks_take_every_step(place: Place) -> None:
    """Each script of the store is in a walk, or it is said why not: so that a new one cannot be forgotten."""
    taken = {name for walk in WALKS for step in place.undisturbed(walk).tap.names for name in step.split(" + ")}
    ours = {name for name in scripts() if not name.startswith(("dramatiq's", "lock-"))}
    assert ours - set(NO_PART_OF_A_WALK) == ours & taken
