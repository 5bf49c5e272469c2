# SPDX-License-Identifier: Apache-2.0
"""What `tideover status` shows on a terminal: colour, word and symbol, never colour alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tideover_worker.cli import output

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from tideover.ops import BreakerStatus, NamespaceStatus, Standing, Status, Verdict

LOOKS = {
    "ok": ("✔", "green"),
    "mixed": ("▲", "yellow"),
    "unexplained": ("▲", "yellow"),
    "review": ("▲", "yellow"),
    "draining": ("▲", "yellow"),
    "parked": ("✖", "red"),
    "apart": ("▲", "yellow"),
    "suspect": ("▲", "yellow"),
    "throttled": ("▲", "yellow"),
    "recovering": ("▲", "yellow"),
    "stranded": ("✖", "red"),
    "outage": ("✖", "red"),
    "bypassed": ("⚑", "magenta"),
    "lost": ("✖", "bold red"),
}
STATES = {
    "closed": ("✔", "green"),
    "suspect": ("▲", "yellow"),
    "recovering": ("▲", "yellow"),
    "half-open": ("◐", "red"),
    "open": ("✖", "red"),
}


def of_status(found: Status) -> Iterator[RenderableType]:
    from rich.text import Text

    if not found.namespaces or len(found.namespaces) > 1:
        yield headline(found.verdict)
    for one in found.namespaces:
        if len(found.namespaces) > 1:
            yield Text(f"\n{one.namespace}", style="bold underline")
        yield from of_namespace(one)


def headline(verdict: Verdict) -> Text:
    from rich.text import Text

    symbol, style = LOOKS[verdict.level]
    word, colon, rest = verdict.sentence.partition(": ")
    return Text.assemble((f"{symbol} {word}{colon}", style), rest)


def of_namespace(one: NamespaceStatus) -> Iterator[RenderableType]:
    from rich.text import Text

    yield headline(one.verdict)
    for remark in one.verdict.remarks:
        yield Text(f"  ! {remark}", style="yellow")
    yield ""
    yield account(one.standing)
    for part in (lanes(one.standing), breakers(one.standing), held(one.standing), workers(one.standing)):
        if part.row_count:
            yield ""
            yield part
    if one.standing.counters:
        yield Text("\nSO FAR  " + ", ".join(f"{what} {n:,}" for what, n in one.standing.counters.items()), style="dim")


def account(standing: Standing) -> Text:
    from rich.text import Text

    ends = " + ".join(f"{end} {n:,}" for end, n in standing.ends.items() if n or end == "succeeded")
    delayed = f" ({standing.delayed:,} delayed)" if standing.delayed else ""
    text = Text.assemble(("ACCOUNT  ", "bold"), f"accepted {standing.accepted:,} = queued {standing.queued:,}{delayed}")
    text.append(f" + running {standing.running:,} + held {standing.held:,} + {ends}; ")
    text.append(f"lost {standing.lost:,}", style="bold red" if standing.lost else "green")
    return text


def lanes(standing: Standing) -> Table:
    numbers = ("QUEUED", "DELAYED", "RUNNING", "HELD")
    table = output.table("LANE", *numbers, right=numbers)
    for lane in standing.lanes:
        counts = (lane.queued, lane.delayed, lane.running, lane.held)
        table.add_row(lane.queue, *(f"{n:,}" for n in counts), style="" if any(counts) else "dim")
    return table


def breakers(standing: Standing) -> Table:
    """Breakers that saw a call, and routes that saw none."""
    from rich.text import Text

    table = output.table("ROUTE AND MODEL", "STATE", "SINCE", "WHY", "NEXT")
    for breaker in standing.breakers:
        symbol, style = STATES[breaker.state]
        since = "" if breaker.since_at is None else ago(standing, breaker.since_at)
        why = Text("" if breaker.state == "closed" else breaker.why)
        forced = "" if breaker.forced is None else f", forced (computed {breaker.computed})"
        state = Text(f"{symbol} {breaker.state}{forced}", style)
        table.add_row(Text(breaker.key), state, since, why, expected(standing, breaker))
    seen = {breaker.key.partition("/")[0] for breaker in standing.breakers}
    for route in standing.routes:
        if route.name not in seen:
            table.add_row(Text(route.name), Text("✔ closed", "dim"), "", Text("no call yet", "dim"), "")
    return table


def expected(standing: Standing, breaker: BreakerStatus) -> str:
    """What comes next for a breaker."""
    from tideover.ops import about

    if breaker.next_probe_at is not None:
        return f"probe in {about(breaker.next_probe_at - standing.asked_at)}"
    if breaker.throttled_until_at is not None:
        return f"quiet for {about(breaker.throttled_until_at - standing.asked_at)}"
    return f"{breaker.pace:.1f} calls/s" if breaker.state == "recovering" else ""


def held(standing: Standing) -> Table:
    from rich.text import Text

    table = output.table("HELD FOR", "REASON", "JOBS", "CRITICAL", "OLDEST", "NEXT EXPIRY", right=("JOBS", "CRITICAL"))
    for group in standing.held_groups:
        oldest = "" if group.oldest_at is None else ago(standing, group.oldest_at)
        expiry = "" if group.next_expiry_at is None else ahead(standing, group.next_expiry_at)
        waits_for = Text(" or ".join(group.waits_for)) if group.waits_for else Text("a human", "yellow")
        table.add_row(waits_for, group.reason, f"{group.jobs:,}", f"{group.critical:,}", oldest, expiry)
    return table


def workers(standing: Standing) -> Table:
    from rich.text import Text

    table = output.table("WORKER", "PID", "MODE", "SEEN", "VERSION", "QUEUES", right=("PID",))
    for worker in standing.workers:
        seen = "never" if worker.seen_at is None else ago(standing, worker.seen_at)
        seen_text = Text(f"✖ silent, {seen}", "red") if worker.silent else Text(seen)
        table.add_row(worker.host, str(worker.pid), worker.mode, seen_text, worker.version, Text(", ".join(worker.queues)))
    for stranger in standing.strangers:
        table.add_row(Text(stranger), "", Text("▲ without tideover", "yellow"))
    return table


def ago(standing: Standing, at: float) -> str:
    from tideover.ops import about

    return f"{about(standing.asked_at - at)} ago"


def ahead(standing: Standing, at: float) -> str:
    from tideover.ops import about

    return f"in {about(at - standing.asked_at)}" if at > standing.asked_at else "now"
