"""Adapters of a tiny base on disk, and stores around them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.catalogue.catalogue import Catalogue
from loraplex_adapter_store.catalogue.freshness import CatalogueLimits
from loraplex_adapter_store.store import AdapterStore
from tests.support.adapters.eviction_traces import lru
from tests.support.bases.tiny_models import tiny_llama

MakeAdapter = Callable[..., Path]
OpenStore = Callable[..., AdapterStore]


@pytest.fixture(scope="session")
def base() -> BaseSpec:
    return BaseSpec.of(tiny_llama(), "tiny-llama")


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """make_adapter(seed, rank=…) → a PEFT directory with a plain LoRA on every q_proj."""

    def make(seed: int, rank: int = 4, name: str | None = None) -> Path:
        path = tmp_path / "adapters" / (name or f"seed-{seed}-rank-{rank}")
        path.mkdir(parents=True)
        config, tensors = plain_lora(seed, rank)
        (path / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, path / "adapter_model.safetensors")
        return path

    return make


@pytest.fixture(params=["local", "catalogue"])
def opened(request: pytest.FixtureRequest) -> OpenStore:
    """``AdapterStore``, alone and with a catalogue in a directory beside its root."""
    if request.param == "local":
        return AdapterStore

    def with_catalogue(root: Path, base: BaseSpec, **options: object) -> AdapterStore:
        catalogue = Catalogue.open(f"file://{root.parent}/catalogue-of-{root.name}", base)
        limits = CatalogueLimits(refresh_s=0.0, poll_s=3600.0)
        return AdapterStore(
            root,
            base,
            catalogue=catalogue,
            catalogue_limits=limits,
            **options,  # type: ignore[arg-type]
        )

    return with_catalogue


@pytest.fixture
def store(tmp_path: Path, base: BaseSpec) -> Iterator[AdapterStore]:
    with AdapterStore(tmp_path / "store", base, allowed_roots=[tmp_path / "adapters"]) as opened:
        yield opened


def evict_least_recently_used(store: AdapterStore) -> None:
    """Makes evictions predictable: the store's own policy looks at measured seconds."""
    store.state.tier._policy = lru


def plain_lora(seed: int, rank: int = 4) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Every number of the adapter is its seed: mixed-up contents show at once."""
    config: dict[str, object] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj"],
    }
    tensors = {}
    for layer in range(3):
        key = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{key}.lora_A.weight"] = torch.full((rank, 32), float(seed))
        tensors[f"{key}.lora_B.weight"] = torch.full((32, rank), float(seed))
    return config, tensors
