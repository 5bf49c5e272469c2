# SPDX-License-Identifier: Apache-2.0
"""Writes docs/settings.md from the settings themselves: `python docs/generate_settings.py`. A test keeps it current."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from textwrap import dedent

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tideover import settings, tables
from tideover.core import policy

PAGE = Path(__file__).with_name("settings.md")
HEAD = """# Settings

`tideover.toml` is found from the working directory upwards, or named by `TIDEOVER_CONFIG`. A variable `TIDEOVER_<KEY>`
overrides a key; a dot becomes two underscores: `TIDEOVER_BREAKER__SETTLE_S=20`. Unknown keys and wrong values are errors that
name the key. `tideover config show` prints what is in force, and where each value came from. Credentials are named, never
written here: by variable (`api_key_env`) or file (`api_key_file`).

Written by `docs/generate_settings.py`; a test keeps it true.
"""
TABLES: tuple[tuple[str, type[BaseModel], type[object] | None], ...] = (
    ("", settings.Settings, None),
    ("routes.NAME", tables.RouteSettings, None),
    ("breaker", tables.BreakerSettings, policy.BreakerPolicy),
    ("drain", tables.DrainSettings, policy.PacePolicy),
    ("worker", tables.WorkerSettings, None),
    ("capacity", tables.CapacitySettings, None),
    ("tenants.NAME", tables.TenantSettings, None),
    ("prices.NAME", tables.PriceSettings, None),
)
OF_NAMES = ((settings.Settings, "routes"), (settings.Settings, "tenants"), (settings.Settings, "prices"))
"""Tables of tables, whose parts have a section of their own."""
WORDS = {
    "redis_url": "Where jobs are kept: `redis://`, `rediss://`, `unix://`, `redis+sentinel://`, `redis+cluster://` "
    "([how](topologies.md)), or `embedded`, the private server in `.tideover/`",
    "namespace": "Prefix of all keys; dramatiq's own. A hash tag (`{shop}`) keeps them on one node of a cluster",
    "mode": "`act`; `observe` decides and logs but lets every job run; `bypass` decides nothing",
    "kind": "`anthropic` (the Messages API, at any base_url), `openai-compatible` (chat completions), or Claude on a cloud: "
    "`bedrock`, `bedrock-mantle`, `vertex`, `foundry`, `anthropic-aws`, `anthropic-google-cloud`",
    "base_url": "The endpoint; needed for `openai-compatible`. Others have one of their own",
    "api_key_env": "The variable that holds the key. When none is named the first route takes `ANTHROPIC_API_KEY`, clouds take "
    "their own credentials",
    "api_key_file": "The file that holds the key",
    "models": "The model that a task asks for, and this route's name for it. A route to Anthropic without any passes names on",
    "max_in_flight": "Calls at once over this route, in each process",
    "max_requests_per_minute": "Calls over this route, of all processes; one without room waits for it, or its job "
    "is rerouted or held",
    "timeout_s": "The longest silence of a provider; an answer that comes along may take longer",
    "probe_max_s": "The longest wait between two probes",
    "start_rate": "Model calls per second at the beginning of a recovery, after a brake, and of a route that flaps",
    "max_rate": "Model calls per second of a recovering route at most, never less than live ones. Unset: as many as it bears",
    "share": "Of the limits that the provider tells in its headers; the rest is for whoever shares the account",
    "max_jobs": "Jobs of AI tasks that may live at once: queued, running and held. Unset: any number",
    "input": "Of a million input tokens, in any currency; those that a cache spared are not counted",
    "output": "Of a million output tokens",
    "double_s": "At first the pace doubles in so many seconds, or in 1.5 times what whole answers take",
}


def docs_of(model: type[object]) -> dict[str, str]:
    """The string below each field, as the source has it."""
    body = ast.parse(dedent(inspect.getsource(model))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            found[field.target.id] = " ".join(ast.literal_eval(after.value).split())
    return found


def allowed(field: FieldInfo) -> str:
    limits = ((sign, getattr(mark, name, None)) for mark in field.metadata for name, sign in (("ge", "≥"), ("le", "≤")))
    return ", ".join(f"{sign} {limit:,}" for sign, limit in limits if limit is not None)


def row(name: str, field: FieldInfo, words: str) -> str:
    if isinstance(field.default, BaseModel):
        return ""
    stated = not field.is_required() and field.default_factory is None and field.default is not None
    default = f"`{field.default}`" if stated else ""
    return f"| `{name}` | {default} | {allowed(field)} | {words.rstrip('.')} |\n"


def page() -> str:
    parts = [HEAD]
    for table, model, source in TABLES:
        words = docs_of(model) | (docs_of(source) if source else {}) | WORDS
        parts.append(f"\n## `[{table}]`\n\n" if table else "\n## Top level\n\n")
        parts.append("| key | default | allowed | what it does |\n|---|---|---|---|\n")
        shown = [(name, field) for name, field in model.model_fields.items() if (model, name) not in OF_NAMES]
        parts += [row(name, field, words.get(name, "")) for name, field in shown]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
