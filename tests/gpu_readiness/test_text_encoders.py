"""Steps of text encoders on torch's ``meta`` device, with and without adapters."""

import pytest
import torch

from loraplex_adapter_store.plan import AdapterPlan, Family, ModulePlan, PoolingMode
from loraplex_server.engine.requests.pooling import Pooling
from loraplex_server.model.encoder.layouts import ENCODERS
from loraplex_server.model.encoder.text_encoder import TextEncoder
from tests.support.bases.tiny_encoders import tiny_encoder
from tests.support.gpu.meta_engine import Wish, hold_weights_as_on_a_gpu, meta_engine

_TEXTS = ((2, 5, 3), (2, 9, 11, 12, 3), (2, 3))


@pytest.mark.parametrize("mode", [PoolingMode.CLS, PoolingMode.MEAN])
@pytest.mark.parametrize("model_type", ENCODERS)
def test_a_step_of_texts_runs_on_a_gpu(
    model_type: str, mode: PoolingMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        hold_weights_as_on_a_gpu(patch)
        model = tiny_encoder(model_type).to(torch.bfloat16)
        encoder = TextEncoder(model, "tiny", self_check=False)
    plan = _lora(encoder)
    wishes = [
        Wish(adapter, text, pooling=Pooling(mode)) for adapter in (None, plan) for text in _TEXTS
    ]
    with meta_engine(encoder, monkeypatch) as engine:
        run = engine.run(wishes)
    assert run.errors == []
    assert run.findings == []
    assert {"shrink_kernel", "expand_kernel"} <= {n for step in run.steps for n in step.launches}
    assert all(len(answer.events) == 1 for answer in run.answers)


def _lora(encoder: TextEncoder) -> AdapterPlan:
    modules = {
        name: ModulePlan(a=torch.ones(4, shape.in_features), b=torch.ones(shape.out_features, 4))
        for name, shape in encoder.spec.modules.items()
        if name != encoder.spec.classifier
    }
    return AdapterPlan("b" * 64, Family.LORA, modules)
