"""Updates that are functions of the frozen base weight, computed once when the file is read.

DEFT    y = (I − Q Pᵀ) W x + s · Q R x + b    A = s R − Pᵀ W, B = Q   ("relu": Q, P₊; "qr": Q, Q)
PEANuT  ΔW = s · B f(W)                       f: a small network over the columns of W, r outputs
FRoD    W ← U (S + diag(λ)) Vᵀ                λ and S (sparse) trained, one V for all layers

V of FRoD and the indices of S must be in the file (save_projection=True). U comes from the base:
the columns of W V⁻ᵀ, normalised to length one.

LoLDU: a diagonal z and a scalar σ are trained between factors of W = P L D U.

    trained:  W − σ₀ P L_r diag(z₀) U_r  +  σ P L_r diag(z) U_r          (U with unit diagonal)
    served:   A' = U_r,  B' = P L_r diag(σ z − σ₀ z₀),  rank r, on the clean base

P, L and U are computed from W by LU with partial pivoting. z₀ is D[:r] (``init_method`` lu, ones,
zeros, s_uniform, s_normal) or its mean (constant). Random starts (uniform, normal) must be in the
file as ``vector_z0``. σ₀ = lora_alpha / r with lora_alpha 1 by default, and σ = σ₀ if it is not in
the file: ``get_loldu_state_dict`` of the released code saves z alone.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, MalformedFile, UnsupportedAdapter
from loraplex_adapter_store.families.contract import Fold, ReadContext
from loraplex_adapter_store.families.extras import fold_linears
from loraplex_adapter_store.families.module_groups import ModuleGroup
from loraplex_adapter_store.operators.kinds import DenseDelta
from loraplex_adapter_store.plan import Family, ModulePlan

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "swish": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": lambda values: values,
}
_MAX_DEPTH = 64
_FROD_SHARED = "base_model.frod_"
_SHORTEST = 1e-12
_Z, _SIGMA, _Z0 = "vector_z", "scaling_factor", "vector_z0"
# Frozen factors, the residual and a mask of ones.
_COPIES = ("lora_A", "lora_B", "P", "original", "layer_weights", "lora_dropout_mask")
_NESTED = "parametrizations.weight"
_SYNONYMS = {
    **{f"{_NESTED}.0.{part}": part for part in (_Z, _SIGMA, _Z0, *_COPIES)},
    f"{_NESTED}.original": "original",
}
_FROM_DIAGONAL = ("lu", "ones", "zeros", "s_uniform", "s_normal")


def read_deft(context: ReadContext) -> Fold:
    config = context.config
    method = config.text("decomposition_method", "relu")
    if method not in ("relu", "qr"):
        raise MalformedFile(
            f"adapter_config.json: decomposition_method is {method!r}, 'relu' or 'qr' is needed"
        )
    parts = ("deft_P",) if config.flag("para") else ("deft_P", "deft_R")
    alpha = config.number("alpha", 0)
    rule = f"{f'alpha/r, alpha = {alpha:g}' if alpha else 'none'}; projection by {method}"
    fold = partial(_fold_deft, method=method, alpha=alpha)
    return fold_linears(context, Family.DEFT, rule, fold, parts)


def read_peanut(context: ReadContext) -> Fold:
    config = context.config
    depth, name = config.integer("depth", 0), config.text("act_fn", "relu") or ""
    if not 0 <= depth <= _MAX_DEPTH:
        raise MalformedFile(
            f"adapter_config.json: depth is {depth}, 0 to {_MAX_DEPTH} can be served"
        )
    if name not in _ACTIVATIONS:
        raise UnsupportedAdapter(
            f"PEANuT with act_fn {name!r} cannot be served; known: {', '.join(_ACTIVATIONS)}"
        )
    scale = config.number("scaling", 1.0)
    stacks = ("peanut_encoders", "peanut_decoders")
    layers = [f"{stack}.{index}.weight" for stack in stacks for index in range(depth)]
    parts = ("peanut_A.weight", "peanut_B.weight", *layers)
    fold = partial(_fold_peanut, depth=depth, activation=_ACTIVATIONS[name], scale=scale)
    return fold_linears(context, Family.PEANUT, f"scaling = {scale:g}", fold, parts)


def _fold_deft(group: ModuleGroup, method: str, alpha: float) -> ModulePlan:
    rank = group.shape("deft_P", 2)[1]
    group.limit_rank(rank)
    p = group.take("deft_P", group.out_features, rank)
    q = p if method == "relu" else torch.linalg.qr(p)[0]
    right = torch.relu(p) if method == "relu" else q
    a = -(right.t() @ group.base_weight())
    if "deft_R" in group:
        scale = alpha / rank if alpha else 1.0
        a = a + scale * group.take("deft_R", rank, group.in_features)
    return ModulePlan(a=a, b=q)


def _fold_peanut(
    group: ModuleGroup, depth: int, activation: Callable[[Tensor], Tensor], scale: float
) -> ModulePlan:
    rank = group.rank("peanut_A.weight")

    def layer(part: str, index: int, values: Tensor) -> Tensor:
        weight = group.take(f"peanut_{part}.{index}.weight", rank, rank)
        return activation(values @ weight.t())

    weight = group.base_weight()
    down = group.take("peanut_A.weight", rank, group.out_features)
    values = activation(weight.t() @ down.t())  # [in_features, rank]
    residuals: list[Tensor] = []
    for index in range(depth):
        residuals.append(values)
        values = layer("encoders", index, values)
    for index in range(depth):
        values = layer("decoders", index, values) + residuals.pop()
    b = group.take("peanut_B.weight", group.out_features, rank)
    return ModulePlan(a=values.t().contiguous(), b=b * scale)


def read_frod(context: ReadContext) -> Fold:
    parts = ("frod_lambda_l", "frod_lambda_s_values")
    return fold_linears(context, Family.FROD, "none (singular values trained)", _fold_frod, parts)


def _fold_frod(group: ModuleGroup) -> ModulePlan:
    ledger, n_in = group.context.ledger, group.in_features
    category = _category(group.module)
    keys = [f"{_FROD_SHARED}{part}.{category}" for part in ("V", "s_indices", "s_size")]
    if any(key not in ledger.names for key in keys):
        raise UnsupportedAdapter(
            f"the file lacks {' or '.join(keys)}: save it with save_projection=True; computing V "
            "again would depend on the machine"
        )
    right = ledger.take(keys[0], (n_in, n_in))
    values = group.take("frod_lambda_s_values", None)
    rows, columns = ledger.take_indices(keys[1], (2, values.numel()), n_in)
    if ledger.take_indices(keys[2], (2,), 1 << 31).tolist() != [n_in, n_in]:
        raise AdapterMismatch(f"tensor {keys[2]!r} must say [{n_in}, {n_in}], the size of S")
    core = torch.diag(group.take("frod_lambda_l", n_in))
    core.index_put_((rows, columns), values, accumulate=True)
    weight = group.base_weight()
    left = _left_vectors(weight, right)
    return ModulePlan(delta_operator=DenseDelta(left @ core @ right.t() - weight))


def _left_vectors(weight: Tensor, right: Tensor) -> Tensor:
    """Return U [out, in], computed in float64 as in PEFT."""
    weight64, right64 = weight.double(), right.double()
    try:
        stretched = torch.linalg.solve(right64, weight64.t()).t()
    except RuntimeError:  # V is singular
        stretched = weight64 @ torch.linalg.pinv(right64, rtol=1e-6).t()
    lengths = stretched.norm(dim=0)
    return torch.where(lengths > _SHORTEST, stretched / lengths, 0.0).float()


def _category(module: str) -> str:
    """Return PEFT's name for a linear of every layer, as "self_attn_q_proj"."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    name = f"{parts[-2]}_{parts[-1]}"
    if name == "output_dense" and len(parts) > 2 and parts[-3] == "attention":
        return "attention_output"
    return name


