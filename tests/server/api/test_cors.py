"""Pages of other origins: closed by default, open to those that the operator names."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.settings.api_keys import ApiKey, Scope
from loraplex_server.settings.config import ConfigError, HttpConfig
from loraplex_server.settings.sources import resolve_config
from tests.server.conftest import Front, make_front, routes_of

pytestmark = pytest.mark.anyio
PAGE = "https://app.example.org"
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


async def test_by_default_no_page_may_read_an_answer(front: Front) -> None:
    answer = await front.client.get("/v1/models", headers={"origin": PAGE})
    assert "access-control-allow-origin" not in answer.headers
    asked = await front.client.options(
        "/v1/chat/completions", headers={"origin": PAGE, **PREFLIGHT}
    )
    assert asked.status_code == 405
    assert "access-control-allow-origin" not in asked.headers


async def test_a_page_that_is_named_may_call_with_a_key(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    keys = (ApiKey.of("the-secret", Scope.INFER),)
    http = HttpConfig(api_keys=keys, cors_origins=(PAGE,))
    front = make_front(tokenizer, base_spec, tmp_path, http)
    path = "/v1/chat/completions"
    asked = await front.client.options(path, headers={"origin": PAGE, **PREFLIGHT})
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in asked.headers["access-control-allow-headers"].lower()
    front.headers = {"origin": PAGE}
    assert (await front.chat()).status_code == 401
    front.headers["authorization"] = "Bearer the-secret"
    for answer in (await front.chat(), await front.chat(temperature=-1)):
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "x-loraplex-adapter" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
    stranger = {"origin": "https://app.example.org.evil.net", **PREFLIGHT}
    refused = await front.client.options(path, headers=stranger)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in refused.headers
    front.store.close()


async def test_a_page_may_use_every_method_that_a_route_has(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    front = make_front(tokenizer, base_spec, tmp_path, HttpConfig(cors_origins=(PAGE,)))
    for method in {method for method, _ in routes_of(front.app)} - {"HEAD", "OPTIONS"}:
        wanted = {"origin": PAGE, "access-control-request-method": method}
        answer = await front.client.options("/v1/adapters/x", headers=wanted)
        assert answer.status_code == 200, method
    front.store.close()


def test_origins_are_checked_at_the_start() -> None:
    given = {"cors_origin": [PAGE, "http://localhost:3000"]}
    assert resolve_config(given).http.cors_origins == (PAGE, "http://localhost:3000")
    for bad in ("example.org", f"{PAGE}/", f"{PAGE}/path", "https://*.example.org", "null"):
        with pytest.raises(ConfigError, match="cors-origin"):
            resolve_config({"cors_origin": [bad]})
    with pytest.raises(ConfigError, match="--api-key"):
        resolve_config({"cors_origin": ["*"]})
    assert resolve_config({"cors_origin": "*", "api_key": ["long-enough"]}).http.cors_origins
