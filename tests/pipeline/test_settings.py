# SPDX-License-Identifier: Apache-2.0
"""What an owner may write, what is refused, and that no refusal repeats a secret."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from tideover.core.policy import BreakerPolicy, PacePolicy
from tideover.errors import ConfigurationError
from tideover.settings import Settings, embedded_socket, explain_settings, forget, load, settings
from tideover.tables import RouteSettings
from tideover_worker.cli.config import config

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOCAL = 'kind = "openai-compatible"\nbase_url = "http://127.0.0.1:8000/v1"\n'
SECRET = "s3cr3t"


@pytest.fixture(autouse=True)
def uncached() -> Iterator[None]:
    forget()
    yield
    forget()


def write(folder: Path, toml: str) -> Path:
    file = folder / "tideover.toml"
    file.write_text(toml)
    return file


def refusal(folder: Path, toml: str = "", **environ: str) -> str:
    if toml:
        write(folder, toml)
    with pytest.raises(ConfigurationError) as caught:
        load(environ=environ, start=folder)
    told = caught.value
    assert told.__context__ is None or told.__suppress_context__, "pydantic's error, which repeats values, is in the traceback"
    return str(caught.value)


def from_toml(folder: Path, toml: str, **environ: str) -> Settings:
    write(folder, toml)
    return load(environ=environ, start=folder)


def test_defaults(tmp_path: Path) -> None:
    """With nothing written there is one anthropic route, the core's own policies, and no store."""
    found = load(environ={}, start=tmp_path)
    assert list(found.routes) == ["anthropic"]
    assert found.routes["anthropic"] == RouteSettings(kind="anthropic")
    assert found.breaker.policy() == BreakerPolicy()
    assert found.drain.policy() == PacePolicy()
    assert found.data_dir == tmp_path / ".tideover"


def test_environment_beats_file_beats_default(tmp_path: Path) -> None:
    """Each leaf comes from the strongest place that wrote it; its neighbours are left alone."""
    written = 'mode = "observe"\n[breaker]\nsettle_s = 20\nprobe_max_s = 40\n'
    found = from_toml(tmp_path, written, TIDEOVER_BREAKER__SETTLE_S="30")
    breaker = found.breaker
    assert (found.mode, breaker.settle_s, breaker.probe_max_s, breaker.probe_after_s) == ("observe", 30, 40, 5)
    assert found.breaker.policy() == BreakerPolicy(settle_s=30, probe_max_s=40)


def test_file_is_found_upwards(tmp_path: Path) -> None:
    """The nearest tideover.toml at or above the working directory counts, and the data lives beside it."""
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    write(tmp_path, 'mode = "bypass"\n')
    found = load(environ={}, start=below)
    assert (found.mode, found.data_dir) == ("bypass", tmp_path / ".tideover")


def test_named_file(tmp_path: Path) -> None:
    """TIDEOVER_CONFIG names the file; one that is missing is an error, not a silent default."""
    (tmp_path / "other.toml").write_text('mode = "bypass"\n')
    assert load(environ={"TIDEOVER_CONFIG": "other.toml"}, start=tmp_path).mode == "bypass"
    assert str(tmp_path / "gone.toml") in refusal(tmp_path, TIDEOVER_CONFIG="gone.toml")
    assert "TIDEOVER_CONFIG" in refusal(tmp_path, TIDEOVER_CONFIG="")


def test_routes_keep_the_order_of_the_file(tmp_path: Path) -> None:
    """The first route is the primary; a route that only the environment knows comes last."""
    environ = {"TIDEOVER_ROUTES__AARDVARK__KIND": "anthropic", "TIDEOVER_ROUTES__ZEBRA__TIMEOUT_S": "5"}
    found = from_toml(tmp_path, f'[routes.zebra]\n{LOCAL}[routes.anthropic]\nkind = "anthropic"\n', **environ)
    assert list(found.routes) == ["zebra", "anthropic", "aardvark"]
    assert (found.primary, found.routes["zebra"].timeout_s) == ("zebra", 5)


def test_tables_from_the_environment(tmp_path: Path) -> None:
    """A table may be given whole as JSON, which is how a name with dots and dashes gets in."""
    environ = {
        "TIDEOVER_ROUTES__LOCAL": '{"kind": "openai-compatible", "base_url": "http://127.0.0.1:1"}',
        "TIDEOVER_ROUTES__LOCAL__MODELS": '{"claude-opus-4.8": "qwen"}',
    }
    assert load(environ=environ, start=tmp_path).routes["local"].model("claude-opus-4.8") == "qwen"
    said = refusal(tmp_path, TIDEOVER_BREAKER=SECRET)
    assert "TIDEOVER_BREAKER: must be a JSON object" in said
    assert SECRET not in said


