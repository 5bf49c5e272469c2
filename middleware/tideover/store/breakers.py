# SPDX-License-Identifier: Apache-2.0
"""Breakers as all processes share them: counted and changed by scripts, judged by `core.breaker`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from tideover.core.breaker import CLOSED, Breaker, Forced, Page, Parked, State, Transition, Witnesses, moved
from tideover.core.detector import MEMORY_S, Base, Charts, Run, Steps
from tideover.store.client import Client, text
from tideover.store.keys import Keys
from tideover.store.news import News
from tideover.store.scripts import Scripts, pairs

STATES: dict[str, State] = {state: state for state in get_args(State)}
PARKED: dict[str, Parked] = {parked: parked for parked in get_args(Parked)}
INSTANTS = (
    "since",
    "opened_at",
    "recovered_at",
    "braked_at",
    "began_at",
    "ok_at",
    "seen_at",
    "throttled_until",
    "probing_until",
    "probe_at",
    "probed_at",
)
NUMBERS = ("generation", "era", "probes_failed", "fence", "flaps")
VERSION = "version"
CHARTS = ("brownout", "blackout", "majority")
COUNTS = ("calls", "failed", "ok", "row")
BASE = ("base_calls", "base_failed", "base_ms")
EVIDENCE = (*CHARTS, *COUNTS, *BASE, "began_ms", "ok_ms", "seen_ms", "throttled_until_ms", "why")
"""What evidence moves, beside the version: in the order of a short reply."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A breaker and who reported on it, at one instant of Redis' clock (unix time)."""

    breaker: Breaker
    by: Witnesses
    now: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Evidence of one era. `latencies`: buckets (see `core.latency`) → first tokens."""

    era: int
    runs: Sequence[Run]
    why: str = ""
    latencies: Mapping[str, int] | None = None


def instant_field(name: str) -> str:
    return f"{name.removesuffix('_at')}_ms"


def breaker_of(row: Mapping[str, str]) -> Breaker:
    """A breaker from its hash; an empty hash is one that never failed."""
    if not row:
        return CLOSED
    known: dict[str, Any] = {name: int(row.get(instant_field(name), 0)) / 1000 for name in INSTANTS}
    known |= {name: int(row.get(name, 0)) for name in (*NUMBERS, VERSION)}
    return Breaker(
        state=STATES[row.get("state", "closed")],
        parked=PARKED[row.get("parked", "")],
        credential=row.get("credential", ""),
        why=row.get("why", ""),
        probe_said=row.get("probe_said", ""),
        charts=charts_in(row),
        base=base_in(row),
        forced=forced_in(row),
        page=page_in(row),
        pace=float(row.get("pace", 0)),
        limited_by=row.get("limited_by", ""),
        paced_at=int(row.get("paced_ms", 0)) / 1000,
        **known,
    )


def charts_in(row: Mapping[str, str]) -> Charts:
    charts: dict[str, Any] = {name: float(row.get(name, 0)) for name in CHARTS}
    return Charts(**charts, **{name: int(row.get(name, 0)) for name in COUNTS})


def base_in(row: Mapping[str, str]) -> Base:
    calls, failed = float(row.get("base_calls", 0)), float(row.get("base_failed", 0))
    return Base(calls=calls, failed=failed, at=int(row.get("base_ms", 0)) / 1000)


def updated(known: Breaker, row: Mapping[str, str]) -> Breaker:
    """A breaker with what evidence has changed of it."""
    instants: dict[str, Any] = {name: int(row[f]) / 1000 for name in INSTANTS if (f := instant_field(name)) in row}
    return replace(known, charts=charts_in(row), base=base_in(row), why=row.get("why", ""), **instants)


def forced_in(row: Mapping[str, str]) -> Forced | None:
    if "forced" not in row:
        return None
    return Forced(
        state="open" if row["forced"] == "open" else "closed",
        until=int(row.get("forced_until_ms", 0)) / 1000,
        who=row.get("forced_who", ""),
        why=row.get("forced_why", ""),
    )


def page_in(row: Mapping[str, str]) -> Page | None:
    if "page" not in row:
        return None
    every_ms = int(row.get("page_probe_every_ms", 0))
    return Page(
        said=row["page"],
        until=int(row.get("page_until_ms", 0)) / 1000,
        shift=float(row.get("page_shift", 0)),
        probe_every_s=every_ms / 1000 if every_ms else None,
    )


class Breakers:
    def __init__(self, client: Client, keys: Keys) -> None:
        self.client, self.keys, self.scripts = client, keys, Scripts(client)

    def report(
        self, key: str, process: str, batch: Batch | None = None, *, known: Breaker | None = None, quiet_s: float = 0
    ) -> Reading:
        """Takes in evidence (None: none) and reads the breaker.

        `known`: it, as of the latest reading. `quiet_s`: the pause that the provider asked for.
        """
        k, steps = self.keys, Steps.of(Base() if known is None else known.base)
        by = [number for chart in (steps.brownout, steps.blackout, steps.majority) for number in (chart.up, chart.down)]
        latencies = {} if batch is None or batch.latencies is None else batch.latencies
        args = [
            key,
            process,
            "" if batch is None else batch.era,
            "" if batch is None else " ".join(f"{kind[0]}{n}" for kind, n in batch.runs),
            "" if batch is None else batch.why,
            int(quiet_s * 1000),
            " ".join(f"{bucket} {n}" for bucket, n in latencies.items()),
            k.news,
            MEMORY_S,
            steps.top,
            *by,
            "" if known is None else known.version,
        ]
        keys = [k.breaker(key), k.reporters(key), k.failing(key), k.latencies(key), k.breakers]
        row, whole, reporters, failing, now_ms = self.scripts.run("report-5", keys, args)
        if whole or known is None:
            breaker = breaker_of(pairs(row))
        else:
            values = zip(EVIDENCE, row, strict=True)
            breaker = updated(known, {name: text(value) for name, value in values if value is not None})
        return Reading(breaker, Witnesses(reporters=int(reporters), failing=int(failing)), int(now_ms) / 1000)

    def transition(self, key: str, seen: Breaker, change: Transition, now: float) -> bool:
        """Moves a breaker that still is as `seen`; False: somebody was faster. `now`: Redis' time, about."""
        after = moved(seen, change, now)
        opens = after.state == "open" and seen.state != "half-open"
        return self._change(key, seen, after, counter="openings" if opens else "")

    def begin_probe(self, key: str, seen: Breaker, lease_s: float, now: float) -> Breaker | None:
        """Takes leave to probe a breaker that still is as `seen`, and half-opens an open one; None: somebody was faster.

        Its number (`fence`) keeps a prober that stalled for longer than the lease from saying anything.
        """
        after = moved(seen, Transition(to="half-open", why=seen.why), now) if seen.is_down else seen
        after = replace(after, fence=seen.fence + 1, probing_until=now + lease_s)
        if not self._change(key, seen, after, offsets={"probing_until": lease_s}, counter="probings"):
            return None
        return after

    def end_probe(self, key: str, fence: int) -> None:
        """Gives the leave to probe back, if it is still this one."""
        seen = self.read([key])[key]
        if seen.fence == fence:
            self._change(key, seen, replace(seen, probing_until=0.0))

    def force(self, key: str, state: str, for_s: float, who: str, why: str) -> Breaker:
        """Sets an operator's word over what is computed."""
        until_ms = int(self.client.time()[0] * 1000 + for_s * 1000)
        said = {"forced": state, "forced_until_ms": until_ms, "forced_who": who, "forced_why": why}
        self.client.hset(self.keys.breaker(key), mapping=said)
        self.client.sadd(self.keys.breakers, key)
        self._tell(key)
        return self.read([key])[key]

    def unforce(self, key: str) -> bool:
        """Takes an operator's word back; False: there was none."""
        gone = self.client.hdel(self.keys.breaker(key), "forced", "forced_until_ms", "forced_who", "forced_why")
        self._tell(key)
        return bool(gone)

    def note_page(self, key: str, page: Page | None) -> None:
        """Notes what a status page says of it; None: nothing any more."""
        names = ("page", "page_until_ms", "page_shift", "page_probe_every_ms")
        if page is None:
            self.client.hdel(self.keys.breaker(key), *names)
        else:
            every_ms = 0 if page.probe_every_s is None else int(page.probe_every_s * 1000)
            said = (page.said, int(page.until * 1000), page.shift, every_ms)
            self.client.hset(self.keys.breaker(key), mapping=dict(zip(names, said, strict=True)))
        self._tell(key)

    def _tell(self, key: str) -> None:
        """Says that a breaker is another by now."""
        self.client.hincrby(self.keys.breaker(key), VERSION, 1)
        self.client.publish(self.keys.news, key)

    def listen(self) -> News:
        """A subscription to the news of this namespace: one message for each breaker that changed."""
        return News(self.client, self.keys.news)

    def keys_known(self) -> list[str]:
        return sorted(text(key) for key in self.client.smembers(self.keys.breakers))

    def read(self, keys: Sequence[str]) -> dict[str, Breaker]:
        with self.client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hgetall(self.keys.breaker(key))
            rows = pipe.execute()
        return {key: breaker_of({text(a): text(b) for a, b in row.items()}) for key, row in zip(keys, rows, strict=True)}

    def latencies(self, key: str) -> dict[str, int]:
        """First tokens so far, by bucket."""
        return {text(bucket): int(n) for bucket, n in self.client.hgetall(self.keys.latencies(key)).items()}

    def note_credential(self, route: str, digest: str, now: float) -> None:
        """Notes that a route's credential works."""
        self.client.hset(self.keys.credentials, f"{route} {digest}", int(now))

    def credentials(self, route: str) -> dict[str, float]:
        """When each credential of a route last worked, by digest."""
        rows = {text(name): float(at) for name, at in self.client.hgetall(self.keys.credentials).items()}
        return {name.removeprefix(f"{route} "): at for name, at in rows.items() if name.startswith(f"{route} ")}

    def _change(
        self, key: str, seen: Breaker, after: Breaker, *, offsets: Mapping[str, float] | None = None, counter: str = ""
    ) -> bool:
        """Writes what differs. An instant that moved is now, by Redis' clock, unless it was cleared or has an offset."""
        instants: list[Any] = []
        others: list[Any] = []
        for name in INSTANTS:
            value = getattr(after, name)
            if value == getattr(seen, name):
                continue
            if offsets is not None and name in offsets:
                instants += [instant_field(name), int(offsets[name] * 1000)]
            elif value == 0 or name == "probe_at":
                others += [instant_field(name), int(value * 1000)]
            else:
                instants += [instant_field(name), 0]
        for name in ("state", *NUMBERS, "parked", "credential", "why", "probe_said"):
            if getattr(after, name) != getattr(seen, name):
                others += [name, getattr(after, name)]
        if after.began_at != seen.began_at:
            others += [item for name in (*CHARTS, *COUNTS) for item in (name, 0)]
        if not instants and not others:
            return True
        args = [key, seen.state, seen.generation, seen.era, seen.fence, counter, self.keys.news, len(instants) // 2]
        keys = [self.keys.breaker(key), self.keys.failing(key), self.keys.counters, self.keys.breakers]
        return bool(self.scripts.run("transition-4", keys, [*args, *instants, *others]))
