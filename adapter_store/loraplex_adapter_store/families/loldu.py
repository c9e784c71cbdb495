"""LoLDU: a diagonal z and a scalar σ are trained between factors of W = P L D U.

    trained:  W − σ₀ P L_r diag(z₀) U_r  +  σ P L_r diag(z) U_r          (U with unit diagonal)
    served:   A' = U_r,  B' = P L_r diag(σ z − σ₀ z₀),  rank r, on the clean base

P, L, U come back from W by LU with partial pivoting when the file does not carry them. z₀ is D[:r]
(``init_method`` lu, ones, zeros, s_uniform, s_normal), its mean (constant), or must be in the file
as ``vector_z0`` (uniform, normal, which drew it at random). σ₀ = lora_alpha / r.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_adapter_store.errors import LimitExceeded, UnsupportedAdapter
from loraplex_adapter_store.plan import Family, ModulePlan
from loraplex_adapter_store.tensor_names import group_by_module

from .contract import Fold, ReadContext
from .coverage import check_coverage, require_parts
from .extras import read_extras

__all__ = ["read"]

_PARTS = ("vector_z", "scaling_factor", "vector_z0", "lora_A", "lora_B", "P", "original")
_NESTED = "parametrizations.weight"
_SUFFIXES = (
    *_PARTS,
    *(f"{_NESTED}.0.{part}" for part in _PARTS),
    f"{_NESTED}.original",
)
_FROM_DIAGONAL = ("lu", "ones", "zeros", "s_uniform", "s_normal")


class _Ldu(NamedTuple):
    pl: Tensor  # P L_r [out, r]
    d: Tensor  # [r]
    u: Tensor  # U_r [r, in], unit diagonal


def read(context: ReadContext) -> Fold:
    grouped = group_by_module(context.ledger.names, _SUFFIXES, context.base)
    plain = {
        module: {suffix.rpartition(".")[2]: key for suffix, key in parts.items()}
        for module, parts in grouped.items()
    }
    check_coverage(context, plain)
    modules = {module: _read_module(context, module, parts) for module, parts in plain.items()}
    extras = read_extras(context, modules)
    rule = "learned σ per module; the subtracted start folded in"
    return Fold(
        Family.LOLDU, rule, modules=extras.modules, replaced_weights=extras.replaced_weights
    )


def _read_module(context: ReadContext, module: str, parts: Mapping[str, str]) -> ModulePlan:
    require_parts(module, parts, ("vector_z", "scaling_factor"))
    ledger = context.ledger
    rank = ledger.shape(parts["vector_z"])[0]
    if rank > context.limits.max_rank:
        raise LimitExceeded(f"{module} has rank {rank}, at most {context.limits.max_rank}")
    z = ledger.take(parts["vector_z"], (rank,))
    sigma = ledger.take(parts["scaling_factor"]).flatten()[0]
    ldu = _decompose(context.base.weight(module), rank)
    _drop_copies(context, parts)
    start = context.config.number("lora_alpha", 8) / rank
    diagonal = sigma * z - start * _subtracted(context, parts, ldu.d)
    return ModulePlan(a=ldu.u, b=ldu.pl * diagonal)


def _decompose(weight: Tensor, rank: int) -> _Ldu:
    p, lower, upper = torch.linalg.lu(weight)
    d = torch.diagonal(upper)
    unit = upper[:rank] / d[:rank].unsqueeze(1)
    return _Ldu((p @ lower[:, :rank]).contiguous(), d[:rank].clone(), unit.contiguous())


def _subtracted(context: ReadContext, parts: Mapping[str, str], d: Tensor) -> Tensor:
    if "vector_z0" in parts:
        return context.ledger.take(parts["vector_z0"], tuple(d.shape))
    method = context.config.text("init_method", "lu")
    if method in _FROM_DIAGONAL:
        return d
    if method == "constant":
        return d.mean().expand_as(d)
    raise UnsupportedAdapter(
        f"LoLDU with init_method={method!r} drew its start at random: the file must carry vector_z0"
    )


def _drop_copies(context: ReadContext, parts: Mapping[str, str]) -> None:
    """The trainer also saves the frozen factors and the residual; they follow from the base."""
    for part in ("lora_A", "lora_B", "P", "original"):
        if part in parts:
            context.ledger.claim(parts[part])
            context.notes.append(f"{parts[part]}: frozen factor, recomputed from the base")
