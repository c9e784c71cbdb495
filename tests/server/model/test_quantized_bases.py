"""Quantised bases of many architectures answer as transformers does over dequantised weights."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from loraplex_kernels.formats.quantized_weight import QuantizedWeight, WeightFormat
from loraplex_kernels.layers.base_linear import BaseLinear
from loraplex_server.model import packing
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.errors import UnsupportedBase
from loraplex_server.model.quantized.quantized_modules import QuantizedModule, quantize_linears
from tests.support.bases.architectures import ARCHITECTURES, RARE_BASES, tiny_model
from tests.support.bases.quantized_oracle import dequantized_weight

CPU = torch.device("cpu")
RARE = ("minicpm3", "deepseek", "mixtral-window", "hunyuan-moe", "phimoe", "opt")
BASES = {
    **{name: (name, {}) for name in ARCHITECTURES},
    **{name: RARE_BASES[name] for name in RARE},
}


@pytest.mark.parametrize(
    ("name", "format"),
    [*((name, WeightFormat.INT4) for name in BASES), ("gpt2", WeightFormat.INT8), ("llama", "fp8")],
)
def test_a_quantised_base_passes_the_self_check(name: str, format: WeightFormat) -> None:
    """The check is transformers' own forward, whose linears make their weights of the codes."""
    model_type, config = BASES[name]
    model = tiny_model(model_type, **config)
    plain = {
        key: module.weight.detach().clone()
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    quantize_linears(model, WeightFormat(format), CPU)
    coded = {key for key, m in model.named_modules() if isinstance(m, QuantizedModule)}
    base = BaseModel(model, "tiny", self_check=True)
    assert base.spec.quantization == format
    assert not any(key.endswith((".gate", "lm_head")) for key in coded)
    for key in coded & plain.keys():
        wanted = dequantized_weight(plain[key], format)
        torch.testing.assert_close(base.spec.weight(key), wanted, atol=1e-6, rtol=1e-6)
    for key in plain.keys() - coded:
        assert torch.equal(base.spec.weight(key), plain[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_self_check_sees_a_wrong_scale(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama").to(dtype)
    quantize_linears(model, WeightFormat.INT8, CPU)
    right = packing.coded_linear

    def wrong(weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> BaseLinear:
        return right([replace(w, scales=w.scales * 1.1) for w in weights], biases)

    monkeypatch.setattr(packing, "coded_linear", wrong)
    with pytest.raises(UnsupportedBase, match="differently from transformers"):
        BaseModel(model, "tiny", self_check=True)
