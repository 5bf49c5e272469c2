# SPDX-License-Identifier: Apache-2.0
"""`tideover doctor` as an operator meets it: a sentence, a checklist, JSON or lines, and an exit code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tideover.store.paces import ALL, Paces

if TYPE_CHECKING:
    from tests.acceptance.conftest import Answer, Desk

PAUSE: dict[str, Any] = {"max_rate": 0.0, "who": "me", "why": "the database is full", "since_ms": 0, "until_ms": None}
PAUSED = "the drain is paused by me (the database is full); 2 held jobs stay"


def asked(desk: Desk, *words: str) -> Answer:
    return desk.ask("doctor", "-n", desk.namespace, *words)


def armed(desk: Desk) -> None:
    """Two jobs are held, a worker is alive, and one leads the drain."""
    desk.held(2)
    desk.until(lambda: desk.registry.leader("drain"), "somebody leads")


def test_armed_as_json(desk: Desk) -> None:
    """One document with the sentence and every check, and exit code 0."""
    armed(desk)
    said = asked(desk, "--json").json
    assert {"schema", "armed", "sentence", "namespaces", "redis"} == set(said)
    assert (1, True, "armed: 2 held jobs would drain") == (said["schema"], said["armed"], said["sentence"])
    (one,) = said["namespaces"]
    counts = {name: one[name] for name in ("namespace", "armed", "held", "stay")}
    assert {"namespace": desk.namespace, "armed": True, "held": 2, "stay": 0} == counts
    assert {"subject": "workers", "severity": "ok", "sentence": "1 worker alive", "remedy": "", "jobs": 0} in one["checks"]
    assert "redis" == said["redis"][0]["subject"]


def test_not_armed_is_exit_code_6(desk: Desk) -> None:
    """In every form, with the sentence, the reason and the remedy; and armed again once it is followed."""
    armed(desk)
    Paces(desk.broker.client, desk.keys).order(ALL, PAUSE)
    said = asked(desk, "--json")
    answer = json.loads(said.out)
    assert (6, False, f"not armed: 2 of 2 held jobs would stay: {PAUSED}") == (said.code, answer["armed"], answer["sentence"])
    code, seen = desk.on_terminal("doctor", "-n", desk.namespace)
    assert (6, True) == (code, seen.startswith("✗ not armed: 2 of 2 held jobs would stay: the drain is paused"))
    lines = [" ".join(line.split()) for line in seen.splitlines()]
    assert f"✗ drain {PAUSED}" in lines
    assert "→ `tideover drain resume`" in lines
    assert "✓ workers 1 worker alive" in lines
    assert 0 == desk.ask("drain", "resume", "-n", desk.namespace).code
    assert 0 == asked(desk).code


def test_piped_it_is_lines(desk: Desk) -> None:
    """A header, the sentence over all, then each check, the gravest first."""
    armed(desk)
    Paces(desk.broker.client, desk.keys).order(ALL, PAUSE)
    header, first, second, *_ = [line.split("\t") for line in asked(desk).out.splitlines()]
    assert ["namespace", "subject", "severity", "jobs", "sentence", "remedy"] == header
    assert ["", "armed", "blocks", "2", f"not armed: 2 of 2 held jobs would stay: {PAUSED}", ""] == first
    assert [desk.namespace, "drain", "blocks", "2", PAUSED, "`tideover drain resume`"] == second


def test_several_namespaces_are_told_one_by_one(desk: Desk) -> None:
    """The commands of the remedies then name theirs; the worst decides the exit code."""
    armed(desk)
    Paces(desk.broker.client, desk.keys).order(ALL, PAUSE)
    desk.broker.client.sadd("tideover:namespaces", "another")
    try:
        said = desk.ask("doctor", "-n", desk.namespace, "-n", "another", "--json")
        code, seen = desk.on_terminal("doctor", "-n", desk.namespace, "-n", "another")
    finally:
        desk.broker.client.srem("tideover:namespaces", "another")
    answer = json.loads(said.out)
    assert (6, 6) == (said.code, code)
    assert f"not armed: 2 of 2 namespaces, {desk.namespace}, another" == answer["sentence"]
    remedies = [check["remedy"] for check in answer["namespaces"][0]["checks"] if check["subject"] == "drain"]
    assert [f"`tideover drain resume -n {desk.namespace}`"] == remedies
    assert all(f"{heading}\x1b[0m\r\n" in seen for heading in (desk.namespace, "another", "Redis"))


def test_a_wrong_namespace_is_refused(desk: Desk) -> None:
    """A name that nobody has used is a mistake, not a diagnosis."""
    said = desk.ask("doctor", "-n", "nowhere")
    assert (2, True) == (said.code, "there is no namespace 'nowhere'" in said.err)


def test_help_has_examples_and_says_the_exit_code(desk: Desk) -> None:
    """So that it can be used in a script without reading more."""
    said = desk.ask("doctor", "--help").out
    assert ("Examples:" in said, "Exit code 6: something blocks" in " ".join(said.split())) == (True, True)
    assert "6  not armed (`tideover doctor`)" in desk.ask("--help").out
