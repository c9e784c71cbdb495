"""Adapters that one family's reader refuses. Faults of all families: ``test_refusal_grid``."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch

from loraplex_adapter_store.errors import (
    AdapterRefused,
    UnsupportedAdapter,
)
from tests.support.adapters.round_trip import trained
from tests.support.bases.tiny_models import read_path, read_tensors, tiny_llama

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _quiet_and_seeded() -> Iterator[None]:
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


SAVED_BY_PEFT: dict[str, tuple[Callable[[], peft.PeftConfig], str]] = {
    "randomised start": (
        lambda: peft.LoraConfig(init_lora_weights="pissa_niter_4", target_modules=["q_proj"]),
        "initial factors",
    ),
    "VeRA without bases": (
        lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], save_projection=False),
        "save_projection",
    ),
    "noise at inference": (
        lambda: peft.PveraConfig(r=4, target_modules=["q_proj"], sample_at_inference=True),
        "another draw",
    ),
    "LN tuning of a linear": (
        lambda: peft.LNTuningConfig(target_modules=["norm", "q_proj"]),
        "q_proj; leave them",
    ),
}


@pytest.mark.parametrize(("make", "match"), SAVED_BY_PEFT.values(), ids=SAVED_BY_PEFT.keys())
def test_what_peft_saves_without_all_that_serving_needs_is_refused(
    make: Callable[[], peft.PeftConfig], match: str, tmp_path: Path
) -> None:
    model = tiny_llama()
    trained(model, make(), tmp_path)
    with pytest.raises(UnsupportedAdapter, match=match):
        read_path(tmp_path, model)


@pytest.mark.parametrize("kind", ["lora_ga", "corda"])
def test_a_residual_lora_is_refused_without_its_initial_factors(kind: str, tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": torch.randn(4, 32), f"{Q}.lora_B.weight": torch.randn(32, 4)}
    config = {"peft_type": "LORA", "r": 4, "target_modules": [Q], "init_lora_weights": kind}
    with pytest.raises(UnsupportedAdapter, match="initial factors"):
        read_tensors(config, tensors, tiny_llama(), tmp_path)


def test_loldu_that_started_at_random_is_refused_without_its_start(tmp_path: Path) -> None:
    tensors = {f"{Q}.vector_z": torch.randn(4), f"{Q}.scaling_factor": torch.tensor(1.0)}
    config = {"peft_type": "LOLDU", "init_method": "normal", "target_modules": [Q]}
    with pytest.raises(UnsupportedAdapter, match="vector_z0"):
        read_tensors(config, tensors, tiny_llama(), tmp_path)


def test_an_unknown_method_lists_the_readable_ones(tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match=r"NEWLORA is not known.*LORA"):
        read_tensors({"peft_type": "newlora"}, {"x": torch.ones(2)}, tiny_llama(), tmp_path)
