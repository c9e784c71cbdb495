"""Low-rank updates with factors made of blocks: GraLoRA and Block-LoRA.

GraLoRA cuts the weight into k × k tiles, each with a LoRA of rank r/k, and one over all:

tile (j, n):  ΔW = s · B_j[n] A_n[j],  A [k, in/k, r], B [k, r, out/k]: j cuts r by k in A, n in B
all tiles:    A = blocks of A_n on the diagonal, rank k·r;   hybrid_r more ranks over all
s = alpha / (r + hybrid_r)

In Block-LoRA the blocks of the down-projection are one shared matrix:

rank axis     A = [A_s; …; A_s], B = [B_1 … B_n]:   ΔW = s · (Σ_i B_i) A_s           rank r/n
feature axis  A = [A_f … A_f] over input slices:    ΔW = s · B [A_f … A_f]           rank r

``block_lora_A.weight`` [r/n, in] or [r, in/n]; ``block_lora_B.weight`` [n, out, r/n] or [out, r].
"""

from functools import partial

import torch

from loraplex_adapter_store.errors import AdapterMismatch, MalformedFile
from loraplex_adapter_store.families.contract import Fold, ReadContext
from loraplex_adapter_store.families.extras import fold_linears
from loraplex_adapter_store.families.module_groups import ModuleGroup
from loraplex_adapter_store.families.scaling import lora_scale, scale_rule
from loraplex_adapter_store.plan import Family, ModulePlan

_TILES_A, _TILES_B = "gralora_A", "gralora_B"
_HYBRID_A, _HYBRID_B = "gralora_A_general.weight", "gralora_B_general.weight"
_BLOCK_A, _BLOCK_B = "block_lora_A.weight", "block_lora_B.weight"


def read_gralora(context: ReadContext) -> Fold:
    alpha = context.config.number("alpha", 64)
    rule = f"alpha/(r + hybrid_r), alpha = {alpha:g}; unrolled to rank k·r"
    fold = partial(_fold_gralora, alpha=alpha)
    return fold_linears(
        context, Family.GRALORA, rule, fold, (_TILES_A, _TILES_B), (_HYBRID_A, _HYBRID_B)
    )


def _fold_gralora(group: ModuleGroup, alpha: float) -> ModulePlan:
    n_tiles, _, rank = group.shape(_TILES_A, 3)
    if not n_tiles or group.in_features % n_tiles or group.out_features % n_tiles or rank % n_tiles:
        raise AdapterMismatch(
            f"{group.module}: {n_tiles} tiles do not divide [{group.out_features}, "
            f"{group.in_features}] and rank {rank} evenly"
        )
    hybrid_rank = group.rank(_HYBRID_A) if _HYBRID_A in group else 0
    group.limit_rank(n_tiles * rank + hybrid_rank)
    a = group.take(_TILES_A, n_tiles, group.in_features // n_tiles, rank)
    b = group.take(_TILES_B, n_tiles, rank, group.out_features // n_tiles)
    part = rank // n_tiles
    # Row (n, j, p) of A reads input tile n. Row block j of B writes output tile j from all n.
    rows = a.new_zeros(n_tiles, rank, n_tiles, group.in_features // n_tiles)
    for tile in range(n_tiles):
        rows[tile, :, tile] = a[tile].t()
    rows = rows.reshape(n_tiles * rank, group.in_features)
    columns = b.new_zeros(n_tiles, group.out_features // n_tiles, n_tiles, n_tiles, part)
    for tile in range(n_tiles):
        shares = b[tile].view(n_tiles, part, -1)  # input tile n, p, output
        columns[tile, :, :, tile] = shares.permute(2, 0, 1)
    flat = columns.reshape(group.out_features, n_tiles * rank)
    if hybrid_rank:
        hybrid_a, hybrid_b = group.factors(_HYBRID_A, _HYBRID_B)
        rows, flat = torch.cat([rows, hybrid_a]), torch.cat([flat, hybrid_b], dim=1)
    return ModulePlan(a=rows, b=flat * (alpha / (rank + hybrid_rank)))


def read_block_lora(context: ReadContext) -> Fold:
    config = context.config
    n_blocks = config.integer("n_blocks")
    axis = config.text("block_axis", "rank")
    if axis not in ("rank", "feature") or n_blocks < 1:
        raise MalformedFile(
            f"Block-LoRA needs block_axis 'rank' or 'feature' and n_blocks ≥ 1, "
            f"not {axis!r} and {n_blocks}"
        )
    fold = partial(_fold_rank if axis == "rank" else _fold_feature, n_blocks=n_blocks)
    rule = f"{scale_rule(config)}; {n_blocks} blocks over the {axis} axis"
    return fold_linears(context, Family.BLOCK_LORA, rule, fold, (_BLOCK_A, _BLOCK_B))


def _fold_rank(group: ModuleGroup, n_blocks: int) -> ModulePlan:
    rank, scale = lora_scale(group.config, group.module)
    if rank % n_blocks:
        raise MalformedFile(f"{group.module}: rank {rank} is not a multiple of n_blocks {n_blocks}")
    group.rank(_BLOCK_A)
    a = group.take(_BLOCK_A, rank // n_blocks, group.in_features)
    arms = group.take(_BLOCK_B, n_blocks, group.out_features, rank // n_blocks)
    return ModulePlan(a=a, b=arms.sum(dim=0) * scale)


def _fold_feature(group: ModuleGroup, n_blocks: int) -> ModulePlan:
    rank, scale = lora_scale(group.config, group.module)
    if group.in_features % n_blocks:
        raise MalformedFile(
            f"{group.module}: {group.in_features} inputs do not divide into {n_blocks} blocks"
        )
    group.rank(_BLOCK_A)
    a = group.take(_BLOCK_A, rank, group.in_features // n_blocks)
    b = group.take(_BLOCK_B, group.out_features, rank)
    return ModulePlan(a=a.repeat(1, n_blocks), b=b * scale)
