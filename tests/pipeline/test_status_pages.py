# SPDX-License-Identifier: Apache-2.0
"""Status pages over real HTTP: good ones of every kind, slow, broken and endless ones, and when they are asked at all."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from tideover.core.status_page import Effect, Incident
from tideover.providers.status_pages import MOST_BYTES, PATHS, read_page
from tideover_worker.status_pages import AT_ONCE, KEPT_S, MOST_FAILURES, Page, StatusPages

if TYPE_CHECKING:
    from tests.conftest import WaitUntil
    from tests.pipeline.conftest import Shop

WITHIN_S = 60.0
SOON_S = 0.3
"""A deadline for pages that never answer."""
MODEL = "claude-opus-4-8"
STATUSPAGE, WIDGET, PROXY, SUMMARY = (path.format(host="127.0.0.1") for path in PATHS)

TITLE = "Elevated errors on Claude Opus 4.8"
OPUS = {"name": TITLE, "status": "investigating", "impact": "major", "started_at": "2026-06-02T06:04:00.000Z"}
LISTED = {"page": {"id": "tymt9n04zgry", "name": "Claude"}, "incidents": [{**OPUS, "shortlink": "https://stspg.io/9zq1"}]}
OPUS_IO = {"id": "01KBW3N0Z5", "name": TITLE, "status": "monitoring", "affected_components": [{"status": "full_outage"}]}
SHIM = {"page": {"name": "OpenAI"}, "status": {"indicator": "major"}, "components": []}
"""What incident.io answers where Statuspage has its summary: no incidents in it."""

HTML = b"<!doctype html><html><body>We'll be back soon</body></html>"

Reply = Callable[[BaseHTTPRequestHandler], None]


class Site(ThreadingHTTPServer):
    """A page with a reply for each path, 404 elsewhere; `stop` ends whatever hangs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.replies: dict[str, Reply] = {}
        self.asked: Counter[str] = Counter()
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def says(self, path: str, body: object, status: int = 200, **headers: str) -> None:
        """A body of JSON, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.replies[path] = lambda asked: send(asked, status, content, headers)

    def says_after(self, released: threading.Event, path: str, body: object) -> None:
        def late(asked: BaseHTTPRequestHandler) -> None:
            released.wait(WITHIN_S)
            send(asked, 200, json.dumps(body).encode(), {})

        self.replies[path] = late

    def hangs(self, path: str, first: bytes = b"", again: bytes = b"") -> None:
        """Never ends its answer: after `first` it sends `again` for ever, or nothing."""
        self.replies[path] = lambda asked: trickle(asked, self.over, first, again)


class Asked(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        self.server.replies.get(self.path, lambda asked: send(asked, 404, HTML, {}))(self)

    def log_message(self, *args: object) -> None:
        pass


def send(asked: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str]) -> None:
    asked.send_response(status)
    for name, value in {"content-length": str(len(content)), **headers}.items():
        asked.send_header(name.replace("_", "-"), value)
    asked.end_headers()
    write(asked, content)


def trickle(asked: BaseHTTPRequestHandler, over: threading.Event, first: bytes, again: bytes) -> None:
    going = write(asked, first)
    while going and not over.wait(0.02 if again else WITHIN_S):
        going = write(asked, again)


def write(asked: BaseHTTPRequestHandler, content: bytes) -> bool:
    """False: the client is gone."""
    try:
        asked.wfile.write(content)
    except OSError:
        return False
    return True


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Site() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.over.set()
        made.shutdown()
        thread.join()


class Told:
    """What was told of pages that cannot be read."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __call__(self, url: str, why: str) -> None:
        self.lines.append((url, why))


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def pages(told: Told) -> Iterator[StatusPages]:
    """Asks at each turn, so that a test need not wait a minute."""
    made = StatusPages(told, every_s=0.0, deadline_s=WITHIN_S)
    yield made
    made.stop()


def test_statuspage(site: Site) -> None:
    site.says(STATUSPAGE, LISTED)
    read = read_page(site.url)
    assert (Incident(TITLE, "major", "investigating", 1780380240.0, "https://stspg.io/9zq1"),) == read.incidents
    assert (f"{site.url}{STATUSPAGE}", Counter([STATUSPAGE])) == (read.address, site.asked)


def test_a_summary_of_statuspage_given_by_its_address(site: Site) -> None:
    """A page that is named with a path is asked there, and nowhere else."""
    site.says("/status/api/v2/summary.json", LISTED)
    read = read_page(f"{site.url}/status/api/v2/summary.json")
    assert (1, Counter(["/status/api/v2/summary.json"])) == (len(read.incidents or ()), site.asked)
    assert read_page(f"{site.url}/other").incidents is None
    assert 1 == site.asked["/other"] == site.asked.total() - 1


