"""A base that answers differently from transformers does not start, and says where."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.errors import UnsupportedBase
from loraplex_server.model.self_check import Reference
from loraplex_server.model.tracing.model_trace import trace_model
from tests.support.bases.architectures import RARE_BASES, tiny_model

_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _refusal(model: PreTrainedModel, change: Callable[[BaseModel], object], fuse: bool) -> str:
    """What the check says of a base that was changed after it was built."""
    reference = Reference.capture(model, trace_model(model))
    base = BaseModel(model, "tiny", fuse=fuse, self_check=False)
    with torch.inference_mode():
        change(base)
    with pytest.raises(UnsupportedBase) as error:
        reference.check(base, model)
    return str(error.value)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_rounding_is_no_difference(name: str, dtype: torch.dtype) -> None:
    BaseModel(tiny_model(name).to(dtype), "tiny", self_check=True)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("name", ["granite", "gpt-oss", "deepseek", "rope-llama3"])
def test_rounding_is_no_difference_where_experts_and_scales_amplify_it(
    name: str, dtype: torch.dtype
) -> None:
    model_type, config = RARE_BASES[name]
    BaseModel(tiny_model(model_type, **config).to(dtype), "tiny", self_check=True)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_the_layer_where_they_part_is_named_with_both_values(dtype: torch.dtype) -> None:
    def change(base: BaseModel) -> None:
        base.mlps["model.layers.1.mlp"].down.packed._weight.zero_()

    model = tiny_model("llama", initializer_range=0.2).to(dtype)
    message = _refusal(model, change, fuse=False)
    assert "They differ first after model.layers.1:" in message
    assert "in transformers and" in message
    assert "--no-self-check" in message


def test_a_wrong_window_is_a_difference_in_decode_steps_too() -> None:
    def change(base: BaseModel) -> None:
        for layer in base.layers:
            object.__setattr__(layer.spec, "window", 2)

    model = tiny_model("gemma2", initializer_range=0.5)
    assert "They differ first after model.layers.0" in _refusal(model, change, fuse=False)


def test_logits_that_are_scaled_otherwise_are_a_difference_of_the_logits() -> None:
    def change(base: BaseModel) -> None:
        base._logits = base._logits.after(0.5)

    assert "in the logits" in _refusal(tiny_model("llama"), change, fuse=True)


def test_fused_layers_that_are_wrong_alone_are_said_to_be() -> None:
    def change(base: BaseModel) -> None:
        assert base.fused is not None
        base.fused._cos.neg_()

    model = tiny_model("llama", initializer_range=0.5)
    assert "--no-fuse" in _refusal(model, change, fuse=True)


def test_positions_late_in_the_context_are_looked_at() -> None:
    def change(base: BaseModel) -> None:
        assert base.fused is not None
        base.fused._cos[100:].neg_()

    model = tiny_model("llama", initializer_range=0.5)
    assert "fused" in _refusal(model, change, fuse=True)


def test_nothing_of_the_check_stays_behind() -> None:
    model = tiny_model("llama")
    base = BaseModel(model, "tiny", self_check=True)
    assert base.step.positions.numel() == 0
    assert not any(module._forward_hooks for module in model.modules())
