"""DoRA: y = m/‖W + s·B A‖_row ⊙ (W x + s·B A x) + b, as an output scale.

The base bias b is not scaled in training but the plan scales it: the plan's bias makes up for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.plan import ModulePlan

__all__ = ["dora_module", "row_norms"]

_ROWS_AT_ONCE = 2048


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
    scale = magnitude / row_norms(base.stored(module), a, b)
    bias = None if lora_bias is None else scale * lora_bias
    base_bias = base.bias(module)
    if base_bias is not None:
        kept = base_bias * (1 - scale)
        bias = kept if bias is None else bias + kept
    return ModulePlan(a=a, b=b, out_scale=scale, bias=bias)


def row_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """‖W + B A‖ per row, float32 [out] on the host, computed where ``weight`` lies.

    ‖w + b A‖² = ‖w‖² + 2 (w Aᵀ)·b + b (A Aᵀ) bᵀ, in float64: the terms cancel when ΔW ≈ −W. B A is
    not formed, and a GPU holds a few rows of W in float64 at a time.
    """
    device = weight.device
    a64 = a.to(device, torch.float64)
    n_rows = weight.shape[0] if device.type == "cpu" else _ROWS_AT_ONCE
    norms = [
        _row_norms(rows.double(), a64, own.to(device, torch.float64))
        for rows, own in zip(torch.split(weight, n_rows), torch.split(b, n_rows), strict=True)
    ]
    return torch.cat(norms).cpu()


def _row_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    cross = ((weight @ a.t()) * b).sum(dim=1)
    own = ((b @ (a @ a.t())) * b).sum(dim=1)
    square = weight.square().sum(dim=1) + 2 * cross + own
    return square.clamp_min(torch.finfo(torch.float64).tiny).sqrt().float()
