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
| `counters` | hash | holds, releases, openings, recovered: not part of the sum | for ever |
| `adopted` | set | Redis ids of live jobs that a producer without tideover sent | until they end |
| `places` | hash | job id → queue and Redis id, for jobs once held or retried | until they end |
| `queues` | set | names of all queues that a job was ever sent to | for ever |
| `tasks` | hash | task → JSON: queue, criticality, routes, models | for ever |
| `models` | set | task, tab, model: what tasks were seen to call | for ever |
| `routes` | hash | route → JSON: kind, models, no secret | for ever |
| `workers` | hash | worker → JSON: host, pid, since, queues, version | until dead |
| `breakers` | set | keys of all breakers that ever saw a call | for ever |
| `breaker:<key>` | hash | state, generation... of a breaker | for ever |
| `window:<key>` | hash | second and outcome → calls | window + 60 s |
| `bucket:<key>` | hash | release tokens | 1 h |
| `held` | set | names of the held sets in use: queue, tab, wait key | while in use |
| `<queue>:held:<wait key>` | zset | Redis id of a held job → unix ms to release it by | while not empty |
| `<queue>:facts` | hash | Redis id of a held job → small JSON | until released |
| `<queue>:permits` | hash | Redis id of a released job → permit | until it ends or is held |
| `stories:<day>` | hash | job id → lines of its story | 8 days |
| `lease:<name>` | string | token of the process that does a chore | seconds |
| `bypass` | string | JSON: who switched tideover off, why | as asked |
| `news` | channel | key of a breaker that changed | — |
| `tideover:namespaces` | set | all namespaces of this database, so that tools find them | for ever |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NAMESPACES = "tideover:namespaces"

WAIT_KEY_JOIN = "|"

DELAYED_SUFFIX = ".DQ"


def queue_of(name: str) -> str:
    """The queue of a list: dramatiq keeps delayed jobs of `default` in `default.DQ`.

    >>> queue_of("default.critical.DQ"), queue_of("default")
    ('default.critical', 'default')
    """
    return name.removesuffix(DELAYED_SUFFIX)


def wait_key_text(wait_key: Sequence[str]) -> str:
    """One text for a set of breakers, whatever their order.

    >>> wait_key_text(("openai/m", "anthropic/m"))
    'anthropic/m|openai/m'
    """
    return WAIT_KEY_JOIN.join(sorted(wait_key))


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
    def breakers(self) -> str:
        return self.own("breakers")

    def breaker(self, key: str) -> str:
        return self.own(f"breaker:{key}")

    def window(self, key: str) -> str:
        return self.own(f"window:{key}")

    def bucket(self, key: str) -> str:
        return self.own(f"bucket:{key}")

    @property
    def held_sets(self) -> str:
        return self.own("held")

    def held(self, queue: str, wait_key: str) -> str:
        return self.own(f"{queue}:held:{wait_key}")

    def facts(self, queue: str) -> str:
        return self.own(f"{queue}:facts")

    def permits(self, queue: str) -> str:
        return self.own(f"{queue}:permits")

    def stories(self, day: str) -> str:
        return self.own(f"stories:{day}")

    def lease(self, name: str) -> str:
        return self.own(f"lease:{name}")

    @property
    def bypass(self) -> str:
        return self.own("bypass")

    @property
    def news(self) -> str:
        return self.own("news")
