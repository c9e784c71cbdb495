"""GET /metrics: vLLM's names, one LoRA sample, a bounded number of series."""

from dataclasses import replace
from time import time

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from loraplex_adapter_store.names.card import AdapterCard
from loraplex_server.engine.requests.client import (
    STEP_TOKENS,
    EngineStats,
    LostAtStart,
    TenantStats,
)
from loraplex_server.metrics.adapter_usage import AdapterUsage
from tests.server.conftest import Front
from tests.support.servers.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


async def samples(front: Front) -> list[Sample]:
    answer = await front.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return [s for family in text_string_to_metric_families(answer.text) for s in family.samples]


def value(found: list[Sample], name: str, **labels: str) -> float:
    matching = [s for s in found if s.name == name and labels.items() <= s.labels.items()]
    assert len(matching) == 1, (name, matching)
    return float(matching[0].value)


async def test_the_names_that_gateways_and_dashboards_parse_are_there(front: Front) -> None:
    await front.chat()
    found = await samples(front)
    names = {sample.name for sample in found}
    assert names >= {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
        "vllm:request_success_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_sum",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:request_queue_time_seconds_bucket",
        "vllm:request_inference_time_seconds_bucket",
        "vllm:request_prefill_time_seconds_bucket",
        "vllm:request_decode_time_seconds_bucket",
        "vllm:request_prompt_tokens_sum",
        "vllm:request_generation_tokens_sum",
        "vllm:request_params_n_count",
        "vllm:request_params_max_tokens_count",
        "vllm:iteration_tokens_total_bucket",
        "vllm:gpu_cache_usage_perc",  # older names
        "vllm:time_per_output_token_seconds_bucket",
        "vllm:lora_requests_info",
        "vllm:num_gpu_loaded_lora_adapters",
        "vllm:num_cpu_loaded_lora_adapters",
        "vllm:max_gpu_lora_adapters",
        "vllm:lora_adapter_load_seconds_sum",
        "loraplex_adapter_pool_bytes",
        "loraplex_adapter_evictions_total",
        "http_requests_total",
        "process_resident_memory_bytes",
    }


async def test_what_a_request_did_is_counted(front: Front) -> None:
    answer = await front.chat(max_tokens=4)
    found = await samples(front)
    usage = answer.json()["usage"]
    assert value(found, "vllm:prompt_tokens_total") == usage["prompt_tokens"]
    assert value(found, "vllm:generation_tokens_total") == 4
    assert value(found, "vllm:request_success_total", finished_reason="length") == 1
    assert value(found, "vllm:time_to_first_token_seconds_count") == 1
    assert value(found, "vllm:inter_token_latency_seconds_count") == 3
    assert value(found, "vllm:request_queue_time_seconds_sum") == 0.25
    assert value(found, "vllm:time_to_first_token_seconds_bucket", le="+Inf") == 1
    route = {"handler": "/v1/chat/completions", "method": "POST", "status": "200"}
    assert value(found, "http_requests_total", **route) == 1


async def test_the_tokens_of_the_engine_s_steps_are_a_histogram(front: Front) -> None:
    counts = [0] * (len(STEP_TOKENS) + 1)
    counts[0], counts[3], counts[-1] = 5, 2, 1
    front.engine.current = EngineStats(
        n_steps=8, n_step_tokens=20_059, steps_by_tokens=tuple(counts)
    )
    found = await samples(front)
    name = "vllm:iteration_tokens_total"
    for bound, n_steps in (("1.0", 5), ("16.0", 5), ("32.0", 7), ("16384.0", 7), ("+Inf", 8)):
        assert value(found, f"{name}_bucket", le=bound) == n_steps
    assert value(found, f"{name}_count") == 8
    assert value(found, f"{name}_sum") == 20_059


async def test_a_client_that_leaves_counts_as_aborted(front: Front) -> None:
    front.engine.manual = True
    body = {"messages": [{"role": "user", "content": "x"}]}
    async with front.call("/v1/chat/completions", body) as call:
        await front.engine.arrival()
        await call.leave()
    found = await samples(front)
    assert value(found, "vllm:request_success_total", finished_reason="abort") == 1


async def test_refused_requests_are_not_counted_as_work(front: Front) -> None:
    front.engine.max_queue = 2
    assert (await front.chat(n=3)).status_code == 429
    found = await samples(front)
    assert value(found, "vllm:prompt_tokens_total") == 0
    assert value(found, "vllm:request_success_total", finished_reason="abort") == 0
    assert value(found, "loraplex_adapter_requests_total", adapter="other") == 0


