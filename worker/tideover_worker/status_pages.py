# SPDX-License-Identifier: Apache-2.0
"""Follows the status pages of providers whose routes are in trouble: to explain, and to corroborate; never to decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tideover import clock, events
from tideover.core.breaker import Page as Said
from tideover.core.route import split_key
from tideover.core.status_page import DEADLINE_S, Effect, Incident, effect, foremost, sentence
from tideover.health import Health

if TYPE_CHECKING:
    from tideover.providers.status_pages import Reading

EVERY_S = 60.0
TURN_S = 1.0
AT_ONCE = 4

MOST_FAILURES = 3
PAUSE_S = 600.0
"""A page that could not be read so often in a row is left alone so long: in an outage it often is out of order itself."""

KEPT_S = 900.0
"""What a page said counts for so long after it was read: its own failing changes nothing, but what it said grows old."""


@dataclass(slots=True)
class Page:
    """What is known of one page, and whether it is asked just now. Instants are monotonic."""

    url: str
    incidents: tuple[Incident, ...] = ()
    read_at: float | None = None
    address: str | None = None
    due_at: float = 0.0
    failures: int = 0
    told: bool = False
    asking: Future[Reading] | None = None
    begun_at: float | None = None
    overdue: bool = False

    def known(self, now: float) -> tuple[Incident, ...]:
        """What it said last, as long as that counts."""
        return self.incidents if self.read_at is not None and now - self.read_at <= KEPT_S else ()


class StatusPages:
    """What the status pages say of routes in trouble; others are not asked. It belongs to one thread, which takes its turns.

    `incidents`: of each route in trouble the foremost unresolved incident of its provider; None: none, or nothing is known.
    `tell(url, why)`: a page cannot be read; said once, until it could be read again.
    """

    def __init__(
        self,
        tell: Callable[[str, str], None],
        *,
        every_s: float = EVERY_S,
        deadline_s: float = DEADLINE_S,
        pause_s: float = PAUSE_S,
    ) -> None:
        self.tell, self.every_s, self.deadline_s, self.pause_s = tell, every_s, deadline_s, pause_s
        self.incidents: dict[str, Incident | None] = {}
        self._routes: dict[str, str] = {}
        self._pages: dict[str, Page] = {}
        self._pool: ThreadPoolExecutor | None = None

    def turn(self, routes: Mapping[str, str], *, wait_s: float | None = None) -> dict[str, Incident | None]:
        """Asks the pages that are due. `routes`: the URL of its page for each route whose breaker is not closed.

        Returns after `wait_s` seconds at most (None: the deadline), for all routes together; a later turn takes later answers.
        """
        self._routes = dict(routes)
        asked = [self._page(url) for url in dict.fromkeys(routes.values())]
        for page in asked:
            self._ask(page)
        under_way = [page.asking for page in asked if page.asking is not None and not page.overdue]
        if under_way and wait_s != 0:
            wait(under_way, timeout=self.deadline_s if wait_s is None else wait_s)
        for page in self._pages.values():
            self._take(page)
        self.incidents = {route: foremost(self.told_of(route)) for route in self._routes}
        return self.incidents

    def told_of(self, route: str) -> tuple[Incident, ...]:
        """Everything that the page of a route in trouble lists."""
        page = self._pages.get(self._routes.get(route, ""))
        return () if page is None else page.known(clock.monotonic())

    def about(self, route: str, model: str) -> Incident | None:
        """What to tell of a breaker. `model`: as the route's provider calls it."""
        return foremost(self.told_of(route), model)

    def effect(self, route: str, model: str) -> Effect:
        """What the page may change for a breaker; nothing for a route that is not in trouble."""
        return effect(self.told_of(route), model)

    def stop(self) -> None:
        """Forgets what is under way: each has its deadline."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _page(self, url: str) -> Page:
        return self._pages.setdefault(url, Page(url))

    def _ask(self, page: Page) -> None:
        now = clock.monotonic()
        if page.asking is not None or now < page.due_at:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(AT_ONCE, "tideover-status-page")
        page.begun_at, page.due_at = None, now + self.every_s
        page.asking = self._pool.submit(read, page, self.deadline_s)

    def _take(self, page: Page) -> None:
        """Takes an answer that has come, or gives up one that is overdue; of that nothing is heard any more.

        One that the pool has not begun to ask for is not late.
        """
        if page.asking is None:
            return
        if page.asking.done():
            asking, overdue = page.asking, page.overdue
            page.asking, page.overdue = None, False
            if not overdue:
                self._heard(page, asking.result())
        elif not page.overdue and page.begun_at is not None and clock.monotonic() - page.begun_at >= self.deadline_s:
            page.overdue = True
            self._failed(page, f"it takes longer than {self.deadline_s:g} s")

    def _heard(self, page: Page, reading: Reading) -> None:
        if reading.incidents is None:
            self._failed(page, reading.why)
            return
        page.incidents, page.read_at, page.address = reading.incidents, clock.monotonic(), reading.address
        page.failures, page.told = 0, False

    def _failed(self, page: Page, why: str) -> None:
        """Nothing changes but when it is asked again, and where: it may have moved to another service.

        After a pause a single failure makes for the next one.
        """
        page.failures, page.address = page.failures + 1, None
        if page.failures >= MOST_FAILURES:
            page.due_at = clock.monotonic() + self.pause_s
        if not page.told:
            page.told = True
            self.tell(page.url, why)


def read(page: Page, deadline_s: float) -> Reading:
    """In a thread of the pool. HTTP is loaded when a route is in trouble, not before."""
    from tideover.providers.status_pages import read_page

    page.begun_at = clock.monotonic()
    return read_page(page.url, address=page.address, deadline_s=deadline_s)


class Corroboration:
    """Notes at the breakers in trouble what their providers' pages say: to explain, and for the little that this may change."""

    def __init__(self, health: Health) -> None:
        self.health = health
        self.pages = StatusPages(events.status_page_unreadable)
        self._noted: dict[str, Said | None] = {}

    def turn(self) -> None:
        settings, views = self.health.settings, self.health.views
        troubled = [key for key, view in views.items() if view.state != "closed" and split_key(key)[0] in settings.routes]
        urls = {name: url for name in map(route_of, troubled) if (url := settings.routes[name].status_page) is not None}
        if not urls and not self._noted:
            return
        self.pages.turn(urls, wait_s=0)
        for key in troubled if urls else ():
            self._note(key, self._said(key))
        for key in [key for key in self._noted if key not in troubled]:
            self._note(key, None)
            del self._noted[key]

    def _said(self, key: str) -> Said | None:
        route, model = split_key(key)
        name = self.health.settings.routes[route].model(model) or model
        incident = self.pages.about(route, name)
        if incident is None:
            return None
        change = self.pages.effect(route, name)
        until = clock.now() + KEPT_S
        return Said(said=sentence(incident, clock.now()), until=until, shift=change.shift, probe_every_s=change.probe_every_s)

    def _note(self, key: str, said: Said | None) -> None:
        """Writes what is new, and again before it grows old."""
        before = self._noted.get(key)
        stale = before is not None and said is not None and said.until - before.until > EVERY_S
        same = (
            before == said
            if before is None or said is None
            else (before.shift, before.probe_every_s) == (said.shift, said.probe_every_s)
        )
        if stale or not same:
            self.health.breakers.note_page(key, said)
            self._noted[key] = said


def route_of(key: str) -> str:
    return split_key(key)[0]
