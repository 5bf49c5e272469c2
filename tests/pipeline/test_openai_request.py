# SPDX-License-Identifier: Apache-2.0
"""A Messages request in the words of chat completions: what is carried, what is lost, what is refused, by dialect.

The referee is the official openai SDK: what it has no type for is no request.
"""

from __future__ import annotations

import doctest
import json
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming
from pydantic import TypeAdapter

from tideover.providers import dialects, openai_request
from tideover.providers.dialects import DIALECTS
from tideover.providers.openai_request import Untranslatable, to_chat
from tideover.tables import DialectName

ASK: dict[str, Any] = {"model": "claude-sonnet-5-5", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
REFEREES = {False: TypeAdapter(CompletionCreateParamsNonStreaming), True: TypeAdapter(CompletionCreateParamsStreaming)}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
TOOL = {"name": "weather", "description": "Tells the weather.", "input_schema": SCHEMA}
PIXEL = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
AT_A_URL = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
CALLED = {"type": "tool_use", "id": "toolu_01", "name": "weather", "input": {"city": "Ærø"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_01", "content": "rain"}
SECRET = "Dear Ann"
CACHED = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}


def whole(value: Any) -> Any:
    """Lists of what the referee looks at only when it is taken."""
    if isinstance(value, dict):
        return {name: whole(each) for name, each in value.items()}
    return [whole(each) for each in value] if isinstance(value, Iterable) and not isinstance(value, str) else value


def refereed(body: dict[str, Any], dialect: DialectName = "compatible") -> tuple[dict[str, Any], tuple[str, ...]]:
    """The chat request, of which the SDK knows every part, and its losses."""
    chat, losses = to_chat(body, "gpt-x", dialect=DIALECTS[dialect])
    assert chat == whole(REFEREES[bool(chat.get("stream"))].validate_python(chat))
    return json.loads(json.dumps(chat)), losses


def said(*blocks: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}, {"role": "user", "content": "and?"}]}


def after_call(*blocks: dict[str, Any]) -> dict[str, Any]:
    """A conversation in which a tool was called, and what the user sends then."""
    asked = {"role": "user", "content": "how is the weather?"}
    return {
        "tools": [TOOL],
        "messages": [asked, {"role": "assistant", "content": [CALLED]}, {"role": "user", "content": [*blocks]}],
    }


def test_a_conversation_of_text_is_carried_whole() -> None:
    body = {
        **ASK,
        "system": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "c", "citations": None}]},
            {"role": "user", "content": "d"},
        ],
        "metadata": {"user_id": "u-1"},
        "temperature": 0.0,
        "tools": [],
    }
    chat, losses = refereed(body)
    assert losses == ()
    assert chat == {
        "model": "gpt-x",
        "messages": [
            {"role": "system", "content": "Be brief.\n\nBe kind."},
            {"role": "user", "content": "a\n\nb"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ],
        "max_tokens": 9,
        "user": "u-1",
        "temperature": 0.0,
    }


def test_tools_are_carried_there() -> None:
    body = {**ASK, "tools": [{**TOOL, "strict": True}, {"type": "custom", "name": "now", "input_schema": {"type": "object"}}]}
    chat, losses = refereed({**body, "tool_choice": {"type": "tool", "name": "now", "disable_parallel_tool_use": True}})
    assert losses == ()
    weather = {"name": "weather", "description": "Tells the weather.", "parameters": SCHEMA, "strict": True}
    now = {"name": "now", "parameters": {"type": "object"}}
    assert [weather, now] == [tool["function"] for tool in chat["tools"]]
    assert ({"type": "function", "function": {"name": "now"}}, False) == (chat["tool_choice"], chat["parallel_tool_calls"])
    for choice, told in {"auto": "auto", "any": "required", "none": "none"}.items():
        assert told == refereed({**body, "tool_choice": {"type": choice}})[0]["tool_choice"]


def test_a_round_of_tools_is_carried() -> None:
    """What the model said and called, what came of it, and what the user says to that."""
    two = [CALLED, {**CALLED, "id": "toolu_02", "caller": {"type": "direct"}}]
    results = [RESULT, {"type": "tool_result", "tool_use_id": "toolu_02", "content": [{"type": "text", "text": "sun"}, PIXEL]}]
    turns = [
        {"role": "user", "content": "how is it?"},
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, *two]},
        {"role": "user", "content": [*results, {"type": "text", "text": "and tomorrow?"}]},
    ]
    chat, losses = refereed({**ASK, "tools": [TOOL], "messages": turns})
    assert ("tool_result.image",) == losses
    function = {"name": "weather", "arguments": json.dumps({"city": "Ærø"})}
    assert chat["messages"][1:] == [
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [{"id": f"toolu_0{n}", "type": "function", "function": function} for n in (1, 2)],
        },
        {"role": "tool", "tool_call_id": "toolu_01", "content": "rain"},
        {"role": "tool", "tool_call_id": "toolu_02", "content": "sun"},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}},
                {"type": "text", "text": "and tomorrow?"},
            ],
        },
    ]


