"""RMSNorm of any transformers model through the fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loraplex_kernels.model_ops import rms_norm

__all__ = ["RmsNorm", "replace_norms"]


class RmsNorm(nn.Module):
    """``x / rms(x) ⊙ (offset + weight)``, the sum of squares in float32."""

    def __init__(self, weight: Tensor, eps: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return rms_norm(flat, self.weight, self.eps, offset=self.offset).view(x.shape)


def replace_norms(model: nn.Module) -> int:
    """Replaces every RMSNorm of the instance; returns how many. Other norms stay as they are."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight")
    ]
    for name, module in found:
        eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
        if eps is None or not isinstance(module.weight, Tensor):
            continue
        offset = 1.0 if _adds_one(module) else 0.0
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], RmsNorm(module.weight, float(eps), offset))
    return len(found)


@torch.no_grad()
def _adds_one(module: nn.Module) -> bool:
    """Whether the norm multiplies by 1 + weight (Gemma): asked of the module, not of its name."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        return False
    probe = torch.ones(1, weight.shape[0], dtype=weight.dtype, device=weight.device)
    scaled = module(probe).float()
    plain = (weight.float() - scaled[0]).abs().max()
    plus_one = (1.0 + weight.float() - scaled[0]).abs().max()
    return bool(plus_one < plain)
