# SPDX-License-Identifier: Apache-2.0
"""What a fake provider remembers of each call. Never a prompt, never a key."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tideover import clock

PENDING = "pending"
OK = "ok"
CLIENT_GONE = "client_gone"
STOPPED = "stopped"


@dataclass(frozen=True)
class Call:
    """One POST to an inference endpoint.

    Attributes:
      n: its number at this provider, from 1.
      provider: the provider's name.
      at: when the request had arrived, Unix time in seconds.
      path: of the URL, without the query.
      model: as requested; empty when the request named none.
      stream: whether a stream was asked for.
      job: the request's `x-tideover-job` header, or None.
      key_ok: whether the credential was right (or none is demanded).
      fault: the fault that it met: drawn, or earned by a bad key or a bad request; None when it met none.
      outcome: `"pending"`, then `"ok"`, a fault, `"client_gone"` (hung up before the answer was complete) or `"stopped"`
        (the provider was stopped first).
      status: HTTP status that was sent; None when none was.
      finished_at: Unix time in seconds; None while pending. It is set just before the last byte is sent.
    """

    n: int
    provider: str
    at: float
    path: str
    model: str
    stream: bool
    job: str | None
    key_ok: bool
    fault: str | None = None
    outcome: str = PENDING
    status: int | None = None
    finished_at: float | None = None


class Ledger:
    """All calls in the order of their arrival. One thread writes; any may read."""

    def __init__(self, provider: str) -> None:
        self.provider = provider
        self.rows: list[Call] = []

    @property
    def next_n(self) -> int:
        """The number that the next call gets."""
        return len(self.rows) + 1

    def begin(self, *, path: str, model: str, stream: bool, job: str | None, key_ok: bool, fault: str | None) -> Entry:
        """Write a pending row."""
        n = self.next_n
        self.rows.append(Call(n, self.provider, clock.now(), path, model, stream, job, key_ok, fault))
        return Entry(self, n)

    def since(self, n: int) -> list[Call]:
        """The calls after number `n`; 0 for all. A row that was pending when read is complete only when read again."""
        return self.rows[max(n, 0) :]


class Entry:
    """The row of a call that is being answered."""

    def __init__(self, ledger: Ledger, n: int) -> None:
        self.ledger, self.n = ledger, n

    def end(self, outcome: str, status: int | None) -> None:
        """Complete the row. The first outcome stands; a later one changes nothing."""
        row = self.ledger.rows[self.n - 1]
        if row.outcome == PENDING:
            self.ledger.rows[self.n - 1] = replace(row, outcome=outcome, status=status, finished_at=clock.now())