@pytest.mark.parametrize(
    ("toml", "asked", "expected"),
    [
        ('kind = "anthropic"', "claude-x", "claude-x"),
        ('kind = "anthropic"\nbase_url = "http://127.0.0.1:1"', "claude-x", "claude-x"),
        ('kind = "anthropic"\nmodels = { claude-x = "y" }', "claude-x", "y"),
        ('kind = "anthropic"\nmodels = { claude-x = "y" }', "claude-z", None),
        (LOCAL, "claude-x", None),
        (LOCAL + 'models = { claude-x = "y" }', "claude-x", "y"),
    ],
)
def test_model(tmp_path: Path, toml: str, asked: str, expected: str | None) -> None:
    """Only an anthropic route without a map serves models that nobody listed."""
    found = from_toml(tmp_path, f"[routes.r]\n{toml}\n")
    assert found.routes["r"].model(asked) == expected


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("[breaker]\nsetle_s = 1", "breaker.setle_s (FILE): unknown key; did you mean breaker.settle_s?"),
        ("settle_s = 1", "settle_s (FILE): unknown key; did you mean breaker.settle_s?"),
        ("xyz = 1", "xyz (FILE): unknown key; known are redis_url, namespace"),
        ('[routes.r]\nkind = "anthropic"\nbase_ulr = "x"', "r.base_ulr (FILE): unknown key; did you mean routes.r.base_url?"),
        ('[routes.r]\nkind = "anthropic"\napi_key = "s3cr3t"', 'api_key_env = "..."'),
        ("[routes.r]\ntimeout_s = 1", "routes.r.kind (FILE): is missing, must be 'anthropic' or 'bedrock' or"),
        ('[routes.r]\nkind = "openai-compatible"', "routes.r (FILE): a route of kind openai-compatible needs base_url"),
        ('[routes.r]\nkind = "azure"', "routes.r.kind (FILE): is 'azure', must be 'anthropic', 'bedrock', "),
        ('[routes.r]\nkind = "bedrock"', "routes.r (FILE): a route of kind bedrock needs region"),
        ('[routes.Big]\nkind = "anthropic"', "routes.Big (FILE)"),
        ('[routes.r]\nkind = "anthropic"\nbase_url = "ftp://h"', "must be a URL like https://host/v1"),
        ('[routes.r]\nkind = "anthropic"\nbase_url = "https://u:s3cr3t@h"', "name the credential with api_key_env"),
        ('[routes.r]\nkind = "anthropic"\napi_key_env = "sk-s3cr3t"', "routes.r.api_key_env (FILE)"),
        ('[routes.r]\nkind = "anthropic"\napi_key_env = "A"\napi_key_file = "b"', "api_key_env or api_key_file, not both"),
        ('[routes.r]\nkind = "anthropic"\nmax_in_flight = 0', "is 0, must be a number from 1 to 100000"),
        ("[routes]", "routes (FILE)"),
        ('routes = "s3cr3t"', "routes (FILE): must be a table"),
        ('routes.r = "s3cr3t"', "routes.r (FILE): must be a table"),
        ('mode = ["s3cr3t"]', "mode (FILE): must be 'act'"),
        ('mode = "atc"', "mode (FILE): is 'atc', must be 'act', 'observe' or 'bypass'"),
        ('namespace = "a b"', "namespace (FILE)"),
        ("max_wait_s = inf", "max_wait_s (FILE): is inf, must be a number from 1 to 31536000"),
        ("[worker]\npoll_s = 'soon'", "worker.poll_s (FILE): is 'soon', must be a number from 0.01 to 5"),
        ("[worker]\nreserved_for_critical = 0.95", "must be a number from 0 to 0.9"),
        ("breaker = 3", "breaker (FILE)"),
        ("[breaker]\nprobe_after_s = 60", "probe_max_s (15.0) is below probe_after_s (60.0)"),
        ("[drain]\nstart_rate = 60\nmax_rate = 50", "max_rate (50.0) is below start_rate (60.0)"),
        ("[drain]\nshare = 1.5", "drain.share (FILE): is 1.5, must be a number from 0.01 to 1"),
        ('redis_url = "http://u:s3cr3t@h"', "must be redis://host:port/0"),
        ('redis_url = "redis://:s3cr3t/x@h:6379/0"', "percent-encode the special characters of a password"),
        ('redis_url = "redis://"', "must be redis://host:port/0"),
        ("mode = \n", "FILE: Invalid value (at line 1"),
        ("_env_file = 's3cr3t'", "_env_file (FILE): unknown key"),
    ],
)  # fmt: skip
def test_refused_in_the_file(tmp_path: Path, toml: str, expected: str) -> None:
    """Each refusal names the key, the file and what would be right, and repeats no secret."""
    said = refusal(tmp_path, toml)
    assert expected.replace("FILE", str(tmp_path / "tideover.toml")) in said
    assert SECRET not in said


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("TIDEOVER_REDIS_ULR", "redis://:s3cr3t@h", "did you mean TIDEOVER_REDIS_URL?"),
        ("TIDEOVER_BREAKER_SETTLE_S", "3", "did you mean TIDEOVER_BREAKER__SETTLE_S?"),
        ("TIDEOVER_CONFIGS", "x", "did you mean TIDEOVER_CONFIG?"),
        ("TIDEOVER_ROUTES__OPENAI__BASE_ULR", "x", "did you mean TIDEOVER_ROUTES__OPENAI__BASE_URL?"),
        ("TIDEOVER_ROUTES__ANTHROPIC__API_KEY", "s3cr3t", "name the variable that holds it"),
        ("TIDEOVER_WORKER__CONCURRENCY", "many", "worker.concurrency (env TIDEOVER_WORKER__CONCURRENCY): is 'many'"),
        ("TIDEOVER_REDIS_URL", "s3cr3t", "redis_url (env TIDEOVER_REDIS_URL): must be redis://"),
        ("TIDEOVER_PORT", "8080", "unknown key"),
    ],
)
def test_refused_in_the_environment(tmp_path: Path, name: str, value: str, expected: str) -> None:
    """A misspelt variable is an error too, and the suggestion is spelt as a variable."""
    said = refusal(tmp_path, **{name: value})
    assert expected in said
    assert f"env {name}" in said
    assert SECRET not in said


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    """One run of a deployment is enough to learn of every wrong key."""
    said = refusal(tmp_path, "[breaker]\nprobe_max_s = 0\n", TIDEOVER_MODE="x", TIDEOVER_NAMESPACE="")
    assert [line.split()[0] for line in said.splitlines()] == ["namespace", "mode", "breaker.probe_max_s"]


