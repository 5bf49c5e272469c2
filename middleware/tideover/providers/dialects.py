# SPDX-License-Identifier: Apache-2.0
"""How the endpoints that call themselves OpenAI-compatible differ: one table, which the translation goes by.

A route's dialect is known by its host; `dialect` in its settings says it for a gateway or a server of your own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tideover.tables import DialectName


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What an endpoint takes, where they differ.

    Attributes:
      hosts: ends of the host names that speak it.
      limit_field: what it calls `max_tokens`.
      max_stops: how many stop sequences it takes; 0: none.
      user_field: where the id of the end user goes; None: nowhere.
      asks_for_usage: whether a stream tells its usage only to who asks for it (`stream_options`).
      one_call_at_a_time: whether it can be told to call one tool at a time (`parallel_tool_calls`).
      call_id_length: how long the id of a tool call must be, of ASCII letters and digits; None: as it comes.
      call_extra: what goes with each tool call that another model made.
      text_after_result: whether a user's text may follow a tool's result.
      image_urls: whether it fetches images by their URL; all take images as data.
    """

    hosts: tuple[str, ...] = ()
    limit_field: str = "max_tokens"
    max_stops: int = 4
    user_field: str | None = "user"
    asks_for_usage: bool = True
    one_call_at_a_time: bool = True
    call_id_length: int | None = None
    call_extra: Mapping[str, Any] = field(default_factory=dict)
    text_after_result: bool = True
    image_urls: bool = True


DIALECTS: Mapping[DialectName, Dialect] = {
    # developers.openai.com: API reference, chat completions. Newer models refuse `max_tokens`.
    "openai": Dialect(hosts=("api.openai.com", ".openai.azure.com"), limit_field="max_completion_tokens"),
    # ai.google.dev/gemini-api/docs/openai; docs/thought-signatures: a call without its signature is a 400 since January 2026,
    # and this word stands for that of a call which another model made. `parallel_tool_calls` has been refused as unknown.
    "gemini": Dialect(
        hosts=("generativelanguage.googleapis.com",),
        user_field=None,
        one_call_at_a_time=False,
        call_extra={"extra_content": {"google": {"thought_signature": "skip_thought_signature_validator"}}},
        image_urls=False,
    ),
    # docs.x.ai: API reference. Its reasoning models answer `stop` with 400: "does not support parameter stop".
    "grok": Dialect(hosts=("api.x.ai",), limit_field="max_completion_tokens", max_stops=0),
    # docs.mistral.ai: API reference; a field that it does not know is a 422 ("extra_forbidden"). A stream tells usage unasked.
    # A tool call's id of another shape is a 400 (code 3280), and so is a user's text right after a tool's result (3230).
    "mistral": Dialect(
        hosts=("api.mistral.ai",), user_field=None, asks_for_usage=False, call_id_length=9, text_after_result=False
    ),
    # vLLM, Ollama, llama.cpp, OpenRouter and others: what all of them take.
    "compatible": Dialect(),
}


def dialect_of(host: str, named: DialectName | None = None) -> Dialect:
    """The dialect of an endpoint: the one that the settings name, else that of its host, else what all take.

    >>> dialect_of("api.mistral.ai").call_id_length, dialect_of("localhost").limit_field, dialect_of("proxy", "grok").max_stops
    (9, 'max_tokens', 0)
    """
    if named is not None:
        return DIALECTS[named]
    return next((each for each in DIALECTS.values() if each.hosts and host.endswith(each.hosts)), DIALECTS["compatible"])
