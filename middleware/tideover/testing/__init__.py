# SPDX-License-Identifier: Apache-2.0
"""For the tests of code that calls models: providers that are real HTTP servers and fail when told to."""

from tideover.testing.answers import Dialect
from tideover.testing.faults import Fault, Phase, PhaseNow, fault_named, phases_of_profile
from tideover.testing.latency import Latency
from tideover.testing.ledger import Call
from tideover.testing.provider import FakeProvider

__all__ = ["Call", "Dialect", "FakeProvider", "Fault", "Latency", "Phase", "PhaseNow", "fault_named", "phases_of_profile"]