def test_unreadable_file(tmp_path: Path) -> None:
    """A file that is no UTF-8 is named."""
    (tmp_path / "tideover.toml").write_bytes(b"\xff")
    assert str(tmp_path / "tideover.toml") in refusal(tmp_path)


def test_variables_of_kubernetes_services_are_not_ours(tmp_path: Path) -> None:
    """A service called tideover-web must not stop the boot of every pod beside it."""
    environ = {
        "TIDEOVER_WEB_SERVICE_HOST": "10.0.0.1",
        "TIDEOVER_WEB_SERVICE_PORT_HTTP": "80",
        "TIDEOVER_WEB_PORT": "tcp://10.0.0.1:80",
        "TIDEOVER_WEB_PORT_80_TCP_ADDR": "10.0.0.1",
        "TIDEOVER_VALKEY_BIN": "/usr/bin/valkey-server",
        "HOME": "/root",
    }
    assert load(environ=environ, start=tmp_path).mode == "act"


def test_store_url(tmp_path: Path) -> None:
    """The URL as given; the address of the private server for `embedded`; else the ways out."""
    at = {"TIDEOVER_REDIS_URL": "rediss://:pw@h:6379/0"}
    assert load(environ=at, start=tmp_path).store_url() == "rediss://:pw@h:6379/0"
    private = load(environ={"TIDEOVER_REDIS_URL": "embedded"}, start=tmp_path)
    assert private.store_url() == f"unix://{embedded_socket(tmp_path / '.tideover')}"
    assert not (tmp_path / ".tideover").exists()
    with pytest.raises(ConfigurationError, match=r"TIDEOVER_REDIS_URL.*tideover\.toml.*worker --dev.*tideover demo"):
        load(environ={}, start=tmp_path).store_url()


def test_address_of_a_deep_directory(tmp_path: Path) -> None:
    """A path too long for a socket moves away, to one address per directory however it is reached."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    (tmp_path / "link").symlink_to(deep)
    assert embedded_socket(tmp_path) == tmp_path / "valkey.sock"
    assert embedded_socket(deep) == embedded_socket(tmp_path / "link")
    assert embedded_socket(deep) != embedded_socket(deep / "other")
    assert len(str(embedded_socket(deep))) <= 100


def key_of(folder: Path, route: str, toml: str, **environ: str) -> str | None:
    return from_toml(folder, toml, **environ).api_key(route)


@pytest.mark.parametrize(
    ("toml", "route", "expected"),
    [
        ('[routes.a]\nkind = "anthropic"', "a", "sk-a"),
        ('[routes.a]\nkind = "anthropic"\nbase_url = "http://127.0.0.1:1"', "a", "sk-a"),
        (f'[routes.l]\n{LOCAL}[routes.a]\nkind = "anthropic"', "a", "sk-a"),
        (f'[routes.l]\n{LOCAL}[routes.a]\nkind = "anthropic"\nbase_url = "http://127.0.0.1:1"', "a", None),
        (f"[routes.l]\n{LOCAL}", "l", None),
        (f'[routes.l]\n{LOCAL}api_key_env = "OTHER"', "l", "sk-o"),
        (f'[routes.l]\n{LOCAL}api_key_file = "key"', "l", "sk-file"),
    ],
)
def test_api_key(tmp_path: Path, toml: str, route: str, expected: str | None) -> None:
    """Anthropic's key goes to Anthropic and to the primary route, and never to another server."""
    (tmp_path / "key").write_text("sk-file\n")
    assert key_of(tmp_path, route, toml, ANTHROPIC_API_KEY="sk-a", OTHER="sk-o") == expected


