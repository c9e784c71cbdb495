"""An engine replica as gateways call it: the real class, without Ray running."""

import asyncio
import errno
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

pytest.importorskip("ray", reason='needs Ray: pip install "loraplex[ray]"')

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.catalogue.catalogue import Catalogue
from loraplex_adapter_store.names.selector import Library, Mixture, MixturePart, NameRef, Selector
from loraplex_adapter_store.store import AdapterStore, EngineHooks
from loraplex_router.experts.gates import arrow_prototypes
from loraplex_server.cluster.config import ClusterConfig, read_config
from loraplex_server.cluster.replica import engine_replica
from loraplex_server.cluster.replica.engine_replica import EngineReplica
from loraplex_server.cluster.replica.remote_request import RemoteRequest
from loraplex_server.engine.errors import EngineDraining
from loraplex_server.engine.requests.client import GenerationRequest, TenantShare
from loraplex_server.engine.requests.events import TokenEvent
from loraplex_server.engine.requests.grammar import GrammarSpec
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.errors import from_engine
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.server_process import save_tiny_model

pytestmark = pytest.mark.anyio

REQUEST = GenerationRequest("mine", (1, 2, 3), SamplingParams(max_tokens=4, ignore_eos=True))

N_WAITING = 20  # more than there are threads


@pytest.fixture
def config(tmp_path: Path) -> ClusterConfig:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        f"server: {{model: {save_tiny_model(tmp_path / 'tiny')}, state-dir: {tmp_path / 'state'}, "
        "dtype: float32, threads: 1, kv-memory: 8MiB, adapter-memory: 8MiB, keep-revisions: 0}"
    )
    return read_config(file)


class Replica(EngineReplica):
    def __del__(self) -> None:
        """Not when it is collected, in the midst of another test: ``replica`` calls Ray's hook."""


