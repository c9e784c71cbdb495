"""Tenants on two servers of one catalogue; and what they are told when it cannot be reached."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.catalogue.catalogue import Catalogue
from tests.server.tenants.conftest import House, open_house
from tests.support.servers.object_stores import Switch

pytestmark = pytest.mark.anyio


class Servers(NamedTuple):
    a: House
    b: House
    switch: Switch


@pytest.fixture
def servers(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Servers]:
    switch = Switch(tmp_path / "catalogue", monkeypatch)
    quotas = {"acme": "max_adapters = 2", "acme-reader": "max_adapters = 2"}
    with ExitStack() as closing:
        a, b = (
            closing.enter_context(
                open_house(
                    tokenizer,
                    base_spec,
                    tmp_path / name,
                    quotas,
                    catalogue=Catalogue(switch.bucket),
                )
            )
            for name in "ab"
        )
        yield Servers(a, b, switch)


async def served(house: House, key: str, adapter: str) -> str:
    body = {"model": "base", "prompt": "hi", "max_tokens": 1, "adapter": adapter}
    answer = await house.ask(key, "POST", "/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return str(answer.headers["x-loraplex-adapter"]).partition("@")[2]


async def test_an_own_name_given_to_one_server_hides_the_operators_on_the_other(
    servers: Servers,
) -> None:
    a, b, _ = servers
    own = (await a.upload("acme", "style", 1)).json()["digest"]
    assert await served(b, "acme-reader", "style") == own[:12]
    shared = (await a.upload("operator", "style", 0)).json()["digest"]
    for key, digest in (("acme", own), ("acme-reader", own), ("umbra", shared)):
        assert await served(b, key, "style") == digest[:12]
        card = await b.ask(key, "GET", "/v1/adapters/style")
        assert card.json()["digest"] == digest
    assert (await b.ask("acme", "DELETE", "/v1/adapters/style")).status_code == 200
    assert await served(a, "acme", "style") == shared[:12]
    assert (await a.ask("umbra", "DELETE", "/v1/adapters/style")).status_code == 403


async def test_listings_and_quotas_are_those_of_the_catalogue(servers: Servers) -> None:
    a, b, _ = servers
    assert (await a.upload("acme", "one", 0)).status_code == 201
    assert (await b.upload("acme", "two", 1)).status_code == 201
    assert (await a.upload("umbra", "other", 2)).status_code == 201
    for house in (a, b):
        assert sorted(await house.names("acme")) == ["one", "two"]
        assert await house.names("umbra") == ["other"]
        refused = await house.upload("acme", "three", 2)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "quota_exceeded")
    missing = {"if-none-match": "*"}
    assert (await b.upload("acme", "one", 2, headers=missing)).status_code == 412


async def test_an_outage_refuses_changes_and_serves_what_is_known(servers: Servers) -> None:
    a, _, switch = servers
    digest = (await a.upload("acme", "one", 0)).json()["digest"]
    assert await served(a, "acme", "one") == digest[:12]
    switch.turn(on=False)
    refusals = [
        await a.upload("acme", "one", 1),
        await a.ask("acme", "DELETE", "/v1/adapters/one"),
        await a.ask("acme", "POST", "/v1/adapters/one/pin"),
        await a.ask("acme", "PATCH", "/v1/adapters/one", {"description": "x"}),
        await a.ask("acme", "GET", "/v1/models/never-asked-for"),
        await a.ask(
            "acme", "POST", "/v1/completions", {"model": "never-asked-for", "prompt": "hi"}
        ),
    ]
    for refused in refusals:
        assert refused.status_code == 503, refused.text
        assert refused.json()["error"]["code"] == "catalogue_unavailable"
        assert int(refused.headers["retry-after"]) >= 1
    for _ in range(2):
        assert await served(a, "acme", "one") == digest[:12]
        assert await served(a, "acme", f"one@{digest[:12]}") == digest[:12]
    health = (await a.ask("operator", "GET", "/health")).json()
    assert [part["part"] for part in health["degraded"]] == ["catalogue"]
    base = {"model": "base", "prompt": "hi", "max_tokens": 1}
    assert (await a.ask("acme", "POST", "/v1/completions", base)).status_code == 200
    switch.turn(on=True)
    assert (await a.upload("acme", "one", 1)).status_code == 200