def test_primary_behind_a_gateway_needs_no_key(tmp_path: Path) -> None:
    """A gateway of one's own may hold the key itself."""
    assert key_of(tmp_path, "a", '[routes.a]\nkind = "anthropic"\nbase_url = "http://127.0.0.1:1"') is None


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ('kind = "anthropic"', "ANTHROPIC_API_KEY"),
        ('kind = "anthropic"\napi_key_env = "EMPTY"', "EMPTY"),
        ('kind = "anthropic"\napi_key_file = "gone"', "gone: No such file"),
        ('kind = "anthropic"\napi_key_file = "empty"', "empty, which is empty"),
    ],
)
def test_missing_api_key(tmp_path: Path, toml: str, expected: str) -> None:
    """A credential that is named and not there is an error that names it."""
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigurationError, match=expected):
        key_of(tmp_path, "a", f"[routes.a]\n{toml}\n", EMPTY=" ")


def test_api_key_is_read_when_asked_for(tmp_path: Path) -> None:
    """A rotated key is seen without a restart."""
    found = from_toml(tmp_path, '[routes.a]\nkind = "anthropic"\napi_key_file = "key"\n')
    for key in ("one", "two"):
        (tmp_path / "key").write_text(key)
        assert found.api_key("a") == key


def test_unknown_route(tmp_path: Path) -> None:
    """A route that is not there is answered with one that is."""
    with pytest.raises(ConfigurationError, match="did you mean anthropic"):
        load(environ={}, start=tmp_path).api_key("antropic")


def test_explained(tmp_path: Path) -> None:
    """Every leaf has its origin, and no password is shown, wherever it stands in the URL."""
    url = f"redis://me:{SECRET}@h:6379/0?password={SECRET}&db=1"
    found = from_toml(tmp_path, f'redis_url = "{url}"\n[routes.a]\nkind = "anthropic"\nmodels = {{ "m.1" = "x" }}\n',
                      TIDEOVER_BREAKER__PROBE_MAX_S="9")  # fmt: skip
    explained = explain_settings(found)
    file = str(tmp_path / "tideover.toml")
    assert explained["redis_url"] == ("redis://me:***@h:6379/0?password=***&db=1", file)
    assert explained['routes.a.models."m.1"'] == ("x", file)
    assert explained["breaker.probe_max_s"] == (9, "env TIDEOVER_BREAKER__PROBE_MAX_S")
    assert explained["mode"] == ("act", "default")
    assert SECRET not in repr(found)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://:s3cr3t@h:1/0", "redis://:***@h:1/0"),
        ("redis://:s3@cr:3t@h", "redis://:***@h"),
        ("redis://s3cr3t@h", "redis://***@h"),
        ("unix:///run/v.sock?password=s3cr3t", "unix:///run/v.sock?password=***"),
        ("redis://h:1/0", "redis://h:1/0"),
        ("embedded", "embedded"),
    ],
)
def test_masked_url(tmp_path: Path, url: str, expected: str) -> None:
    """A URL is shown without what lets one in."""
    found = load(environ={"TIDEOVER_REDIS_URL": url}, start=tmp_path)
    assert explain_settings(found)["redis_url"][0] == expected


def test_cached_until_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has one set of settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIDEOVER_MODE", "observe")
    assert settings().mode == "observe"
    monkeypatch.setenv("TIDEOVER_MODE", "bypass")
    assert settings().mode == "observe"
    forget()
    assert settings().mode == "bypass"


def test_config_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piped it is tab-separated; --json is one object; wrong settings are exit code 2 and a message."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIDEOVER_REDIS_URL", f"redis://:{SECRET}@h:6379/0")
    piped = CliRunner().invoke(config, ["show"])
    assert piped.stdout.splitlines()[0] == "redis_url\tredis://:***@h:6379/0\tenv TIDEOVER_REDIS_URL"
    as_json = json.loads(CliRunner().invoke(config, ["show", "--json"]).stdout)
    assert as_json["mode"] == {"value": "act", "origin": "default"}
    forget()
    monkeypatch.setenv("TIDEOVER_MODE", "x")
    wrong = CliRunner().invoke(config, ["show"])
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "TIDEOVER_MODE" in wrong.stderr
