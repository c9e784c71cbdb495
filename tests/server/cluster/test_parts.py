"""The parts of a cluster that need no Ray: its file, its arithmetic, its streams."""

import asyncio
from pathlib import Path

import httpx
import pytest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from loraplex_server.cluster.config import read_config
from loraplex_server.cluster.gateway.cluster_fleet import ProcessMetrics, one_page
from loraplex_server.cluster.gateway.gateway import without_request_id
from loraplex_server.cluster.gateway.remote_engine import summed
from loraplex_server.cluster.ray.serving import refused_change
from loraplex_server.cluster.replica.autoscaling import wanted_replicas
from loraplex_server.cluster.replica.remote_request import EventBuffer
from loraplex_server.engine.requests.client import EngineStats, TenantStats
from loraplex_server.engine.requests.events import FinishReason, TokenEvent
from loraplex_server.settings.config import ConfigError


def written(folder: Path, text: str) -> Path:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return file


def test_the_file_sets_the_servers_options_and_the_sizes(tmp_path: Path) -> None:
    config = read_config(
        written(
            tmp_path,
            f"server: {{port: 8123, state-dir: {tmp_path}, max-model-len: 512}}\n"
            "engines: {replicas: 3, cpus: 2}\nray: {object_store_memory: 50MiB}\n",
        )
    )
    assert (config.server.http.port, config.server.engine.max_model_len) == (8123, 512)
    assert (config.engines.replicas, config.engines.cpus, config.gateways.replicas) == (3, 2.0, 2)
    assert config.ray.object_store_bytes == 50 << 20
    assert config.server.store.catalogue == (tmp_path / "catalogue").as_uri()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("servers: {}", "servers"),
        ("server: {max-modellen: 5}", "max_modellen"),
        ("engines: {replicas: 0}", r"engines\.replicas"),
        ("engines: {min_replicas: 4}", "min_replicas"),
        ("engines: {max_replicas: 1}", "max_replicas"),
        ("server: {port: 0}", "port"),
        ("server: {host: 0.0.0.0}", "without authentication"),
        ("- a list", "mapping"),
    ],
)
def test_a_bad_file_stops_the_start_and_names_the_key(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_config(written(tmp_path, text))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            "server: {state-dir: DIR, model: other}",
            "server.model was the default base",
        ),
        ("server: {state-dir: DIR, port: 8123}", "server.port has changed"),
        ("server: {state-dir: DIR}\nname: other", "name has changed"),
        ("server: {state-dir: DIR}\nray: {address: auto}", "ray has changed"),
        ("server: {state-dir: DIR, max-queue: 7}\nengines: {replicas: 3}", None),
    ],
)
def test_an_upgrade_changes_neither_the_base_nor_what_is_set_at_the_start(
    tmp_path: Path, changed: str, told: str | None
) -> None:
    old = read_config(written(tmp_path, f"server: {{state-dir: {tmp_path}}}"))
    new = read_config(written(tmp_path, changed.replace("DIR", str(tmp_path))))
    why = refused_change(old, new)
    if told is None:
        assert why is None
    else:
        assert why is not None
        assert why.startswith(told)
        assert "cluster down" in why


@pytest.mark.parametrize(
    ("n_requests", "in_use", "slots", "wanted"),
    [
        (0.0, [], [], 0),
        (1.0, [1.0], [64.0], 1),
        (33.0, [1.0, 1.0], [64.0, 64.0], 2),
        (10.0, [60.0, 60.0], [64.0, 64.0], 2),  # few requests, more adapters than one can hold
        (10.0, [64.0, 64.0], [64.0, 64.0], 2),
        (10.0, [90.0, 80.0], [64.0, 64.0], 3),
    ],
)
def test_replicas_are_wanted_for_requests_and_for_adapters(
    n_requests: float, in_use: list[float], slots: list[float], wanted: int
) -> None:
    assert wanted_replicas(n_requests, 32.0, in_use, slots) == wanted


def test_the_sum_of_engines_has_each_adapter_once_and_tenants_together() -> None:
    one = EngineStats(
        n_running=2,
        tenants=(TenantStats("a", 1, 2, 3, 4),),
        pool_slots_used=2,
        running_adapters={"x": 2},
        resident_adapters=("x", "y"),
        resident_bytes={"x": 5, "y": 7},
        step_age_s=1.0,
    )
    other = EngineStats(
        n_running=1,
        tenants=(TenantStats("b", 1, 0, 1, 0), TenantStats("a", 0, 1, 1, 1)),
        pool_slots_used=4,
        running_adapters={"x": 1},
        resident_adapters=("y", "z"),
        resident_bytes={"y": 7, "z": 9},
        step_age_s=3.0,
    )
    both = summed([one, other])
    assert (both.n_running, both.pool_slots_used) == (3, 6)
    assert both.running_adapters == {"x": 3}
    assert both.resident_adapters == ("x", "y", "z")
    assert both.resident_bytes == {"x": 5, "y": 14, "z": 9}
    assert set(both.tenants) == {TenantStats("a", 1, 3, 4, 5), TenantStats("b", 1, 0, 1, 0)}
    assert both.step_age_s == 3.0
    assert summed([]) == EngineStats()


def test_a_page_of_several_processes_has_each_family_once() -> None:
    def gauge(value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily("loraplex_kv_pages", "Pages.", labels=("state",))
        family.add_metric(("used",), value)
        return family

    counted = CounterMetricFamily("loraplex_adapter_requests", "Calls.", labels=("adapter",))
    counted.add_metric(("a1",), 7.0)
    page = one_page(
        [ProcessMetrics("e1", [gauge(1)]), ProcessMetrics("e2", [gauge(2)]),
         ProcessMetrics("g1", [counted])]
    ).decode()  # fmt: skip
    families = {family.name: family.samples for family in text_string_to_metric_families(page)}
    assert page.count("# TYPE loraplex_kv_pages ") == 1
    assert {s.labels["replica"]: s.value for s in families["loraplex_kv_pages"]} == {
        "e1": 1.0,
        "e2": 2.0,
    }
    assert families["loraplex_adapter_requests"][0].labels == {"adapter": "a1", "replica": "g1"}


@pytest.mark.anyio
async def test_an_answer_has_one_request_id_where_ray_adds_its_own() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("x", headers={"X-Request-ID": "a", "x-else": "b"})(
            scope, receive, send
        )

    transport = httpx.ASGITransport(without_request_id(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        answer = await client.get("/")
    assert (answer.text, answer.headers["x-else"]) == ("x", "b")
    assert "x-request-id" not in answer.headers


@pytest.mark.anyio
async def test_the_first_event_comes_at_once_and_later_ones_together() -> None:
    buffer = EventBuffer()
    lists = buffer.lists(gap_s=3600.0)
    buffer.put(TokenEvent("r", (1,)))
    assert [event.token_ids for event in await anext(lists)] == [(1,)]
    later = asyncio.ensure_future(anext(lists))
    for number in range(2, 5):
        buffer.put(TokenEvent("r", (number,)))
        await asyncio.sleep(0)
    assert not later.done()  # the gap has not passed, and nothing has ended
    buffer.put(TokenEvent("r", (), finish=FinishReason.STOP))
    assert [event.token_ids for event in await later] == [(2,), (3,), (4,), ()]
    with pytest.raises(StopAsyncIteration):
        await anext(lists)
