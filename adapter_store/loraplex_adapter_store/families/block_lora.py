"""Block-LoRA: the blocks of the down-projection are one shared matrix.

rank axis     A = [A_s; …; A_s], B = [B_1 … B_n]:   ΔW = s · (Σ_i B_i) A_s           rank r/n
feature axis  A = [A_f … A_f] over input slices:    ΔW = s · B [A_f … A_f]           rank r

``block_lora_A.weight`` [r/n, in] or [r, in/n]; ``block_lora_B.weight`` [n, out, r/n] or [out, r].
"""

from __future__ import annotations

from collections.abc import Mapping

from loraplex_adapter_store.errors import LimitExceeded, MalformedFile
from loraplex_adapter_store.plan import Family, ModulePlan
from loraplex_adapter_store.tensor_names import group_by_module

from .contract import Fold, ReadContext
from .coverage import check_coverage, require_parts
from .extras import read_extras
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
    grouped = group_by_module(context.ledger.names, (_A, _B), context.base)
    check_coverage(context, grouped)
    fold = _fold_rank if axis == "rank" else _fold_feature
    modules = {module: fold(context, module, parts, n_blocks) for module, parts in grouped.items()}
    extras = read_extras(context, modules)
    return Fold(
        family=Family.BLOCK_LORA,
        scale_rule=f"{scale_rule(config)}; {n_blocks} blocks over the {axis} axis",
        modules=extras.modules,
        replaced_weights=extras.replaced_weights,
    )


def _fold_rank(
    context: ReadContext, module: str, parts: Mapping[str, str], n_blocks: int
) -> ModulePlan:
    require_parts(module, parts, (_A, _B))
    shape = context.base.modules[module]
    rank, scale = _rank(context, module)
    if rank % n_blocks:
        raise MalformedFile(f"{module}: rank {rank} is not a multiple of n_blocks {n_blocks}")
    a = context.ledger.take(parts[_A], (rank // n_blocks, shape.in_features))
    arms = context.ledger.take(parts[_B], (n_blocks, shape.out_features, rank // n_blocks))
    return ModulePlan(a=a, b=arms.sum(dim=0) * scale)


def _fold_feature(
    context: ReadContext, module: str, parts: Mapping[str, str], n_blocks: int
) -> ModulePlan:
    require_parts(module, parts, (_A, _B))
    shape = context.base.modules[module]
    rank, scale = _rank(context, module)
    if shape.in_features % n_blocks:
        raise MalformedFile(f"{module}: {shape.in_features} inputs do not cut into {n_blocks}")
    a = context.ledger.take(parts[_A], (rank, shape.in_features // n_blocks))
    b = context.ledger.take(parts[_B], (shape.out_features, rank))
    return ModulePlan(a=a.repeat(1, n_blocks), b=b * scale)


def _rank(context: ReadContext, module: str) -> tuple[int, float]:
    rank, scale = lora_scale(context.config, module)
    if rank > context.limits.max_rank:
        raise LimitExceeded(f"{module} has rank {rank}, at most {context.limits.max_rank}")
    return rank, scale