def test_incident_ios_widget(site: Site) -> None:
    """Found behind the addresses that the service does not have, and asked there at once from then on."""
    site.says(SUMMARY, SHIM)
    site.says(WIDGET, {"ongoing_incidents": [{**OPUS_IO, "url": "https://x.test/1", "current_worst_impact": "partial_outage"}]})
    read = read_page(site.url)
    assert (Incident(TITLE, "major", "monitoring", None, "https://x.test/1"),) == read.incidents
    site.asked.clear()
    assert read == read_page(site.url, address=read.address)
    assert Counter([WIDGET]) == site.asked


def test_incident_ios_page(site: Site) -> None:
    """Where the widget is switched off, what the page itself is made from."""
    site.says(SUMMARY, SHIM)
    site.says(PROXY, {"summary": {"public_url": "https://x.test", "ongoing_incidents": [OPUS_IO]}})
    expected = Incident(TITLE, "critical", "monitoring", None, "https://x.test/incidents/01KBW3N0Z5")
    assert (expected,) == read_page(site.url).incidents


def test_a_page_that_moved(site: Site) -> None:
    """It is followed, but not in circles."""
    site.says("/new", LISTED)
    site.says("/old", b"", 301, location="/new")
    site.says("/round", b"", 302, location="/round")
    assert read_page(f"{site.url}/old").incidents
    read = read_page(f"{site.url}/round")
    assert (None, True) == (read.incidents, read.why.startswith("TooManyRedirects"))


RUBBISH: list[tuple[object, int, str]] = [
    (HTML, 200, "its answer is no JSON"),
    (json.dumps(LISTED).encode()[:-9], 200, "its answer is no JSON"),
    (b"", 200, "its answer is no JSON"),
    (b"[" * 200_000, 200, "its answer is no JSON"),
    (b"\xff\xfe\x00", 200, "its answer is no JSON"),
    (b"9" * 10_000, 200, "its answer is no JSON"),
    ({"incidents": "none"}, 200, "its answer lists no incidents in a format that tideover knows"),
    ([LISTED], 200, "its answer lists no incidents in a format that tideover knows"),
    ("fine", 200, "its answer lists no incidents in a format that tideover knows"),
    (LISTED, 500, "it answers 500"),
    (LISTED, 404, "it answers 404"),
    (b"", 204, "it answers 204"),
    (b" " * (MOST_BYTES + 1), 200, "its answer is longer than 1,000,000 bytes"),
]


@pytest.mark.parametrize(("body", "status", "why"), RUBBISH, ids=range(len(RUBBISH)))
def test_rubbish_is_unknown(site: Site, body: object, status: int, why: str) -> None:
    """Never an exception, and never taken for «no incidents»."""
    site.says("/page", body, status)
    read = read_page(f"{site.url}/page")
    assert (None, None, why) == (read.incidents, read.address, read.why)


def test_a_body_that_is_cut_off_is_unknown(site: Site) -> None:
    site.says("/page", LISTED, content_length="9999")
    read = read_page(f"{site.url}/page")
    assert (None, True) == (read.incidents, read.why.startswith("RemoteProtocolError"))


def test_a_packed_body_is_unknown(site: Site) -> None:
    """A small one could be huge."""
    site.says("/page", gzip.compress(json.dumps(LISTED).encode()), content_encoding="gzip")
    read = read_page(f"{site.url}/page")
    assert (None, "its answer is packed, though that was not asked for") == (read.incidents, read.why)


def test_an_endless_body_is_given_up(site: Site) -> None:
    """Long before its deadline, when it is longer than any page."""
    site.hangs("/page", b"HTTP/1.0 200 OK\r\n\r\n", b" " * 200_000)
    assert "its answer is longer than 1,000,000 bytes" == read_page(f"{site.url}/page", deadline_s=WITHIN_S).why


@pytest.mark.parametrize(
    ("first", "again"),
    [(b"", b""), (b"HTTP/1.0 200 OK\r\n", b"x: y\r\n"), (b"HTTP/1.0 200 OK\r\n\r\n", b" "), (b"HTTP/1.0 200 OK\r\n\r\n{", b"")],
    ids=["no answer", "headers trickle", "body trickles", "body stops"],
)
def test_a_slow_page_is_unknown(site: Site, first: bytes, again: bytes) -> None:
    """The deadline is one of the wall, whatever trickles in meanwhile."""
    site.hangs("/page", first, again)
    read = read_page(f"{site.url}/page", deadline_s=SOON_S)
    assert (None, f"it takes longer than {SOON_S} s") == (read.incidents, read.why)


