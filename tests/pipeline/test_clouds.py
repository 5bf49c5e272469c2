# SPDX-License-Identifier: Apache-2.0
"""Claude on other clouds, by the SDK's own clients: as a fallback and as the primary, with a key or the cloud's credentials."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anthropic
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from tests.pipeline.test_streaming import HEAD, WHOLE

from tideover import aclaude, ai_task, claude, text_of, wrap
from tideover.errors import ConfigurationError
from tideover.settings import settings
from tideover.testing import Fault

if TYPE_CHECKING:
    from tests.pipeline.conftest import Serving, Shop

CLOUDS = {
    "bedrock": 'kind = "bedrock"\nregion = "us-east-1"',
    "bedrock-mantle": 'kind = "bedrock-mantle"\nregion = "us-east-1"',
    "vertex": 'kind = "vertex"\nregion = "us-east5"\nproject = "shop"',
    "foundry": 'kind = "foundry"',
    "anthropic-aws": 'kind = "anthropic-aws"\nregion = "us-east-1"\nworkspace = "wrkspc_1"',
}
GOOGLE = 'kind = "anthropic-google-cloud"\nregion = "us"\nproject = "shop"\nworkspace = "wrkspc_1"'
STREAM = {"content-type": "text/event-stream"}


def cloud(shop: Shop, kind: str, url: str | None = None, *, key: bool = True) -> str:
    """The table of a route `cloud` that the shop's fallback serves."""
    said = {**CLOUDS, "anthropic-google-cloud": GOOGLE}[kind]
    named = 'api_key_env = "CLOUD_KEY"' if key else ""
    url = url or shop.fallback.root_url
    models = f'models = {{ "{shop.model}" = "claude-there:1" }}'
    return f'[routes.cloud]\n{said}\nbase_url = "{url}"\n{models}\ntimeout_s = 10\n{named}'


def plain(shop: Shop, tag: str) -> str:
    return text_of(claude().messages.create(**shop.question(tag)))


def helper(shop: Shop, tag: str) -> str:
    with claude().messages.stream(**shop.question(tag)) as stream:
        return stream.get_final_text()


async def aplain(shop: Shop, tag: str) -> str:
    return text_of(await aclaude().messages.create(**shop.question(tag)))


async def ahelper(shop: Shop, tag: str) -> str:
    async with aclaude().messages.stream(**shop.question(tag)) as stream:
        return await stream.get_final_text()


def tasks_of(shop: Shop, **options: Any) -> list[Any]:
    """A critical task for each way to call."""
    made = []
    for ask in (plain, helper, aplain, ahelper):
        said = {"criticality": "critical", "expires_in": timedelta(minutes=2), **shop.quick, **options}
        said["actor_name"] = ask.__name__
        if ask in (aplain, ahelper):

            async def acall(tag: str, ask: Any = ask) -> str:
                return str(await ask(shop, tag))

            made.append(ai_task(**said)(acall))
        else:

            def call(tag: str, ask: Any = ask) -> str:
                return str(ask(shop, tag))

            made.append(ai_task(**said)(call))
    return made


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None of this machine's."""
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_BEARER_TOKEN_BEDROCK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


@pytest.mark.parametrize("kind", CLOUDS)
@pytest.mark.parametrize("as_primary", [False, True])
def test_claude_on_other_clouds(shop: Shop, monkeypatch: pytest.MonkeyPatch, kind: str, as_primary: bool) -> None:
    """Whole answers and streams, from functions and coroutines; under the cloud's name of the model and with its own key."""
    monkeypatch.setenv("CLOUD_KEY", shop.fallback_key)
    shop.configure(more=cloud(shop, kind))
    tasks = tasks_of(shop, **({"route": "cloud"} if as_primary else {"reroute": ["cloud"]}))
    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    jobs = [task.send(f"job{n}") for n, task in enumerate(tasks)]
    assert ["openai: The"] * 4 == [shop.result(job)[:11] for job in jobs]
    calls = [call for call in shop.fallback.calls() if call.job]
    assert {("claude-there:1", True, True)} == {(call.model, call.key_ok, call.stream) for call in calls}
    if as_primary:
        assert [] == shop.primary.calls()


