# SPDX-License-Identifier: Apache-2.0
"""What is read of a status page, whom an incident is about, and how little it may change."""

from __future__ import annotations

import math
from typing import Any
from unicodedata import category

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tideover.core.status_page import (
    LONGEST_NAME,
    LONGEST_URL,
    MOST_INCIDENTS,
    Effect,
    Incident,
    about,
    effect,
    foremost,
    names_model,
    names_some_model,
    of_incident_io,
    of_statuspage,
    parse,
    sentence,
)

OPUS, SONNET = "claude-opus-4-8", "claude-sonnet-4-6"

STATUSPAGE: dict[str, Any] = {
    "page": {"id": "tymt9n04zgry", "name": "Claude", "url": "https://status.claude.com", "time_zone": "Etc/UTC"},
    "status": {"indicator": "major", "description": "Partial System Outage"},
    "components": [{"id": "k8w3r06qmzrp", "name": "Claude API (api.anthropic.com)", "status": "partial_outage"}],
    "incidents": [
        {
            "id": "zkr25thltwc9",
            "name": "Elevated errors on Claude Opus 4.6",
            "status": "monitoring",
            "impact": "major",
            "created_at": "2026-06-02T09:45:10.123Z",
            "started_at": "2026-06-02T06:04:00.000Z",
            "monitoring_at": "2026-06-02T10:42:00.000Z",
            "resolved_at": None,
            "shortlink": "https://stspg.io/9zq1",
            "incident_updates": [{"status": "monitoring", "body": "A fix is out.", "affected_components": None}],
        },
        {
            "name": "Elevated errors across multiple models",
            "status": "investigating",
            "created_at": "2026-06-02T10:00:00+02:00",
        },
        {"name": "Database upgrade", "status": "in_progress", "impact": "maintenance"},
    ],
    "scheduled_maintenances": [],
}

WIDGET: dict[str, Any] = {
    "page_title": "OpenAI",
    "page_url": "https://status.openai.com",
    "ongoing_incidents": [
        {
            "id": "01KBW3N0Z5JQW3QZV5F6T7Y8X9",
            "name": "Elevated error rates for GPT-5.5",
            "status": "identified",
            "url": "https://status.openai.com/incidents/01KBW3N0Z5JQW3QZV5F6T7Y8X9",
            "last_update_at": "2026-06-02T09:45:10Z",
            "last_update_message": "We have identified the cause.",
            "current_worst_impact": "partial_outage",
            "affected_components": [{"id": "01JMXBRMFE6N2", "name": "Responses", "current_status": "partial_outage"}],
        }
    ],
    "in_progress_maintenances": [],
    "scheduled_maintenances": [],
}

PROXY: dict[str, Any] = {
    "summary": {
        "name": "OpenAI",
        "public_url": "https://status.openai.com/",
        "components": [{"id": "01JMXBRMFE6N2", "name": "Responses"}],
        "affected_components": [{"component_id": "01JMXBRMFE6N2", "status": "degraded_performance"}],
        "ongoing_incidents": [
            {
                "id": "01KBW3N0Z5",
                "name": "Elevated error rates for GPT-5.5",
                "status": "investigating",
                "published_at": "2026-06-02T09:45:10Z",
                "affected_components": [
                    {"component_id": "01JMXBRMFE6N2", "status": "degraded_performance"},
                    {"component_id": "01JMXBRMFE6N3", "status": "full_outage"},
                ],
                "updates": [{"published_at": "2026-06-02T09:45:10Z", "message_string": "We look into it."}],
            }
        ],
    }
}


def an_incident(name: str, **more: Any) -> Incident:
    told: dict[str, Any] = {"impact": "major", "phase": "investigating", "started_at": None, "url": ""}
    return Incident(name, **{**told, **more})


def test_statuspage() -> None:
    """Incidents with their real beginning, where the page gives one; a maintenance is none."""
    opus, others = parse(STATUSPAGE) or ()
    expected = Incident("Elevated errors on Claude Opus 4.6", "major", "monitoring", 1780380240.0, "https://stspg.io/9zq1")
    assert expected == opus
    assert ("unknown", "investigating", 1780387200.0, "") == (others.impact, others.phase, others.started_at, others.url)


def test_incident_ios_widget() -> None:
    """It says how bad an incident is and where to read on, but not since when."""
    name, url = "Elevated error rates for GPT-5.5", "https://status.openai.com/incidents/01KBW3N0Z5JQW3QZV5F6T7Y8X9"
    assert (Incident(name, "major", "identified", None, url),) == parse(WIDGET)


def test_incident_ios_page() -> None:
    """It says since when; how bad it is, its components say; the address is made as the page makes it."""
    name, url = "Elevated error rates for GPT-5.5", "https://status.openai.com/incidents/01KBW3N0Z5"
    assert (Incident(name, "critical", "investigating", 1780393510.0, url),) == parse(PROXY)


@pytest.mark.parametrize("quiet", [{"incidents": []}, {"ongoing_incidents": []}, {"summary": {"ongoing_incidents": []}}])
def test_a_page_without_incidents_is_known(quiet: object) -> None:
    """That nothing is wrong is something else than that nothing is known."""
    assert () == parse(quiet)


