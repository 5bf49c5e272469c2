# SPDX-License-Identifier: Apache-2.0
"""How all namespaces stand, with one sentence for each and one for all."""

from __future__ import annotations

from dataclasses import dataclass

from tideover.ops.access import Operator
from tideover.ops.standing import Standing, standings
from tideover.ops.verdict import Verdict, overall, verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceStatus:
    namespace: str
    verdict: Verdict
    standing: Standing


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """`verdict` is that of the worst namespace."""

    verdict: Verdict
    namespaces: tuple[NamespaceStatus, ...]

    @property
    def lost(self) -> int:
        return sum(namespace.standing.lost for namespace in self.namespaces)


def status(operator: Operator) -> Status:
    """How each of the operator's namespaces stands.

    Raises:
      StoreUnavailable: Redis does not answer.
    """
    found = tuple(NamespaceStatus(namespace=s.namespace, verdict=verdict(s), standing=s) for s in standings(operator))
    return Status(verdict=overall([(one.namespace, one.verdict) for one in found]), namespaces=found)
