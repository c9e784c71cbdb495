"""DeLoRA: rank-one parts of unit norm, scaled together by λ.

ΔW = λ/r · Σ_i (b_i/‖b_i‖) (a_i/‖a_i‖)ᵀ ⊙ w,   w[k] = ‖W[:, k]‖ at the start, stored in the file
"""

from __future__ import annotations

from loraplex_adapter_store.plan import Family, ModulePlan

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, linear_groups

__all__ = ["read"]

_SHORTEST = 1e-4  # PEFT's floor for a length


def read(context: ReadContext) -> Fold:
    parts = ("delora_A", "delora_B", "delora_lambda")
    groups = linear_groups(context, parts, optional=("delora_w_norm",))
    modules = {module: _module(group) for module, group in groups.items()}
    return fold_with_extras(context, Family.DELORA, "λ/r over normalised factors", modules)


def _module(group: ModuleGroup) -> ModulePlan:
    rank = group.rank("delora_A")
    a = group.take("delora_A", rank, group.in_features)
    b = group.take("delora_B", group.out_features, rank)
    strength = group.take("delora_lambda", 1) / rank
    lengths = a.norm(dim=1).clamp_min(_SHORTEST) * b.norm(dim=0).clamp_min(_SHORTEST)
    if "delora_w_norm" in group:
        columns = group.take("delora_w_norm", group.in_features)
    else:
        columns = group.context.base.weight(group.module).norm(dim=0)
    return ModulePlan(a=a * columns, b=b * (strength / lengths))
