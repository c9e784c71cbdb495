"""Norms of any transformers model: RMSNorm through the fused kernel, others as they are.

Rows whose adapter has a norm of its own (LN tuning, modules_to_save) are normed once more with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loraplex_adapter_store.plan import NormPlan
from loraplex_kernels.model_ops import add_rms_norm, rms_norm

from .forward_context import ForwardContext

__all__ = ["AdaptedNorm", "RmsNorm", "replace_norms"]


class RmsNorm(nn.Module):
    """``x / rms(x) ⊙ (offset + weight)``, the sum of squares in float32."""

    def __init__(
        self, name: str, weight: Tensor, eps: float, offset: float, step: ForwardContext
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.eps = eps
        self.offset = offset
        self._name = name
        self._step = step

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., width] with an axis of one entry for each row of the step."""
        flat = x.reshape(-1, x.shape[-1])
        out = rms_norm(flat, self.weight, self.eps, offset=self.offset).view(x.shape)
        self._norm_own_rows(x, out)
        return out

    def add_and_norm(self, x: Tensor, residual: Tensor) -> Tensor:
        """``residual += x`` in place; returns the norm of the sum. Both [T, width]."""
        out = add_rms_norm(x, residual, self.weight, self.eps, offset=self.offset)
        self._norm_own_rows(residual, out)
        return out

    @property
    def is_own_anywhere(self) -> bool:
        """Whether an adapter of the step has a norm of its own here."""
        return any(self._name in fallback.parts.norms for fallback in self._step.fallback)

    def _norm_own_rows(self, x: Tensor, out: Tensor) -> None:
        for fallback in self._step.fallback:
            own = fallback.parts.norms.get(self._name)
            if own is not None and own.weight is not None:
                axis = _row_axis(x, self._step)
                rows = x.movedim(axis, 0)[fallback.rows]
                normed = rms_norm(
                    rows.reshape(-1, rows.shape[-1]), own.weight, self.eps, offset=self.offset
                )
                out.movedim(axis, 0)[fallback.rows] = normed.view(rows.shape)


class AdaptedNorm(nn.Module):
    """Any other norm of transformers, called again with an adapter's weight and bias."""

    def __init__(self, name: str, norm: nn.Module, step: ForwardContext) -> None:
        super().__init__()
        for part, value in norm.named_parameters(recurse=False):
            self.register_parameter(part, value)  # under the names of the checkpoint
        self._norm = norm
        self._name = name
        self._step = step

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., width] with an axis of one entry for each row of the step."""
        out: Tensor = self._norm(x)
        for fallback in self._step.fallback:
            own = fallback.parts.norms.get(self._name)
            if own is not None:
                axis = _row_axis(x, self._step)
                rows = x.movedim(axis, 0)[fallback.rows]
                out.movedim(axis, 0)[fallback.rows] = self._with(own, rows)
        return out

    def _with(self, own: NormPlan, rows: Tensor) -> Tensor:
        given = {"weight": own.weight, "bias": own.bias}
        parameters = {part: value for part, value in given.items() if value is not None}
        normed: Tensor = torch.func.functional_call(self._norm, parameters, (rows,))
        return normed


def replace_norms(model: nn.Module, step: ForwardContext) -> frozenset[str]:
    """Replaces every norm of the instance that has parameters; returns their names."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__ and any(True for _ in module.parameters(recurse=False))
    ]
    for name, module in found:
        model.set_submodule(name, _rms_norm(name, module, step) or AdaptedNorm(name, module, step))
    return frozenset(name for name, _ in found)


def _rms_norm(name: str, module: nn.Module, step: ForwardContext) -> RmsNorm | None:
    """None if ``module`` is another norm, or one of several vectors: asked with random rows."""
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or eps is None:
        return None
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    norm = RmsNorm(name, weight, float(eps), 1.0 if _adds_one(module, weight) else 0.0, step)
    return norm if _agree(norm, module, weight) else None


@torch.no_grad()
def _agree(ours: RmsNorm, theirs: nn.Module, weight: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, weight.shape[0], generator=generator).to(weight)
    expected, found = theirs(rows).float(), ours(rows).float()
    rounding = 4 * torch.finfo(weight.dtype).eps
    return bool(((found - expected).abs() <= rounding * (1 + expected.abs())).all())


@torch.no_grad()
def _adds_one(module: nn.Module, weight: Tensor) -> bool:
    """Whether the norm multiplies by 1 + weight (Gemma): found by running the module."""
    probe = torch.ones(1, weight.shape[0], dtype=weight.dtype, device=weight.device)
    scaled = module(probe).float()
    plain = (weight.float() - scaled[0]).abs().max()
    plus_one = (1.0 + weight.float() - scaled[0]).abs().max()
    return bool(plus_one < plain)


def _row_axis(x: Tensor, step: ForwardContext) -> int:
    """The axis of the step's rows; heads may stand before them or after.

    Where there are as many heads as rows it is the axis of the larger stride: all that comes from
    one row lies together.
    """
    n_rows = step.positions.shape[0]
    fitting = [axis for axis in range(x.dim() - 1) if x.shape[axis] == n_rows]
    return max(fitting, key=x.stride)
