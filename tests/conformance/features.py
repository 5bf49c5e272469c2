# SPDX-License-Identifier: Apache-2.0
"""What a request of the Messages API may use, one feature each; every route is asked for all of them."""

from __future__ import annotations

from typing import Any

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
TOOL = {"name": "weather", "description": "Tells the weather.", "input_schema": SCHEMA}
PIXEL = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
CALLED = {"type": "tool_use", "id": "toolu_01", "name": "weather", "input": {"city": "Ærø"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_01", "content": "rain"}
PAPER = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "aGk="}}


def turns(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


def after(*said: Any) -> dict[str, Any]:
    """Earlier words of the model."""
    asked, more = {"role": "user", "content": "How is the weather?"}, {"role": "user", "content": "And now?"}
    return {"messages": [asked, {"role": "assistant", "content": list(said)}, more]}


def called(*answers: Any) -> dict[str, Any]:
    """A round of tools."""
    asked = {"role": "user", "content": "How is the weather?"}
    rounds = [asked, {"role": "assistant", "content": [CALLED]}, {"role": "user", "content": list(answers)}]
    return {"tools": [TOOL], "messages": rounds}


FEATURES: dict[str, dict[str, Any]] = {
    "text": {},
    "system prompt": {"system": "Be brief."},
    "several turns": after({"type": "text", "text": "Rain."}),
    "images": turns({"type": "text", "text": "What is it?"}, PIXEL),
    "images at a URL": turns({"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}),
    "tools": {"tools": [TOOL]},
    "tool_choice": {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "weather"}},
    "one tool at a time": {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
    "tool results": called(RESULT),
    "failed tools": called({**RESULT, "is_error": True}),
    "images as tool results": called({**RESULT, "content": [PIXEL]}),
    "text after tool results": called(RESULT, {"type": "text", "text": "In Fahrenheit, please."}),
    "stop sequences": {"stop_sequences": ["###"]},
    "JSON schemas": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    "user ids": {"metadata": {"user_id": "u-1"}},
    "cache control": {"system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]},
    "effort": {"output_config": {"effort": "low"}},
    "thinking": {"max_tokens": 4000, "thinking": {"type": "enabled", "budget_tokens": 2000}},
    "documents": turns(PAPER),
    "prefilled answers": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello"}]},
    "server tools": {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
    "earlier thinking": after({"type": "thinking", "thinking": "Hm.", "signature": "EqQB"}, {"type": "text", "text": "Rain."}),
    "uploaded files": turns({"type": "document", "source": {"type": "file", "file_id": "file_1"}}),
    "containers": {"container": "container_1"},
}
