# SPDX-License-Identifier: Apache-2.0
"""What a fake provider can be told and asked over HTTP, on its own port, at the root.

POST /__control   one of  {"fail": "529"}  {"fail": {"fault": "hang", "p": 0.3, "models": ["opus"], "retry_after_s": 2}}
                  {"play": [PHASE, ...]}  {"profile": {"path": ..., "id": ..., "speed": 60, "model_of": {...}}}
                  {"heal": true}; answers as /__phase does, or 400 {"error": ...}
GET  /__ledger?since=N   the calls after number N, as a list
GET  /__phase            {"provider", "phase", "index", "p_error", "remaining_s"}; phase null when it is well
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

from tideover.testing.faults import Phase, phases_of_profile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tideover.testing.provider import FakeProvider
    from tideover.testing.wire import Request

PATHS: Final = ("/__control", "/__ledger", "/__phase")


def is_control(path: str) -> bool:
    """Whether the path is ours, and no provider's."""
    return path in PATHS


def answer(provider: FakeProvider, request: Request) -> tuple[int, object]:
    """Status and JSON for a request to one of `PATHS`."""
    try:
        match request.method, request.path.rstrip("/"):
            case "POST", "/__control":
                obey(provider, json.loads(request.body))
                return 200, phase_of(provider)
            case "GET", "/__ledger":
                since = int(parse_qs(request.query).get("since", ["0"])[0])
                return 200, [asdict(call) for call in provider.ledger.since(since)]
            case "GET", "/__phase":
                return 200, phase_of(provider)
            case _:
                return 405, {"error": f"{request.path} does not take {request.method}"}
    except (ValueError, TypeError, KeyError, OSError) as error:
        return 400, {"error": f"{type(error).__name__}: {error}"}


def obey(provider: FakeProvider, order: Mapping[str, Any]) -> None:
    """Do what one order says. ValueError, TypeError, KeyError or OSError when it makes no sense."""
    if not isinstance(order, dict) or len(order) != 1:
        raise ValueError('say one of {"fail": ...}, {"play": [...]}, {"profile": {...}} and {"heal": true}')
    [(verb, what)] = order.items()
    match verb:
        case "fail":
            provider.fail(**({"fault": what} if isinstance(what, str) else what))
        case "play":
            provider.play([Phase.of(phase) for phase in what])
        case "profile":
            provider.play(phases_of_profile(what.pop("path"), what.pop("id"), **what))
        case "heal":
            provider.heal()
        case _:
            raise ValueError(f"no order {verb!r}; there are fail, play, profile and heal")


def phase_of(provider: FakeProvider) -> dict[str, object]:
    """The phase in force as JSON; `remaining_s` is null when it has no end."""
    now = provider.phase
    if now is None:
        return {"provider": provider.name, "phase": None, "index": None, "p_error": 0.0, "remaining_s": None}
    remaining_s = None if math.isinf(now.remaining_s) else now.remaining_s
    about = {"phase": now.phase.name, "index": now.index, "p_error": now.p_error, "remaining_s": remaining_s}
    return {"provider": provider.name, **about}
