"""A key with a list of adapters uses those, and learns of no others."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.learning.generated_adapters import GeneratedAdapters
from loraplex_server.settings.api_keys import AdapterAccess, ApiKey, Scope
from loraplex_server.settings.config import HttpConfig
from tests.server.conftest import Front, make_front, routes_of
from tests.support.adapters.choosers import Choosers
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.word_encoder import WordEncoder
from tests.support.scripted_generator import ScriptedGenerator

pytestmark = pytest.mark.anyio

ADMIN, TEAM, BASE_ONLY = "admin-secret", "team-secret", "base-only-secret"
KEYS = (
    ApiKey.of(ADMIN, Scope.ADMIN),
    replace(ApiKey.of(TEAM, Scope.ADMIN), access=AdapterAccess(("team-a/*",))),
    replace(ApiKey.of(BASE_ONLY, Scope.INFER), access=AdapterAccess(())),
)
PROFILES = {
    "team-a/sql": ("SQL", ("SQL: count the orders", "SQL: list the customers")),
    "team-a/cook": ("recipes", ("Bake bread with flour", "Boil a soup")),
    "team-b/pirate": ("pirate", ("Arr matey where is the rum", "Arr matey sing")),
}


@pytest.fixture
def shared(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    tmp_path: Path,
) -> Iterator[Front]:
    """Adapters of two teams behind one server; asked with the key of team a."""
    with contextlib.ExitStack() as closing:

        def parts(store: AdapterStore) -> dict[str, object]:
            generated = GeneratedAdapters(store, lambda: ScriptedGenerator(base_spec))
            choosers = Choosers(store, WordEncoder(), generated)
            closing.callback(generated.close)
            closing.callback(choosers.close)
            return {"generated": generated, **choosers.parts}

        keys = HttpConfig(api_keys=KEYS)
        front = make_front(tokenizer, base_spec, tmp_path, keys, with_store=parts)
        _put_profiles(front, base_spec)
        use(front, TEAM)
        yield front
    front.store.close()


def _put_profiles(front: Front, base_spec: BaseSpec) -> None:
    for seed, (name, (description, examples)) in enumerate(PROFILES.items()):
        source = write_lora(front.root / name, base_spec, seed=seed)
        front.store.put_directory(
            name, source, options=PutOptions(description=description, examples=examples)
        )


def use(front: Front, secret: str) -> None:
    front.headers = {"authorization": f"Bearer {secret}"}


async def get(front: Front, path: str) -> httpx.Response:
    return await front.client.get(path, headers=front.headers)


def assert_refused(answer: httpx.Response, name: str, existing: str, missing: str) -> None:
    """The same words for an adapter of somebody else and for one that nobody has."""
    assert answer.status_code == 403, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("adapter_not_allowed", "permission_error")
    assert error["message"].replace(name, "…") == "this API key may not use the adapter '…'"
    assert (existing if name == missing else missing) not in answer.text


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": "{}"},
        {"adapter": "{}@0123"},
        {"adapter": {"name": "{}"}},
        {"model": "{}"},
        {"model": "base:{}"},
        {"adapter_id": "{}"},
        {"adapter": [{"name": "team-a/sql", "weight": 0.5}, {"name": "{}", "weight": 0.5}]},
        {"adapter": {"arrow": ["team-a/sql", "{}"]}},
    ],
)
async def test_no_way_of_naming_reaches_an_adapter_of_others(
    shared: Front, fields: dict[str, object]
) -> None:
    for name in ("team-b/pirate", "team-b/nobody"):
        asked = _filled(fields, name)
        assert isinstance(asked, dict)
        for answer in (await shared.chat(**asked), await shared.complete(**asked)):
            assert_refused(answer, name, "team-b/pirate", "team-b/nobody")
    assert shared.engine.requests == []
    assert all(card.n_leases == 0 for card in shared.store.list())


def _filled(value: object, name: str) -> object:
    if isinstance(value, str):
        return value.format(name)
    if isinstance(value, list):
        return [_filled(item, name) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item, name) for key, item in value.items()}
    return value


async def test_the_adapters_of_the_list_and_the_base_are_served(shared: Front) -> None:
    mixture = [{"name": "team-a/sql", "weight": 0.5}, {"name": "team-a/cook", "weight": 0.5}]
    for adapter in ("team-a/sql", mixture, None):
        assert (await shared.chat(adapter=adapter)).status_code == 200
    use(shared, BASE_ONLY)
    assert (await shared.chat()).status_code == 200
    assert (await shared.chat(adapter="team-a/sql")).status_code == 403


async def test_listings_show_only_the_list(shared: Front) -> None:
    for secret, n_adapters in ((TEAM, 2), (BASE_ONLY, 0), (ADMIN, 3)):
        use(shared, secret)
        names = [card["name"] for card in (await get(shared, "/v1/adapters")).json()["data"]]
        ids = [card["id"] for card in (await get(shared, "/v1/models")).json()["data"]]
        assert len(names) == n_adapters
        assert ids == ["base", *names]


async def test_a_name_of_the_list_that_does_not_exist_is_a_404_without_others(
    shared: Front,
) -> None:
    for answer in (
        await shared.chat(adapter="team-a/pirate"),
        await shared.chat(model="team-a/pirate"),
        await shared.chat(model="a name that none can have"),
        await get(shared, "/v1/adapters/team-a/pirate"),
        await get(shared, "/v1/models/team-a/pirate"),
        await shared.client.delete("/v1/adapters/team-a/pirate", headers=shared.headers),
        await shared.post("/v1/adapters/team-a/pirate/pin", {}),
        await shared.post("/v1/adapters/team-a/pirate/warm", {}),
    ):
        assert answer.status_code == 404, answer.text
        assert "team-b" not in answer.text
    assert "team-a/sql" in (await shared.chat(adapter="team-a/pirate")).json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models/{}", None),
        ("GET", "/v1/models/base:{}", None),
        ("GET", "/v1/adapters/{}", None),
        ("GET", "/v1/adapters/{}/routing", None),
        ("PUT", "/v1/adapters/{}", {"source": "team-a/sql"}),
        ("DELETE", "/v1/adapters/{}", None),
        ("POST", "/v1/adapters/{}/pin", {}),
        ("POST", "/v1/adapters/{}/unpin", {}),
        ("POST", "/v1/adapters/{}/warm", {}),
        ("POST", "/v1/adapters/{}/unload", {}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "{}", "lora_path": "team-a/sql"}),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "{}"}),
        ("POST", "/v1/adapters/generate", {"description": "x", "name": "{}"}),
        ("POST", "/tokenize", {"messages": [{"role": "user", "content": "x"}], "adapter": "{}"}),
    ],
)
async def test_no_route_tells_of_or_changes_an_adapter_of_others(
    shared: Front, method: str, path: str, body: object
) -> None:
    before = [(card.name, card.digest, card.pinned) for card in shared.store.list()]
    for name in ("team-b/pirate", "team-b/nobody"):
        answer = await shared.client.request(
            method, path.format(name), json=_filled(body, name), headers=shared.headers
        )
        assert_refused(answer, name, "team-b/pirate", "team-b/nobody")
    assert [(card.name, card.digest, card.pinned) for card in shared.store.list()] == before


async def test_every_route_with_a_name_in_its_path_asks_for_the_right_to_it(shared: Front) -> None:
    routes = [(method, path) for method, path in routes_of(shared.app) if "{name}" in path]
    assert len(routes) >= 7
    for method, path in routes:
        url = path.replace("{name}", "team-b/pirate")
        answer = await shared.client.request(method, url, json={}, headers=shared.headers)
        assert answer.json()["error"]["code"] == "adapter_not_allowed", (method, path)


async def test_auto_chooses_among_the_list_only(shared: Front) -> None:
    pirate = [{"role": "user", "content": "Arr matey where is the rum"}]
    use(shared, ADMIN)
    free = (await shared.chat(adapter="auto", messages=pirate)).json()
    assert free["adapter"]["name"] == "team-b/pirate"
    use(shared, TEAM)
    answer = await shared.chat(adapter="auto", messages=pirate)
    assert answer.status_code == 200
    assert "team-b" not in answer.text
    sql = [{"role": "user", "content": "SQL: count the customers"}]
    assert (await shared.chat(model="auto", messages=sql)).json()["adapter"]["name"] == "team-a/sql"
    told = await shared.post("/v1/route", {"messages": pirate})
    assert {c["name"] for c in told.json()["candidates"]} == {"team-a/sql", "team-a/cook"}


async def test_generated_adapters_need_their_place_in_the_list(shared: Front) -> None:
    wish = {"description": "to French"}
    for answer in (
        await shared.chat(adapter=wish),
        await shared.post("/v1/adapters/generate", wish),
    ):
        assert answer.json()["error"]["code"] == "adapter_not_allowed"
    named = {**wish, "name": "team-a/french", "probe": False}
    assert (await shared.post("/v1/adapters/generate", named)).status_code == 201
    use(shared, ADMIN)
    assert (await shared.chat(adapter=wish)).status_code == 200


async def test_jobs_and_metrics_of_others_are_closed(shared: Front) -> None:
    use(shared, ADMIN)
    body = {"source": "team-b/pirate", "wait": False}
    job = (
        await shared.client.put("/v1/adapters/team-b/new", json=body, headers=shared.headers)
    ).json()
    assert (await get(shared, f"/v1/jobs/{job['id']}")).status_code == 200
    assert (await get(shared, "/metrics")).status_code == 200
    use(shared, TEAM)
    assert (await get(shared, f"/v1/jobs/{job['id']}")).status_code == 404
    assert (await get(shared, "/metrics")).json()["error"]["code"] == "metrics_not_allowed"
