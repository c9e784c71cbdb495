"""/v1/route, the routing report of an adapter, and routing in /metrics."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.resolving.sentence_encoder import SharedEncoder
from loraplex_server.engine.adapters.expert_monitor import ExpertMonitor
from loraplex_server.metrics.routing_collector import RoutingCollector
from tests.server.conftest import Front, make_front
from tests.support.adapters.choosers import Choosers
from tests.support.adapters.lora_files import write_lora
from tests.support.servers.asgi_call import events_of

pytestmark = pytest.mark.anyio

PROFILES = {
    "sql": ("Writes SQL queries for a question", ["Show all customers", "Count orders per month"]),
    "pirate": ("Answers like a pirate", ["Tell me about your ship, matey", "Arr, where is rum?"]),
}


@dataclass
class PlacedLoad:
    """What the monitor reads of an adapter on the device."""

    digest: str
    experts: dict[str, Any]


@dataclass
class Experts:
    load: torch.Tensor


@pytest.fixture
def monitor() -> ExpertMonitor:
    return ExpertMonitor()


@pytest.fixture
def routed(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    tmp_path: Path,
    pulled_encoder: Path,
    monitor: ExpertMonitor,
) -> Iterator[Front]:
    opened: list[Choosers] = []

    def parts(store: AdapterStore) -> dict[str, object]:
        choosers = Choosers(store, SharedEncoder(lambda: pulled_encoder))
        opened.append(choosers)
        return {
            **choosers.parts,
            "collectors": [RoutingCollector(store, monitor, choosers.router)],
        }

    front = make_front(tokenizer, base_spec, tmp_path, experts=monitor, with_store=parts)
    for seed, (name, (description, examples)) in enumerate(PROFILES.items()):
        source = write_lora(front.root / name, base_spec, seed=seed)
        front.store.put_directory(
            name, source, options=PutOptions(description=description, examples=examples)
        )
    yield front
    opened[0].close()
    front.store.close()


def count(front: Front, monitor: ExpertMonitor, name: str, load: list[int]) -> str:
    digest = front.store.get(name).digest
    placed = PlacedLoad(digest, {"model.layers.0.mlp": Experts(torch.tensor(load))})
    monitor.look([placed], idle=True)  # type: ignore[list-item]
    return digest


async def test_route_explains_a_text_without_generating(routed: Front) -> None:
    answer = await routed.post("/v1/route", {"input": "Arr matey, where is the rum?"})
    body = answer.json()
    assert answer.status_code == 200
    assert body["object"] == "route"
    assert body["adapter"] == "pirate"
    assert body["candidates"][0]["name"] == "pirate"
    assert body["candidates"][0]["score"] > body["candidates"][1]["score"]
    assert body["margin"] > body["threshold"]
    assert routed.engine.requests == []


async def test_route_reads_the_system_message_and_the_last_user_turn(routed: Front) -> None:
    messages = [
        {"role": "system", "content": "Answer like a pirate."},
        {"role": "user", "content": "Count the orders of each month"},
        {"role": "assistant", "content": "Aye."},
        {"role": "user", "content": "Where is your ship?"},
    ]
    body = (await routed.post("/v1/route", {"messages": messages})).json()
    assert body["adapter"] == "pirate"


async def test_route_tells_what_a_request_with_tools_gets(
    routed: Front, base_spec: BaseSpec
) -> None:
    source = write_lora(routed.root / "caller", base_spec, seed=5)
    options = PutOptions(description="Calls tools", defaults={"auto": "with_tools"})
    routed.store.put_directory("caller", source, options=options)
    asked = {"input": "Arr matey, where is the rum?"}
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    assert (await routed.post("/v1/route", asked)).json()["adapter"] == "pirate"
    assert (await routed.post("/v1/route", {**asked, "tools": tools})).json()["adapter"] == "caller"


@pytest.mark.parametrize(
    "body", [{}, {"input": "a", "messages": [{"role": "user", "content": "b"}]}, {"messages": []}]
)
async def test_route_wants_exactly_one_text(routed: Front, body: dict[str, object]) -> None:
    assert (await routed.post("/v1/route", body)).status_code == 400


async def test_route_without_a_router_says_so(front: Front) -> None:
    answer = await front.post("/v1/route", {"input": "hello"})
    assert answer.json()["error"]["code"] == "feature_not_enabled"


async def test_answers_carry_the_routing_whole_and_streamed(routed: Front) -> None:
    messages = [{"role": "user", "content": "Arr matey, tell me about rum and your ship"}]
    body = (await routed.chat(adapter="auto", messages=messages)).json()
    routing = body["loraplex"]["routing"]
    assert routing["adapter"] == "pirate"
    assert {c["name"] for c in routing["candidates"]} == {"sql", "pirate"}
    streamed = await routed.chat(adapter="auto", messages=messages, stream=True)
    first = events_of(streamed.content)[0]
    assert first["loraplex"]["routing"]["adapter"] == "pirate"
    completion = (await routed.complete(adapter="auto", prompt="Arr, where is rum?")).json()
    assert completion["loraplex"]["routing"]["adapter"] == "pirate"


async def test_answers_without_auto_carry_no_routing(routed: Front) -> None:
    assert "loraplex" not in (await routed.chat()).json()
    assert "loraplex" not in (await routed.chat(adapter="sql")).json()


async def test_an_adapter_registered_later_is_found_once_the_listing_is_old(
    routed: Front, base_spec: BaseSpec
) -> None:
    source = write_lora(routed.root / "cook", base_spec, seed=9)
    examples = ["How do I bake bread?", "A soup with lentils, please"]
    routed.store.put_directory(
        "cook", source, options=PutOptions(description="Gives recipes", examples=examples)
    )
    router = routed.app.state.parts.semantic
    router._listed_at = float("-inf")
    body = (await routed.post("/v1/route", {"input": "How do I bake bread with lentils?"})).json()
    assert body["candidates"][0]["name"] == "cook"


async def test_the_routing_report_counts_rows_per_place_and_expert(
    routed: Front, monitor: ExpertMonitor
) -> None:
    digest = count(routed, monitor, "sql", [6, 2, 0, 0])
    answer = await routed.client.get("/v1/adapters/sql/routing")
    body = answer.json()
    assert body["digest"] == digest
    assert body["n_picks"] == 8
    assert body["places"][0]["place"] == "model.layers.0.mlp"
    assert body["places"][0]["counts"] == [6, 2, 0, 0]
    assert body["imbalance"] == 3.0


async def test_an_adapter_that_never_routed_reports_nothing(routed: Front) -> None:
    body = (await routed.client.get("/v1/adapters/pirate/routing")).json()
    assert (body["n_picks"], body["places"]) == (0, [])


async def test_the_report_of_an_unknown_adapter_is_404_and_of_a_bad_window_400(
    routed: Front,
) -> None:
    assert (await routed.client.get("/v1/adapters/nobody/routing")).status_code == 404
    answer = await routed.client.get("/v1/adapters/sql/routing?window_s=0")
    assert answer.status_code == 400


async def test_metrics_tell_load_entropy_and_imbalance_by_adapter(
    routed: Front, monitor: ExpertMonitor
) -> None:
    count(routed, monitor, "sql", [3, 1])
    await routed.post("/v1/route", {"input": "Arr matey, where is the rum?"})
    text = (await routed.client.get("/metrics")).text
    assert 'loraplex_expert_load{adapter="sql",expert="0"} 0.75' in text
    assert 'loraplex_expert_imbalance{adapter="sql"} 1.5' in text
    assert 'loraplex_expert_entropy{adapter="sql"} 0.81' in text
    assert 'loraplex_auto_decisions_total{to="adapter"} 1.0' in text


async def test_metrics_stay_bounded_with_many_adapters_and_experts(
    routed: Front, monitor: ExpertMonitor
) -> None:
    for index in range(40):
        placed = PlacedLoad(f"{index:064x}", {"mlp": Experts(torch.ones(64, dtype=torch.int64))})
        monitor.look([placed], idle=True)  # type: ignore[list-item]
    count(routed, monitor, "sql", [1] * 500)
    text = (await routed.client.get("/metrics")).text
    assert text.count("loraplex_expert_load{") == 256