@pytest.fixture
async def replica(
    config: ClusterConfig, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[EngineReplica]:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"))
    monkeypatch.setattr(engine_replica.serve, "get_replica_context", lambda: context)
    replica = Replica.__new__(Replica)
    await EngineReplica.__init__(replica, config.server)
    yield replica
    await EngineReplica.__del__(replica)


@pytest.fixture
def gateway(
    replica: EngineReplica, config: ClusterConfig, tmp_path: Path
) -> Iterator[AdapterStore]:
    """The store of one."""
    base = BaseSpec.of(tiny_model(eos_token_id=2, max_position_embeddings=4096), "tiny")
    assert base.fingerprint == replica.facts().base.fingerprint
    url = config.server.store.catalogue
    assert url is not None
    catalogue = Catalogue.open(url, base)
    with AdapterStore(
        tmp_path / "gateway",
        base,
        engine=EngineHooks(gate_of=arrow_prototypes),
        catalogue=catalogue,
    ) as store:
        yield store


def put(gateway: AdapterStore, *names: str) -> None:
    root = gateway.root.parent
    for seed, name in enumerate(names):
        source = write_lora(root / name.replace(":", "-"), gateway.base, seed=seed, scale=0.4)
        gateway.put_directory(name, source)


def asking(gateway: AdapterStore, selector: Selector, tenant: str = "") -> RemoteRequest:
    with gateway.acquire(selector, tenant=tenant) as lease:
        request = replace(REQUEST, adapter=lease, share=TenantShare(tenant))
        return RemoteRequest.of(request, gateway.base.fingerprint)


async def events_of(replica: EngineReplica, request: RemoteRequest) -> list[TokenEvent]:
    return [event async for events in replica.generate("", request) for event in events]


async def test_a_request_for_another_base_gets_none_of_its_tokens(replica: EngineReplica) -> None:
    """In an upgrade that changes the base a gateway may still be of the other version."""
    request = RemoteRequest.of(REQUEST, replica.facts().base.fingerprint)
    events = await events_of(replica, request)
    assert sum(len(event.token_ids) for event in events) == 4
    (last,) = await events_of(replica, replace(request, base="0" * 64))
    assert isinstance(last.error, EngineDraining)


@pytest.mark.parametrize(
    "selector",
    [
        Mixture((MixturePart(NameRef("a"), 0.5), MixturePart(NameRef("b"), 0.5))),
        Library((NameRef("a"), NameRef("b")), top_k=1),
    ],
    ids=["mixture", "library"],
)
@pytest.mark.parametrize("change", ["replaced", "deleted"])
async def test_what_a_gateway_has_put_together_is_served_when_a_part_has_changed(
    replica: EngineReplica, gateway: AdapterStore, tmp_path: Path, selector: Selector, change: str
) -> None:
    """A request keeps the digests that it began with, as that for one adapter does."""
    put(gateway, "a", "b", "c")
    request = asking(gateway, selector)
    if change == "replaced":
        gateway.put_directory("a", tmp_path / "c")
    else:
        gateway.delete("a")
    events = await events_of(replica, request)
    assert events[-1].error is None
    assert sum(len(event.token_ids) for event in events) == 4


async def test_routers_hear_of_the_slots_that_experts_take(
    replica: EngineReplica, gateway: AdapterStore
) -> None:
    put(gateway, "a", "b", "c")
    n_slots = replica.record_routing_stats()["free_slots"]
    assert isinstance(n_slots, int)
    library = Library((NameRef("a"), NameRef("b")), top_k=1)
    for selector, n_free in ((NameRef("c"), n_slots - 1), (library, n_slots - 1 - 3)):
        events = await events_of(replica, asking(gateway, selector))
        assert events[-1].error is None
        assert replica.record_routing_stats()["free_slots"] == n_free


async def test_loads_that_wait_for_room_hold_up_no_other_tenant(
    replica: EngineReplica, gateway: AdapterStore
) -> None:
    held = ["acme:h0", "acme:h1", "acme:h2"]
    names = [f"acme:a{n}" for n in range(N_WAITING)]
    both = Mixture((MixturePart(NameRef(names[0]), 0.5), MixturePart(NameRef(names[1]), 0.5)))
    selectors = [both, *(NameRef(name) for name in names)]
    put(gateway, *held, *names, "umbra:here", "umbra:cold")
    store = replica._store
    mine = [asking(gateway, NameRef(f"umbra:{name}"), "umbra") for name in ("here", "cold")]
    assert (await events_of(replica, mine[0]))[-1].error is None
    with ExitStack() as closing:
        for name in held:
            closing.enter_context(store.acquire(name))
        store.state.tier._n_bytes, store.state.tier._wait_s = (
            store.stats().host_bytes_used,
            600.0,
        )
        waiting = [
            asyncio.create_task(events_of(replica, asking(gateway, selector, tenant)))
            for selector, tenant in zip(selectors, cycle(["acme", "batch:acme"]), strict=False)
        ]
        grammar = GrammarSpec("start: /a+/")
        try:
            async with asyncio.timeout(60):
                for request in (*mine, replace(mine[1], adapter=None, grammar=grammar)):
                    assert (await events_of(replica, request))[-1].error is None
            assert not any(call.done() for call in waiting)
        finally:
            for call in waiting:
                call.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        async with asyncio.timeout(60):  # who has left waits no longer
            await asyncio.to_thread(replica._loads._pool.shutdown)


@pytest.mark.parametrize(
    ("failure", "part"),
    [(OSError(errno.ENOSPC, "/srv/full"), "storage"), (MemoryError(), "loader")],
)
async def test_a_fault_of_a_load_is_told_counted_and_may_be_tried_again(
    replica: EngineReplica,
    gateway: AdapterStore,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    part: str,
) -> None:
    put(gateway, "a")
    request = asking(gateway, NameRef("a"))
    with monkeypatch.context() as patched:
        patched.setattr(replica._store.leases._loader, "load", Mock(side_effect=failure))
        (last,) = await events_of(replica, request)
    assert last.error is not None
    assert (told := from_engine(last.error)).status == 503
    assert "/srv" not in told.message
    assert replica.stats().faults[part] == 1
    assert (await events_of(replica, request))[-1].error is None
