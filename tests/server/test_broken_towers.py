"""A server does not start with a tower or a pooling that answers differently from transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex_server.engine.config import EngineConfig
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.encoder.text_encoder import TextEncoder
from loraplex_server.model.errors import UnsupportedBase
from loraplex_server.model.layers.packed_lora_linear import LoraLinear
from loraplex_server.model.vision.image_trunk import ImageTrunk
from tests.conformance.tiny_base import app_of, tiny_engine_config
from tests.support.bases.tiny_encoders import save_tiny_encoder
from tests.support.bases.tiny_vision import save_tiny_vision

_TOWER = "model.vision_tower.encoder.layers.1.self_attn"
_PROJECTOR = "model.multi_modal_projector"


def _start(path: Path, state: Path, config: EngineConfig | None = None) -> None:
    with app_of(path, state, config or tiny_engine_config()):
        pass


def _swap(model: Any, one: str, other: str) -> None:
    """Exchange two linears of equal shape, as a wrong map of names would."""
    first, second = model.get_submodule(one), model.get_submodule(other)
    assert isinstance(first, LoraLinear)
    assert isinstance(second, LoraLinear)
    model.set_submodule(one, second)
    model.set_submodule(other, first)


_BROKEN: dict[str, Callable[[Any], None]] = {
    "queries and keys of a layer of the tower are swapped": lambda model: _swap(
        model, f"{_TOWER}.q_proj", f"{_TOWER}.k_proj"
    ),
    "the projector has no activation": lambda model: model.set_submodule(
        f"{_PROJECTOR}.act", torch.nn.Identity()
    ),
    "a layer of the tower is left out": lambda model: model.set_submodule(
        f"{_TOWER}.out_proj", torch.nn.Identity()
    ),
}


@pytest.mark.parametrize("name", _BROKEN)
def test_a_broken_image_tower_is_refused_at_start(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tiny_vision("llava", tmp_path / "base")
    _start(path, tmp_path / "state")  # the whole tower passes
    adapt = BaseModel._adapt_images

    def break_after(self: BaseModel, model: Any, *args: Any) -> ImageTrunk:
        trunk = adapt(self, model, *args)
        _BROKEN[name](model)
        return trunk

    monkeypatch.setattr(BaseModel, "_adapt_images", break_after)
    with pytest.raises(UnsupportedBase) as error:
        _start(path, tmp_path / "state")
    assert "its tower answers differently from transformers" in str(error.value)
    assert "--no-self-check" in str(error.value)
    _start(path, tmp_path / "state", tiny_engine_config(self_check=False))


def _mean(encoder: TextEncoder, hidden: Tensor, token_ids: Tensor) -> Tensor:
    return hidden.mean(0)


def _first(encoder: TextEncoder, hidden: Tensor, token_ids: Tensor) -> Tensor:
    return hidden[0]


@pytest.mark.parametrize(
    ("model_type", "config", "wrong"),
    [
        ("bert", {}, _mean),
        ("roberta", {}, _mean),
        ("modernbert", {"classifier_pooling": "mean"}, _first),
        ("modernbert", {"classifier_pooling": "cls"}, _mean),
    ],
)
def test_a_wrong_pooling_is_refused_at_start(
    model_type: str,
    config: dict[str, Any],
    wrong: Callable[[TextEncoder, Tensor, Tensor], Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = save_tiny_encoder(model_type, tmp_path / "base", **config)
    _start(path, tmp_path / "state")
    monkeypatch.setattr(TextEncoder, "pooled", wrong)
    with pytest.raises(UnsupportedBase) as error:
        _start(path, tmp_path / "state")
    assert "the inputs of the classifier differ" in str(error.value)
    assert "--no-self-check" in str(error.value)


def test_a_wrong_position_of_an_encoder_is_refused_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tiny_encoder("roberta", tmp_path / "base")
    positions = TextEncoder._position_ids
    monkeypatch.setattr(
        TextEncoder, "_position_ids", lambda self, token_ids: positions(self, token_ids) - 1
    )
    with pytest.raises(UnsupportedBase, match="the hidden states differ"):
        _start(path, tmp_path / "state")
