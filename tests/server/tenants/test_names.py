"""Each tenant has its own names, contents, jobs and generated adapters."""

import asyncio

import pytest

from loraplex_adapter_store.leasing import AdapterLease
from loraplex_adapter_store.store import AdapterStore
from tests.server.tenants.conftest import House

pytestmark = pytest.mark.anyio


async def test_the_same_name_is_another_adapter_for_each_tenant(house: House) -> None:
    """Attack: take a name before its owner does, or overwrite it."""
    first = await house.upload("acme", "mine", 0)
    second = await house.upload("umbra", "mine", 1)
    assert (first.status_code, second.status_code) == (201, 201)
    for key, card in (
        ("acme", first.json()),
        ("acme-reader", first.json()),
        ("umbra", second.json()),
    ):
        shown = (await house.ask(key, "GET", "/v1/adapters/mine")).json()
        assert (shown["name"], shown["digest"], shown["revision"]) == ("mine", card["digest"], 1)
        answer = await house.ask(
            key, "POST", "/v1/completions", {"prompt": "hi", "adapter": "mine"}
        )
        assert answer.headers["x-loraplex-adapter"] == f"mine@{card['digest'][:12]}"
        assert answer.json()["adapter"]["digest"] == card["digest"]
    assert (await house.ask("umbra", "DELETE", "/v1/adapters/mine")).status_code == 200
    assert (await house.ask("acme", "GET", "/v1/adapters/mine")).status_code == 200


async def test_equal_weights_of_two_tenants_tell_nothing_of_each_other(house: House) -> None:
    """Attack: upload what somebody else may have, and look at its leases, tier and freed bytes."""
    mine = (await house.upload("acme", "twin", 0)).json()
    theirs = (await house.upload("umbra", "other-name", 0)).json()
    assert mine["digest"] != theirs["digest"]
    await house.ask("umbra", "POST", "/v1/adapters/other-name/pin")
    freed = (await house.ask("acme", "DELETE", "/v1/adapters/twin")).json()["n_bytes_freed"]
    assert freed["disk"] == mine["n_bytes"]["disk"]


async def test_no_way_of_writing_a_name_reaches_another_tenant(house: House) -> None:
    await house.upload("umbra", "secret")
    for name in ("umbra:secret", "acme:umbra:secret", "umbra:nothing"):
        for method in ("GET", "PUT", "DELETE"):
            answer = await house.ask("acme", method, f"/v1/adapters/{name}", {"source": "source-0"})
            assert answer.json()["error"]["code"] == "adapter_not_allowed", (method, name)
        for field in ("adapter", "model", "adapter_id", "lora_path"):
            answer = await house.ask(
                "acme", "POST", "/v1/completions", {"prompt": "x", field: name}
            )
            assert answer.status_code in (400, 403, 404), (field, name)
            assert answer.headers.get("x-loraplex-adapter") is None


async def test_the_operator_shares_and_sees_and_a_tenant_does_not_change_what_is_shared(
    house: House,
) -> None:
    assert (await house.upload("operator", "pirate", 2)).status_code == 201
    await house.upload("acme", "mine", 0)
    assert await house.names("operator") == ["acme:mine", "pirate"]
    assert await house.names("acme") == ["mine", "pirate"]
    assert await house.names("umbra") == ["pirate"]
    shown = (await house.ask("acme", "GET", "/v1/adapters/pirate")).json()
    assert shown["n_leases"] is shown["tier"] is None
    assert shown["n_bytes"]["host"] is shown["n_bytes"]["device"] is None
    for method, path in (
        ("DELETE", ""),
        ("POST", "/pin"),
        ("POST", "/unpin"),
        ("POST", "/rollback"),
        ("GET", "/routing"),
    ):
        answer = await house.ask("acme", method, f"/v1/adapters/pirate{path}")
        assert answer.json()["error"]["code"] == "adapter_shared", path
    assert (await house.upload("acme", "pirate")).json()["error"]["code"] == "adapter_shared"
    answer = await house.ask("operator", "DELETE", "/v1/adapters/acme:mine")
    assert answer.json()["name"] == "acme:mine"
    assert await house.names("acme") == ["pirate"]


async def test_a_mixture_takes_the_memory_of_the_tenant_who_asks_for_it(house: House) -> None:
    """Attack: fill the memory of what the operator shares with ever new weights."""
    await house.upload("operator", "pirate", 2)
    for key, tenant in (("acme", "acme"), ("operator", "")):
        mixture = [{"name": "pirate", "weight": 0.5 if tenant else 0.25}]
        body = {"prompt": "x", "adapter": mixture}
        assert (await house.ask(key, "POST", "/v1/completions", body)).status_code == 200
        lease = house.front.engine.requests[-1].adapter
        assert isinstance(lease, AdapterLease)
        assert lease.recipe.tenant == tenant


