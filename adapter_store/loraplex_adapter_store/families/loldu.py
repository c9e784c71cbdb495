"""LoLDU: a diagonal z and a scalar σ are trained between factors of W = P L D U.

    trained:  W − σ₀ P L_r diag(z₀) U_r  +  σ P L_r diag(z) U_r          (U with unit diagonal)
    served:   A' = U_r,  B' = P L_r diag(σ z − σ₀ z₀),  rank r, on the clean base

P, L, U come back from W by LU with partial pivoting when the file does not carry them. z₀ is D[:r]
(``init_method`` lu, ones, zeros, s_uniform, s_normal), its mean (constant), or must be in the file
as ``vector_z0`` (uniform, normal, which drew it at random). σ₀ = lora_alpha / r.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_adapter_store.plan import Family, ModulePlan

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, linear_groups

__all__ = ["read"]

_Z, _SIGMA, _Z0 = "vector_z", "scaling_factor", "vector_z0"
_COPIES = ("lora_A", "lora_B", "P", "original")  # frozen factors and the residual
_NESTED = "parametrizations.weight"
_SYNONYMS = {
    **{f"{_NESTED}.0.{part}": part for part in (_Z, _SIGMA, _Z0, *_COPIES)},
    f"{_NESTED}.original": "original",
}
_FROM_DIAGONAL = ("lu", "ones", "zeros", "s_uniform", "s_normal")


class _Ldu(NamedTuple):
    pl: Tensor  # P L_r [out, r]
    d: Tensor  # [r]
    u: Tensor  # U_r [r, in], unit diagonal


def read(context: ReadContext) -> Fold:
    groups = linear_groups(context, (_Z, _SIGMA), (_Z0, *_COPIES), synonyms=_SYNONYMS)
    modules = {module: _read_module(group) for module, group in groups.items()}
    rule = "learned σ per module; the subtracted start folded in"
    return fold_with_extras(context, Family.LOLDU, rule, modules)


def _read_module(group: ModuleGroup) -> ModulePlan:
    rank = group.rank(_Z, n_dims=1)
    limit = min(group.in_features, group.out_features)
    if not 1 <= rank <= limit:
        raise AdapterMismatch(
            f"tensor {group.keys[_Z]!r} has {rank} entries, {group.module} allows 1 to {limit}"
        )
    z = group.take(_Z, rank)
    sigma = group.vector(_SIGMA, 1)
    for copy in _COPIES:
        if copy in group:
            group.drop(copy, "frozen factor, recomputed from the base")
    ldu = _decompose(group.context.base.weight(group.module), rank)
    start = group.context.config.number("lora_alpha", 8) / rank
    diagonal = sigma * z - start * _subtracted(group, ldu.d)
    return ModulePlan(a=ldu.u, b=ldu.pl * diagonal)


def _decompose(weight: Tensor, rank: int) -> _Ldu:
    p, lower, upper = torch.linalg.lu(weight)
    d = torch.diagonal(upper)
    unit = upper[:rank] / d[:rank].unsqueeze(1)
    return _Ldu((p @ lower[:, :rank]).contiguous(), d[:rank].clone(), unit.contiguous())


def _subtracted(group: ModuleGroup, d: Tensor) -> Tensor:
    method = group.context.config.text("init_method", "lu")
    if _Z0 in group:
        return group.take(_Z0, *d.shape)
    if method in _FROM_DIAGONAL:
        return d
    if method == "constant":
        return d.mean().expand_as(d)
    raise UnsupportedAdapter(
        f"LoLDU with init_method={method!r} drew its start at random: the file must carry vector_z0"
    )
