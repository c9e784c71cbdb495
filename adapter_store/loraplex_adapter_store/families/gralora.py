"""GraLoRA: the weight is cut into k × k tiles, each with a LoRA of rank r/k, and one over all.

tile (j, n):  ΔW = s · B_j[n] A_n[j],  A [k, in/k, r], B [k, r, out/k]: j cuts r by k in A, n in B
all tiles:    A = blocks of A_n on the diagonal, rank k·r;   hybrid_r more ranks over all
s = alpha / (r + hybrid_r)
"""

from __future__ import annotations

import torch

from loraplex_adapter_store.errors import AdapterMismatch
from loraplex_adapter_store.plan import Family, ModulePlan

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, limit_rank, linear_groups

__all__ = ["read"]

_A, _B = "gralora_A", "gralora_B"
_HYBRID_A, _HYBRID_B = "gralora_A_general.weight", "gralora_B_general.weight"


def read(context: ReadContext) -> Fold:
    alpha = context.config.number("alpha", 64)
    groups = linear_groups(context, (_A, _B), optional=(_HYBRID_A, _HYBRID_B))
    modules = {module: _module(group, alpha) for module, group in groups.items()}
    rule = f"alpha/(r + hybrid_r), alpha = {alpha:g}; unrolled to rank k·r"
    return fold_with_extras(context, Family.GRALORA, rule, modules)


def _module(group: ModuleGroup, alpha: float) -> ModulePlan:
    n_tiles, _, rank = group.shape(_A, 3)
    if not n_tiles or group.in_features % n_tiles or group.out_features % n_tiles or rank % n_tiles:
        raise AdapterMismatch(
            f"{group.module}: {n_tiles} tiles cut neither [{group.out_features}, "
            f"{group.in_features}] nor rank {rank} evenly"
        )
    hybrid_rank = group.rank(_HYBRID_A) if _HYBRID_A in group else 0
    limit_rank(group.context, group.module, n_tiles * rank + hybrid_rank)
    a = group.take(_A, n_tiles, group.in_features // n_tiles, rank)
    b = group.take(_B, n_tiles, rank, group.out_features // n_tiles)
    part = rank // n_tiles
    # Row (n, j, p) of A reads input tile n; row block j of B writes output tile j from all n.
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
        rows = torch.cat([rows, group.take(_HYBRID_A, hybrid_rank, group.in_features)])
        flat = torch.cat([flat, group.take(_HYBRID_B, group.out_features, hybrid_rank)], dim=1)
    return ModulePlan(a=rows, b=flat * (alpha / (rank + hybrid_rank)))
