"""Methods that learn how many ranks each module keeps: AdaLoRA and SoRA, folded to true ranks.

AdaLoRA  ΔW = α/(r₀ + 1e-5) · B diag(E) A      r₀ = init_r, whatever was pruned since
SoRA     ΔW = α/r · B diag(g) A                 rows with g = 0 are dropped; r is the original rank
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from loraplex_adapter_store.errors import LimitExceeded
from loraplex_adapter_store.plan import Family, ModulePlan
from loraplex_adapter_store.tensor_names import group_by_module

from .contract import Fold, ReadContext
from .coverage import check_coverage, require_parts
from .extras import read_extras

__all__ = ["read_adalora", "read_sora"]

_RANKNUM_EPSILON = 1e-5  # PEFT divides by ranknum + this
_SORA_SPELLINGS = ("lora.lora_A", "lora.lora_B", "lora.gate")


def read_adalora(context: ReadContext) -> Fold:
    config = context.config
    init_rank = config.integer("init_r", 12)
    alpha = config.number("lora_alpha", 8)
    scale = (alpha if alpha > 0 else float(init_rank)) / (init_rank + _RANKNUM_EPSILON)
    names = ("lora_A", "lora_B", "lora_E")
    grouped = group_by_module(context.ledger.names, names, context.base)
    check_coverage(context, grouped)
    modules = {
        module: _gated(context, module, parts, names, scale) for module, parts in grouped.items()
    }
    extras = read_extras(context, modules)
    return Fold(
        family=Family.ADALORA,
        scale_rule=f"alpha/init_r = {alpha:g}/{init_rank} = {scale:g}, times lora_E per rank",
        modules=_kept(extras.modules),
        replaced_weights=extras.replaced_weights,
    )


def read_sora(context: ReadContext) -> Fold:
    config = context.config
    rank, alpha = config.integer("r", 8), config.number("lora_alpha", 16)
    names = ("lora_A", "lora_B", "gate")
    grouped = group_by_module(context.ledger.names, (*names, *_SORA_SPELLINGS), context.base)
    check_coverage(context, grouped)
    modules: dict[str, ModulePlan] = {}
    for module, parts in grouped.items():
        plain = {key.removeprefix("lora."): tensor for key, tensor in parts.items()}
        modules[module] = _gated(context, module, plain, names, alpha / rank)
    extras = read_extras(context, modules)
    return Fold(
        family=Family.SORA,
        scale_rule=f"alpha/r = {alpha:g}/{rank} = {alpha / rank:g}, zero gates dropped",
        modules=_kept(extras.modules),
        replaced_weights=extras.replaced_weights,
    )


def _kept(modules: Mapping[str, ModulePlan]) -> dict[str, ModulePlan]:
    """Without the modules that were pruned to nothing."""
    return {name: plan for name, plan in modules.items() if plan.rank or plan.bias is not None}


def _gated(
    context: ReadContext,
    module: str,
    parts: Mapping[str, str],
    names: tuple[str, str, str],
    scale: float,
) -> ModulePlan:
    require_parts(module, parts, names)
    shape = context.base.modules[module]
    a_key, b_key, gate_key = (parts[name] for name in names)
    found = context.ledger.shape(a_key)[0]
    if found > context.limits.max_rank:
        raise LimitExceeded(f"{module} has rank {found}, at most {context.limits.max_rank}")
    a = context.ledger.take(a_key, (found, shape.in_features))
    b = context.ledger.take(b_key, (shape.out_features, found))
    gate: Tensor = context.ledger.take(gate_key).flatten()
    if gate.numel() != found:
        context.ledger.expect(gate_key, (found, 1))
    kept = gate != 0
    return ModulePlan(a=a[kept], b=(b * gate * scale)[:, kept].contiguous())
