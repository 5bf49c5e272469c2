# SPDX-License-Identifier: Apache-2.0
"""Every operator question and command; the command line and a dashboard are skins on it.

Read from Redis only, never from user code. An answer is a frozen dataclass, and `as_json` makes plain data of it.
"""

from tideover.ops.access import Operator, Refused, open_operator
from tideover.ops.acts import Release, Selection, bypass_off, bypass_on, choose_all, choose_jobs, permits, release
from tideover.ops.explanation import Explanation, explain
from tideover.ops.listing import HeldJob, Listing, backlog
from tideover.ops.overview import NamespaceStatus, Status, status
from tideover.ops.standing import BreakerStatus, Bypass, Standing
from tideover.ops.values import about, as_json, counted, iso
from tideover.ops.verdict import Level, Verdict

__all__ = [
    "BreakerStatus",
    "Bypass",
    "Explanation",
    "HeldJob",
    "Level",
    "Listing",
    "NamespaceStatus",
    "Operator",
    "Refused",
    "Release",
    "Selection",
    "Standing",
    "Status",
    "Verdict",
    "about",
    "as_json",
    "backlog",
    "bypass_off",
    "bypass_on",
    "choose_all",
    "choose_jobs",
    "counted",
    "explain",
    "iso",
    "open_operator",
    "permits",
    "release",
    "status",
]
