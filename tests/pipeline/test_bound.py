# SPDX-License-Identifier: Apache-2.0
"""A request that only its provider can read goes to no other one, however alike: the job waits, and says why."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tideover import ai_task, claude, text_of
from tideover.providers.bound import bound_to_its_provider
from tideover.testing import Fault

if TYPE_CHECKING:
    from tests.pipeline.conftest import Shop

THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "EqQB"}
FILE = {"type": "document", "source": {"type": "file", "file_id": "file_1"}}
FOUND = {"type": "web_search_tool_result", "tool_use_id": "t", "content": [{"encrypted_content": "x", "url": "u"}]}
TOOL = {"type": "tool_use", "id": "t", "name": "n", "input": {"file_id": "the caller's word", "signature": "too"}}


def said(*blocks: Any, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": list(blocks)}, {"role": "user", "content": "!"}]
    return {"messages": turns, **more}


@pytest.mark.parametrize(
    ("request_", "bound"),
    [
        (said({"type": "text", "text": "signature"}), ()),
        (said(TOOL), ()),
        (said({"type": "thinking", "thinking": "Hm.", "signature": ""}), ()),
        (said(THOUGHT), ("thinking",)),
        (said({"type": "redacted_thinking", "data": "x"}), ("thinking",)),
        (said(FILE), ("file_id",)),
        (said({"type": "tool_result", "tool_use_id": "t", "content": [FILE]}), ("file_id",)),
        (said({"type": "container_upload", "file_id": "f"}), ("file_id",)),
        (said(FOUND), ("encrypted_content",)),
        (said({"type": "compaction", "content": "c", "encrypted_content": "x"}), ("encrypted_content",)),
        (said(container="container_1"), ("container",)),
        (said(container={"id": "container_1"}, thread={"type": "continue", "id": "t"}), ("container", "thread")),
        (said(mcp_servers=[{"url": "https://x", "authorization_token": "secret"}]), ("mcp_servers",)),
        (said(container=None, thread=None, mcp_servers=[]), ()),
        ({"messages": "nonsense", "system": [FILE]}, ("file_id",)),
    ],
)
def test_what_binds_a_request(request_: dict[str, Any], bound: tuple[str, ...]) -> None:
    assert bound == bound_to_its_provider(request_)


@pytest.mark.parametrize("kind", ["openai-compatible", "anthropic"])
def test_a_bound_request_waits_for_its_provider(shop: Shop, kind: str) -> None:
    """Also where the other route speaks the same dialect. The job's story names what binds it."""
    other = f'[routes.other]\nkind = "{kind}"\nbase_url = "{shop.fallback.root_url}"\nmodels = {{ "{shop.model}" = "m" }}\n'
    shop.configure(more=other)

    @ai_task(criticality="critical", expires_in=timedelta(minutes=2), reroute=["other"], **shop.quick)
    def ask(tag: str) -> str:
        turns: Any = said(THOUGHT, {"type": "text", "text": "Yes."})["messages"]
        return text_of(claude().messages.create(**shop.question(tag, messages=turns)))

    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    job = ask.send("bound")
    shop.until_all("held", [job])
    assert [] == [call for call in shop.fallback.calls() if call.job]
    assert ("other: cannot carry thinking", f"anthropic/{shop.model}") == (shop.facts(job).detail, shop.facts(job).wait_key)
    shop.heal()
    assert "anthropic" == shop.result(job).partition(":")[0]
