# SPDX-License-Identifier: Apache-2.0
"""A Messages request in the words of OpenAI's chat completions. Nothing is dropped in silence.

What has no words there is refused by name (`Untranslatable`) or named as a loss. Pure functions; the calls are in
`openai_compatible`, the way back is `openai_answer`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tideover.providers.dialects import DIALECTS, Dialect

LONGEST_NAME = 64
"""Of a tool; Messages allows 128."""
TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
KNOWN_OF_TOOLS = {"type", "name", "description", "input_schema", "strict"}
LOST_OF_TOOLS = {"cache_control", "input_examples", "eager_input_streaming"}
NO_SCHEMAS = {"properties", "required", "enum", "const", "default", "examples"}
"""Words of a JSON schema under which no further schema stands, but for the properties, which are looked at by name."""
ALNUM = re.compile(r"[^0-9A-Za-z]")
WORD = re.compile(r"[a-z][a-z0-9_]{0,31}")


class Untranslatable(Exception):
    """The request uses something that an OpenAI-compatible endpoint cannot be given.

    Attributes:
      what: the names of it all, sorted.
    """

    def __init__(self, what: tuple[str, ...]) -> None:
        self.what = what
        super().__init__(f"an OpenAI-compatible route cannot carry: {', '.join(what)}")


@dataclass(frozen=True, slots=True)
class Notes:
    """What is lost and what refuses to be carried, gathered while a request is translated for a dialect."""

    dialect: Dialect
    losses: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)


def to_chat(
    body: Mapping[str, Any], model: str, *, dialect: Dialect = DIALECTS["compatible"]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The chat request for a Messages request, and the names of what it loses. Raises `Untranslatable`.

    >>> to_chat({"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], "stop_sequences": ["END"]}, "gpt")
    ({'model': 'gpt', 'messages': [{'role': 'user', 'content': 'hi'}], 'max_tokens': 9, 'stop': ['END']}, ('stop_sequence',))
    """
    notes = Notes(dialect)
    turns = [turn if isinstance(turn, dict) else {} for turn in as_list(body.get("messages"), "messages", notes)]
    chat: dict[str, Any] = {"model": model, "messages": [*system_turn(body.get("system"), notes)]}
    for turn in turns:
        chat["messages"] += chat_turns(turn, notes)
    if turns and turns[-1].get("role") == "assistant":
        notes.refused.add("prefill")
    for name, value in body.items():
        chat |= chat_field(name, value, notes)
    if notes.refused:
        raise Untranslatable(tuple(sorted(notes.refused)))
    return chat, tuple(sorted(notes.losses))


def as_list(value: Any, name: str, notes: Notes) -> list[Any]:
    """The items of what should be a list. Nothing for None; what is no list is refused."""
    if isinstance(value, list | tuple):
        return list(value)
    if value is not None:
        notes.refused.add(f"{name} that are no list")
    return []


def word(name: object) -> str:
    """A name that the request itself brings, as it may be told: one that is no word could be a part of a prompt.

    >>> word("container"), word("Dear Ann, your ticket"), word(3)
    ('container', 'an odd name', 'an odd name')
    """
    return name if isinstance(name, str) and WORD.fullmatch(name) else "an odd name"


# fields of the request


def chat_field(name: str, value: Any, notes: Notes) -> dict[str, Any]:
    match name, value:
        case ("model" | "messages" | "system", _) | ("tools" | "stop_sequences", []) | (_, None):
            return {}
        case "max_tokens", _:
            return {notes.dialect.limit_field: value}
        case (("temperature" | "top_p"), _):
            return {name: value}
        case "stream", _:
            usage = {"stream_options": {"include_usage": True}} if notes.dialect.asks_for_usage else {}
            return {"stream": True, **usage} if value else {}
        case "stop_sequences", list():
            return stops(value, notes)
        case "metadata", dict():
            return metadata(value, notes)
        case "tools", list():
            return {"tools": [tool for given in value for tool in chat_tools(given, notes)]}
        case "tool_choice", dict():
            return tool_choice(value, notes)
        case "output_config", dict():
            return output_config(value, notes)
        case ("thinking" | "cache_control" | "service_tier", _):
            notes.losses.add(name)
            return {}
        case _:
            notes.refused.add(word(name))
            return {}


def stops(value: list[Any], notes: Notes) -> dict[str, Any]:
    most = notes.dialect.max_stops
    if len(value) > most:
        notes.refused.add(f"more than {most} stop_sequences" if most else "stop_sequences")
    notes.losses.add("stop_sequence")  # which one ended the answer is not told, nor that one did
    return {"stop": value}


