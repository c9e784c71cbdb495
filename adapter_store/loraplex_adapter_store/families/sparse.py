"""Only some entries of the weight are trained.

SHiRA        y = W x + Σ v[i] at (row, column)[i]; the places stand in the file
SuperTuning  the same at the largest (or smallest) weights of the base, with a LoRA beside it
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch
from loraplex_adapter_store.operators.deltas import SparseDelta
from loraplex_adapter_store.plan import Family, ModulePlan

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, linear_groups

__all__ = ["read_shira", "read_supertuning", "sparse_delta"]

_VALUES, _INDICES = "supertuning_values", "supertuning_indices"
_LORA_A, _LORA_B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


def read_shira(context: ReadContext) -> Fold:
    groups = linear_groups(context, ("shira_weight", "shira_indices"))
    modules = {module: _shira_module(group) for module, group in groups.items()}
    return fold_with_extras(context, Family.SHIRA, "none (entries added)", modules)


def read_supertuning(context: ReadContext) -> Fold:
    config = context.config
    parts: tuple[str, ...] = (_VALUES,)
    if config.flag("save_precomputed_indices", True):
        parts += (_INDICES,)
    if config.is_set("r"):
        parts += (_LORA_A, _LORA_B)
    groups = linear_groups(context, parts)
    modules = {module: _super_module(group) for module, group in groups.items()}
    return fold_with_extras(context, Family.SUPERTUNING, "none (entries added)", modules)


def sparse_delta(flat: Tensor, values: Tensor, in_features: int, out_features: int) -> SparseDelta:
    """Entries at row · in_features + column, in any order; those at one place are added."""
    places, inverse = torch.unique(flat, return_inverse=True)
    summed = values.new_zeros(places.numel()).index_add_(0, inverse, values)
    rows_columns = torch.stack([places // in_features, places % in_features])
    return SparseDelta(rows_columns.int(), summed, out_features)


def _shira_module(group: ModuleGroup) -> ModulePlan:
    values = group.take("shira_weight", None)
    larger = max(group.in_features, group.out_features)
    rows, columns = group.indices("shira_indices", larger, 2, values.numel())
    for what, found, size in (
        ("row", rows, group.out_features),
        ("column", columns, group.in_features),
    ):
        if found.numel() and int(found.max()) >= size:
            raise AdapterMismatch(
                f"{group.module}: an entry in {what} {int(found.max())}, the weight has {size}"
            )
    flat = rows * group.in_features + columns
    delta = sparse_delta(flat, values, group.in_features, group.out_features)
    return ModulePlan(delta_operator=delta)


def _super_module(group: ModuleGroup) -> ModulePlan:
    config = group.context.config
    largest = config.flag("select_top", True)
    values = group.take(_VALUES, None)
    n_places = group.in_features * group.out_features
    if values.numel() > n_places:
        raise AdapterMismatch(f"{group.module}: {values.numel()} entries of {n_places} places")
    if _INDICES in group:
        flat = group.indices(_INDICES, n_places, values.numel())
    else:
        scores = group.context.base.weight(group.module).abs().flatten()
        flat = scores.topk(values.numel(), largest=largest).indices
    delta = sparse_delta(flat, values, group.in_features, group.out_features)
    if _LORA_A not in group:
        return ModulePlan(delta_operator=delta)
    rank = group.rank(_LORA_A)
    a = group.take(_LORA_A, rank, group.in_features)
    b = group.take(_LORA_B, group.out_features, rank) * (config.number("lora_alpha") / rank)
    return ModulePlan(a=a, b=b, delta_operator=delta)
