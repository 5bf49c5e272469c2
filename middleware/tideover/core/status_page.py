# SPDX-License-Identifier: Apache-2.0
"""What a provider's status page says, and how little that may change.

The page speaks 20 minutes late in the median (OpenAI 2025-26, Claude 2026), when half of an outage is over. So it explains, and
corroborates what our own calls have shown; alone it opens and closes nothing:

    says                                                  may
    of a model, or of the provider: anything unresolved   stand in an explanation (`sentence`)
    of our model: anything unresolved                     take ln 10 off the threshold of its charts (`Effect.shift`)
    of our model or of no model in particular: monitoring have it probed every 2 s (`Effect.probe_every_s`)

Two formats are read, told apart by their shape; of each only what is named here, all of it optional but name and status:

    Statuspage v2    {"incidents": [{name, status, impact, started_at, created_at, shortlink}]}
                     of `/api/v2/incidents/unresolved.json` and `/api/v2/summary.json`
    incident.io      {"ongoing_incidents": [{name, status, url, current_worst_impact, affected_components: [{current_status}]}]}
                     of the widget API (`/api/v1/summary`), which does not say when an incident began; and
                     {"summary": {"public_url", "ongoing_incidents": [{id, name, status, published_at,
                     affected_components: [{status}]}]}} of what its own page is made from (`/proxy/<host>`)

No page has a component for each model: which one an incident is about stands in its title only, in a human's words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, Literal

Phase = Literal["investigating", "identified", "monitoring", "resolved"]
Impact = Literal["unknown", "none", "minor", "major", "critical"]
About = Literal["model", "provider", "other"]
"""Whom an incident is about: our model, no model in particular, or other models only."""

PHASES: dict[str, Phase] = {
    "investigating": "investigating",
    "identified": "identified",
    "fixing": "identified",
    "monitoring": "monitoring",
    "resolved": "resolved",
    "postmortem": "resolved",
}
"""Any other status is a maintenance's, or nothing that we know."""

IMPACTS: dict[str, Impact] = {
    "none": "none",
    "operational": "none",
    "maintenance": "none",
    "under_maintenance": "none",
    "minor": "minor",
    "degraded": "minor",
    "degraded_performance": "minor",
    "major": "major",
    "partial_outage": "major",
    "critical": "critical",
    "major_outage": "critical",
    "full_outage": "critical",
}
WORSE: tuple[Impact, ...] = ("unknown", "none", "minor", "major", "critical")

MOST_INCIDENTS = 50
LONGEST_NAME, LONGEST_URL = 200, 300
UNPRINTABLE = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]+")
WEB_ADDRESS = re.compile(r"https?://[^\s\x00-\x1f\x7f-\x9f\"'<>\\\ud800-\udfff]+")

SHIFT = math.log(10)
PROBE_EVERY_S = 2.0

DEADLINE_S = 3.0
"""Within that a page answers, or says nothing."""


@dataclass(frozen=True, slots=True)
class Incident:
    """What a provider tells of itself. `started_at`: Unix time, None where the page does not say; `url`: "" likewise."""

    name: str
    impact: Impact
    phase: Phase
    started_at: float | None
    url: str


@dataclass(frozen=True, slots=True)
class Effect:
    """What it may change for one breaker: `shift` is taken off its threshold; `probe_every_s` None: probed as ever."""

    shift: float = 0.0
    probe_every_s: float | None = None


def parse(decoded: object) -> tuple[Incident, ...] | None:
    """The incidents in a decoded body of either format; None: it is none of them, so nothing is known.

    >>> parse({"incidents": []}), parse({"message": "not found"}), parse(None)
    ((), None, None)
    """
    found = of_statuspage(decoded)
    return of_incident_io(decoded) if found is None else found


def of_statuspage(decoded: object) -> tuple[Incident, ...] | None:
    """The incidents of a Statuspage v2 body; None: it is not one. What is no incident in the list is passed over."""

    def read(one: object) -> Incident | None:
        return incident(one, field(one, "impact"), ("started_at", "created_at"), field(one, "shortlink"))

    return read_each(field(decoded, "incidents"), read)