def metadata(value: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
    notes.refused.update(f"metadata.{word(key)}" for key in value if key != "user_id")
    if value.get("user_id") is None:
        return {}
    if notes.dialect.user_field is None:
        notes.losses.add("metadata.user_id")
        return {}
    return {notes.dialect.user_field: value["user_id"]}


def chat_tools(tool: Any, notes: Notes) -> list[dict[str, Any]]:
    """A tool that the caller's code runs; one that Anthropic's servers run cannot go elsewhere."""
    if not isinstance(tool, dict) or tool.get("type", "custom") not in ("custom", None):
        notes.refused.add("server tools")
        return []
    for name in tool.keys() - KNOWN_OF_TOOLS:
        if tool[name] is not None:
            (notes.losses if name in LOST_OF_TOOLS else notes.refused).add(f"tools.{word(name)}")
    if len(str(tool.get("name"))) > LONGEST_NAME:
        notes.refused.add(f"a tool's name of more than {LONGEST_NAME} characters")
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    if tool.get("strict"):
        function |= strictly(tool.get("input_schema"), "tools.strict", notes)
    return [{"type": "function", "function": function}]


def strictly(schema: Any, name: str, notes: Notes) -> dict[str, bool]:
    """`strict`, if the schema is one that chat completions can be strict about; else that is lost."""
    if is_strict(schema):
        return {"strict": True}
    notes.losses.add(name)
    return {}


def is_strict(schema: Any) -> bool:
    """Whether each object of a JSON schema names all its properties as required, and allows no other.

    Source: developers.openai.com, structured outputs, supported schemas.

    >>> one = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}
    >>> is_strict(one), is_strict({**one, "required": ["a"]})
    (False, True)
    """
    if isinstance(schema, list):
        return all(map(is_strict, schema))
    if not isinstance(schema, dict):
        return True
    if schema.get("type") == "object" or "properties" in schema:
        properties = schema.get("properties") or {}
        named = {*schema.get("required", ())} == properties.keys()
        if not named or schema.get("additionalProperties") is not False or not all(map(is_strict, properties.values())):
            return False
    return all(is_strict(value) for name, value in schema.items() if name not in NO_SCHEMAS)


def tool_choice(value: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
    chat: dict[str, Any] = {}
    match value.get("type"):
        case "tool":
            chat["tool_choice"] = {"type": "function", "function": {"name": value.get("name")}}
        case "auto" | "any" | "none" as kind:
            chat["tool_choice"] = TOOL_CHOICES[kind]
        case _:
            notes.refused.add("tool_choice")
    if value.get("disable_parallel_tool_use"):
        if not notes.dialect.one_call_at_a_time:
            notes.refused.add("tool_choice.disable_parallel_tool_use")
        chat["parallel_tool_calls"] = False
    notes.refused.update(f"tool_choice.{word(name)}" for name in value.keys() - {"type", "name", "disable_parallel_tool_use"})
    return chat


def output_config(value: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
    """A JSON schema for the answer; how much effort it is worth is lost, as each model has other words for it."""
    if value.get("effort") is not None:
        notes.losses.add("output_config.effort")
    notes.refused.update(
        f"output_config.{word(name)}" for name in value.keys() - {"effort", "format"} if value[name] is not None
    )
    match value.get("format"):
        case None:
            return {}
        case {"type": "json_schema", "schema": dict() as schema, **more} if not more:
            described = {"name": "answer", "schema": schema, **strictly(schema, "output_config.format", notes)}
            return {"response_format": {"type": "json_schema", "json_schema": described}}
        case _:
            notes.refused.add("output_config.format")
            return {}


# turns of the conversation


def system_turn(system: Any, notes: Notes) -> list[dict[str, str]]:
    blocks = [{"type": "text", "text": system}] if isinstance(system, str) else as_list(system, "system", notes)
    text = "\n\n".join(texts(blocks, notes))
    return [{"role": "system", "content": text}] if text else []


def chat_turns(turn: Mapping[str, Any], notes: Notes) -> list[dict[str, Any]]:
    """The chat messages for a turn; more than one where tools' results are in it."""
    content = turn.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else as_list(content, "content", notes)
    blocks = [block if isinstance(block, dict) else {} for block in blocks]
    match turn.get("role"):
        case "user":
            return user_turns(blocks, notes)
        case "assistant":
            return [assistant_turn(blocks, notes)]
        case role:
            notes.refused.add(f"role {word(role)}")
            return []


def user_turns(blocks: list[dict[str, Any]], notes: Notes) -> list[dict[str, Any]]:
    results = [block for block in blocks if block.get("type") == "tool_result"]
    others = [block for block in blocks if block.get("type") != "tool_result"]
    if results and results != blocks[: len(results)]:
        notes.refused.add("tool_result after other content")
    turns: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    for block in results:
        turn, images = result_turn(block, notes)
        turns.append(turn)
        shown += images
    parts = [*shown, *user_parts(others, notes)]
    if parts or not results:
        if results and not notes.dialect.text_after_result:
            notes.refused.add("content after tool_result")
        turns.append({"role": "user", "content": joined(parts)})
    return turns


def joined(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """One string if it is all text: some compatible servers take no list of parts."""
    if all(part["type"] == "text" for part in parts):
        return "\n\n".join(part["text"] for part in parts)
    return parts


def user_parts(blocks: Iterable[Mapping[str, Any]], notes: Notes) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for block in blocks:
        if block.get("type") == "image":
            parts += image_parts(block, notes)
        else:
            parts += [{"type": "text", "text": text} for text in texts([block], notes)]
    return parts


def image_parts(block: Mapping[str, Any], notes: Notes) -> list[dict[str, Any]]:
    look_at(block, {"source"}, notes)
    match block.get("source"):
        case {"type": "base64", "media_type": str() as kind, "data": str() as data}:
            url = f"data:{kind};base64,{data}"
        case {"type": "url", "url": str() as url} if notes.dialect.image_urls:
            pass
        case {"type": str() as kind}:
            notes.refused.add(f"image.{word(kind)}")
            return []
        case _:
            notes.refused.add("image")
            return []
    return [{"type": "image_url", "image_url": {"url": url}}]


def texts(blocks: Iterable[Any], notes: Notes) -> list[str]:
    """The texts of blocks; what is none is refused."""
    found = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind != "text":
            notes.refused.add("content" if kind is None else word(kind))
            continue
        look_at(block, {"text"}, notes)
        found.append(str(block.get("text", "")))
    return found


def look_at(block: Mapping[str, Any], known: set[str], notes: Notes) -> None:
    """Names what goes unsaid of a block, or cannot be left unsaid."""
    for name in block.keys() - known - {"type"}:
        if block[name] is not None and name in ("cache_control", "citations"):
            notes.losses.add(name)
        elif block[name] is not None:
            notes.refused.add(f"{word(block.get('type'))}.{word(name)}")


def result_turn(block: Mapping[str, Any], notes: Notes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a tool came to, and its images, which only a user may show."""
    look_at(block, {"tool_use_id", "content", "is_error"}, notes)
    content = block.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else as_list(content, "content", notes)
    images = [each for each in blocks if isinstance(each, dict) and each.get("type") == "image"]
    text = "\n\n".join(texts([each for each in blocks if each not in images], notes))
    if images:
        notes.losses.add("tool_result.image")  # it is shown right after the results, by the user
    if block.get("is_error"):
        notes.losses.add("tool_result.is_error")
        text = f"[tool error] {text}"
    turn = {"role": "tool", "tool_call_id": call_id(block.get("tool_use_id"), notes.dialect), "content": text}
    return turn, [part for image in images for part in image_parts(image, notes)]


def assistant_turn(blocks: list[dict[str, Any]], notes: Notes) -> dict[str, Any]:
    """What the model said, and then the tools that it called."""
    calls = [block for block in blocks if block.get("type") == "tool_use"]
    others = [block for block in blocks if block.get("type") != "tool_use"]
    if calls and calls != blocks[len(others) :]:
        notes.losses.add("text after tool_use")  # it comes before
    text = "".join(texts(others, notes))
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": text or None, "tool_calls": [chat_call(block, notes) for block in calls]}


def chat_call(block: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
    look_at({**block, "caller": None if is_direct(block.get("caller")) else True}, {"id", "name", "input", "caller"}, notes)
    if not is_direct(block.get("caller")):
        notes.refused.add("tool_use.caller")
    function = {"name": block.get("name"), "arguments": json.dumps(block.get("input"))}
    return {"id": call_id(block.get("id"), notes.dialect), "type": "function", "function": function, **notes.dialect.call_extra}


def is_direct(caller: Any) -> bool:
    """Whether the model itself called a tool, not code that runs on Anthropic's servers."""
    return caller is None or (isinstance(caller, dict) and caller.get("type") == "direct")


def call_id(given: Any, dialect: Dialect) -> str:
    """The id of a tool call as the dialect wants it: the same for a call and for its result.

    >>> call_id("toolu_01", DIALECTS["openai"]), len(call_id("toolu_01", DIALECTS["mistral"]))
    ('toolu_01', 9)
    """
    length = dialect.call_id_length
    if length is None or (len(str(given)) == length and not ALNUM.search(str(given))):
        return str(given)
    return hashlib.sha256(str(given).encode()).hexdigest()[:length]
