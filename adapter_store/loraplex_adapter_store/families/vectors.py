"""Methods that train vectors, not matrices.

IA³    y = l ⊙ (W x + b)                  (attention keys and values)
       y = W (l ⊙ x) + b                  (feed-forward modules: the input is scaled)
BEFT   y = W x + b + v
LoFiT  o_proj((1 + a) ⊙ h + v) per head = W_o ((1 + a) ⊙ h) + W_o v
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from loraplex_adapter_store.adapter_config import AdapterConfig
from loraplex_adapter_store.errors import AdapterMismatch
from loraplex_adapter_store.plan import Family, ModulePlan
from loraplex_adapter_store.targets import module_in
from loraplex_adapter_store.tensor_names import group_by_module, module_names, resolve_module

from .contract import Fold, ReadContext
from .coverage import check_coverage
from .extras import read_extras

__all__ = ["read_beft", "read_ia3", "read_lofit"]

_HEAD = re.compile(r"(?P<attention>.+)\.(?P<part>attn_A|attn_v)\.(?P<head>\d+)")


def read_ia3(context: ReadContext) -> Fold:
    grouped = group_by_module(context.ledger.names, ("ia3_l",), context.base)
    check_coverage(context, grouped)
    modules = {
        module: _ia3_module(context, module, parts["ia3_l"]) for module, parts in grouped.items()
    }
    extras = read_extras(context, modules)
    return Fold(
        Family.IA3,
        "vectors, no scale",
        modules=extras.modules,
        replaced_weights=extras.replaced_weights,
    )


def read_beft(context: ReadContext) -> Fold:
    grouped = group_by_module(context.ledger.names, ("beft_bias",), context.base)
    check_coverage(context, grouped)
    modules: dict[str, ModulePlan] = {}
    for module, parts in grouped.items():
        bias = context.ledger.take(parts["beft_bias"]).flatten()
        _check_length(parts["beft_bias"], bias.numel(), context.base.modules[module].out_features)
        modules[module] = ModulePlan(bias=bias)
    extras = read_extras(context, modules)
    return Fold(
        Family.BEFT,
        "biases, no scale",
        modules=extras.modules,
        replaced_weights=extras.replaced_weights,
    )


def read_lofit(context: ReadContext) -> Fold:
    heads: dict[str, dict[str, dict[int, str]]] = {}
    names = module_names(context.base) | {name.rpartition(".")[0] for name in context.base.modules}
    for key in context.ledger.names:
        match = _HEAD.fullmatch(key)
        attention = None if match is None else resolve_module(match["attention"], names)
        if match is not None and attention is not None:
            parts = heads.setdefault(attention, {"attn_A": {}, "attn_v": {}})
            parts[match["part"]][int(match["head"])] = key
    modules: dict[str, ModulePlan] = {}
    for attention, parts in heads.items():
        output = _output_projection(context, attention)
        modules[output] = _lofit_module(context, output, parts)
    if not modules:
        raise AdapterMismatch(
            "no attn_v vectors of this base's attention blocks",
            context.ledger.unclaimed,
            unexpected_keys=context.ledger.unclaimed,
        )
    return Fold(Family.LOFIT, "head offsets through o_proj, no scale", modules=modules)


def _ia3_module(context: ReadContext, module: str, key: str) -> ModulePlan:
    vector = context.ledger.take(key).flatten()
    shape = context.base.modules[module]
    if _is_feedforward(context.config, module):
        _check_length(key, vector.numel(), shape.in_features)
        return ModulePlan(in_scale=vector)
    _check_length(key, vector.numel(), shape.out_features)
    return ModulePlan(out_scale=vector)


def _is_feedforward(config: AdapterConfig, module: str) -> bool:
    return module_in(config.names("feedforward_modules"), module)


def _output_projection(context: ReadContext, attention: str) -> str:
    for leaf in ("o_proj", "out_proj", "c_proj", "dense"):
        if f"{attention}.{leaf}" in context.base.modules:
            return f"{attention}.{leaf}"
    raise AdapterMismatch(f"{attention} has no output projection to carry the head offsets")


def _lofit_module(
    context: ReadContext, output: str, parts: Mapping[str, Mapping[int, str]]
) -> ModulePlan:
    base = context.base
    scales = torch.zeros(base.n_heads, base.head_dim)
    offsets = torch.zeros(base.n_heads, base.head_dim)
    for target, name in ((scales, "attn_A"), (offsets, "attn_v")):
        for head, key in parts[name].items():
            if head >= base.n_heads:
                raise AdapterMismatch(f"{key}: the base has {base.n_heads} heads")
            target[head] = context.ledger.take(key, (base.head_dim,))
    bias = base.weight(output) @ offsets.flatten() if bool(offsets.any()) else None
    in_scale = 1 + scales.flatten() if bool(scales.any()) else None
    if bias is None and in_scale is None:
        bias = torch.zeros(base.modules[output].out_features)
    return ModulePlan(bias=bias, in_scale=in_scale)


def _check_length(key: str, have: int, need: int) -> None:
    if have != need:
        raise AdapterMismatch(f"tensor {key!r} has {have} entries, the base needs {need}")
