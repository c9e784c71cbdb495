"""Steps of image encoders on torch's ``meta`` device: both towers, with and without adapters."""

import pytest
import torch

from loraplex_adapter_store.plan import AdapterPlan, Family, ModulePlan, PoolingMode
from loraplex_server.engine.requests.pooling import Pooling
from loraplex_server.model.encoder.image_encoder import ImageEncoder
from loraplex_server.model.encoder.image_layouts import IMAGE_ENCODERS
from tests.support.bases.tiny_image_encoders import TWO_TOWERS, tiny_image_encoder
from tests.support.gpu.meta_engine import Wish, hold_weights_as_on_a_gpu, meta_engine

_EMBEDDING = Pooling(PoolingMode.CLS)


@pytest.mark.parametrize("model_type", IMAGE_ENCODERS)
def test_a_step_of_images_and_texts_runs_on_a_gpu(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        hold_weights_as_on_a_gpu(patch)
        model = tiny_image_encoder(model_type).to(torch.bfloat16)
        encoder = ImageEncoder(model, "tiny", image_size=(32, 32), self_check=False)
    plan, image = _lora(encoder), torch.zeros(3, 32, 32)
    rows = (0,) * encoder.n_rows(32, 32)
    wishes = [
        Wish(adapter, rows, pooling=_EMBEDDING, pixels=image) for adapter in (None, plan, plan)
    ]
    if model_type in TWO_TOWERS:
        wishes += [Wish(adapter, (2, 5, 3), pooling=_EMBEDDING) for adapter in (None, plan)]
    with meta_engine(encoder, monkeypatch) as engine:
        run = engine.run(wishes)
    assert run.errors == []
    assert run.findings == []
    assert {"shrink_kernel", "expand_kernel"} <= {n for step in run.steps for n in step.launches}
    copied = [copy.shape for step in run.steps for copy in step.copies_out]
    # Embeddings of features alone come back; those of ViT and DINOv2 are hidden states.
    width = encoder.spec.feature_size
    in_features = model_type in TWO_TOWERS
    assert copied == ([(3, width), (2, width)] if in_features else [(3 * len(rows), 32)])
    assert all(len(answer.events) == 1 for answer in run.answers)


def _lora(encoder: ImageEncoder) -> AdapterPlan:
    modules = {
        name: ModulePlan(a=torch.ones(4, shape.in_features), b=torch.ones(shape.out_features, 4))
        for name, shape in encoder.spec.modules.items()
    }
    return AdapterPlan("b" * 64, Family.LORA, modules)
