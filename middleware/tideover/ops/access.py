# SPDX-License-Identifier: Apache-2.0
"""Who asks: a connection, the settings, and the namespaces that questions and acts cover."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tideover.core.breaker import Breaker
from tideover.errors import ConfigurationError, JobNotFound, StoreUnavailable, TideoverError
from tideover.settings import Settings
from tideover.sources import did_you_mean, mask
from tideover.store.account import Ledger
from tideover.store.backlog import Backlog
from tideover.store.breakers import Breakers
from tideover.store.client import FAILED, Client, connect
from tideover.store.keys import Keys
from tideover.store.paces import Paces
from tideover.store.registry import Registry, namespaces
from tideover.store.stories import Stories

SHORTEST_PREFIX = 6
"""Characters of a job's id that may stand for the whole."""


class Refused(TideoverError):
    """What was asked for is possible but not allowed now. The message says why, and how to insist if one can."""


class Misasked(TideoverError, ValueError):
    """The question or act makes no sense as it was asked. The message says what is allowed."""


@dataclass(frozen=True, slots=True)
class Space:
    """One namespace."""

    name: str
    ledger: Ledger
    backlog: Backlog
    breakers: Breakers
    stories: Stories
    registry: Registry
    paces: Paces

    def breakers_known(self) -> dict[str, Breaker]:
        return self.breakers.read(self.breakers.keys_known())


@dataclass(frozen=True, slots=True)
class Operator:
    """Somebody who looks after namespaces of one Redis."""

    client: Client
    settings: Settings
    spaces: tuple[Space, ...]

    def now(self) -> float:
        """Unix time by Redis' clock, which breakers and workers go by."""
        seconds, micros = self.client.time()
        return float(seconds) + float(micros) / 1e6

    def the_space(self, doing: str) -> Space:
        """The one namespace that an act is for; refuses to choose among several."""
        if len(self.spaces) == 1:
            return self.spaces[0]
        if not self.spaces:
            raise Refused(f"{doing}: tideover was never used in this Redis, so there is nothing to act on")
        names = ", ".join(space.name for space in self.spaces)
        raise Refused(f"{doing}: this Redis has {len(self.spaces)} namespaces ({names}). Name the one with --namespace")

    def close(self) -> None:
        self.client.close()


def open_operator(settings: Settings, chosen: Sequence[str] = ()) -> Operator:
    """An operator for the `chosen` namespaces; none chosen: all in which tideover was ever used.

    Raises:
      ConfigurationError: there is no such namespace, or no Redis is configured.
      StoreUnavailable: Redis does not answer.
    """
    client = connect(settings.store_url())
    try:
        with reaching(settings):
            known = namespaces(client)
        for name in chosen:
            if name not in known:
                near = did_you_mean(name, known) if known else "; tideover was never used in this Redis"
                raise ConfigurationError(f"there is no namespace {name!r}{near}")
    except TideoverError:
        client.close()
        raise
    names = known if not chosen else list(dict.fromkeys(chosen))
    return Operator(client, settings, tuple(open_space(client, name) for name in names))


def open_space(client: Client, name: str) -> Space:
    keys = Keys(name)
    stores = Ledger(client, keys), Backlog(client, keys), Breakers(client, keys), Stories(client, keys), Registry(client, keys)
    return Space(name, *stores, Paces(client, keys))


@contextmanager
def reaching(settings: Settings) -> Iterator[None]:
    """Turns what redis-py raises into `StoreUnavailable`, which names the server, without its password, and the way out."""
    try:
        yield
    except FAILED as error:
        if settings.redis_url == "embedded":
            where, remedy = "the private Valkey of this directory", "`tideover worker --dev MODULE` starts it"
        else:
            where, remedy = mask(str(settings.redis_url)), "Check that it runs, and the URL in `tideover config show`"
        said = " ".join(str(error).split())[:200]
        raise StoreUnavailable(f"Redis cannot be asked at {where} ({type(error).__name__}: {said}). {remedy}") from error


def find_job(operator: Operator, asked: str) -> tuple[Space, str]:
    """The namespace and the full id of a job, by its id or the beginning of it."""
    for space in operator.spaces:
        if space.backlog.place(asked, space.registry.queues()) is not None or space.stories.of(asked):
            return space, asked
    like: set[tuple[str, str]] = set()
    by_name = {space.name: space for space in operator.spaces}
    if len(asked) >= SHORTEST_PREFIX:
        for space in operator.spaces:
            found = space.backlog.jobs_like(asked, space.registry.queues()) | space.stories.jobs_like(asked)
            like |= {(space.name, job_id) for job_id in found}
    if not like:
        raise JobNotFound(
            f"there is nothing to tell of job {asked}: it was neither held, retried, rerouted, expired, discarded nor failed "
            "in the last 7 days. A job that is queued, runs, or succeeded without incident has no story; check the id, of "
            f"which the first {SHORTEST_PREFIX} characters must be given at least"
        )
    if len(like) > 1:
        some = ", ".join(sorted(job_id for _, job_id in like)[:3])
        raise JobNotFound(f"{asked} stands for {len(like)} jobs ({some}...); give more of the id")
    name, job_id = like.pop()
    return by_name[name], job_id
