# SPDX-License-Identifier: Apache-2.0
"""A cluster: all keys of a namespace in the slot of its hash tag."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from dramatiq import group
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import RedisBackend

from tideover.errors import ConfigurationError, StoreUnavailable
from tideover.store.client import connect
from tideover.testing import Fault
from tideover_worker.boot import check_store

if TYPE_CHECKING:
    from tests.topology.conftest import Node, Rack, Shop

SLOTS = 16_384


def url_of(nodes: list[Node]) -> str:
    """Its first node is not there, the second one knows the others."""
    return f"redis+cluster://127.0.0.1:1,127.0.0.1:{nodes[-1].port}"


def test_the_story_on_a_cluster(rack: Rack, open_shop: Callable[[str, str], Shop], program: str) -> None:
    """As on one server."""
    nodes = rack.cluster(program=program)
    open_shop(url_of(nodes), "{shop}").tell_the_story()


def test_a_group_completes(rack: Rack, open_shop: Callable[[str, str], Shop], program: str) -> None:
    """Its barrier is in a slot of its own."""
    shop = open_shop(url_of(rack.cluster(program=program)), "{shop}")
    shop.broker.add_middleware(GroupCallbacks(RedisBackend(client=shop.broker.client)))
    shop.work()
    batch: Any = group([shop.summary.message("one"), shop.report.message("two")])
    batch.add_completion_callback(shop.report.message("both"))
    batch.run()
    shop.until(lambda: {"one", "two", "both"} <= shop.answered(), "the group's callback has run")


def test_without_a_hash_tag_nothing_starts(open_shop: Callable[[str, str], Shop]) -> None:
    """The settings say which one to take."""
    shop = open_shop("redis+cluster://127.0.0.1:1", "shop")
    with pytest.raises(ConfigurationError, match=r'namespace \(.*\): .*hash tag.* namespace = "{shop}"'):
        shop.summary.send("x")


def test_the_url_of_one_server_for_a_cluster(cluster: list[Node], open_shop: Callable[[str, str], Shop]) -> None:
    """The error names the URL to give."""
    said = [told for node in cluster if (told := refusal(open_shop(f"redis://127.0.0.1:{node.port}", "{shop}")))]
    assert len(said) >= 2, "at most one node keeps both the namespace and the list of namespaces"
    assert all("redis+cluster://" in told for told in said)


def refusal(shop: Shop) -> str:
    """Why it accepts no job; empty when it does."""
    try:
        shop.summary.send("x")
    except StoreUnavailable as error:
        return str(error)
    finally:
        shop.close()
    return ""


def test_each_node_is_checked_at_boot(cluster: list[Node]) -> None:
    """Eviction on any primary stops the worker: the slot may move there."""
    with connect(url_of(cluster)) as client:
        check_store(client)
        cluster[0].ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        with pytest.raises(ConfigurationError, match="noeviction"):
            check_store(client)


@pytest.mark.usefixtures("swift_restarts")
def test_the_node_of_the_namespace_dies_in_mid_hold(rack: Rack, open_shop: Callable[[str, str], Shop], program: str) -> None:
    """Its replica takes over: what had reached that ends, and the account is whole."""
    nodes = rack.cluster(program=program)
    owner = nodes[int(nodes[0].ask("CLUSTER", "KEYSLOT", "{shop}")) * len(nodes) // SLOTS]
    replica = rack.cluster_replica(owner)
    shop = open_shop(url_of(nodes), "{shop}")
    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    safe = {job.args[0] for job in shop.send(24, "safe")}
    shop.until_held(24)
    shop.until(lambda: replica.follows(owner), "the replica has what was sent")
    shop.send(6, "maybe")
    owner.kill()
    shop.until(lambda: shop.try_to_send(shop.report, "after"), "a job is accepted again")
    shop.primary.heal()
    account = shop.until_over()
    assert (account.accepted, 0) == (account.ends["succeeded"], account.difference)
    assert safe | {"after"} <= shop.answered()