async def test_generated_adapters_are_their_tenants_and_named_by_the_server_alone(
    house: House,
) -> None:
    """Attack 7: list others' descriptions, overwrite or squat their names, use up the quota."""
    order = {"description": "Translates to French", "probe": False}
    mine = (await house.ask("acme", "POST", "/v1/adapters/generate", order)).json()
    assert mine["name"].startswith("generated/")
    assert await house.names("umbra") == []
    for path in (mine["name"], "generated/0123456789abcdef", "GENERATED/x"):
        answer = await house.upload("umbra", path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "name_reserved")
        named = await house.ask("umbra", "POST", "/v1/adapters/generate", {**order, "name": path})
        assert named.json()["error"]["code"] == "name_reserved"
        loaded = {"lora_name": path, "lora_path": "source-0"}
        answer = await house.ask("umbra", "POST", "/v1/load_lora_adapter", loaded)
        assert answer.json()["error"]["code"] == "name_reserved"
    for text in ("one", "two", "three"):  # the quota of names is two for each
        await house.ask("umbra", "POST", "/v1/adapters/generate", {**order, "description": text})
    assert len(await house.names("umbra")) == 2
    again = await house.ask("acme", "POST", "/v1/adapters/generate", order)
    assert again.json()["digest"] == mine["digest"]
    assert again.json()["revision"] == 1
    chosen = {"prompt": "hi", "adapter": {"description": "Translates to French"}}
    answer = (await house.ask("acme", "POST", "/v1/completions", chosen)).json()["adapter"]
    assert answer["digest"] == mine["digest"]


async def test_auto_offers_a_generated_adapter_to_its_tenant_only(house: House) -> None:
    order = {"description": "Translates to French", "probe": False}
    mine = (await house.ask("acme", "POST", "/v1/adapters/generate", order)).json()
    body = {"input": "Translates to French"}
    for key, names in (("acme", [mine["name"]]), ("umbra", []), ("operator", [])):
        told = (await house.ask(key, "POST", "/v1/route", body)).json()
        assert [c["name"] for c in told["candidates"]] == names


async def test_a_job_is_its_tenants(house: House) -> None:
    body = {"source": "source-1", "wait": False}
    job = (await house.ask("umbra", "PUT", "/v1/adapters/loaded", body)).json()
    for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel")):
        missing = await house.ask("acme", method, f"/v1/jobs/job-0{path}")
        theirs = await house.ask("acme", method, f"/v1/jobs/{job['id']}{path}")
        assert theirs.status_code == missing.status_code == 404
        assert theirs.text == missing.text.replace("job-0", job["id"])
    shown = (await house.ask("umbra", "GET", f"/v1/jobs/{job['id']}")).json()
    assert shown["adapter"] == "loaded"


async def test_metrics_are_closed_to_tenants(house: House) -> None:
    for key, status in (("acme", 403), ("umbra", 403), ("operator", 200), ("prometheus", 200)):
        assert (await house.ask(key, "GET", "/metrics")).status_code == status


async def test_tenants_names_are_the_same_after_a_restart(house: House) -> None:
    card = (await house.upload("acme", "mine")).json()
    await house.upload("umbra", "mine", 1)
    store, root = house.front.store, house.front.root.parent / "store"
    store.close()
    with AdapterStore(root, store.base) as reopened:
        found = {card.name: card.digest for card in reopened.list()}
    assert found["acme:mine"] == card["digest"]
    assert set(found) == {"acme:mine", "umbra:mine"}


async def test_messages_speak_of_the_tenants_own_names(house: House) -> None:
    await house.upload("acme", "pirate", 0)
    await house.upload("umbra", "pirates", 1)
    answers = [
        await house.ask("acme", "GET", "/v1/adapters/pirat"),
        await house.ask("acme", "POST", "/v1/completions", {"prompt": "x", "adapter": "pirat"}),
        await house.ask("acme", "POST", "/v1/adapters/pirate/rollback"),
        await house.ask(
            "acme", "DELETE", "/v1/adapters/pirate", headers={"if-match": f'"{"0" * 64}"'}
        ),
    ]
    for answer in answers:
        assert answer.status_code in (400, 404, 412)
        assert "pirate" in answer.text
        assert "pirates" not in answer.text
        assert "acme:" not in answer.text


async def test_two_generations_of_one_order_by_two_tenants_at_once_are_two_adapters(
    house: House,
) -> None:
    order = {"description": "Answers in verse", "probe": False}
    answers = await asyncio.gather(
        *(house.ask(key, "POST", "/v1/adapters/generate", order) for key in ("acme", "umbra") * 2)
    )
    assert [answer.status_code for answer in answers] == [201] * 4
    digests = [answer.json()["digest"] for answer in answers]
    assert digests[:2] == digests[2:]
    assert digests[0] != digests[1]
