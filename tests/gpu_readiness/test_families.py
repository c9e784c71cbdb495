"""Steps of every adapter family on the stand-in for a GPU: no tensor is left on the host."""

import dataclasses
import warnings
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_server.model.base_model import BaseModel
from tests.support.adapters.adapter_samples import SAMPLES
from tests.support.adapters.routed_plans import lora_plan
from tests.support.bases.tiny_models import read_tensors
from tests.support.gpu.meta_engine import Wish, meta_engine
from tests.support.servers.engines import GREEDY

SHORT = dataclasses.replace(GREEDY, max_tokens=2)  # a prefill and a decode step
N_GROUPS = 4


def family_plan(family: str, model: PreTrainedModel, folder: Path) -> AdapterPlan:
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample = SAMPLES[family](model, folder, True)
    return read_tensors(sample.config, sample.tensors, model, folder).plan


@pytest.mark.parametrize("group", range(N_GROUPS))
def test_families_beside_each_other(
    group: int,
    family_model: PreTrainedModel,
    family_base: BaseModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    families = sorted(SAMPLES)[group::N_GROUPS]
    plans = [family_plan(family, family_model, tmp_path / family) for family in families]
    plans.append(lora_plan(family_model, rank=4, seed=1))
    wishes = [*(Wish(plan, sampling=SHORT) for plan in plans), Wish(sampling=SHORT)]
    with meta_engine(family_base, monkeypatch, max_batch_size=16, max_loras=64) as engine:
        run = engine.run(wishes)
        assert engine.loads.findings == []
        failed = {
            family: answer.last.error
            for family, answer in zip(families, run.answers, strict=False)
            if answer.last.error is not None
        }
        assert failed == {}, [repr(error)[:300] for error in run.errors]
        assert run.errors == []
        assert run.findings == []
