"""An engine replica as gateways call it: the real class, without Ray running."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')

from loraplex_server.cluster import engine_replica
from loraplex_server.cluster.config import ClusterConfig, read_config
from loraplex_server.cluster.engine_replica import EngineReplica
from loraplex_server.cluster.remote_request import RemoteRequest
from loraplex_server.engine.client import GenerationRequest
from loraplex_server.engine.errors import EngineDraining
from loraplex_server.engine.events import TokenEvent
from loraplex_server.engine.sampling_params import SamplingParams
from tests.support.server_process import save_tiny_model

pytestmark = pytest.mark.anyio

REQUEST = GenerationRequest("mine", (1, 2, 3), SamplingParams(max_tokens=4, ignore_eos=True))


@pytest.fixture
def config(tmp_path: Path) -> ClusterConfig:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        f"server: {{model: {save_tiny_model(tmp_path / 'tiny')}, state-dir: {tmp_path / 'state'}, "
        "dtype: float32, threads: 1, kv-memory: 8MiB, adapter-memory: 8MiB, keep-revisions: 0}"
    )
    return read_config(file)


@pytest.fixture
async def replica(
    config: ClusterConfig, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[EngineReplica]:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"))
    monkeypatch.setattr(engine_replica.serve, "get_replica_context", lambda: context)
    replica = EngineReplica.__new__(EngineReplica)
    await EngineReplica.__init__(replica, config.server)
    yield replica
    await replica.__del__()


async def events_of(replica: EngineReplica, request: RemoteRequest) -> list[TokenEvent]:
    return [event async for events in replica.generate("", request) for event in events]


async def test_a_request_for_another_base_gets_none_of_its_tokens(replica: EngineReplica) -> None:
    """In an upgrade that changes the base a gateway may still be of the other version."""
    request = RemoteRequest.of(REQUEST, replica.facts().base.fingerprint)
    events = await events_of(replica, request)
    assert sum(len(event.token_ids) for event in events) == 4
    (last,) = await events_of(replica, replace(request, base="0" * 64))
    assert isinstance(last.error, EngineDraining)
