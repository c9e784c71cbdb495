"""Every metric of the dashboard is one that a running server exposes, under that name and label."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.learning.generated_adapters import GeneratedAdapters
from loraplex_server.engine.adapters.expert_monitor import ExpertMonitor
from loraplex_server.metrics.routing_collector import RoutingCollector
from loraplex_server.settings.config import ServerConfig
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.bases.tiny_tokenizer import tiny_tokenizer
from tests.support.servers.built_app import built_app
from tests.support.servers.fake_engine import FakeEngine

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/loraplex.json").read_text())
NAME = re.compile(r"(?:vllm:|loraplex_|http_|process_)[a-z0-9_]+")
BY = re.compile(r"by \(([a-z_, ]+)\)")


PROMETHEUS = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
SCRAPE = PROMETHEUS["scrape_configs"][0]
OF_THE_SCRAPE = {rule["target_label"] for rule in SCRAPE["relabel_configs"]}


def expressions() -> list[str]:
    return [t["expr"] for panel in DASHBOARD["panels"] for t in panel.get("targets", ())]


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, set[str]]]:
    """Sample and family name → its labels, of a front that is put together as `serve` does."""
    folder = tmp_path_factory.mktemp("dashboard")
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    spec = BaseSpec.of(tiny_model(), "tiny/llama")
    with AdapterStore(folder / "store", spec, allowed_roots=[folder]) as store:
        store.put_directory("pirate", write_lora(folder / "pirate", spec))
        generated = GeneratedAdapters(store, lambda: pytest.fail("nothing is generated here"))
        app = built_app(
            FakeEngine(tokenizer.backend_tokenizer),
            store,
            tokenizer,
            ServerConfig(),
            generated=generated,
            collectors=[
                RoutingCollector(store, ExpertMonitor(), None, generated),
            ],
        )
        services = app.state.parts
        services.metrics.usage.counters("pirate")
        services.metrics.answered("/health", "GET", 200, 0.1)
        services.collector.refresh_listing()
        text = generate_latest(services.registry).decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        found.setdefault(family.name, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_metric_of_the_dashboard_exists(exposed: dict[str, set[str]]) -> None:
    used = {name for expression in expressions() for name in NAME.findall(expression)}
    assert len(used) > 30
    assert used <= set(exposed)


def test_what_is_grouped_by_is_a_label_of_its_metric(exposed: dict[str, set[str]]) -> None:
    for expression in expressions():
        for labels in BY.findall(expression):
            names = NAME.findall(expression)
            wanted = {label.strip() for label in labels.split(",")}
            assert all(wanted <= exposed[name] | OF_THE_SCRAPE for name in names), expression


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)


def test_grafana_finds_its_data_source_and_prometheus_its_target() -> None:
    source = yaml.safe_load(
        (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text()
    )["datasources"][0]
    uids = {t["datasource"]["uid"] for p in DASHBOARD["panels"] for t in p.get("targets", ())}
    assert uids == {source["uid"]}
    assert SCRAPE["static_configs"][0]["targets"] == ["loraplex:8000"]


def test_every_expression_is_of_the_replicas_that_are_chosen() -> None:
    variable = DASHBOARD["templating"]["list"][0]
    assert variable["name"] in OF_THE_SCRAPE
    metric, label = variable["definition"].removeprefix("label_values(")[:-1].split(", ")
    assert label == variable["name"]
    assert metric == "loraplex_engine_up"
    chosen = f'{variable["name"]}=~"${variable["name"]}"'
    for expression in expressions():
        assert expression.count(chosen) == len(NAME.findall(expression)), expression
