"""Factors that are functions of the frozen base weight, worked out once when the file is read.

DEFT    y = (I − Q Pᵀ) W x + s · Q R x + b    A = s R − Pᵀ W, B = Q   ("relu": Q, P₊; "qr": Q, Q)
PEANuT  ΔW = s · B f(W)                       f: a small network over the columns of W, r outputs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from loraplex_adapter_store.errors import MalformedFile, UnsupportedAdapter
from loraplex_adapter_store.plan import Family, ModulePlan

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, limit_rank, linear_groups

__all__ = ["read_deft", "read_peanut"]

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


def read_deft(context: ReadContext) -> Fold:
    config = context.config
    method = config.text("decomposition_method", "relu")
    if method not in ("relu", "qr"):
        raise MalformedFile(
            f"adapter_config.json: decomposition_method is {method!r}, 'relu' or 'qr' is needed"
        )
    removes_only = config.flag("para")
    groups = linear_groups(context, ("deft_P",) if removes_only else ("deft_P", "deft_R"))
    alpha = config.number("alpha", 0)
    modules = {module: _deft_module(group, method, alpha) for module, group in groups.items()}
    rule = f"alpha/r, alpha = {alpha:g}" if alpha else "none"
    return fold_with_extras(context, Family.DEFT, f"{rule}; projection by {method}", modules)


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
    groups = linear_groups(context, ("peanut_A.weight", "peanut_B.weight", *layers))
    modules = {
        module: _peanut_module(group, depth, name, scale) for module, group in groups.items()
    }
    return fold_with_extras(context, Family.PEANUT, f"scaling = {scale:g}", modules)


def _deft_module(group: ModuleGroup, method: str, alpha: float) -> ModulePlan:
    rank = group.shape("deft_P", 2)[1]
    limit_rank(group.context, group.module, rank)
    p = group.take("deft_P", group.out_features, rank)
    q = p if method == "relu" else torch.linalg.qr(p)[0]
    right = torch.relu(p) if method == "relu" else q
    a = -(right.t() @ group.context.base.weight(group.module))
    if "deft_R" in group:
        scale = alpha / rank if alpha else 1.0
        a = a + scale * group.take("deft_R", rank, group.in_features)
    return ModulePlan(a=a, b=q)


def _peanut_module(group: ModuleGroup, depth: int, name: str, scale: float) -> ModulePlan:
    activation = _ACTIVATIONS[name]
    rank = group.rank("peanut_A.weight")

    def layer(part: str, index: int, values: Tensor) -> Tensor:
        weight = group.take(f"peanut_{part}.{index}.weight", rank, rank)
        return activation(values @ weight.t())

    weight = group.context.base.weight(group.module)
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
