# SPDX-License-Identifier: Apache-2.0
"""The account of a broker's jobs, for a test to look at."""

from __future__ import annotations

import dramatiq
from dramatiq.broker import Broker
from dramatiq.brokers.redis import RedisBroker

from tideover.errors import ConfigurationError
from tideover.store.account import Account, Ledger
from tideover.store.keys import Keys


def account(broker: Broker | None = None) -> Account:
    """Where all jobs are, and how they ended: `account().held`, `account().ends["failed"]`, `account().lost`.

    Args:
      broker: a RedisBroker, or a StubBroker with tideover on it; None: the one that was set.

    Raises:
      ConfigurationError: jobs of this broker are in no store.
    """
    on = broker or dramatiq.get_broker()
    if not isinstance(on, RedisBroker):
        raise ConfigurationError(
            f"there is no account of jobs on this {type(on).__name__}. On dramatiq's StubBroker there is one once Tideover() "
            "is added, a task is declared, and `pip install 'tideover[testing]'` has brought a store in memory"
        )
    return Ledger(on.client, Keys(on.namespace)).read()
