"""FRoD: W = U diag(λ₀) Vᵀ with one V for the same linear of all layers; λ and S (sparse) trained.

W ← U (S + diag(λ)) Vᵀ. V and the places of S must be in the file (save_projection=True); U comes
from the base: its columns are those of W V⁻ᵀ, of length one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_adapter_store.operators.deltas import DenseDelta
from loraplex_adapter_store.plan import Family, ModulePlan

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, linear_groups

__all__ = ["read"]

_SHARED = "base_model.frod_"
_SHORTEST = 1e-12


def read(context: ReadContext) -> Fold:
    groups = linear_groups(context, ("frod_lambda_l", "frod_lambda_s_values"))
    modules = {module: _module(group) for module, group in groups.items()}
    return fold_with_extras(context, Family.FROD, "none (singular values trained)", modules)


def _module(group: ModuleGroup) -> ModulePlan:
    ledger, n_in = group.context.ledger, group.in_features
    category = _category(group.module)
    keys = [f"{_SHARED}{part}.{category}" for part in ("V", "s_indices", "s_size")]
    if any(key not in ledger.names for key in keys):
        raise UnsupportedAdapter(
            f"the file lacks {' or '.join(keys)}: save it with save_projection=True, working V out "
            "again would depend on the machine"
        )
    right = ledger.take(keys[0], (n_in, n_in))
    values = group.take("frod_lambda_s_values", None)
    rows, columns = ledger.take_indices(keys[1], (2, values.numel()), n_in)
    if ledger.take_indices(keys[2], (2,), 1 << 31).tolist() != [n_in, n_in]:
        raise AdapterMismatch(f"tensor {keys[2]!r} must say [{n_in}, {n_in}], the size of S")
    core = torch.diag(group.take("frod_lambda_l", n_in))
    core.index_put_((rows, columns), values, accumulate=True)
    weight = group.context.base.weight(group.module)
    left = _left(weight, right)
    return ModulePlan(delta_operator=DenseDelta(left @ core @ right.t() - weight))


def _left(weight: Tensor, right: Tensor) -> Tensor:
    """U [out, in], in float64 as PEFT works it out."""
    weight64, right64 = weight.double(), right.double()
    try:
        stretched = torch.linalg.solve(right64, weight64.t()).t()
    except RuntimeError:  # V is singular
        stretched = weight64 @ torch.linalg.pinv(right64, rtol=1e-6).t()
    lengths = stretched.norm(dim=0)
    return torch.where(lengths > _SHORTEST, stretched / lengths, 0.0).float()


def _category(module: str) -> str:
    """What PEFT calls a linear that stands in every layer, as "self_attn_q_proj"."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    name = f"{parts[-2]}_{parts[-1]}"
    if name == "output_dense" and len(parts) > 2 and parts[-3] == "attention":
        return "attention_output"
    return name