def of_incident_io(decoded: object) -> tuple[Incident, ...] | None:
    """The incidents of an incident.io body, of its widget or of its page; None: it is neither."""
    summary = field(decoded, "summary")
    body = decoded if summary is None else summary

    def read(one: object) -> Incident | None:
        url = field(one, "url") or address_below(field(body, "public_url"), field(one, "id"))
        return incident(one, impact_of(one), ("started_at", "published_at"), url)

    return read_each(field(body, "ongoing_incidents"), read)


def read_each(listed: object, read: Callable[[object], Incident | None]) -> tuple[Incident, ...] | None:
    found = map(read, listed[:MOST_INCIDENTS]) if isinstance(listed, list) else None
    return None if found is None else tuple(one for one in found if one is not None)


def incident(one: object, impact: object, began: Sequence[str], url: object) -> Incident | None:
    """An item of a list as an incident; None: it is a maintenance, or no incident at all."""
    name, phase = one_line(field(one, "name"), LONGEST_NAME), PHASES.get(word(field(one, "status")))
    if not name or phase is None:
        return None
    starts = [at for at in (instant(field(one, date)) for date in began) if at is not None]
    return Incident(name, IMPACTS.get(word(impact), "unknown"), phase, starts[0] if starts else None, address(url))


def impact_of(one: object) -> object:
    """What incident.io's widget says outright, and else the worst of the components."""
    said = field(one, "current_worst_impact")
    if said is not None:
        return said
    components = field(one, "affected_components")
    if not isinstance(components, list):
        return None
    words = [word(field(part, key)) for part in components for key in ("current_status", "status")]
    return max(words, key=lambda said: WORSE.index(IMPACTS.get(said, "unknown")), default=None)


def address_below(page: object, identity: object) -> str:
    """The address that incident.io gives an incident below that of its page."""
    known = isinstance(identity, str) and re.fullmatch(r"\w+", identity) and address(page)
    return address(f"{address(page).rstrip('/')}/incidents/{identity}") if known else ""


def field(value: object, name: str) -> Any:
    """A member of what should be an object."""
    return value.get(name) if isinstance(value, Mapping) else None


def word(value: object) -> str:
    return value.strip().lower() if isinstance(value, str) else ""


def one_line(value: object, longest: int) -> str:
    """A stranger's text, fit for a log line and a terminal.

    >>> one_line("Elevated\\n errors\\x1b[31m ", 40), one_line(["Elevated"], 40)
    ('Elevated errors [31m', '')
    """
    text = UNPRINTABLE.sub(" ", value[: 8 * longest]).strip() if isinstance(value, str) else ""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def address(value: object) -> str:
    """An address of the web, and nothing else that a link could be.

    >>> address("https://stspg.io/9zq1"), address("javascript:alert(1)"), address(7)
    ('https://stspg.io/9zq1', '', '')
    """
    known = isinstance(value, str) and len(value) <= LONGEST_URL and WEB_ADDRESS.fullmatch(value)
    return str(value) if known else ""


def instant(value: object) -> float | None:
    """Unix time of a date as JSON has them; one without a zone is UTC.

    >>> instant("2026-06-02T09:45:10.123Z"), instant("2026-06-02T09:45:10"), instant("yesterday"), instant(1e9)
    (1780393510.123, 1780393510.0, None, None)
    """
    if not isinstance(value, str):
        return None
    try:
        at = datetime.fromisoformat(value)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except ValueError:
        return None


GENERIC = re.compile(
    "ai|anthropic|apac|api|au|azure|bedrock|chat|claude|eu|global|google|instruct|jp|latest|meta|models?|openai|preview|us|v|vertex"
)
"""Words in the name of a model that name no family."""

VARIANTS = frozenset(["codex", "flash", "large", "lite", "medium", "mini", "nano", "pro", "small", "turbo"])
"""Words that make another model of the same family and version."""

FAMILIES = frozenset(["embedding", "embeddings", "gemini", "gpt", "haiku", "llama", "opus", "sonnet", "sora", "whisper"])
"""Families known by name, so that an incident of theirs is not taken for one of the whole provider."""

