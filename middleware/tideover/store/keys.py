# SPDX-License-Identifier: Apache-2.0
"""Every key: name, type, lifetime. Each carries its namespace, so one hash tag (`namespace = "{shop}"`) keeps them together.

dramatiq's own keys, which a worker without tideover understands as well:

| key | type | holds | lives |
|---|---|---|---|
| `<ns>:<queue>` | list | Redis ids of queued jobs; `<queue>.DQ` of delayed ones | while not empty |
| `<ns>:<queue>.msgs` | hash | Redis id → encoded message, held ones included | while not empty |
| `<ns>:__acks__.<worker>.<queue>` | set | Redis ids that a worker has fetched | while not empty |
| `<ns>:__heartbeats__` | zset | worker → unix ms of its last sign of life | cleaned by the maintainer |
| `<ns>:<queue>.XQ`, `.XQ.msgs` | zset, hash | dead letters: failed and expired jobs | 7 days |

Ours, below `<ns>:__tideover__:` (a queue's name cannot contain a colon):

| key | type | holds | lives |
|---|---|---|---|
| `account` | hash | accepted and the ends, as counters | for ever |
| `counters` | hash | holds, releases, openings, recovered, restored, degraded, tidied: not part of the sum | for ever |
| `tenants` | hash | tenant → its live jobs, of those sent with a tenant | while it has jobs |
| `once:<day>` | hash | id of a job sent with an idempotency key → its list and a digest of its arguments | 2 days |
| `group:<group>` | set | job ids of a group's members that have succeeded | 30 days |
| `adopted` | set | Redis ids of live jobs that a producer without tideover sent | until they end |
| `places` | hash | job id → list and Redis id, of jobs whose Redis id is another than their job id | until they end |
| `schema` | string | number of the shape of these keys (see `registry.py`) | for ever |
| `queues` | set | names of all queues that a job was ever sent to | for ever |
| `tasks` | hash | task → JSON: queue, criticality, routes, models | for ever |
| `models` | set | task, tab, model: what tasks were seen to call | for ever |
| `routes` | hash | route → JSON: kind, models, no secret | for ever |
| `workers` | hash | worker → JSON: host, pid, since, queues, tasks, version, schema | until dead |
| `strangers` | hash | worker without tideover that has fetched jobs → JSON: first and last seen | 1 h |
| `breakers` | set | keys of all breakers that ever saw a call | for ever |
| `breaker:<key>` | hash | state, generation, charts... of a breaker | for ever |
| `reporters:<key>` | zset | process → unix ms of its latest report on a breaker | 2 min |
| `failing:<key>` | zset | the same of those whose latest call failed | 2 min |
| `latencies:<key>` | hash | bucket → first tokens of a route and model that took so long | for ever |
| `credentials` | hash | route and digest of a credential → unix time when it last worked | for ever |
| `pace:<key>` | hash | what calls of a recovering route and model came to, the leader's notes and the pace | 1 h |
| `orders` | hash | breaker, or `*` for all → JSON: releases per second at most, until when, who, why | for ever |
| `bucket:<key>` | hash | release tokens | 1 h |
| `<queue>:held` | zset | held jobs as group id, order and Redis id, all of score 0 (see `facts.py`) | while not empty |
| `<queue>:facts` | hash | Redis id of a held job → packed facts | until released |
| `<queue>:groups` | hash | group id → facet: what its held jobs have in common | while it has jobs |
| `<queue>:counts` | hash | group id → number of its held jobs | while it has jobs |
| `<queue>:leaders` | hash | digest of a key → order and Redis id of the job that runs for all that have it | until they end |
| `<queue>:waiters` | zset | digest and Redis id of held jobs that wait for its answer, all of score 0 | until they end |
| `<queue>:marks` | hash | Redis id → permit, times and ms held, workers that died with it | until it ends or is held |
| `stories:<day>` | hash | job id → lines of its story | 8 days |
| `answer:<digest>` | string | JSON: the last good answer to a key of a task and tenant, and when | as asked |
| `spent:<hour>` | hash | route or task → what its calls have cost in an hour of the clock | 2 h |
| `limiter:<route>` | hash | what is left of a route's limits per minute, and the tokens of a call | 1 h |
| `lease:<name>` | string | worker that does a chore | seconds |
| `bypass` | string | JSON: who switched tideover off, why | as asked |
| `news` | channel | key of a breaker that changed | — |
| `tideover:namespaces` | set | all namespaces of this database, so that tools find them | for ever |
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

SCHEMA = 1
"""The shape of our keys and of what tideover writes into messages. A change that older processes cannot read raises it by one;
processes of this number and of the one before share a Redis, so while the lower one is stored its shape is written."""

NAMESPACES = "tideover:namespaces"
BYPASS = "bypass"
"""The news that an operator switched tideover off or on; all other news are names of breakers."""

WAIT_KEY_JOIN = "|"

DELAYED_SUFFIX = ".DQ"


def queue_of(name: str) -> str:
    """The queue of a list: dramatiq keeps delayed jobs of `default` in `default.DQ`.

    >>> queue_of("default.critical.DQ"), queue_of("default")
    ('default.critical', 'default')
    """
    return name.removesuffix(DELAYED_SUFFIX)


@lru_cache(maxsize=1024)
def wait_key_text(wait_key: tuple[str, ...]) -> str:
    """One text for a set of breakers, whatever their order.

    >>> wait_key_text(("openai/m", "anthropic/m"))
    'anthropic/m|openai/m'
    """
    return WAIT_KEY_JOIN.join(sorted(wait_key))


def breaker_keys_in(wait_key: str) -> tuple[str, ...]:
    """What `wait_key_text` joined."""
    return tuple(wait_key.split(WAIT_KEY_JOIN)) if wait_key else ()


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one namespace."""

    namespace: str

    def own(self, name: str) -> str:
        return f"{self.namespace}:__tideover__:{name}"

    # dramatiq's
    def queue(self, queue: str) -> str:
        return f"{self.namespace}:{queue}"

    def msgs(self, queue: str) -> str:
        return f"{self.namespace}:{queue}.msgs"

    def acks(self, worker: str, queue: str) -> str:
        return f"{self.namespace}:__acks__.{worker}.{queue}"

    @property
    def heartbeats(self) -> str:
        return f"{self.namespace}:__heartbeats__"

    def dead(self, queue: str) -> str:
        return f"{self.namespace}:{queue_of(queue)}.XQ"

    def dead_msgs(self, queue: str) -> str:
        return self.dead(queue) + ".msgs"

    # ours
    @property
    def account(self) -> str:
        return self.own("account")

    @property
    def counters(self) -> str:
        return self.own("counters")

    @property
    def tenants(self) -> str:
        return self.own("tenants")

    def group(self, group: str) -> str:
        """On a cluster in the slot of dramatiq's barrier, whose key is the bare group id: one script uses both."""
        return f"{{{group}}}:{self.own('group')}" if "{" in self.namespace else self.own(f"group:{group}")

    def once(self, day: str) -> str:
        return self.own(f"once:{day}")

    @property
    def adopted(self) -> str:
        return self.own("adopted")

    @property
    def places(self) -> str:
        return self.own("places")

    @property
    def queues(self) -> str:
        return self.own("queues")

    @property
    def tasks(self) -> str:
        return self.own("tasks")

    @property
    def models(self) -> str:
        return self.own("models")

    @property
    def routes(self) -> str:
        return self.own("routes")

    @property
    def workers(self) -> str:
        return self.own("workers")

    @property
    def strangers(self) -> str:
        return self.own("strangers")

    @property
    def schema(self) -> str:
        return self.own("schema")

    @property
    def breakers(self) -> str:
        return self.own("breakers")

    def breaker(self, key: str) -> str:
        return self.own(f"breaker:{key}")

    def reporters(self, key: str) -> str:
        return self.own(f"reporters:{key}")

    def failing(self, key: str) -> str:
        return self.own(f"failing:{key}")

    def latencies(self, key: str) -> str:
        return self.own(f"latencies:{key}")

    @property
    def credentials(self) -> str:
        return self.own("credentials")

    @property
    def orders(self) -> str:
        return self.own("orders")

    def pace(self, key: str) -> str:
        return self.own(f"pace:{key}")

    def bucket(self, key: str) -> str:
        return self.own(f"bucket:{key}")

    def held(self, queue: str) -> str:
        return self.own(f"{queue}:held")

    def facts(self, queue: str) -> str:
        return self.own(f"{queue}:facts")

    def groups(self, queue: str) -> str:
        return self.own(f"{queue}:groups")

    def counts(self, queue: str) -> str:
        return self.own(f"{queue}:counts")

    def leaders(self, queue: str) -> str:
        return self.own(f"{queue}:leaders")

    def waiters(self, queue: str) -> str:
        return self.own(f"{queue}:waiters")

    def marks(self, queue: str) -> str:
        return self.own(f"{queue}:marks")

    def stories(self, day: str) -> str:
        return self.own(f"stories:{day}")

    def answer(self, digest: str) -> str:
        return self.own(f"answer:{digest}")

    def spent(self, hour: str) -> str:
        return self.own(f"spent:{hour}")

    def limiter(self, route: str) -> str:
        return self.own(f"limiter:{route}")

    def lease(self, name: str) -> str:
        return self.own(f"lease:{name}")

    @property
    def bypass(self) -> str:
        return self.own("bypass")

    @property
    def news(self) -> str:
        return self.own("news")
