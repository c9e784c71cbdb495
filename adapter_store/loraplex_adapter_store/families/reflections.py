"""HRA: the input passes a chain of r Householder reflections, which differs from I by rank r.

y = W H x + b,   H = Π_i (I − 2 u_i u_iᵀ),  u_i of length one  (apply_GS: orthogonal, too)

H − I = −2 Σ_i p_i u_iᵀ with p_i = Π_{j<i} (I − 2 u_j u_jᵀ) u_i, so  A = Uᵀ, B = −2 W P: rank r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch
from loraplex_adapter_store.plan import Family, ModulePlan

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, limit_rank, linear_groups

__all__ = ["read"]


def read(context: ReadContext) -> Fold:
    orthogonal = context.config.flag("apply_GS")
    groups = linear_groups(context, ("hra_u",))
    modules = {module: _module(group, orthogonal) for module, group in groups.items()}
    rule = "none (reflections of the input" + (", made orthogonal)" if orthogonal else ")")
    return fold_with_extras(context, Family.HRA, rule, modules)


def _module(group: ModuleGroup, orthogonal: bool) -> ModulePlan:
    limit_rank(group.context, group.module, group.shape("hra_u", 2)[1])
    u = group.take("hra_u", group.in_features, None)
    if not bool((u.norm(dim=0) > 0).all()):
        raise AdapterMismatch(f"{group.module}: a reflection of length zero has no direction")
    u = _orthogonalised(u) if orthogonal else u / u.norm(dim=0)
    passed = u if orthogonal else _passed_through(u)
    weight = group.context.base.weight(group.module)
    return ModulePlan(a=u.t().contiguous(), b=-2 * (weight @ passed))


def _orthogonalised(u: Tensor) -> Tensor:
    """Gram-Schmidt, column by column, [in_features, r]."""
    columns: list[Tensor] = []
    for column in u.unbind(dim=1):
        for earlier in columns:
            column = column - (earlier @ column) * earlier
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


def _passed_through(u: Tensor) -> Tensor:
    """Column i behind all reflections before it: p_i = u_i − 2 Σ_{j<i} p_j (u_j · u_i)."""
    columns: list[Tensor] = []
    for index, column in enumerate(u.unbind(dim=1)):
        if index:
            before = torch.stack(columns, dim=1)
            column = column - 2 * before @ (u[:, :index].t() @ column)
        columns.append(column)
    return torch.stack(columns, dim=1)
