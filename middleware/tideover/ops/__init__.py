# SPDX-License-Identifier: Apache-2.0
"""Every operator question and command; the command line and a dashboard are skins on it.

Read from Redis only, never from user code. An answer is a frozen dataclass, and `as_json` makes plain data of it.
"""

from tideover.ops.access import Misasked, Operator, Refused, open_operator
from tideover.ops.acts import (
    Preview,
    Release,
    Selection,
    bypass_off,
    bypass_on,
    choose,
    choose_jobs,
    preview,
    refuse_if_none_may_go,
    release,
)
from tideover.ops.breakers import BreakerExplanation, BreakerStatus, Override, explain_breaker, force, resume, unforce
from tideover.ops.checklist import Check, Severity
from tideover.ops.dead import RESTORABLE, DeadFilter, DeadSelection, RestoredBefore, choose_dead, choose_dead_jobs
from tideover.ops.discards import Discard, DiscardPreview, discard, preview_discard
from tideover.ops.doctor import Diagnosis, NamespaceDiagnosis, diagnose
from tideover.ops.drain import Drains, DrainStatus, Order, cap_drain, drains, resume_drain
from tideover.ops.explanation import Explanation, explain
from tideover.ops.held import HeldGroup
from tideover.ops.listing import Breakdown, HeldJob, Listing, backlog, breakdown
from tideover.ops.overview import NamespaceStatus, Status, status
from tideover.ops.restoration import ExpiresIn, Restored, RestorePreview, preview_restore, restore
from tideover.ops.routes import HopTold, RouteTest, assumptions, try_routes
from tideover.ops.search import Filter
from tideover.ops.standing import Bypass, Standing
from tideover.ops.values import about, as_json, counted, iso
from tideover.ops.verdict import Level, Verdict

__all__ = [
    "RESTORABLE",
    "Breakdown",
    "BreakerExplanation",
    "BreakerStatus",
    "Bypass",
    "Check",
    "DeadFilter",
    "DeadSelection",
    "Diagnosis",
    "Discard",
    "DiscardPreview",
    "DrainStatus",
    "Drains",
    "ExpiresIn",
    "Explanation",
    "Filter",
    "HeldGroup",
    "HeldJob",
    "HopTold",
    "Level",
    "Listing",
    "Misasked",
    "NamespaceDiagnosis",
    "NamespaceStatus",
    "Operator",
    "Order",
    "Override",
    "Preview",
    "Refused",
    "Release",
    "RestorePreview",
    "Restored",
    "RestoredBefore",
    "RouteTest",
    "Selection",
    "Severity",
    "Standing",
    "Status",
    "Verdict",
    "about",
    "as_json",
    "assumptions",
    "backlog",
    "breakdown",
    "bypass_off",
    "bypass_on",
    "cap_drain",
    "choose",
    "choose_dead",
    "choose_dead_jobs",
    "choose_jobs",
    "counted",
    "diagnose",
    "discard",
    "drains",
    "explain",
    "explain_breaker",
    "force",
    "iso",
    "open_operator",
    "preview",
    "preview_discard",
    "preview_restore",
    "refuse_if_none_may_go",
    "release",
    "restore",
    "resume",
    "resume_drain",
    "status",
    "try_routes",
    "unforce",
]
