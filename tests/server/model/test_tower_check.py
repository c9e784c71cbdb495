"""The self-check of image encoders finds towers, poolings and projections that answer otherwise."""

import dataclasses
from pathlib import Path

import pytest
import torch

from loraplex_server.model.encoder.encoder import Modality
from loraplex_server.model.encoder.image_encoder import ImageEncoder
from loraplex_server.model.encoder.image_layouts import IMAGE_ENCODERS
from loraplex_server.model.encoder.loading import load_image_encoder
from loraplex_server.model.encoder.tower_check import TowerReference
from loraplex_server.model.errors import ModelError, UnsupportedBase
from tests.support.bases.tiny_image_encoders import TWO_TOWERS, tiny_image_encoder

_SIZE = (32, 32)


@pytest.mark.parametrize("model_type", IMAGE_ENCODERS)
def test_a_tower_that_answers_otherwise_is_found(model_type: str) -> None:
    model = tiny_image_encoder(model_type)
    encoder = ImageEncoder(model, "tiny", image_size=_SIZE)  # whose own check passes
    layout, fresh = IMAGE_ENCODERS[model_type], tiny_image_encoder(model_type)
    if layout.classifier:
        fresh.set_submodule(layout.classifier, torch.nn.Identity())
    reference = TowerReference.capture(fresh, layout, _SIZE)
    assert set(reference.cases) == set(encoder.towers)
    assert (Modality.TEXT in reference.cases) == (model_type in TWO_TOWERS)
    reference.check(encoder)
    for modality, cases in reference.cases.items():
        for index, name in enumerate(("hidden states", "features")):
            states = list(cases[1].states)
            states[index] = states[index] + 0.01 * torch.randn_like(states[index])
            wrong = cases[1]._replace(states=(states[0], states[1]))
            altered = dataclasses.replace(reference, cases={modality: (cases[0], wrong)})
            with pytest.raises(UnsupportedBase, match=f"the {name} of {modality.value}s differ"):
                altered.check(encoder)


def test_a_checkpoint_without_the_weights_of_a_tower_is_refused(tmp_path: Path) -> None:
    clip = tiny_image_encoder("clip")
    clip.save_pretrained(
        tmp_path, state_dict={k: v for k, v in clip.state_dict().items() if "text_model" not in k}
    )
    with pytest.raises(ModelError, match="lacks 36 weights of its encoder, as text_model"):
        load_image_encoder(tmp_path, "clip", None, dtype=torch.float32, device=torch.device("cpu"))