async def test_mixtures_share_one_series_whatever_their_weights(lora: Front) -> None:
    for weight in (0.1, 0.2, 0.3):
        assert (await lora.chat(adapter=[{"name": "pirate", "weight": weight}])).is_success
    assert (await lora.chat(adapter="pirate")).is_success
    found = await samples(lora)
    assert value(found, "loraplex_adapter_requests_total", adapter="mixture") == 3
    assert value(found, "loraplex_adapter_requests_total", adapter="pirate") == 1
    shown = [s for s in found if s.name == "loraplex_adapter_requests_total"]
    assert len(shown) == 3


async def test_handlers_are_route_templates_whatever_the_path(front: Front) -> None:
    for path in ("/v1/models/a", "/v1/models/b/c", "/nothing/1", "/nothing/2", "/x%0a"):
        await front.client.get(path)
    handlers = {s.labels["handler"] for s in await samples(front) if "handler" in s.labels}
    assert handlers == {"/v1/models/{model_id:path}", "unmatched"}


async def test_the_lora_sample_is_one_with_the_time_as_its_value(lora: Front) -> None:
    pirate, poet = (lora.store.get(name).digest for name in ("pirate", "org/poet"))
    lora.engine.current = EngineStats(
        pool_slots_total=32,
        resident_adapters=(pirate,),
        running_adapters={pirate: 1},
        waiting_adapters={poet: 2, pirate: 1, "mixture": 1},
    )
    found = [s for s in await samples(lora) if s.name == "vllm:lora_requests_info"]
    assert len(found) == 1
    assert found[0].labels["running_lora_adapters"] == "pirate"
    assert found[0].labels["waiting_lora_adapters"] == "org/poet"
    assert found[0].labels["max_lora"] == "32"
    assert abs(found[0].value - time()) < 60


