"""DoRA: y = m/‖W + s·B A‖_row ⊙ (W x + s·B A x) + b, as an output scale.

The base bias b is not scaled in training but the plan scales it: the plan's bias makes up for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.plan import ModulePlan

__all__ = ["dora_module", "row_norms"]


def dora_module(
    base: BaseSpec,
    module: str,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    *,
    lora_bias: Tensor | None = None,
) -> ModulePlan:
    """``b`` has the scale folded in; ``magnitude`` [out]; ``lora_bias`` [out] is scaled as B is."""
    scale = magnitude / row_norms(base.weight(module), a, b)
    bias = None if lora_bias is None else scale * lora_bias
    base_bias = base.bias(module)
    if base_bias is not None:
        kept = base_bias * (1 - scale)
        bias = kept if bias is None else bias + kept
    return ModulePlan(a=a, b=b, out_scale=scale, bias=bias)


def row_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """‖W + B A‖ per row [out], without forming B A.

    ‖w + b A‖² = ‖w‖² + 2 (w Aᵀ)·b + b (A Aᵀ) bᵀ, in float64: the terms cancel when ΔW ≈ −W.
    """
    weight64, a64, b64 = weight.double(), a.double(), b.double()
    cross = ((weight64 @ a64.t()) * b64).sum(dim=1)
    own = ((b64 @ (a64 @ a64.t())) * b64).sum(dim=1)
    square = weight64.square().sum(dim=1) + 2 * cross + own
    return square.clamp_min(torch.finfo(torch.float64).tiny).sqrt().float()
