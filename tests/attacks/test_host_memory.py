"""Host memory for adapters that is full of one tenant's, and what another tenant's wait for it."""

from collections.abc import Iterator

import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from tests.attacks.two_tenants import Neighbours, Tenant, two_tenants, waited
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.bounds import broken_only_if_each_time, check_below
from tests.support.servers.server_process import save_tiny_model

pytestmark = pytest.mark.slow
MINE, FLOOD = ["mine-0", "mine-1"], [f"theirs-{n}" for n in range(12)]
HOST_BYTES = 8 * 10_752  # eight adapters


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neighbours]:
    folder = tmp_path_factory.mktemp("host")
    model = save_tiny_model(folder / "model")
    flags = ["--adapter-host-memory", str(HOST_BYTES), "--max-batch-size", "4"]
    with two_tenants(folder, model, *flags) as both:
        spec = BaseSpec.of(tiny_model(), "model")
        for seed, name in enumerate([*FLOOD, *MINE]):
            tenant = both.small if name in MINE else both.flood
            tenant.put(name, write_lora(folder / name, spec, seed=seed))
        yield both


def complete(tenant: Tenant, adapter: str, n_tokens: int = 1) -> None:
    body = {"prompt": "x", "adapter": adapter, "max_tokens": n_tokens, "ignore_eos": True}
    tenant.post("/v1/completions", body)


def test_a_tenant_that_fills_host_memory_takes_none_of_anothers_share(
    neighbours: Neighbours,
) -> None:
    """Half of the memory holds four adapters, of which this tenant uses two."""
    for name in MINE:
        complete(neighbours.small, name)
    for name in FLOOD * 3:
        complete(neighbours.flood, name)
        cards = neighbours.small.http.get("/v1/adapters").raise_for_status().json()["data"]
        assert {card["name"] for card in cards if card["n_bytes"]["host"]} == set(MINE)


@broken_only_if_each_time
def test_an_adapter_loads_while_another_tenant_uses_as_many_as_it_can(
    neighbours: Neighbours,
) -> None:
    """More adapters than fit have two callers each, so that those in memory are never idle."""

    def use(adapter: str) -> None:
        for _ in range(2):
            complete(neighbours.flood, adapter, 200)

    def load() -> None:
        for name in MINE:  # none of this tenant's is in memory
            neighbours.small.post(f"/v1/adapters/{name}/unload", {})
        complete(neighbours.small, MINE[0])

    flood = [lambda name=name: use(name) for name in FLOOD * 2]
    check_below(waited(flood, load), 0.2)
