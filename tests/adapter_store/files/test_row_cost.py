"""The note on slow rows counts the modules that the engine computes again, and no others."""

from collections.abc import Sequence
from pathlib import Path

import peft
import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from tests.support.adapters.round_trip import randomise
from tests.support.bases.tiny_models import read_path, tiny_llama, untouched

MODEL = tiny_llama()
BASE = BaseSpec.of(MODEL, "tiny")


def note_of_ia3(path: Path, targets: Sequence[str], feedforward: Sequence[str]) -> str | None:
    """Return the cost note in the load report of an adapter that PEFT has saved."""
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
    n_ups = sum(name.endswith("up_proj") for name in BASE.modules)
    assert note is not None
    assert note.startswith(f"{n_ups} modules")