def test_a_page_that_is_not_there_is_unknown(site: Site) -> None:
    """Nobody listens, no TLS, no such name, no address at all."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    urls = [
        f"http://127.0.0.1:{port}",
        site.url.replace("http:", "https:"),
        "http://",
        "",
        "ftp://127.0.0.1/x",
        "http://[",
        "\n",
    ]
    assert [None] * len(urls) == [read_page(url, deadline_s=WITHIN_S).incidents for url in urls]
    assert [] == [url for url in urls if not read_page(url, deadline_s=WITHIN_S).why]


def test_a_page_that_is_down_is_not_asked_everywhere(site: Site) -> None:
    """One address is enough to know that."""
    site.says(STATUSPAGE, HTML, 503)
    assert "it answers 503" == read_page(site.url).why
    assert Counter([STATUSPAGE]) == site.asked


def test_a_turn_tells_what_pages_say(site: Site, pages: StatusPages, told: Told) -> None:
    """For each route in trouble; two routes of one provider ask once."""
    site.says(STATUSPAGE, LISTED)
    site.says("/quiet", {"incidents": []})
    routes = {"anthropic": site.url, "second": site.url, "quiet": f"{site.url}/quiet", "gone": f"{site.url}/gone"}
    found = pages.turn(routes)
    assert {"anthropic": TITLE, "second": TITLE, "quiet": None, "gone": None} == {
        route: incident and incident.name for route, incident in found.items()
    }
    assert (found, Counter([STATUSPAGE, "/quiet", "/gone"])) == (pages.incidents, site.asked)
    assert [(f"{site.url}/gone", "it answers 404")] == told.lines
    assert (found["anthropic"], None) == (pages.about("anthropic", MODEL), pages.about("anthropic", "claude-opus-4-6"))
    effects = [pages.effect(route, MODEL) for route in ("quiet", "gone", "never heard of")]
    assert (True, [Effect()] * 3) == (pages.effect("anthropic", MODEL).shift > 2, effects)


def test_only_routes_in_trouble_are_asked_about(site: Site, pages: StatusPages) -> None:
    """Without trouble no page is asked, and what was known changes nothing any more."""
    site.says(STATUSPAGE, LISTED)
    assert {} == pages.turn({})
    assert 0 == site.asked.total()
    pages.turn({"anthropic": site.url})
    assert 1 == site.asked.total()
    assert {} == pages.turn({}) == pages.turn({})
    assert (1, Effect(), None) == (site.asked.total(), pages.effect("anthropic", MODEL), pages.about("anthropic", MODEL))


def test_a_page_is_asked_once_a_minute(site: Site, told: Told) -> None:
    """However often there is a turn, or the trouble comes and goes."""
    site.says(STATUSPAGE, LISTED)
    pages = StatusPages(told)
    for routes in ({"anthropic": site.url}, {"anthropic": site.url}, {}, {"anthropic": site.url}):
        pages.turn(routes)
    pages.stop()
    assert ({"anthropic": TITLE}, Counter([STATUSPAGE])) == ({r: i and i.name for r, i in pages.incidents.items()}, site.asked)


def test_a_page_that_stays_away_is_left_alone(site: Site, pages: StatusPages, told: Told) -> None:
    """Three failures in a row, and it has a rest; it is told once, and what it said before still counts."""
    site.says(STATUSPAGE, LISTED)
    routes = {"anthropic": site.url}
    before = pages.turn(routes)
    site.says(STATUSPAGE, HTML, 503)
    assert [before] * 6 == [pages.turn(routes) for _ in range(6)]
    assert (1 + MOST_FAILURES, [(site.url, "it answers 503")]) == (site.asked.total(), told.lines)


def test_a_page_that_comes_back_is_heard(site: Site, told: Told) -> None:
    """After its rest, at another address too; and its next failure is told again."""
    pages = StatusPages(told, every_s=0.0, deadline_s=WITHIN_S, pause_s=0.0)
    routes = {"anthropic": site.url}
    site.says(STATUSPAGE, LISTED)
    pages.turn(routes)
    del site.replies[STATUSPAGE]
    for _ in range(MOST_FAILURES + 1):
        pages.turn(routes)
    site.says(WIDGET, {"ongoing_incidents": [OPUS_IO]})
    found = pages.turn(routes)["anthropic"]
    assert ("monitoring", 1) == (found and found.phase, len(told.lines))
    del site.replies[WIDGET]
    pages.turn(routes)
    pages.stop()
    assert [site.url] * 2 == [url for url, _ in told.lines]


def test_what_a_page_said_grows_old() -> None:
    """An incident that nobody could read again is not believed for ever."""
    said = (Incident(TITLE, "major", "monitoring", None, ""),)
    page = Page("https://status.test", incidents=said, read_at=100.0)
    assert (said, ()) == (page.known(100.0 + KEPT_S), page.known(101.0 + KEPT_S))


def test_hanging_pages_hold_nobody_up(site: Site, told: Told, wait_until: WaitUntil) -> None:
    """More of them than are asked at once: a turn ends while they hang, each fails, and later they are heard again."""
    pages = StatusPages(told, every_s=0.0, deadline_s=SOON_S, pause_s=0.0)
    routes = {f"r{i}": f"{site.url}/p{i}" for i in range(6)}
    for i in range(6):
        site.hangs(f"/p{i}")

    def all_told() -> bool:
        pages.turn(routes)
        return {url for url, _ in told.lines} == set(routes.values())

    wait_until(all_told, within_s=WITHIN_S, description="each hanging page was told of")
    assert (6, set(routes.values())) == (len(told.lines), {url for url, _ in told.lines})
    pages.deadline_s = WITHIN_S
    for i in range(6):
        site.says(f"/p{i}", LISTED)

    def all_heard() -> bool:
        return all(pages.turn(routes).values())

    wait_until(all_heard, within_s=WITHIN_S, description="each page was heard")
    pages.stop()


def test_a_page_behind_hanging_ones_is_not_late(site: Site, told: Told, wait_until: WaitUntil) -> None:
    """Its deadline begins when it is asked; what a page says after its own is not heard."""
    pages, released = StatusPages(told, deadline_s=WITHIN_S), threading.Event()
    hanging = {f"r{i}": f"{site.url}/p{i}" for i in range(AT_ONCE)}
    for i in range(AT_ONCE):
        site.says_after(released, f"/p{i}", LISTED)
    site.says("/good", LISTED)
    routes = {**hanging, "good": f"{site.url}/good"}
    pages.turn(routes, wait_s=0)
    wait_until(lambda: site.asked.total() == AT_ONCE, within_s=WITHIN_S, description="all that hang are asked")
    pages.deadline_s = 0.0
    pages.turn(routes, wait_s=0)
    assert [(url, "it takes longer than 0 s") for url in hanging.values()] == told.lines
    pages.deadline_s = WITHIN_S
    released.set()

    def nothing_under_way() -> bool:
        pages.turn(routes)
        return all(page.asking is None for page in pages._pages.values())

    wait_until(nothing_under_way, within_s=WITHIN_S, description="every answer has come")
    pages.stop()
    assert (["good"], AT_ONCE) == ([route for route, found in pages.incidents.items() if found], len(told.lines))


def test_a_turn_need_not_wait(site: Site, pages: StatusPages, wait_until: WaitUntil) -> None:
    """A later turn takes the answer."""
    released = threading.Event()
    site.says_after(released, STATUSPAGE, LISTED)
    routes = {"anthropic": site.url}
    assert [{"anthropic": None}] * 2 == [pages.turn(routes, wait_s=0) for _ in range(2)]
    released.set()
    wait_until(lambda: pages.turn(routes, wait_s=0)["anthropic"], within_s=WITHIN_S, description="the answer was taken")


def test_a_page_explains_a_breaker_and_has_it_asked_more_often(shop: Shop, site: Site) -> None:
    """It is asked only while the route is in trouble; what it says stands beside the evidence, and goes with the trouble."""
    key = f"anthropic/{MODEL}"
    incident = {**OPUS, "status": "monitoring", "shortlink": "https://stspg.io/9zq1"}
    site.says(STATUSPAGE, {**LISTED, "incidents": [incident]})
    shop.configure(primary_options=f'status_page = "{site.url}"', probe_after_s=60, probe_max_s=60)
    shop.work()
    shop.result(shop.summary.send("first"))
    assert Counter() == site.asked
    shop.open_breaker()
    shop.until(lambda: shop.breakers.read([key])[key].page is not None, "it is noted")
    page = shop.breakers.read([key])[key].page
    assert page is not None
    assert (True, 2.0) == (TITLE in page.said, page.probe_every_s)
    shop.heal()
    shop.until(lambda: shop.breaker().state == "closed", "asked every two seconds, it closes long before its own pause is over")
    shop.until(lambda: shop.breakers.read([key])[key].page is None, "nothing is said of it any more")
