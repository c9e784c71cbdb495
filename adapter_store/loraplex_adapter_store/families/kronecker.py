"""LoKr: ΔW = α/r · W₁ ⊗ W₂, each factor as it is or as a product of rank r."""

from __future__ import annotations

from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch
from loraplex_adapter_store.operators.deltas import Kronecker
from loraplex_adapter_store.plan import Family, ModulePlan

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, linear_groups
from .scaling import pattern_scale

__all__ = ["read"]

_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def read(context: ReadContext) -> Fold:
    context.config.get("init_weights")  # where factors start changes nothing of the base
    groups = linear_groups(context, (), optional=_PARTS)
    modules = {module: _module(group) for module, group in groups.items()}
    rank, alpha = context.config.integer("r", 8), context.config.number("alpha", 8)
    return fold_with_extras(context, Family.LOKR, f"alpha/r = {alpha:g}/{rank}", modules)


def _module(group: ModuleGroup) -> ModulePlan:
    scale = pattern_scale(group.context.config, group.module, "alpha").scale
    left, right = _factor(group, "lokr_w1"), _factor(group, "lokr_w2")
    shape = (left.shape[0] * right.shape[0], left.shape[1] * right.shape[1])
    if shape != (group.out_features, group.in_features):
        raise AdapterMismatch(
            f"{group.module}: factors of {list(left.shape)} and {list(right.shape)} make "
            f"{list(shape)}, the base needs [{group.out_features}, {group.in_features}]"
        )
    return ModulePlan(delta_operator=Kronecker(left * scale, right))


def _factor(group: ModuleGroup, name: str) -> Tensor:
    if name in group:
        return group.take(name, None, None)
    halves = f"{name}_a", f"{name}_b"
    lost = [f"{group.module}.{half}" for half in halves if half not in group]
    if lost:
        raise AdapterMismatch(
            f"{group.module} is incomplete: it lacks {', '.join(lost)}", lost, missing_keys=lost
        )
    rank = group.rank(halves[1])
    return group.take(halves[0], None, rank) @ group.take(halves[1], rank, None)
