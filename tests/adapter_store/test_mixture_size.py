"""The memory of a mixture: known, and refused, before any of it is built."""

from collections.abc import Mapping
from pathlib import Path

import peft
import pytest
import torch

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.composites.mixture import mix_plans, outline_mixture
from loraplex_adapter_store.errors import InvalidSelector, LimitExceeded, UnservableAdapter
from loraplex_adapter_store.names.selector import parse_selector
from loraplex_adapter_store.plan import AdapterPlan
from loraplex_adapter_store.store import AdapterStore, EngineHooks
from tests.adapter_store.conftest import OpenStore
from tests.support.adapters.adapter_samples import SAMPLES
from tests.support.adapters.packers import TensorsAside
from tests.support.adapters.round_trip import trained
from tests.support.bases.tiny_models import read_tensors, tiny_llama

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: Mapping[str, peft.PeftConfig] = {
    "vera": peft.VeraConfig(r=16, target_modules=ALL),
    "randlora": peft.RandLoraConfig(r=4, target_modules=ALL),
    "lora": peft.LoraConfig(r=4, target_modules=ALL),
}
MIXTURE = parse_selector([{"name": name, "weight": 0.5} for name in CONFIGS])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("adapters")
    for name, config in CONFIGS.items():
        trained(tiny_llama(), config, found / name)
    return found


def _put(store: AdapterStore, folder: Path) -> int:
    """The bytes of the parts."""
    return sum(store.put_directory(name, folder / name).n_bytes.host for name in CONFIGS)


class _Notes(TensorsAside):
    """Notes the plans that it is asked about, and refuses a rank."""

    def __init__(self, max_rank: int | None = None) -> None:
        super().__init__()
        self.max_rank = max_rank
        self.prepared: list[AdapterPlan] = []
        self.refused: list[AdapterPlan] = []

    def check(self, plan: AdapterPlan) -> None:
        rank = max((module.rank for module in plan.modules.values()), default=0)
        if self.max_rank is not None and rank > self.max_rank:
            self.refused.append(plan)
            raise LimitExceeded(f"rank {rank}")

    def prepare(self, plan: AdapterPlan) -> AdapterPlan:
        self.prepared.append(plan)
        return super().prepare(plan)


def test_a_mixture_reserves_what_it_builds(
    folder: Path, tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    class Looks(_Notes):
        n_reserved = 0

        def prepare(self, plan: AdapterPlan) -> AdapterPlan:
            self.n_reserved = store.stats().host_bytes_used - n_before
            return super().prepare(plan)

    packer, n_before = Looks(), 0
    with opened(tmp_path / "s", base, engine=EngineHooks(packer)) as store:
        n_parts = _put(store, folder)
        n_before = store.stats().host_bytes_used
        store.acquire(MIXTURE).release()
        assert packer.n_reserved == packer.prepared[-1].n_bytes > 3 * n_parts
        n_peeked = len(packer.prepared)
        store.acquire(MIXTURE).release()
        assert len(packer.prepared) == n_peeked


def test_a_mixture_that_host_memory_can_never_hold_is_refused_before_it_is_built(
    folder: Path, tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    packer = _Notes()
    with opened(tmp_path / "s", base, engine=EngineHooks(packer), host_bytes=200_000) as store:
        assert _put(store, folder) < 200_000
        n_prepared = len(packer.prepared)
        with pytest.raises(LimitExceeded, match=r"200,000 for adapters.*--adapter-host-memory"):
            store.acquire(MIXTURE)
        assert len(packer.prepared) == n_prepared
        assert store.stats().n_leases == 0
        store.acquire("vera").release()


def test_a_mixture_above_the_rank_is_refused_before_it_is_built(
    folder: Path, tmp_path: Path, base: BaseSpec, opened: OpenStore
) -> None:
    packer = _Notes(max_rank=16)
    with opened(tmp_path / "s", base, engine=EngineHooks(packer)) as store:
        _put(store, folder)
        # Of an input of 32: VeRA's 16, RandLoRA's 8 blocks of 4 and LoRA's 4.
        with pytest.raises(UnservableAdapter, match="rank 52"):
            store.acquire(MIXTURE)
        assert all(tensor.is_meta for plan in packer.refused for tensor in plan.tensors())
        assert store.stats().n_leases == 0


@pytest.mark.parametrize("family", SAMPLES)
def test_outlines_are_what_mixtures_become(family: str, tmp_path: Path, base: BaseSpec) -> None:
    model = tiny_llama()
    plans = []
    for name in (family, "LORA", "VERA"):
        (tmp_path / name).mkdir(exist_ok=True)
        config, tensors = SAMPLES[name](model, tmp_path / name, True)
        plans.append(read_tensors(config, tensors, model, tmp_path).plan)
    digest, names = "d" * 64, ["one", "two", "three"]
    try:
        whole = mix_plans([(plan, 0.5) for plan in plans], base, digest, names)
    except InvalidSelector:
        with pytest.raises(InvalidSelector, match="'one'"):
            outline_mixture(plans, digest, names)
        return
    outline = outline_mixture(plans, digest, names)
    assert outline.n_bytes == whole.n_bytes
    for path, module in whole.modules.items():
        for factor, outlined in (
            (module.a, outline.modules[path].a),
            (module.b, outline.modules[path].b),
        ):
            assert _shape(factor) == _shape(outlined)


def _shape(tensor: torch.Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
