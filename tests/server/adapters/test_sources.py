"""Which sources a client may name: nothing by default, then what the operator allowed."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.settings.api_keys import AdapterAccess, ApiKey, Scope, parse_keys
from loraplex_server.settings.config import HttpConfig
from tests.server.conftest import Front, make_front
from tests.support.adapters.lora_files import write_lora
from tests.support.servers.web_folder import WebFolder, web_folder

pytestmark = pytest.mark.anyio


@pytest.fixture
def web(base_spec: BaseSpec, tmp_path: Path) -> Iterator[WebFolder]:
    write_lora(tmp_path / "www" / "team" / "x", base_spec)
    write_lora(tmp_path / "www" / "team-b" / "x", base_spec, seed=1)
    with web_folder(tmp_path / "www") as shown:
        yield shown


@pytest.fixture
def open_front(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path, web: WebFolder
) -> Iterator[Front]:
    """May load from below ``/team`` of the web server."""
    front = make_front(tokenizer, base_spec, tmp_path, allow_sources=[f"{web.url}/team"])
    yield front
    front.store.close()


async def put(front: Front, source: str) -> httpx.Response:
    return await front.client.put("/v1/adapters/x", json={"source": source})


async def test_an_address_brings_its_card(
    open_front: Front, web: WebFolder, tmp_path: Path
) -> None:
    told = {"description": "d", "examples": ["e"], "defaults": {"stop": ["x"]}}
    (tmp_path / "www" / "team" / "x" / "card.json").write_text(json.dumps(told))
    card = (await put(open_front, f"{web.url}/team/x")).json()
    assert {name: card[name] for name in told} == told


@pytest.mark.parametrize(
    "source", ["hf://org/repo@main", "s3://b/a", "gs://b/a", "az://c/a", "https://example.org/a"]
)
async def test_no_address_is_fetched_unless_the_operator_allowed_it(
    front: Front, source: str
) -> None:
    payload = {"lora_name": "x", "lora_path": source}
    for answer in (await put(front, source), await front.post("/v1/load_lora_adapter", payload)):
        assert answer.status_code == 403, answer.text
        error = answer.json()["error"]
        assert error["code"] == "source_forbidden"
        assert error["type"] == "permission_error"
        assert source in error["message"]
        assert "--allow-source" in error["message"]


async def test_an_allowed_address_is_fetched(open_front: Front, web: WebFolder) -> None:
    answer = await put(open_front, f"{web.url}/team/x/")
    assert answer.status_code == 201, answer.text
    assert answer.json()["provenance"]["uri"] == f"{web.url}/team/x"
    assert (await open_front.chat(adapter="x")).status_code == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/team-b/x", 403),  # begins with the same letters
        ("/", 403),
        ("/team/../team-b/x", 400),
        ("/team/%2e%2e/team-b/x", 400),
        ("/team/%2E%2E%2Fteam-b/x", 400),
        ("/team\\..\\team-b", 400),
        ("/team/x?redirect=1", 400),
        ("/team//x", 400),
    ],
)
async def test_an_address_cannot_climb_out_of_its_prefix(
    open_front: Front, web: WebFolder, path: str, status: int
) -> None:
    assert (await put(open_front, web.url + path)).status_code == status
    assert web.asked == []


async def test_a_prefix_allows_neither_another_port_nor_a_user_name(
    open_front: Front, web: WebFolder
) -> None:
    host = web.url.removeprefix("http://")
    assert (await put(open_front, f"{web.url}0/team/x")).status_code == 403
    assert (await put(open_front, f"http://{host}@evil.example/team/x")).status_code == 400
    assert (await put(open_front, f"https://{host}/team/x")).status_code == 403
    assert web.asked == []


async def test_a_redirect_is_not_followed(
    open_front: Front, web: WebFolder, base_spec: BaseSpec, tmp_path: Path
) -> None:
    write_lora(tmp_path / "inner" / "team" / "x", base_spec)
    with web_folder(tmp_path / "inner") as inner:
        web.redirect_to = inner.url
        answer = await put(open_front, f"{web.url}/team/x")
        assert inner.asked == []
    assert answer.status_code == 400
    assert "redirects to" in answer.json()["error"]["message"]
    assert open_front.store.list() == ()


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("../outside", 403),
        ("/etc", 403),
        ("/no/such/place", 403),  # as for one that exists
        ("file:///etc", 403),
        ("x/../../outside", 403),
        ("link", 403),
        ("loop", 403),
        ("nothing", 404),
        ("n" * 300, 404),
        ("a\0b", 400),
        ("ftp://host/a", 400),
    ],
)
async def test_a_directory_must_lie_below_an_allowed_one(
    front: Front, base_spec: BaseSpec, source: str, status: int
) -> None:
    outside = write_lora(front.root.parent / "outside", base_spec)
    (front.root / "link").symlink_to(outside)
    (front.root / "loop").symlink_to(front.root / "loop")
    payload = {"lora_name": "x", "lora_path": source}
    for answer in (await put(front, source), await front.post("/v1/load_lora_adapter", payload)):
        assert answer.status_code == status, answer.text
        assert str(front.root.parent) not in answer.text
        if status == 403:
            assert "--adapters-dir" in answer.json()["error"]["message"]
    assert front.store.list() == ()


async def test_a_file_that_links_out_of_the_allowed_directory_is_not_read(
    front: Front, base_spec: BaseSpec
) -> None:
    outside = write_lora(front.root.parent / "outside", base_spec)
    folder = write_lora(front.root / "x", base_spec)
    weights = folder / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(outside / "adapter_model.safetensors")
    answer = await put(front, "x")
    assert answer.status_code == 403
    assert str(front.root) not in answer.text
    assert front.store.list() == ()


async def test_a_key_loads_only_from_its_own_sources(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    """A key of team b that may write must not read the weights of team a from their source."""
    access = AdapterAccess(("team-b/*",), ("team-b/*",))
    keys = (replace(ApiKey.of("key-of-team-b", Scope.ADMIN), access=access),)
    front = make_front(tokenizer, base_spec, tmp_path, HttpConfig(api_keys=keys))
    for seed, name in enumerate(("team-a/secret", "team-b/own")):
        write_lora(front.root / name, base_spec, seed=seed)
    headers = {"authorization": "Bearer key-of-team-b"}
    for source in ("team-a/secret", str(front.root / "team-a" / "secret"), "team-a/missing"):
        for answer in (
            await front.client.put(
                "/v1/adapters/team-b/steal", json={"source": source}, headers=headers
            ),
            await front.client.post(
                "/v1/load_lora_adapter",
                json={"lora_name": "team-b/steal", "lora_path": source},
                headers=headers,
            ),
        ):
            assert answer.status_code == 403, answer.text
            assert answer.json()["error"]["code"] == "source_forbidden"
    answer = await front.client.put(
        "/v1/adapters/team-b/mine", json={"source": "team-b/own"}, headers=headers
    )
    assert answer.status_code == 201, answer.text
    front.store.close()


def test_a_key_with_a_list_of_adapters_has_no_sources_unless_it_says_so() -> None:
    text = """
        [[key]]
        name = "b"
        sha256 = "%s"
        scope = "admin"
        adapters = ["team-b/*"]
    """ % ("0" * 64)
    (key,) = parse_keys(text)
    assert not key.access.allows_source("team-b/x")
    (key,) = parse_keys(text + 'sources = ["team-b/*"]')
    assert key.access.allows_source("team-b/x")
    assert not key.access.allows_source("team-a/x")
