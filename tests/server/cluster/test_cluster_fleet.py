"""What any gateway tells of the engine replicas, in /metrics and /health."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerFast

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.cluster.gateway import cluster_fleet
from loraplex_server.cluster.gateway.cluster_fleet import ClusterFleet
from loraplex_server.cluster.replica.remote_request import ReplicaStats
from loraplex_server.engine.requests.client import EngineStats
from loraplex_server.health_tracker import Degradation
from tests.server.conftest import make_front

pytestmark = pytest.mark.anyio


async def test_a_replica_that_is_down_or_fails_is_seen_at_every_gateway(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing = Degradation("storage", "No space left on device", 1.7e9, 4)
    engine: Any = SimpleNamespace(
        replicas=[
            ReplicaStats("up", EngineStats(), faults={"storage": 4}, degraded=(failing,)),
            ReplicaStats("down", EngineStats(), alive=False),
        ]
    )
    context = SimpleNamespace(app_name="loraplex")
    monkeypatch.setattr(cluster_fleet.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(cluster_fleet, "_FRONTS", ())  # they are asked through Ray
    fleet = ClusterFleet("gateway", engine)
    front = make_front(tokenizer, base_spec, tmp_path, fleet=fleet)
    page = (await front.client.get("/metrics")).text
    health = await front.client.get("/health")
    front.store.close()
    families = {family.name: family.samples for family in text_string_to_metric_families(page)}
    up = {sample.labels["replica"]: sample.value for sample in families["loraplex_engine_up"]}
    assert up == {"up": 1.0, "down": 0.0}
    (faults,) = families["loraplex_faults"]
    assert (faults.labels, faults.value) == ({"part": "storage", "replica": "up"}, 4.0)
    assert health.json() == {"status": "degraded", "degraded": [failing.to_json()]}
