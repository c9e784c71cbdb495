"""GET /v1/requests and GET /v1/live: what runs, what ran, and who may see it."""

import json
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.engine.errors import EngineDead
from loraplex_server.engine.requests.client import EngineStats
from loraplex_server.metrics.adapter_usage import AdapterActivity
from loraplex_server.settings.api_keys import AdapterAccess, ApiKey, Scope
from loraplex_server.settings.config import HttpConfig
from tests.server.conftest import Front, make_front
from tests.support.adapters.lora_files import write_lora
from tests.support.servers.asgi_call import AsgiCall

pytestmark = pytest.mark.anyio
SECRETS = {"a": "secret-of-a", "b": "secret-of-b", "operator": "secret-of-operator"}


def key(tenant: str) -> ApiKey:
    scope = Scope.ADMIN if tenant == "operator" else Scope.INFER
    made = ApiKey.of(SECRETS[tenant], scope)
    access = AdapterAccess() if tenant == "operator" else AdapterAccess(tenant=tenant)
    return ApiKey(made.sha256, made.scopes, tenant, tenant, access)


@pytest.fixture
def shared(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[Front]:
    http = HttpConfig(host="0.0.0.0", api_keys=tuple(map(key, SECRETS)))
    front = make_front(tokenizer, base_spec, tmp_path, http)
    yield front
    front.close()


@pytest.fixture
def telling(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[Front]:
    front = make_front(tokenizer, base_spec, tmp_path, HttpConfig(show_prompts=True))
    yield front
    front.close()


def of(tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {SECRETS[tenant]}"}


async def requests(front: Front, **headers: str) -> Any:
    answer = await front.client.get("/v1/requests", headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_call_that_ended_is_told_without_its_prompt(lora: Front) -> None:
    answer = await lora.chat(adapter="pirate", max_tokens=4)
    (call,) = (await requests(lora))["data"]
    assert call["id"] == answer.headers["x-request-id"]
    assert call["adapter"] == answer.headers["x-loraplex-adapter"]
    assert (call["state"], call["status"], call["error"]) == ("ended", 200, None)
    assert call["chosen_by"] == "name"
    usage = answer.json()["usage"]
    assert call["prompt_tokens"] == usage["prompt_tokens"]
    assert call["output_tokens"] == usage["completion_tokens"] == 4
    assert call["queue_s"] == 0.25  # as the scripted engine says
    assert 0 < call["first_token_s"] <= call["seconds"]
    assert call["prompt"] is None


async def test_how_the_adapter_was_chosen_is_told(lora: Front) -> None:
    await lora.chat()
    await lora.chat(adapter=[{"name": "pirate", "weight": 0.5}])
    await lora.client.post("/v1/embeddings", json={"input": "hi", "adapter": "pirate"})
    chosen = [(call["path"], call["chosen_by"]) for call in (await requests(lora))["data"]]
    assert chosen == [  # the newest first
        ("/v1/embeddings", "name"),
        ("/v1/chat/completions", "mixture"),
        ("/v1/chat/completions", "base"),
    ]


async def test_a_refused_call_is_told_with_the_code_of_its_error(lora: Front) -> None:
    refused = await lora.chat(adapter="nobody")
    (call,) = (await requests(lora))["data"]
    assert (call["state"], call["status"]) == ("failed", 404)
    assert call["error"] == refused.json()["error"]["code"]
    assert call["adapter"] is None


async def test_an_error_within_a_stream_is_told(front: Front) -> None:
    front.engine.manual = True
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    async with front.call("/v1/chat/completions", body) as call:
        await front.engine.arrival()
        front.engine.step()
        await call.next_body()
        front.engine.fail(EngineDead("out of luck"))
        await call.rest()
    (told,) = (await requests(front))["data"]
    assert (told["status"], told["state"], told["error"]) == (200, "failed", "engine_dead")


async def test_prompts_are_shown_where_the_operator_says_so(telling: Front) -> None:
    await telling.complete(prompt="tell me " + "x" * 40)
    (call,) = (await requests(telling))["data"]
    assert call["prompt"] == "tell me " + "x" * 40


async def test_the_last_200_calls_are_kept(front: Front) -> None:
    for _ in range(203):
        await front.chat(model="nobody")
    assert len((await requests(front))["data"]) == 200


async def test_a_running_call_is_a_row_of_live(lora: Front) -> None:
    lora.engine.manual = True
    body = {"messages": [{"role": "user", "content": "x"}], "adapter": "pirate"}
    async with lora.call("/v1/chat/completions", body) as call:
        await lora.engine.arrival()
        (row,) = (await lora.client.get("/v1/live")).json()["rows"]
        assert row["state"] == "waiting"
        assert row["adapter"].startswith("pirate@")
        lora.engine.step()
        (running,) = (await requests(lora))["running"]
        assert (running["state"], running["output_tokens"]) == ("answering", 1)
        await call.leave()
    assert (await requests(lora))["running"] == []
    (ended,) = (await requests(lora))["data"]
    assert ended["error"] == "client_left"


async def test_live_tells_of_memory_rates_and_moves(lora: Front) -> None:
    live = lora.app.state.parts.live_view
    await lora.chat(max_tokens=4)
    first = (await lora.client.get("/v1/live")).json()
    assert first["first_token_s"]["n"] == 1
    assert first["gap_s"]["n"] == 3
    digest = lora.store.get("pirate").digest
    lora.engine.current = EngineStats(
        kv_pages_used=3, kv_pages_total=9, resident_adapters=(digest,), pool_slots_total=4
    )
    live._read_at = float("-inf")  # the pause between two readings is over
    second = (await lora.client.get("/v1/live")).json()
    assert second["engine"]["kv_pages"] == {"used": 3, "total": 9}
    assert second["adapters"]["device"] == ["pirate"]
    assert [(move["kind"], move["adapter"]) for move in second["moves"]] == [("loaded", "pirate")]
    lora.engine.current = EngineStats()
    live._read_at = float("-inf")
    third = (await lora.client.get("/v1/live")).json()
    assert [move["kind"] for move in third["moves"]] == ["loaded", "evicted"]


async def test_the_list_of_adapters_tells_what_each_has_done(lora: Front) -> None:
    digest = lora.store.get("pirate").digest
    lora.store.state.tier.drop(digest)  # the next call has to load it
    for _ in range(2):
        await lora.chat(adapter="pirate", max_tokens=4)
    lora.engine.current = EngineStats(
        resident_adapters=(digest,), resident_load_s={digest: 0.25, "of another": 1.0}
    )
    cards = (await lora.client.get("/v1/adapters")).json()["data"]
    poet, pirate = sorted(cards, key=lambda card: card["usage"]["requests"])
    assert pirate["name"] == "pirate"
    assert pirate["usage"] == {"requests": 2, "output_tokens": 8, "tokens_per_s": 0.8}
    assert pirate["tier"] == "device"
    assert pirate["last_load_ms"]["device"] == 250.0
    assert 0 < pirate["last_load_ms"]["host"] < 60_000
    assert poet["usage"] == {"requests": 0, "output_tokens": 0, "tokens_per_s": 0.0}
    assert poet["last_load_ms"] == {"host": None, "device": None}


async def test_the_use_of_a_shared_adapter_is_for_its_owner_alone(
    shared: Front, base_spec: BaseSpec
) -> None:
    shared.store.put_directory("pirate", write_lora(shared.root / "pirate", base_spec, seed=0))
    body = {"messages": [{"role": "user", "content": "x"}], "adapter": "pirate", "max_tokens": 2}
    await shared.client.post("/v1/chat/completions", json=body, headers=of("a"))
    told = {}
    for who in ("b", "operator"):
        (card,) = (await shared.client.get("/v1/adapters", headers=of(who))).json()["data"]
        told[who] = (card["usage"], card["last_load_ms"])
    assert told["b"] == (None, None)
    assert told["operator"][0]["requests"] == 1


def test_tokens_a_second_are_of_the_last_ten_seconds() -> None:
    activity = AdapterActivity()
    now = perf_counter()
    activity.add_tokens(50, now - 30)
    activity.add_tokens(10, now - 5)
    activity.add_tokens(10, now)
    told = activity.to_json()
    assert told["output_tokens"] == 70
    assert told["tokens_per_s"] == 2.0


async def test_live_is_followed_until_the_client_leaves(front: Front) -> None:
    async with AsgiCall(front.app, "GET", "/v1/live/events") as call:
        for _ in range(2):
            event = await call.next_body()
            assert json.loads(event.removeprefix(b"data: "))["object"] == "live"
        await call.leave()


async def test_a_tenant_sees_its_own_calls_and_nobody_s_live(shared: Front) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    for tenant in ("a", "b"):
        answer = await shared.client.post("/v1/chat/completions", json=body, headers=of(tenant))
        assert answer.status_code == 200, answer.text
    for tenant in ("a", "b"):
        (call,) = (await requests(shared, **of(tenant)))["data"]
        assert call["tenant"] == tenant
        for path in ("/v1/live", "/v1/live/events", "/v1/cluster"):
            refused = await shared.client.get(path, headers=of(tenant))
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                403,
                "live_not_allowed",
            )
    assert len((await requests(shared, **of("operator")))["data"]) == 2
    assert (await shared.client.get("/v1/live", headers=of("operator"))).status_code == 200
    alone = await shared.client.get("/v1/cluster", headers=of("operator"))
    assert alone.json() == {"object": "cluster", "cluster": None}
