"""Keys, scopes, and what is open without them."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.settings.api_keys import ApiKey, Scope
from loraplex_server.settings.config import HttpConfig
from tests.server.conftest import Front, make_front, routes_of
from tests.support.servers.asgi_call import AsgiCall

pytestmark = pytest.mark.anyio
ADMIN, INFER, METRICS = "admin-secret", "infer-secret", "metrics-secret"
KEYS = (
    ApiKey.of(ADMIN, Scope.ADMIN),
    ApiKey.of(INFER, Scope.INFER),
    ApiKey.of(METRICS, Scope.METRICS),
)


@pytest.fixture
def locked(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[Front]:
    front = make_front(tokenizer, base_spec, tmp_path, HttpConfig(host="0.0.0.0", api_keys=KEYS))
    yield front
    front.store.close()


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


async def test_every_route_is_closed_without_a_key_except_the_probes(locked: Front) -> None:
    routes = routes_of(locked.app)
    assert ("PUT", "/v1/adapters/{name}") in routes
    for method, path in routes:
        answer = await locked.client.request(method, path.replace("{name}", "x"), json={})
        open_ = path in ("/health", "/ready", "/ping")
        assert (answer.status_code == 401) is not open_, (method, path, answer.status_code)
    for path in ("/v1/nothing", "/docs", "/openapi.json", "/metrics", "//v1/models", "/health/x"):
        answer = await locked.client.get(path)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong-key", f"Basic {ADMIN}", ADMIN])
async def test_a_wrong_key_is_a_401(locked: Front, header: str) -> None:
    answer = await locked.client.get("/v1/models", headers={"authorization": header})
    assert answer.status_code == 401


async def test_a_forged_host_header_opens_nothing(locked: Front) -> None:
    """CVE-2026-48746: the path must not be rebuilt from the Host header."""
    for host in ("x/health?", "localhost/ready?", "127.0.0.1"):
        headers = {"host": host}
        async with AsgiCall(locked.app, "GET", "/v1/models", headers=headers) as call:
            await call.next_body()
        assert call.status == 401


async def test_a_metrics_key_reads_the_metrics_and_nothing_else(locked: Front) -> None:
    allowed = []
    for method, path in (*routes_of(locked.app), ("GET", "/docs"), ("GET", "/v1/nothing")):
        path = path.replace("{name}", "x")
        answer = await locked.client.request(method, path, json={}, headers=bearer(METRICS))
        if answer.status_code != 403:
            allowed.append((method, path))
    probes = {
        (method, path) for method in ("GET", "HEAD") for path in ("/health", "/ready", "/ping")
    }
    assert set(allowed) <= {("GET", "/metrics"), *probes}
    answer = await locked.client.get("/metrics", headers=bearer(METRICS))
    assert "loraplex_engine_up" in answer.text


async def test_an_infer_key_generates_but_does_not_change_adapters(locked: Front) -> None:
    locked.headers = bearer(INFER)
    assert (await locked.chat()).status_code == 200
    assert (await locked.client.get("/v1/adapters", headers=bearer(INFER))).status_code == 200
    answer = await locked.post("/v1/route", {"input": "x"})
    assert answer.json()["error"]["code"] == "feature_not_enabled"
    for method, path in (
        ("POST", "/v1/adapters/generate"),
        ("PUT", "/v1/adapters/x"),
        ("DELETE", "/v1/adapters/x"),
        ("POST", "/v1/adapters/x/pin"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("POST", "/v1/anything/new"),
    ):
        answer = await locked.client.request(method, path, json={}, headers=bearer(INFER))
        assert answer.status_code == 403, path
        assert answer.json()["error"]["code"] == "missing_scope"
    answer = await locked.client.delete("/v1/adapters/x", headers=bearer(ADMIN))
    assert answer.status_code == 404
    for secret, is_admin in ((INFER, False), (ADMIN, True)):
        told = (await locked.client.get("/version", headers=bearer(secret))).json()
        assert told["may_change"] is is_admin
        live = await locked.client.get("/v1/live", headers=bearer(secret))
        assert told["sees_all"] is is_admin is (live.status_code == 200)
        metrics = await locked.client.get("/metrics", headers=bearer(secret))
        assert (metrics.status_code == 200) is is_admin  # it names the adapters of all tenants


async def test_tenants_do_not_share_a_prefix_cache(locked: Front) -> None:
    for secret in (ADMIN, INFER):
        locked.headers = bearer(secret)
        await locked.chat()
    first, second = (request.cache_salt for request in locked.engine.requests)
    assert first != second
    assert ADMIN not in first


async def test_keys_of_one_tenant_share_a_prefix_cache(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    keys = tuple(replace(key, tenant="acme") for key in KEYS[:2])
    front = make_front(tokenizer, base_spec, tmp_path, HttpConfig(api_keys=keys))
    for secret in (ADMIN, INFER):
        front.headers = bearer(secret)
        await front.chat()
    assert [request.cache_salt for request in front.engine.requests] == ["acme", "acme"]
    front.store.close()


async def test_public_metrics_need_no_key_and_open_nothing_else(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    http = HttpConfig(host="0.0.0.0", api_keys=KEYS, public_metrics=True)
    front = make_front(tokenizer, base_spec, tmp_path, http)
    assert (await front.client.get("/metrics")).status_code == 200
    assert (await front.client.post("/metrics")).status_code == 401
    for path in ("/metrics/x", "/v1/models", "/v1/adapters"):
        assert (await front.client.get(path)).status_code == 401
    front.store.close()


async def test_off_loopback_without_a_key_adapters_are_read_only(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    http = HttpConfig(host="0.0.0.0", insecure=True)
    front = make_front(tokenizer, base_spec, tmp_path, http)
    assert (await front.chat()).status_code == 200
    assert (await front.client.get("/version")).json()["may_change"] is False
    metrics = await front.client.get("/metrics")
    assert metrics.status_code == 403
    assert "--public-metrics" in metrics.json()["error"]["message"]
    answer = await front.client.delete("/v1/adapters/x")
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "writes_disabled"
    front.store.close()


async def test_a_web_page_cannot_change_adapters_through_a_name_of_its_own(front: Front) -> None:
    """DNS rebinding: the browser sends the page's host name."""
    headers = {"host": "evil.example:8000"}
    answer = await front.client.delete("/v1/adapters/x", headers=headers)
    assert answer.status_code == 403
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        answer = await front.client.delete("/v1/adapters/x", headers={"host": host})
        assert answer.status_code == 404, host


async def test_secrets_never_reach_the_log(locked: Front, caplog: pytest.LogCaptureFixture) -> None:
    locked.headers = bearer(ADMIN)
    with caplog.at_level(logging.DEBUG):
        await locked.chat()
        await locked.client.get("/v1/models", headers=bearer("wrong-" + INFER))
    assert ADMIN not in caplog.text
    assert INFER not in caplog.text
    assert ADMIN not in repr(locked.app.state.parts.config)
