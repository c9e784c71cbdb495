"""The dashboard holds nothing that Grafana's own schema does not know."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grafana_foundation_sdk", reason='needs pip install "loraplex[dev]"')
from grafana_foundation_sdk.cog import encoder, plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

DASHBOARDS = Path(__file__).resolve().parents[2] / "deploy/grafana/dashboards"
# The editor's copy of a variable's query, which the schema lacks.
NOT_IN_THE_SCHEMA = {"/templating/list/0/definition"}


@pytest.fixture(scope="module")
def dashboard() -> Any:
    plugins.register_default_plugins()  # the options of panels, and Prometheus' queries
    return json.loads((DASHBOARDS / "loraplex.json").read_text())


def unknown(dashboard: Any) -> set[str]:
    """Return the paths whose values do not survive Grafana's types."""
    read = Dashboard.from_json(copy.deepcopy(dashboard))
    return set(_changed(dashboard, json.loads(encoder.JSONEncoder().encode(read)), ""))


def _changed(written: Any, read: Any, path: str) -> Iterator[str]:
    if isinstance(written, dict) and isinstance(read, dict):
        for key, value in written.items():
            yield from _changed(value, read.get(key), f"{path}/{key}")
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        for number, (one, other) in enumerate(zip(written, read, strict=True)):
            yield from _changed(one, other, f"{path}/{number}")
    elif written != read:
        yield path


def test_every_field_of_the_dashboard_is_one_of_grafanas(dashboard: Any) -> None:
    assert unknown(dashboard) == NOT_IN_THE_SCHEMA


@pytest.mark.parametrize(
    "path", ["/titel", "/panels/1/gridPos/width", "/panels/1/targets/0/expresion"]
)
def test_a_misspelt_field_would_be_found(dashboard: Any, path: str) -> None:
    wrong = copy.deepcopy(dashboard)
    *parents, key = path.strip("/").split("/")
    place = wrong
    for parent in parents:
        place = place[int(parent) if isinstance(place, list) else parent]
    place[key] = 1
    assert unknown(wrong) == NOT_IN_THE_SCHEMA | {path}
