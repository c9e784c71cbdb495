"""Quantised linears as modules of a transformers model, until they are packed.

Such a module computes its weight from codes whenever it is asked for, so everything that reads a
model sees the weights that are served: transformers' own forward in the self-check, the trace, the
spec with its fingerprint and norms. One weight at a time is plain.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loraplex_kernels.quantized_weight import QuantizedWeight, WeightFormat, quantize_weight

__all__ = [
    "QuantizedModule",
    "install_quantized",
    "quantization_of",
    "quantize_linears",
]

_ROUTERS = ("gate", "router", "shared_expert_gate")  # of experts: small, and they choose
_MIB = 1 << 20
_log = logging.getLogger(__name__)


class _QuantizedLinear(nn.Linear):
    """Its forward is ``nn.Linear``'s."""

    def __init__(self, quantized: QuantizedWeight, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)  # without a parameter of its own
        self.quantized = quantized
        self.out_features, self.in_features = quantized.shape
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in], dequantised for the caller."""
        return self.quantized.dequantize()


class _QuantizedConv1D(Conv1D):  # type: ignore[misc]
    """GPT-2's: the weight is [in, out]."""

    def __init__(self, quantized: QuantizedWeight, bias: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.quantized = quantized
        self.nf, self.nx = quantized.shape
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        return self.quantized.dequantize().t()


QuantizedModule = _QuantizedLinear | _QuantizedConv1D


def quantize_linears(model: PreTrainedModel, format: WeightFormat, device: torch.device) -> None:
    """Quantises the linears of the layers, one by one, on ``device``, where their codes stay.

    The output head, embeddings, norms, routers of experts and stacked experts keep their dtype.
    Raises ValueError for weights that are not finite.
    """
    before = after = 0
    for name, module in list(_linears(model)):
        if name.rpartition(".")[2] in _ROUTERS:
            continue
        weight = module.weight.detach()
        before += weight.nbytes
        rows = weight if isinstance(module, nn.Linear) else weight.t()
        try:
            quantized = quantize_weight(rows.to(device), format)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        after += quantized.n_bytes
        _replace(model, name, quantized)
    stacked = sum(p.nbytes for p in model.parameters() if p.dim() == 3)
    _log.info(
        "weights of linears: %d MiB in %s, they were %d MiB%s",
        after // _MIB,
        format,
        before // _MIB,
        f"; {stacked // _MIB} MiB of stacked experts stay as they are" if stacked else "",
    )


def install_quantized(model: PreTrainedModel, weights: Mapping[str, QuantizedWeight]) -> None:
    """Puts weights that were quantised before in the place of the linears so named."""
    for name, quantized in weights.items():
        _replace(model, name, quantized)


def quantization_of(model: nn.Module) -> str | None:
    """The formats of the quantised linears, as "int8"; None if there are none."""
    formats = {m.quantized.format for m in model.modules() if isinstance(m, QuantizedModule)}
    return "+".join(sorted(formats)) or None


def _linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if module is not head and (plain or isinstance(module, Conv1D)):
            yield name, module


def _replace(model: PreTrainedModel, name: str, quantized: QuantizedWeight) -> None:
    module = model.get_submodule(name)
    kind = _QuantizedConv1D if isinstance(module, Conv1D) else _QuantizedLinear
    made = kind(quantized, module.bias)
    made.train(module.training)
    model.set_submodule(name, made)
