"""The base weight is multiplied entry by entry.

HiRA   ΔW = W ⊙ (B A)
GLoRA  W ← W + W ⊙ A + B,  b ← b + b ⊙ D + E + W C, each of A … E low-rank, a vector, or a number
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex_adapter_store.adapter_config import AdapterConfig
from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_adapter_store.operators.deltas import MaskedWeight
from loraplex_adapter_store.plan import Family, ModulePlan

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, limit_rank, linear_groups

__all__ = ["read_glora", "read_hira"]

_PLACEHOLDERS = tuple(f"glora_{path}.zeros" for path in "ABCDE")  # of paths that were left out


def read_hira(context: ReadContext) -> Fold:
    context.config.get("init_weights")  # where factors start changes nothing of the base
    groups = linear_groups(context, ("hira_A", "hira_B"))
    modules = {module: _hira_module(group) for module, group in groups.items()}
    return fold_with_extras(context, Family.HIRA, "none", modules)


def read_glora(context: ReadContext) -> Fold:
    if context.config.text("bias", "none") != "none":
        raise UnsupportedAdapter("GLoRA beside trained biases multiplies what was trained: refused")
    kind = context.config.text("config_A_B", "lora")
    required = {"lora": ("Xd", "Xu"), "vector": ("X",), "constant": ("X",)}.get(kind or "", ())
    parts = tuple(f"glora_{path}.{leaf}" for path in "AB" for leaf in required)
    optional = tuple(f"glora_{path}.{leaf}" for path in "CDE" for leaf in ("Xd", "Xu", "X"))
    groups = linear_groups(context, parts, (*optional, *_PLACEHOLDERS))
    modules = {module: _glora_module(group) for module, group in groups.items()}
    return fold_with_extras(context, Family.GLORA, f"none (A and B: {kind})", modules)


def _hira_module(group: ModuleGroup) -> ModulePlan:
    rank = group.rank("hira_A")
    a = group.take("hira_A", rank, group.in_features)
    b = group.take("hira_B", group.out_features, rank)
    return ModulePlan(delta_operator=MaskedWeight(a, b))


def _glora_module(group: ModuleGroup) -> ModulePlan:
    _drop_placeholders(group)
    mask, added = _matrix(group, "A"), _matrix(group, "B")
    delta = None if mask is None else MaskedWeight(*mask)
    a, b = (None, None) if added is None else added
    return ModulePlan(a=a, b=b, bias=_glora_bias(group), delta_operator=delta)


def _drop_placeholders(group: ModuleGroup) -> None:
    for name in _PLACEHOLDERS:
        if name in group and bool(group.take(name).any()):
            raise AdapterMismatch(f"tensor {group.keys[name]!r} must be zero: nothing reads it")


def _matrix(group: ModuleGroup, path: str) -> tuple[Tensor, Tensor] | None:
    """(A, B) of path A or B: low-rank as stored; a vector or a number is of rank one."""
    if f"glora_{path}.Xu" in group and f"glora_{path}.Xd" in group:
        rank = group.rank(f"glora_{path}.Xu")
        a = group.take(f"glora_{path}.Xu", rank, group.in_features)
        return a, group.take(f"glora_{path}.Xd", group.out_features, rank)
    if f"glora_{path}.X" not in group:
        return None
    limit_rank(group.context, group.module, 1)
    column = _per_output(group, path).unsqueeze(1)
    return torch.ones(1, group.in_features), column


def _glora_bias(group: ModuleGroup) -> Tensor | None:
    base = group.context.base
    own = base.bias(group.module)
    parts = _bias_parts(group.context.config)
    if own is None:
        return None
    lost = [f"{group.module}.{part}" for part in parts if part not in group]
    if lost:
        raise AdapterMismatch(
            f"{group.module} is incomplete: it lacks {', '.join(lost)}", lost, missing_keys=lost
        )
    total = torch.zeros(group.out_features)
    if "glora_D.X" in group:
        total += own * _per_output(group, "D")
    if "glora_E.X" in group:
        total += _per_output(group, "E")
    if "glora_C.X" in group:
        total += base.weight(group.module) @ group.vector("glora_C.X", group.in_features)
    elif "glora_C.Xd" in group and "glora_C.Xu" in group:
        rank = group.rank("glora_C.Xu")
        column = group.take("glora_C.Xd", group.in_features, rank) @ group.take(
            "glora_C.Xu", rank, 1
        )
        total += base.weight(group.module) @ column.squeeze(1)
    return total


def _bias_parts(config: AdapterConfig) -> tuple[str, ...]:
    """The tensors of a linear with a bias, that is: the others have no C, D and E."""
    column = {"lora": ("glora_C.Xd", "glora_C.Xu"), "vector": ("glora_C.X",)}
    parts = column.get(config.text("config_C", "lora") or "", ())
    has_scales = config.text("config_D_E", "constant") != "none"
    return (*parts, "glora_D.X", "glora_E.X") if has_scales else parts


def _per_output(group: ModuleGroup, path: str) -> Tensor:
    """A number for each output, [out_features], stored as one or as that many."""
    key = f"glora_{path}.X"
    n_stored = torch.Size(group.context.ledger.shape(group.keys[key])).numel()
    stored = group.vector(key, 1 if n_stored == 1 else group.out_features)
    return stored.expand(group.out_features).clone()
