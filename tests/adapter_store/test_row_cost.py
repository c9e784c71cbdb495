"""The note on what a row costs counts what the engine computes again, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.plan import ModulePlan
from loraplex_adapter_store.row_cost import row_cost_note
from tests.support.round_trip import randomise
from tests.support.tiny_models import read_path, tiny_llama, untouched

MODEL = tiny_llama()
BASE = BaseSpec.of(MODEL, "tiny")


def note_of_ia3(path: Path, targets: Sequence[str], feedforward: Sequence[str]) -> str | None:
    """What the reader's report says of an adapter that PEFT has saved."""
    config = peft.IA3Config(target_modules=list(targets), feedforward_modules=list(feedforward))
    tuned = peft.get_peft_model(untouched(MODEL), config)
    randomise(tuned)
    tuned.save_pretrained(path)
    notes = read_path(path, MODEL).report.notes
    return next((note for note in notes if "in torch" in note), None)


@pytest.mark.filterwarnings("ignore")  # PEFT's
def test_vectors_that_ask_for_no_product_cost_nothing(tmp_path: Path) -> None:
    assert note_of_ia3(tmp_path, ["k_proj", "v_proj", "down_proj"], ["down_proj"]) is None


@pytest.mark.filterwarnings("ignore")
def test_scaled_inputs_that_others_read_cost_the_product_of_their_linear(tmp_path: Path) -> None:
    note = note_of_ia3(tmp_path, ["k_proj", "up_proj", "down_proj"], ["up_proj", "down_proj"])
    ups = [shape for name, shape in BASE.modules.items() if name.endswith("up_proj")]
    flops = 2 * sum(shape.in_features * shape.out_features for shape in ups)
    assert note is not None
    assert f"{flops / 1e6:.2g} MFLOP a token on {len(ups)} modules" in note


def test_factors_beside_a_scale_are_the_kernels() -> None:
    name, shape = next((n, s) for n, s in BASE.modules.items() if n.endswith("up_proj"))
    scale = torch.ones(shape.in_features)
    factors = {"a": torch.ones(8, shape.in_features), "b": torch.ones(shape.out_features, 8)}
    bare = row_cost_note({name: ModulePlan(in_scale=scale)}, BASE)
    assert bare is not None
    assert row_cost_note({name: ModulePlan(in_scale=scale, **factors)}, BASE) == bare
    down = name.replace("up_proj", "down_proj")
    assert row_cost_note({down: ModulePlan(in_scale=scale)}, BASE) is None
