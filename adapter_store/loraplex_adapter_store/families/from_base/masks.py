"""Methods that multiply the base weight entry by entry.

HiRA   ΔW = W ⊙ (B A)
GLoRA  W ← W + W ⊙ A + B,  b ← b + b ⊙ D + E + W C, each of A … E low-rank, a vector, or a number
"""

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_adapter_store.families.contract import Fold, ReadContext
from loraplex_adapter_store.families.extras import fold_linears
from loraplex_adapter_store.families.module_groups import ModuleGroup
from loraplex_adapter_store.files.adapter_config import AdapterConfig
from loraplex_adapter_store.operators.kinds import MaskedWeight
from loraplex_adapter_store.plan import Family, ModulePlan

_PLACEHOLDERS = tuple(f"glora_{path}.zeros" for path in "ABCDE")  # of paths that were left out


def read_hira(context: ReadContext) -> Fold:
    context.config.get("init_weights")  # the start of the factors does not change the base
    return fold_linears(context, Family.HIRA, "none", _fold_hira, ("hira_A", "hira_B"))


def read_glora(context: ReadContext) -> Fold:
    if context.config.text("bias", "none") != "none":
        raise UnsupportedAdapter("GLoRA beside trained biases multiplies what was trained: refused")
    kind = context.config.text("config_A_B", "lora")
    required = {"lora": ("Xd", "Xu"), "vector": ("X",), "constant": ("X",)}.get(kind or "", ())
    parts = tuple(f"glora_{path}.{leaf}" for path in "AB" for leaf in required)
    optional = tuple(f"glora_{path}.{leaf}" for path in "CDE" for leaf in ("Xd", "Xu", "X"))
    rule, optional = f"none (A and B: {kind})", (*optional, *_PLACEHOLDERS)
    return fold_linears(context, Family.GLORA, rule, _fold_glora, parts, optional)


def _fold_hira(group: ModuleGroup) -> ModulePlan:
    return ModulePlan(delta_operator=MaskedWeight(*group.factors("hira_A", "hira_B")))


def _fold_glora(group: ModuleGroup) -> ModulePlan:
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
    """Return the factors of path A or B. A vector or a number becomes rank one."""
    if f"glora_{path}.Xu" in group and f"glora_{path}.Xd" in group:
        return group.factors(f"glora_{path}.Xu", f"glora_{path}.Xd")
    if f"glora_{path}.X" not in group:
        return None
    group.limit_rank(1)
    column = _per_output(group, path).unsqueeze(1)
    return torch.ones(1, group.in_features), column


def _glora_bias(group: ModuleGroup) -> Tensor | None:
    own = group.context.base.bias(group.module)
    parts = _bias_parts(group.config)
    if own is None:
        return None
    group.require(*parts)
    total = torch.zeros(group.out_features)
    if "glora_D.X" in group:
        total += own * _per_output(group, "D")
    if "glora_E.X" in group:
        total += _per_output(group, "E")
    if "glora_C.X" in group:
        total += group.base_weight() @ group.vector("glora_C.X", group.in_features)
    elif "glora_C.Xd" in group and "glora_C.Xu" in group:
        rank = group.rank("glora_C.Xu")
        left = group.take("glora_C.Xd", group.in_features, rank)
        column = left @ group.take("glora_C.Xu", rank, 1)
        total += group.base_weight() @ column.squeeze(1)
    return total


def _bias_parts(config: AdapterConfig) -> tuple[str, ...]:
    """Return the suffixes of paths C, D and E, which only linears with a bias have."""
    column = {"lora": ("glora_C.Xd", "glora_C.Xu"), "vector": ("glora_C.X",)}
    parts = column.get(config.text("config_C", "lora") or "", ())
    has_scales = config.text("config_D_E", "constant") != "none"
    return (*parts, "glora_D.X", "glora_E.X") if has_scales else parts


def _per_output(group: ModuleGroup, path: str) -> Tensor:
    """Return a number for each output, [out_features]; the file may hold a single number."""
    key = f"glora_{path}.X"
    n_stored = torch.Size(group.context.ledger.shape(group.keys[key])).numel()
    stored = group.vector(key, 1 if n_stored == 1 else group.out_features)
    return stored.expand(group.out_features).clone()