@pytest.mark.parametrize(
    "rubbish",
    [None, 1, "incidents", [], ["incidents"], {}, {"incidents": None}, {"incidents": {}}, {"summary": []}, {"page": {}}],
)
def test_what_is_no_status_page_is_unknown(rubbish: object) -> None:
    assert parse(rubbish) is None


ODD: list[object] = [None, 7, "x", [], {}, {"name": "x"}, {"status": "identified"}, {"name": ["x"], "status": "identified"}]


@pytest.mark.parametrize("key", ["incidents", "ongoing_incidents"])
def test_what_is_no_incident_is_passed_over(key: str) -> None:
    """One odd item does not hide the others."""
    good = {"name": "Errors", "status": "Identified", "started_at": "0000-00-00", "shortlink": {}, "url": 3, "impact": []}
    assert (an_incident("Errors", impact="unknown", phase="identified"),) == parse({key: [*ODD, good]})


def test_strangers_text_stays_text() -> None:
    """One line, without escapes, no longer than a line; an address leads to the web; a list ends somewhere."""
    one = {"name": "Errors\n\x1b[31m\u202e on \u2028 all" + "l" * 500, "status": "resolved", "shortlink": "javascript:alert(1)"}
    found = parse({"incidents": [one] * 500}) or ()
    assert MOST_INCIDENTS == len(found)
    told = found[0]
    assert (True, LONGEST_NAME, "") == (told.name.startswith("Errors [31m on all"), len(told.name), told.url)


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
WORDS = st.sampled_from(
    ["monitoring", "resolved", "major", "full_outage", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"]
)
KEYS = [*STATUSPAGE["incidents"][0], *WIDGET["ongoing_incidents"][0], *PROXY["summary"]["ongoing_incidents"][0]]
ITEM = st.dictionaries(st.sampled_from(KEYS), WORDS | JSON | st.lists(st.fixed_dictionaries({"status": WORDS | JSON})))
LIKELY = st.fixed_dictionaries({}, optional={"incidents": st.lists(ITEM | JSON), "ongoing_incidents": st.lists(ITEM | JSON)})


@given(JSON | LIKELY | LIKELY.map(lambda body: {"summary": {**body, "public_url": "https://x.test"}}), st.text())
def test_no_json_makes_them_raise(decoded: object, model: str) -> None:
    """Whatever a page says, it is incidents or unknown, and fit to be told."""
    for read in (parse, of_statuspage, of_incident_io):
        for one in read(decoded) or ():
            line = sentence(one, 1e9)
            assert [] == [sign for sign in line if category(sign) in ("Cc", "Cs", "Zl", "Zp")]
            assert (True, True) == (0 < len(one.name) <= LONGEST_NAME, len(one.url) <= LONGEST_URL)
            assert one.started_at is None or math.isfinite(one.started_at)
            assert effect([one], model).shift in (0.0, math.log(10))


@given(st.text(), st.text())
def test_any_title_is_about_somebody(title: str, model: str) -> None:
    assert about(an_incident(title), model) in ("model", "provider", "other")


NAMED = [
    (
        "Elevated errors on Claude Opus 4.6",
        ["claude-opus-4-6", "claude-opus-4-6-20260203", "us.anthropic.claude-opus-4-6-v1:0"],
    ),
    ("Elevated errors on claude-opus-4-6", ["claude-opus-4-6", "claude-opus-4-6@20260203", "Claude-Opus-4-6"]),
    ("Elevated errors on Claude Sonnet", [SONNET, "claude-3-5-sonnet-20241022", "claude-sonnet-4-20250514"]),
    ("Elevated errors across multiple models", [OPUS, SONNET, "gpt-5.5", "o3"]),
    ("All models unavailable", [OPUS, "gpt-5.5"]),
    ("Elevated errors for all of our Claude models", [OPUS, "claude-haiku-4-5"]),
    ("Elevated errors on Opus 4.6 and other models", [OPUS, SONNET]),
    ("Elevated errors for all Opus models", [OPUS, "claude-3-opus-latest"]),
    ("Errors on Opus 4.6, 4.7, and 4.8", [OPUS]),
    ("Errors on Opus 4.6/Sonnet 4.6.", ["claude-opus-4-6", SONNET]),
    ("Errors on Claude 3.5 and 3.7 Sonnet", ["claude-3-5-sonnet-latest", "claude-3-7-sonnet-latest"]),
    ("Errors on Claude 4 models", [OPUS, SONNET, "claude-sonnet-4-20250514"]),
    ("Opus 4.x is slow", [OPUS, "claude-opus-4-20250514"]),
    ("Opus 4", ["claude-opus-4-20250514", "claude-opus-4-0"]),
    ("Opus: 529 errors", [OPUS]),
    ("Haiku 4.5 Opus", [OPUS, "claude-haiku-4-5"]),
    ("Gemini Flash is slow", ["gemini-2.5-flash"]),
    ("Opus and 2 more are slow", [OPUS]),
    ("All models but not Haiku", [OPUS]),
    ("GPT-4o mini and GPT-5.5 are slow", ["gpt-4o-mini-2024-07-18", "gpt-5.5", "gpt-5.5-2026-01-01"]),
    ("o3 and o4-mini errors", ["o3", "o4-mini"]),
    ("GPT models are slow", ["gpt-5.5", "gpt-4o-mini"]),
    ("Llama 3.3 errors", ["library/llama3.3"]),
]
NOT_NAMED = [
    ("Elevated errors on Claude Opus 4.6", [OPUS, "claude-opus-4-20250514", SONNET, "gpt-4.6", ""]),
    ("Opus 4", [OPUS]),
    ("Errors on Opus 4.6: 4.8 works", [OPUS]),
    ("Gemini Flash is slow", ["gemini-2.5-pro"]),
    ("Elevated errors on Claude Sonnet", [OPUS]),
    ("Elevated errors for all Opus models", [SONNET]),
    ("Errors on Opus 4.6 and Sonnet", [OPUS]),
    ("Errors on Claude 3.5 Sonnet", [SONNET, "claude-3-5-haiku-latest"]),
    ("Errors on Claude 4 models", ["claude-3-5-haiku-latest"]),
    ("All models but not Haiku", ["claude-haiku-4-5"]),
    ("GPT-4o mini is slow", ["gpt-4o", "gpt-5-mini"]),
    ("GPT-4o is slow", ["gpt-4o-mini", "gpt-4", "gpt-4.1"]),
    ("Gemini 2.5 Flash", ["gemini-2.5-pro"]),
    ("claude.ai is down", [OPUS, SONNET]),
    ("Claude Code: logins fail", [OPUS]),
]


@pytest.mark.parametrize(("title", "model"), [(title, model) for title, models in NAMED for model in models])
def test_a_title_names_a_model(title: str, model: str) -> None:
    assert names_model(title, model)


@pytest.mark.parametrize(("title", "model"), [(title, model) for title, models in NOT_NAMED for model in models])
def test_a_title_does_not_name_another_model(title: str, model: str) -> None:
    """A neighbour's incident is no evidence: models fail, and recover, one by one."""
    assert not names_model(title, model)


@pytest.mark.parametrize(
    "title", ["claude.ai is down", "Claude Code: logins fail", "Elevated errors", "Elevated 529s on the API"]
)
def test_a_title_without_a_model_is_about_the_provider(title: str) -> None:
    assert (False, "provider") == (names_some_model(title), about(an_incident(title), OPUS))


@pytest.mark.parametrize("title", ["Opus 4.6 errors", "GPT-4o", "o3 is slow", "Claude 3 is slow"])
def test_a_title_with_another_model_is_not_about_ours(title: str) -> None:
    assert (True, "other") == (names_some_model(title), about(an_incident(title), OPUS))


def test_only_our_models_unresolved_incident_shifts_the_threshold() -> None:
    """By ln 10; the provider's own, another model's and one that is over shift nothing."""
    ours = an_incident("Elevated errors on Claude Opus 4.8")
    over = an_incident("Elevated errors on Claude Opus 4.8", phase="resolved")
    assert Effect(math.log(10), None) == effect([over, ours], OPUS)
    nothing = [[], [over], [an_incident("Opus 4.6 errors", phase="monitoring")], [an_incident("The API is down")]]
    assert [Effect()] * 4 == [effect(incidents, OPUS) for incidents in nothing]


def test_monitoring_makes_probes_quicker() -> None:
    """A repair is out: asking every 2 s finds its effect soon."""
    assert Effect(math.log(10), 2.0) == effect([an_incident("Opus is slow", phase="monitoring")], OPUS)
    assert Effect(0.0, 2.0) == effect([an_incident("The API is down", phase="monitoring")], OPUS)


def test_the_foremost_incident() -> None:
    """Our model's before the provider's, then the worst, then the newest; none that is over, none of other models only."""
    other, over = an_incident("Haiku is down", impact="critical"), an_incident("Opus is down", phase="resolved")
    provider = an_incident("The API is down", impact="critical", started_at=9.0)
    old, new = an_incident("Opus is slow", started_at=1.0), an_incident("Opus is slower", started_at=2.0)
    mild = an_incident("Opus is odd", impact="none", started_at=3.0)
    assert new == foremost([other, over, provider, old, new, mild], OPUS)
    assert provider == foremost([other, over, provider], OPUS)
    assert foremost([other, over], OPUS) is None
    assert other == foremost([over, old, other])


def test_a_sentence_says_what_is_known() -> None:
    """And leaves out what the page does not say."""
    told = an_incident("The API is down", impact="unknown", phase="identified")
    assert 'the status page says "The API is down" (identified)' == sentence(told, 1e9)
    known = an_incident("The API is down", impact="none", started_at=1e9, url="https://stspg.io/1")
    expected = 'the status page says "The API is down" (impact none, investigating, for 1 h 1 min): https://stspg.io/1'
    assert expected == sentence(known, 1e9 + 3661)