@pytest.mark.parametrize("fault", [Fault.OVERLOADED, Fault.STREAM_CUT, Fault.STREAM_ERROR, Fault.RESET, Fault.RATE_LIMITED])
def test_bedrock_fails_too(shop: Shop, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """What its frames tell is told from a whole answer: the job goes on to the next route."""
    monkeypatch.setenv("CLOUD_KEY", shop.fallback_key)
    shop.configure(more=cloud(shop, "bedrock", shop.primary.root_url))
    tasks = tasks_of(shop, route="cloud", reroute=["openai"])
    shop.work()
    shop.primary.fail(fault)
    jobs = [task.send(f"job{n}") for n, task in enumerate((tasks[0], tasks[2]))]
    assert ["openai: The"] * 2 == [shop.result(job)[:11] for job in jobs]


def test_a_probe_asks_bedrock(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds that the route is back, by one-token calls."""
    monkeypatch.setenv("CLOUD_KEY", shop.primary_key)
    shop.configure(more=cloud(shop, "bedrock", shop.primary.root_url))

    @ai_task(criticality="deferrable", route="cloud", **shop.quick)
    def ask(tag: str) -> str:
        return plain(shop, tag)

    shop.work()
    shop.primary.fail(Fault.RESET)
    jobs = shop.send(ask, 3, "job")
    shop.until_all("held", jobs)
    key = f"cloud/{shop.model}"
    shop.until(lambda: shop.breakers.read([key])[key].generation, "it opens")
    shop.heal()
    assert {"anthropic"} == {shop.result(job).partition(":")[0] for job in jobs}


def test_aws_credentials_sign_the_call(shop: Shop, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key in the settings AWS' own chain signs, and the primary's key is nowhere in the request."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    shop.configure(more=cloud(shop, "bedrock", serving(STREAM, WHOLE), key=False))
    (task, *_) = tasks_of(shop, reroute=["cloud"])
    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    assert "Hello." == shop.result(task.send("job"))
    ((path, headers, body),) = serving.seen
    assert path == "/model/claude-there:1/invoke-with-response-stream"
    assert headers["authorization"].startswith("AWS4-HMAC-SHA256 Credential=AKIA1/")
    assert shop.primary_key not in json.dumps(headers) + body.decode()


@pytest.mark.parametrize("kind", ["vertex", "anthropic-google-cloud"])
def test_google_s_default_credentials(shop: Shop, serving: Serving, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Without a key in the settings a token comes from Google's application default credentials."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    tokens = serving({"content-type": "application/json"}, json.dumps({"access_token": "ya29.t", "expires_in": 3600}).encode())
    account = {
        "type": "service_account",
        "client_email": "a@shop",
        "private_key": pem,
        "token_uri": tokens,
        "project_id": "shop",
    }
    path = shop.folder / "account.json"
    path.write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    shop.configure(more=cloud(shop, kind, serving(STREAM, WHOLE), key=False))
    (task, _, atask, _) = tasks_of(shop, reroute=["cloud"])
    shop.work()
    shop.primary.fail(Fault.OVERLOADED)
    assert ["Hello.", "Hello."] == [shop.result(task.send("job")), shop.result(atask.send("ajob"))]
    asked = [headers for path, headers, _ in serving.seen if "rawpredict" in path.lower() or "messages" in path]
    assert {"Bearer ya29.t"} == {headers["authorization"] for headers in asked}


@pytest.mark.parametrize("kind", ["anthropic", "foundry", "bedrock", "vertex", "openai-compatible"])
def test_what_one_provider_is_sent_no_other_gets(
    shop: Shop, serving: Serving, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Keys, headers of a call, of a client and of the environment: they are the primary's alone."""
    secrets = ["sk-ant-own", "call-secret", "client-secret", "environment-secret", "token-secret"]
    monkeypatch.setenv("ANTHROPIC_CUSTOM_HEADERS", "X-Gateway-Key: environment-secret\nX-Team: environment-secret")
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "token-secret")
    monkeypatch.setenv("CLOUD_KEY", "cloud-key")
    url = serving(STREAM, WHOLE)
    route = cloud(shop, kind, url) if kind in CLOUDS else cloud(shop, "foundry", url).replace('"foundry"', f'"{kind}"')
    down = serving(
        {"content-type": "application/json"}, b'{"type": "error", "error": {"type": "overloaded_error"}}', status=529
    )
    shop.configure(more=route, primary=down)

    @ai_task(criticality="critical", expires_in=timedelta(minutes=2), reroute=["cloud"], **{**shop.quick, "max_retries": 0})
    def ask(tag: str) -> str:
        mine = anthropic.Anthropic(
            api_key="sk-ant-own", base_url=down, default_headers={"X-Own": "client-secret"}, max_retries=0
        )
        asked = shop.question(tag)
        asked["extra_headers"] |= {
            "Authorization": "Bearer call-secret",
            "X-Private": "call-secret",
            "Helicone-Auth": "call-secret",
        }
        return text_of(wrap(mine).messages.create(**asked))

    shop.work()
    ask.send("job")
    asked = shop.until(lambda: [seen for seen in serving.seen if "claude-there" in f"{seen}"], "it is rerouted")
    for path, headers, body in asked:
        told = path + json.dumps(headers) + body.decode()
        assert [] == [secret for secret in (*secrets, shop.primary_key) if secret in told]
        assert headers["x-tideover-job"] == "job"


def test_a_cloud_that_answers_pings_only_is_bounded(shop: Shop, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that never begins is given up on a cloud as anywhere."""
    monkeypatch.setenv("CLOUD_KEY", "k")
    url = serving(STREAM, HEAD, again=b'event: ping\ndata: {"type": "ping"}\n\n')
    shop.configure(more=cloud(shop, "vertex", url).replace("timeout_s = 10", "timeout_s = 0.2"))
    (task, *_) = tasks_of(shop, route="cloud", reroute=["openai"])
    shop.work()
    assert "openai" == shop.result(task.send("job")).partition(":")[0]


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ('kind = "bedrock"', "needs region"),
        ('kind = "vertex"\nregion = "us"', "needs project"),
        ('kind = "foundry"', "needs resource, or base_url"),
        ('kind = "foundry"\nresource = "r"\nbase_url = "https://x"', "and not both"),
        ('kind = "anthropic"\nregion = "us"', "only a route of kind bedrock or"),
        ('kind = "openai-compatible"\nbase_url = "https://x"\nprofile = "p"', "only a route of kind bedrock or"),
        ('kind = "bedrock"\nregion = "us"\nprofile = "p"\napi_key_env = "K"', "profile, or a key, not both"),
        ('kind = "azure"', "must be 'anthropic', 'bedrock'"),
    ],
)
def test_what_cannot_work_is_said_at_once(shop: Shop, table: str, why: str) -> None:
    shop.configure(more=f"[routes.cloud]\n{table}")
    with pytest.raises(ConfigurationError, match=why):
        settings()


def test_a_missing_library_is_named(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extra that brings it."""
    for kind, extra in (("bedrock", "bedrock"), ("vertex", "vertex")):
        shop.configure(more=cloud(shop, kind, key=False))
        settings().check_route("cloud")
        with monkeypatch.context() as gone:
            gone.setattr("tideover.settings.find_spec", lambda library: None)
            with pytest.raises(ConfigurationError, match=rf"pip install 'tideover\[{extra}\]'"):
                settings().check_route("cloud")


def test_what_the_sdk_refuses_is_an_error_of_the_settings(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a ConfigurationError that names the route, and holds no key."""
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", "sk-hidden")
    shop.configure(more=cloud(shop, "bedrock", key=False) + 'profile = "p"')
    with pytest.raises(ConfigurationError, match="route cloud") as refused:
        claude_of("cloud")
    assert "sk-hidden" not in str(refused.value)


def claude_of(route: str) -> Any:
    from tideover.providers.anthropic import sync_client

    return sync_client(route)
