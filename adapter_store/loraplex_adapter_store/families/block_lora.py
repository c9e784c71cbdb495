"""Block-LoRA: the blocks of the down-projection are one shared matrix.

rank axis     A = [A_s; …; A_s], B = [B_1 … B_n]:   ΔW = s · (Σ_i B_i) A_s           rank r/n
feature axis  A = [A_f … A_f] over input slices:    ΔW = s · B [A_f … A_f]           rank r

``block_lora_A.weight`` [r/n, in] or [r, in/n]; ``block_lora_B.weight`` [n, out, r/n] or [out, r].
"""

from __future__ import annotations

from loraplex_adapter_store.errors import MalformedFile
from loraplex_adapter_store.plan import Family, ModulePlan

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, linear_groups
from .scaling import lora_scale, scale_rule

__all__ = ["read"]

_A, _B = "block_lora_A.weight", "block_lora_B.weight"


def read(context: ReadContext) -> Fold:
    config = context.config
    n_blocks = config.integer("n_blocks")
    axis = config.text("block_axis", "rank")
    if axis not in ("rank", "feature") or n_blocks < 1:
        raise MalformedFile(
            f"Block-LoRA needs block_axis 'rank' or 'feature' and n_blocks ≥ 1, "
            f"not {axis!r} and {n_blocks}"
        )
    fold = _fold_rank if axis == "rank" else _fold_feature
    groups = linear_groups(context, (_A, _B))
    modules = {module: fold(group, n_blocks) for module, group in groups.items()}
    rule = f"{scale_rule(config)}; {n_blocks} blocks over the {axis} axis"
    return fold_with_extras(context, Family.BLOCK_LORA, rule, modules)


def _fold_rank(group: ModuleGroup, n_blocks: int) -> ModulePlan:
    rank, scale = lora_scale(group.context.config, group.module)
    if rank % n_blocks:
        raise MalformedFile(f"{group.module}: rank {rank} is not a multiple of n_blocks {n_blocks}")
    group.rank(_A)
    a = group.take(_A, rank // n_blocks, group.in_features)
    arms = group.take(_B, n_blocks, group.out_features, rank // n_blocks)
    return ModulePlan(a=a, b=arms.sum(dim=0) * scale)


def _fold_feature(group: ModuleGroup, n_blocks: int) -> ModulePlan:
    rank, scale = lora_scale(group.context.config, group.module)
    if group.in_features % n_blocks:
        raise MalformedFile(
            f"{group.module}: {group.in_features} inputs do not cut into {n_blocks} blocks"
        )
    group.rank(_A)
    a = group.take(_A, rank, group.in_features // n_blocks)
    b = group.take(_B, group.out_features, rank)
    return ModulePlan(a=a.repeat(1, n_blocks), b=b * scale)