async def test_an_endpoint_picker_finds_what_its_scorers_read(lora: Front) -> None:
    """The metric protocol of llm-d and the Gateway API inference extension: gauges, one sample
    each, the geometry of the cache as labels."""
    lora.engine.current = EngineStats(
        n_waiting=2, kv_pages_used=5, kv_pages_total=20, pool_slots_total=8
    )
    text = (await lora.client.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    expected = {
        "vllm:num_requests_waiting": 2.0,
        "vllm:num_requests_running": 0.0,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:gpu_cache_usage_perc": 0.25,
        "vllm:cache_config_info": 1.0,
        "vllm:lora_requests_info": pytest.approx(time(), abs=60),
    }
    for name, number in expected.items():
        assert families[name].type == "gauge"
        assert [sample.value for sample in families[name].samples] == [number], name
    geometry = families["vllm:cache_config_info"].samples[0].labels
    assert int(geometry["block_size"]) > 0
    assert geometry["num_gpu_blocks"] == "20"
    assert geometry["cache_dtype"] == "auto"
    assert int(families["vllm:lora_requests_info"].samples[0].labels["max_lora"]) == 8


async def test_residency_tells_device_from_host(lora: Front) -> None:
    digest = lora.store.get("pirate").digest
    lora.store.pin("pirate")
    lora.store.acquire("org/poet").release()
    lora.engine.current = EngineStats(resident_adapters=(digest,))
    found = [s for s in await samples(lora) if s.name == "vllm:lora_adapter_loaded"]
    labels = {s.labels["adapter_name"]: s.labels for s in found}
    assert labels["pirate"]["level"] == "gpu"
    assert labels["pirate"]["pinned"] == "true"
    assert labels["org/poet"]["level"] == "cpu"
    assert labels["org/poet"]["rank"] == "4"


async def test_a_call_is_told_apart_by_queue_prefill_and_decode(front: Front) -> None:
    await front.chat(max_tokens=4)
    found = await samples(front)
    for phase in ("queue", "prefill", "decode", "inference"):
        assert value(found, f"vllm:request_{phase}_time_seconds_count") == 1


async def test_busy_adapters_tell_their_tier_and_all_are_counted_by_it(lora: Front) -> None:
    await lora.chat(adapter="pirate")
    digest = lora.store.get("pirate").digest
    lora.engine.current = EngineStats(
        resident_adapters=(digest,), n_adapter_loads=2, adapter_load_seconds=0.5
    )
    lora.app.state.parts.collector._listed_at = float("-inf")
    found = await samples(lora)
    assert value(found, "loraplex_adapter_tier", adapter="pirate", tier="device") == 1
    assert value(found, "loraplex_adapters_by_tier", tier="device") == 1
    by_tier = [s.value for s in found if s.name == "loraplex_adapters_by_tier"]
    assert sum(by_tier) == 2
    assert value(found, "loraplex_adapter_device_load_seconds_sum") == 0.5
    assert value(found, "loraplex_adapter_prefix_hit_tokens_total", adapter="pirate") == 0


async def test_each_tenant_is_told_and_a_thousand_share_one_series(lora: Front) -> None:
    lora.engine.current = EngineStats(
        tenants=tuple(TenantStats(f"t{number}", 1, 2, 3, 12) for number in range(1000)),
        n_fairness_preemptions=7,
    )
    found = await samples(lora)
    assert value(found, "loraplex_rows_taken_back_total") == 7
    assert value(found, "loraplex_tenant_requests", tenant="t0", state="waiting") == 2
    assert value(found, "loraplex_tenant_queue_steps_sum", tenant="t0") == 12
    shown = [s for s in found if s.name == "loraplex_tenant_requests"]
    assert len(shown) == 2 * 51
    assert sum(s.value for s in shown if s.labels["state"] == "running") == 1000


async def test_a_thousand_adapters_do_not_make_a_thousand_series(
    lora: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = lora.store.get("pirate")
    few = len(await samples(lora))
    cards = tuple(
        replace(card, name=f"a{number}", digest=f"{number:064x}") for number in range(1000)
    )

    def listed() -> tuple[AdapterCard, ...]:
        return cards

    collector = lora.app.state.parts.collector
    monkeypatch.setattr(lora.store.cards, "all", listed)
    collector._listed_at = float("-inf")
    metrics = lora.app.state.parts.metrics
    for number in range(1000):
        metrics.usage.counters(f"a{number}").n_requests += 1
    lora.engine.current = EngineStats(resident_adapters=tuple(c.digest for c in cards[:50]))
    many = await samples(lora)
    assert value(many, "loraplex_adapters_registered") == 1000
    assert len(many) < few + 128 + 13 * 21
    shown = {s.labels["adapter"] for s in many if s.name == "loraplex_adapter_requests_total"}
    assert len(shown) == 21
    assert "other" in shown


def test_busy_adapters_take_the_places_of_idle_ones_and_no_counter_runs_backwards() -> None:
    usage = AdapterUsage(2)
    seen: dict[str, int] = {}
    for phase in (["a", "b"], ["c", "c", "d", "c"], ["c", "e", "e", "e", "e"], ["a"]):
        for _ in range(20):
            for name in phase:
                usage.counters(name).n_requests += 1
        usage.review()
        for row in usage.all():
            if row.name == "other":
                assert row.n_requests >= seen.get(row.name, 0)
            seen[row.name] = row.n_requests
        assert len(list(usage.all())) == 3
    shown = {row.name for row in usage.all()}
    assert shown & {"c", "e"}
    assert "b" not in shown


async def test_the_bytes_of_a_used_adapter_are_shown_by_tier(lora: Front) -> None:
    await lora.chat(adapter="pirate")
    card = lora.store.get("pirate")
    lora.engine.current = EngineStats(resident_bytes={card.digest: 4096})
    text = (await lora.client.get("/metrics")).text
    tiers = {"disk": card.n_bytes.disk, "host": card.n_bytes.host, "device": 4096}
    for tier, n_bytes in tiers.items():
        sample = f'loraplex_adapter_bytes{{adapter="pirate",tier="{tier}"}} {float(n_bytes)}'
        assert sample in text


async def test_what_a_kernel_took_at_start_is_seen_in_health_and_metrics(front: Front) -> None:
    assert isinstance(front.engine, FakeEngine)
    assert (await front.client.get("/health")).json() == {"status": "ok"}
    lost = LostAtStart("graphs", "routed_mlp", "gate_pairs_triton: CompilationError")
    front.engine.current = replace(front.engine.current, lost_at_start=(lost,))
    health = (await front.client.get("/health")).json()
    assert health == {"status": "ok", "lost_at_start": [lost._asdict()]}
    text = (await front.client.get("/metrics")).text
    assert 'loraplex_lost_at_start{layers="routed_mlp",what="graphs"} 1.0' in text