def test_a_failed_tool_says_so() -> None:
    chat, losses = refereed({**ASK, **after_call({**RESULT, "is_error": True})})
    assert ("[tool error] rain", ("tool_result.is_error",)) == (chat["messages"][-1]["content"], losses)
    chat, losses = refereed({**ASK, **after_call({"type": "tool_result", "tool_use_id": "toolu_01"})})
    assert ("", ()) == (chat["messages"][-1]["content"], losses)


def test_images_are_carried() -> None:
    chat, losses = refereed(
        {**ASK, "messages": [{"role": "user", "content": [PIXEL, AT_A_URL, {"type": "text", "text": "?"}]}]}
    )
    urls = [part["image_url"]["url"] for part in chat["messages"][0]["content"][:2]]
    assert (["data:image/png;base64,aGk=", "https://example.com/a.png"], ()) == (urls, losses)


def test_an_answer_in_json_is_asked_for() -> None:
    chat, losses = refereed({**ASK, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}})
    assert ({"name": "answer", "schema": SCHEMA, "strict": True}, ()) == (chat["response_format"]["json_schema"], losses)
    loose = {**SCHEMA, "required": []}
    chat, losses = refereed({**ASK, "output_config": {"format": {"type": "json_schema", "schema": loose}, "effort": "low"}})
    assert {"name": "answer", "schema": loose} == chat["response_format"]["json_schema"]
    assert ("output_config.effort", "output_config.format") == losses


@pytest.mark.parametrize(
    ("more", "losses"),
    [
        ({"stop_sequences": ["END"]}, ("stop_sequence",)),
        ({"system": [CACHED]}, ("cache_control",)),
        ({"cache_control": {"type": "ephemeral"}, "thinking": {"type": "disabled"}}, ("cache_control", "thinking")),
        ({"thinking": {"type": "adaptive"}}, ("thinking",)),
        ({"stream": True}, ()),
        ({"stop_sequences": [], "cache_control": None}, ()),
        ({"tools": [{**TOOL, "cache_control": {"type": "ephemeral"}}]}, ("tools.cache_control",)),
        ({"tools": [{**TOOL, "input_schema": {"type": "object", "properties": {"a": {}}}, "strict": True}]}, ("tools.strict",)),
        ({"messages": [*said({"type": "text", "text": "x"})["messages"]]}, ()),
        (
            {
                "tools": [TOOL],
                "messages": [
                    {"role": "assistant", "content": [CALLED, {"type": "text", "text": "done"}]},
                    {"role": "user", "content": [RESULT]},
                ],
            },
            ("text after tool_use",),
        ),
    ],
)
def test_a_loss_is_named(more: dict[str, Any], losses: tuple[str, ...]) -> None:
    assert losses == refereed({**ASK, **more})[1]


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"tools": [{"type": "web_search_20260209", "name": "web_search"}]}, ("server tools",)),
        ({"tools": [{**TOOL, "defer_loading": True}]}, ("tools.defer_loading",)),
        ({"tools": [{**TOOL, "name": "x" * 65}]}, ("a tool's name of more than 64 characters",)),
        ({"tool_choice": {"type": "best"}}, ("tool_choice",)),
        (said({"type": "image", "source": {"type": "file", "file_id": "f"}}, {"type": "document"}), ("document", "image.file")),
        (said({"type": "thinking", "thinking": "hm", "signature": "s"}, role="assistant"), ("thinking",)),
        (said({"type": "server_tool_use", "id": "s", "name": "f", "input": {}}, role="assistant"), ("server_tool_use",)),
        (said({**CALLED, "caller": {"type": "code_execution_20250825"}}, role="assistant"), ("tool_use.caller",)),
        (said({"type": "text", "text": "x", "new": 1}), ("text.new",)),
        (said({"type": "text", "text": "look"}, RESULT), ("tool_result after other content",)),
        (said({**RESULT, "content": [{"type": "document"}]}), ("document",)),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "{"}]}, ("prefill",)),
        ({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]}, ("role system",)),
        ({"messages": [{"role": "user", "content": 3}], "system": 3}, ("content that are no list", "system that are no list")),
        ({"output_config": {"format": {"type": "grammar"}}}, ("output_config.format",)),
        ({"metadata": {"team": "x"}}, ("metadata.team",)),
        ({"stop_sequences": list("abcde")}, ("more than 4 stop_sequences",)),
        ({"inference_geo": "eu", "top_k": 3, "container": "c"}, ("container", "inference_geo", "top_k")),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(more: dict[str, Any], what: tuple[str, ...]) -> None:
    with pytest.raises(Untranslatable) as caught:
        to_chat({**ASK, **more}, "gpt-x")
    assert what == caught.value.what