ALL_MODELS = re.compile(
    r"\b(?:(?:all|any|every|many|most|multiple|other|several|various)(?: of)?(?: the| our| its)?"
    r"(?: (?:claude|anthropic|openai|ai|api|language))*|claude|anthropic|openai) models\b"
)
EXCEPT = re.compile(r"\b(?:except|excluding|other than|apart from|but not|does not affect|not affecting)\b")

TOKEN = re.compile(
    r"(?<![\d.])v?(?P<version>\d{1,2}(?:[.-](?:\d{1,2}|x\b))?[a-z]?)(?![\d%a-z]|\.\d)|(?P<word>[a-z]+)|(?P<mark>[,/&+])"
)
BETWEEN = frozenset([",", "/", "&", "+", "and", "or"])


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    version: bool = False


@dataclass(frozen=True, slots=True)
class Named:
    """One model of a family, as a title or a name has it. `version` None: any; "4.x": any 4."""

    version: str | None = None
    variants: frozenset[str] = frozenset()

    def covers(self, model: Named) -> bool:
        if self.version is None or model.version is None:
            return self.variants <= model.variants
        if self.version.endswith(".x"):
            return of_generation(model.version, self.version.removesuffix(".x"))
        return self.version == model.version and self.variants == model.variants


def names_model(incident_title: str, model: str) -> bool:
    """Whether a title names this model, as its provider calls it. A family without a version names all of it.

    >>> names_model("Elevated errors on Claude Opus 4.6", "claude-opus-4-6"), names_model("Opus 4.6", "claude-opus-4-8")
    (True, False)
    >>> names_model("Claude Sonnet is slow", "claude-sonnet-4-20250514"), names_model("All models but not GPT-4o", "gpt-4o")
    (True, False)
    """
    said, *excluded = EXCEPT.split(incident_title.lower(), maxsplit=1)
    return mentions(said, model) and not any(mentions(text, model) for text in excluded)


def names_some_model(incident_title: str) -> bool:
    """Whether a title names any model, ours or not; one that does not is about the provider as a whole."""
    tokens = tokens_of(incident_title.lower())
    return (
        ALL_MODELS.search(incident_title.lower()) is not None
        or any(token.text in FAMILIES for token in tokens)
        or any(token.text in ("claude", "o") and after.version for token, after in pairwise(tokens))
    )


def mentions(text: str, model: str) -> bool:
    if ALL_MODELS.search(text):
        return True
    tokens, (family, ours) = tokens_of(text), identity(model)
    places = [i for i in range(len(tokens)) if tuple(token.text for token in tokens[i : i + len(family)]) == family]
    if any(named.covers(ours) for i in places for named in named_at(tokens, i, i + len(family))):
        return True
    return "claude" in model.lower() and any(of_generation(ours.version, named) for named in generations(tokens))


def identity(model: str) -> tuple[tuple[str, ...], Named]:
    """The family of a model and what it is in there, of a provider's name for it.

    >>> identity("us.anthropic.claude-opus-4-8-20260101-v1:0")[0], identity("claude-3-5-sonnet-20241022")[1].version
    (('opus',), '3.5')
    >>> identity("gpt-4o-mini-2024-07-18")
    (('gpt',), Named(version='4o', variants=frozenset({'mini'})))
    """
    tokens = tokens_of(model.lower().rpartition("/")[2])
    words = [token.text for token in tokens if not token.version]
    family = [text for text in words if text not in VARIANTS and not GENERIC.fullmatch(text)]
    version = next((token.text for token in tokens if token.version), None)
    return tuple(family or words[:1] or [""]), Named(version, VARIANTS.intersection(words))


def tokens_of(text: str) -> list[Token]:
    """Words, versions and the marks of a list; figures that are no version (529, 5%, dates) are left out."""
    found = []
    for match in TOKEN.finditer(text):
        version = match["version"]
        found.append(Token(match[0]) if version is None else Token(version.replace("-", ".").removesuffix(".0"), version=True))
    return found