class _Ldu(NamedTuple):
    pl: Tensor  # P L_r [out, r]
    d: Tensor  # [r]
    u: Tensor  # U_r [r, in], unit diagonal


def read_loldu(context: ReadContext) -> Fold:
    rule = "learned σ per module; the subtracted start folded in"
    required, optional = (_Z,), (_SIGMA, _Z0, *_COPIES)
    return fold_linears(
        context, Family.LOLDU, rule, _fold_loldu, required, optional, synonyms=_SYNONYMS
    )


def _fold_loldu(group: ModuleGroup) -> ModulePlan:
    rank = group.rank(_Z, n_dims=1)
    limit = min(group.in_features, group.out_features)
    if not 1 <= rank <= limit:
        raise AdapterMismatch(
            f"tensor {group.keys[_Z]!r} has {rank} entries, {group.module} allows 1 to {limit}"
        )
    z = group.take(_Z, rank)
    start = group.config.number("lora_alpha", 1) / rank
    sigma = group.vector(_SIGMA, 1) if _SIGMA in group else start
    for copy in _COPIES:
        if copy in group:
            group.drop(copy, "frozen factor, recomputed from the base")
    ldu = _decompose(group.base_weight(), rank)
    diagonal = sigma * z - start * _subtracted(group, ldu.d)
    return ModulePlan(a=ldu.u, b=ldu.pl * diagonal)


def _decompose(weight: Tensor, rank: int) -> _Ldu:
    p, lower, upper = torch.linalg.lu(weight)
    d = torch.diagonal(upper)
    unit = upper[:rank] / d[:rank].unsqueeze(1)
    return _Ldu((p @ lower[:, :rank]).contiguous(), d[:rank].clone(), unit.contiguous())


def _subtracted(group: ModuleGroup, d: Tensor) -> Tensor:
    method = group.config.text("init_method", "lu")
    if _Z0 in group:
        return group.take(_Z0, *d.shape)
    if method in _FROM_DIAGONAL:
        return d
    if method == "constant":
        return d.mean().expand_as(d)
    raise UnsupportedAdapter(
        f"LoLDU with init_method={method!r} drew its start at random: the file must have vector_z0"
    )