@pytest.mark.parametrize(
    "more",
    [
        {SECRET: 1},
        {"metadata": {SECRET: 1}},
        {"tools": [{**TOOL, SECRET: 1}]},
        {"tools": [{"type": SECRET}]},
        {"tool_choice": {"type": SECRET, SECRET: 1}},
        {"output_config": {SECRET: 1, "format": SECRET}},
        {"messages": [{"role": SECRET, "content": SECRET}]},
        said({"type": SECRET}, {"type": "image", "source": {"type": SECRET}}, {"type": "text", "text": "x", SECRET: 1}),
    ],
)
def test_a_refusal_quotes_nothing_of_a_prompt(more: dict[str, Any]) -> None:
    with pytest.raises(Untranslatable) as caught:
        to_chat({**ASK, **more}, "gpt-x")
    assert SECRET not in str(caught.value)


# --- dialects


def refusals(dialect: DialectName, more: dict[str, Any]) -> tuple[str, ...]:
    try:
        to_chat({**ASK, **more}, "m", dialect=DIALECTS[dialect])
    except Untranslatable as error:
        return error.what
    return ()


def test_each_dialect_names_the_limit_as_it_wants_it() -> None:
    fields = {name: {"max_tokens", "max_completion_tokens"} & refereed(ASK, name)[0].keys() for name in DIALECTS}
    newer, older = {"max_completion_tokens"}, {"max_tokens"}
    assert {"openai": newer, "gemini": older, "grok": newer, "mistral": older, "compatible": older} == fields


def test_grok_takes_no_stop_sequences() -> None:
    assert ("stop_sequences",) == refusals("grok", {"stop_sequences": ["END"]})
    assert () == refusals("grok", {"stop_sequences": []})


def test_gemini_is_given_a_word_for_the_signatures_that_it_wants() -> None:
    chat, _ = to_chat({**ASK, **after_call(RESULT)}, "gemini-3", dialect=DIALECTS["gemini"])
    (call,) = chat["messages"][1]["tool_calls"]
    assert call["extra_content"] == {"google": {"thought_signature": "skip_thought_signature_validator"}}
    assert ("image.url",) == refusals("gemini", said(AT_A_URL))
    one = {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}
    assert ("tool_choice.disable_parallel_tool_use",) == refusals("gemini", one)


def test_mistral_is_given_only_what_it_knows() -> None:
    body = {**ASK, **after_call(RESULT), "metadata": {"user_id": "u"}, "stream": True}
    chat, losses = refereed(body, "mistral")
    assert ({"model", "messages", "max_tokens", "stream", "tools"}, ("metadata.user_id",)) == (chat.keys(), losses)
    called, answered = chat["messages"][1]["tool_calls"][0]["id"], chat["messages"][2]["tool_call_id"]
    assert (called, 9, True) == (answered, len(called), called.isalnum())
    assert ("content after tool_result",) == refusals("mistral", after_call(RESULT, {"type": "text", "text": "and?"}))


# --- whatever comes


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=5), each, max_size=3),
    max_leaves=6,
)
PARTS = st.sampled_from([CALLED, RESULT, PIXEL, AT_A_URL, CACHED, {"type": "text", "text": "x"}, {"type": "document"}]) | JSON
NAMES = st.sampled_from(["tools", "tool_choice", "system", "stop_sequences", "metadata", "output_config", "thinking", "odd"])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.lists(PARTS, max_size=4) | JSON), max_size=4),
    st.dictionaries(NAMES, JSON, max_size=3),
    st.sampled_from([*DIALECTS]),
)
def test_any_request_is_carried_or_refused(turns: list[tuple[str, Any]], more: dict[str, Any], dialect: DialectName) -> None:
    body = {**ASK, "messages": [{"role": role, "content": content} for role, content in turns], **more}
    with suppress(Untranslatable):
        chat, _ = to_chat(body, "m", dialect=DIALECTS[dialect])
        assert json.loads(json.dumps(chat)) == chat
        assert chat["model"] == "m"


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(openai_request).failed == doctest.testmod(dialects).failed == 0