def named_at(tokens: Sequence[Token], begin: int, end: int) -> list[Named]:
    """What the mention of a family at [begin:end] names: "Opus 4.6, 4.7", "3.5 Sonnet", "GPT-4o mini", "Haiku"."""
    at = past(tokens, end, VARIANTS)
    variants = frozenset(token.text for token in tokens[end:at])
    found = []
    while at < len(tokens) and tokens[at].version:
        after = past(tokens, at + 1, VARIANTS)
        found.append(Named(tokens[at].text, variants.union(token.text for token in tokens[at + 1 : after])))
        at = past(tokens, after, BETWEEN)
        if at == after:
            break
    return found or [Named(version, variants) for version in versions_before(tokens, begin)] or [Named(None, variants)]


def past(tokens: Sequence[Token], at: int, words: frozenset[str]) -> int:
    """Where the run of these words that begins at `at` is over."""
    return next((i for i in range(at, len(tokens)) if tokens[i].text not in words), len(tokens))


def versions_before(tokens: Sequence[Token], at: int) -> list[str]:
    """Versions that stand before their family, and not behind another one."""
    found: list[str] = []
    while at > 0 and (tokens[at - 1].version or (found and tokens[at - 1].text in BETWEEN)):
        at -= 1
        found += [tokens[at].text] if tokens[at].version else []
    return [] if at > 0 and tokens[at - 1].text in FAMILIES else found


def generations(tokens: Sequence[Token]) -> list[str]:
    """The versions of "Claude 4 models", of whichever family."""
    found = []
    for i, token in enumerate(tokens[:-1]):
        if token.text == "claude" and tokens[i + 1].version and (i + 2 == len(tokens) or tokens[i + 2].text not in FAMILIES):
            found.append(tokens[i + 1].text.removesuffix(".x"))
    return found


def of_generation(version: str | None, generation: str) -> bool:
    return version is not None and (version == generation or version.startswith(f"{generation}."))


def about(found: Incident, model: str) -> About:
    """Whom an incident is about, seen from a route's name for a model."""
    if names_model(found.name, model):
        return "model"
    return "other" if names_some_model(found.name) else "provider"


def foremost(incidents: Iterable[Incident], model: str | None = None) -> Incident | None:
    """The unresolved incident that says most: of the model rather than of the provider, then the worst, then the newest.

    Those that are about other models only count for none; without a model, all of them count.
    """

    def weight(one: Incident) -> tuple[bool, int, float]:
        ours = model is not None and about(one, model) == "model"
        return ours, WORSE.index(one.impact), 0.0 if one.started_at is None else one.started_at

    unresolved = (one for one in incidents if one.phase != "resolved")
    return max((one for one in unresolved if model is None or about(one, model) != "other"), key=weight, default=None)


def effect(incidents: Iterable[Incident], model: str) -> Effect:
    """What the incidents of a page may change for a model; of a page that is unknown, nothing.

    >>> effect([Incident("Elevated errors on Claude Opus 4.6", "major", "investigating", None, "")], "claude-opus-4-8")
    Effect(shift=0.0, probe_every_s=None)
    """
    found = foremost(incidents, model)
    if found is None:
        return Effect()
    shift = SHIFT if about(found, model) == "model" else 0.0
    return Effect(shift, PROBE_EVERY_S if found.phase == "monitoring" else None)


def sentence(found: Incident, now: float) -> str:
    """One line for an explanation.

    >>> sentence(Incident("Elevated errors on Claude Opus 4.6", "major", "monitoring", 1000.0, "https://stspg.io/9zq1"), 1750.0)
    'the status page says "Elevated errors on Claude Opus 4.6" (major, monitoring, for 12 min): https://stspg.io/9zq1'
    """
    impact = [] if found.impact == "unknown" else [f"impact {found.impact}" if found.impact == "none" else found.impact]
    lasted = [] if found.started_at is None else [f"for {lasting(now - found.started_at)}"]
    told = f'the status page says "{found.name}" ({", ".join([*impact, found.phase, *lasted])})'
    return f"{told}: {found.url}" if found.url else told


def lasting(seconds: float) -> str:
    """
    >>> lasting(-5.0), lasting(750.0), lasting(20_700.0), lasting(400_000.0)
    ('less than a minute', '12 min', '5 h 45 min', '4 d 15 h')
    """
    minutes = max(0, int(seconds // 60))
    if minutes < 60:
        return f"{minutes} min" if minutes else "less than a minute"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
