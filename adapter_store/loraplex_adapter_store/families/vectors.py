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

from loraplex_adapter_store.errors import AdapterMismatch
from loraplex_adapter_store.plan import Family, ModulePlan
from loraplex_adapter_store.targets import is_feedforward
from loraplex_adapter_store.tensor_names import module_names, resolve_module

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, linear_groups

__all__ = ["read_beft", "read_ia3", "read_lofit"]

_HEAD = re.compile(r"(?P<attention>.+)\.(?P<part>attn_A|attn_v)\.(?P<head>\d+)")


def read_ia3(context: ReadContext) -> Fold:
    groups = linear_groups(context, ("ia3_l",))
    modules = {module: _ia3_module(group) for module, group in groups.items()}
    return fold_with_extras(context, Family.IA3, "vectors, no scale", modules)


def read_beft(context: ReadContext) -> Fold:
    groups = linear_groups(context, ("beft_bias",))
    modules = {
        module: ModulePlan(bias=group.vector("beft_bias", group.out_features))
        for module, group in groups.items()
    }
    return fold_with_extras(context, Family.BEFT, "biases, no scale", modules)


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
    rule = "head offsets through o_proj, no scale"
    return fold_with_extras(context, Family.LOFIT, rule, modules)


def _ia3_module(group: ModuleGroup) -> ModulePlan:
    if is_feedforward(group.context.config, group.module):
        return ModulePlan(in_scale=group.vector("ia3_l", group.in_features))
    return ModulePlan(out_scale=group.vector("ia3_l", group.out_features))


def _output_projection(context: ReadContext, attention: str) -> str:
    for leaf in ("o_proj", "out_proj", "c_proj", "dense"):
        if f"{attention}.{leaf}" in context.base.modules:
            return f"{attention}.{leaf}"
    raise AdapterMismatch(f"{attention} has no output projection to carry the head offsets")


def _lofit_module(
    context: ReadContext, output: str, parts: Mapping[str, Mapping[int, str]]
) -> ModulePlan:
    base = context.base
    if base.modules[output].in_features != base.n_heads * base.head_dim:
        raise AdapterMismatch(f"{output} does not take {base.n_heads} heads of {base.head_dim}")
    scales = torch.zeros(base.n_heads, base.head_dim)
    offsets = torch.zeros(base.n_heads, base.head_dim)
    for target, name in ((scales, "attn_A"), (offsets, "attn_v")):
        for head, key in parts[name].items():
            if head >= base.n_heads:
                raise AdapterMismatch(f"{key}: the base has {base.n_heads} heads")
            target[head] = context.ledger.take(key, (base.head_dim,))
    bias = base.weight(output) @ offsets.flatten() if parts["attn_v"] else None
    in_scale = 1 + scales.flatten() if parts["attn_A"] else None
    return ModulePlan(bias=bias, in_scale=in_scale)
