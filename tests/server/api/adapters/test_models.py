"""GET /v1/models: what pickers, benches and routers read."""

import re

import pytest

from tests.server.conftest import Front

pytestmark = pytest.mark.anyio


async def test_the_base_comes_first_and_adapters_name_it_as_parent(lora: Front) -> None:
    body = (await lora.client.get("/v1/models")).json()
    assert body["object"] == "list"
    base, *adapters = body["data"]
    assert base["id"] == "base"
    assert base["root"] == "tiny/llama"
    assert base["parent"] is None
    assert [card["id"] for card in adapters] == ["org/poet", "pirate"]
    assert {card["parent"] for card in adapters} == {"base"}
    for card in body["data"]:
        assert card["object"] == "model"
        assert isinstance(card["created"], int)
        assert card["owned_by"]
        assert card["max_model_len"] == 256


async def test_the_root_of_an_adapter_gives_no_path_away(lora: Front) -> None:
    text = (await lora.client.get("/v1/models")).text + (await lora.client.get("/v1/adapters")).text
    text += (await lora.client.get("/v1/adapters/pirate")).text
    assert str(lora.root) not in text
    assert lora.store.get("pirate").digest in text


@pytest.mark.parametrize("name", ["base", "pirate", "org/poet", "base:pirate"])
async def test_one_model_is_shown_by_id_with_slashes_and_colons(lora: Front, name: str) -> None:
    answer = await lora.client.get(f"/v1/models/{name}")
    assert answer.status_code == 200
    assert answer.json()["id"] == name


async def test_an_unknown_model_is_a_404(lora: Front) -> None:
    answer = await lora.client.get("/v1/models/nobody")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "pirate" in answer.json()["error"]["message"]


async def test_only_loaded_adapters_are_listed_on_request(lora: Front) -> None:
    lora.store.acquire("pirate").release()
    loaded = {card.name for card in lora.store.list() if card.n_bytes.host}
    body = (await lora.client.get("/v1/models?loaded=true")).json()
    assert {card["id"] for card in body["data"]} == {"base", *loaded}
    answer = await lora.client.get("/v1/models?loaded=perhaps")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "loaded"


async def test_probes_and_version_answer(front: Front) -> None:
    for path in ("/health", "/ready", "/ping"):
        assert (await front.client.get(path)).status_code == 200
        assert (await front.client.head(path)).status_code == 200
    assert (await front.client.get("/version")).json()["version"]
    assert (await front.client.get("/openapi.json")).status_code == 200


async def test_the_docs_page_is_made_of_this_server_alone(front: Front) -> None:
    page = await front.client.get("/docs")
    assert page.status_code == 200
    sources = re.findall(r"(?:src|href)=\"([^\"]+)\"", page.text)
    assert sources
    assert all(source.startswith("/") for source in sources)
    for source in sources:
        assert (await front.client.get(source)).status_code == 200


async def test_every_route_of_the_docs_page_is_in_one_group(front: Front) -> None:
    schema = front.app.openapi()
    groups = {tag["name"] for tag in schema["tags"]}
    used = [route.get("tags", []) for path in schema["paths"].values() for route in path.values()]
    assert all(len(tags) == 1 for tags in used)
    assert {tag for tags in used for tag in tags} == groups


async def test_every_route_documents_its_answer_and_its_errors(front: Front) -> None:
    paths = front.app.openapi()["paths"]
    for path, methods in paths.items():
        for method, route in methods.items():
            answers = route["responses"]
            assert any(status.startswith("2") for status in answers), (method, path)
            if path.startswith("/v1/"):
                assert {"400", "401", "403"} <= answers.keys(), (method, path)
