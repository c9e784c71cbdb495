"""A transformers model with the dequantised weights of a quantised base.

Written from the definitions in docs/quantization.md with torch alone, on unpacked values.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def dequantized(model: PreTrainedModel, format: str) -> PreTrainedModel:
    """Return a copy with dequantised linears; the head keeps its weight, tied or not."""
    changed: PreTrainedModel = copy.deepcopy(model)
    head = changed.get_output_embeddings()
    for module in changed.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.data = dequantized_weight(module.weight.data, format)
    return changed


def dequantized_weight(weight: Tensor, format: str) -> Tensor:
    """Quantise and dequantise ``weight`` [out, in], in its own dtype."""
    if format == "int4":
        size = 128 if weight.shape[1] % 128 == 0 else 64
        groups = torch.split(weight, size, dim=1)
        return torch.cat([_to_steps(group, 7) for group in groups], dim=1)
    if format == "int8":
        return _to_steps(weight, 127)
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(weight.dtype)


def _to_steps(weight: Tensor, n_steps: int) -> Tensor:
    scale = (weight.float().abs().amax(1, keepdim=True) / n_steps).half().float()
    return ((weight.float() / scale).round().clamp(-n_steps - 1, n_steps) * scale).to(weight.dtype)
