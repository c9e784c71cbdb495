"""Methods that learn how many ranks each module keeps: AdaLoRA and SoRA, folded to true ranks.

AdaLoRA  ΔW = α/(r₀ + 1e-5) · B diag(E) A      r₀ = init_r, whatever was pruned since
SoRA     ΔW = α/r · B diag(g) A                 rows with g = 0 are dropped; r is the original rank
"""

from __future__ import annotations

from collections.abc import Mapping

from loraplex_adapter_store.plan import Family, ModulePlan

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, linear_groups
from .scaling import positive_rank

__all__ = ["read_adalora", "read_sora"]

_RANKNUM_EPSILON = 1e-5  # PEFT divides by ranknum + this
_SORA_SYNONYMS = {"lora.lora_A": "lora_A", "lora.lora_B": "lora_B", "lora.gate": "gate"}


def read_adalora(context: ReadContext) -> Fold:
    init_rank = positive_rank(context.config, 12, key="init_r")
    alpha = context.config.number("lora_alpha", 8)
    scale = (alpha if alpha > 0 else float(init_rank)) / (init_rank + _RANKNUM_EPSILON)
    groups = linear_groups(context, ("lora_A", "lora_B", "lora_E"))
    rule = f"alpha/init_r = {alpha:g}/{init_rank} = {scale:g}, times lora_E per rank"
    return _gated(context, Family.ADALORA, rule, groups, "lora_E", scale)


def read_sora(context: ReadContext) -> Fold:
    rank, alpha = positive_rank(context.config, 8), context.config.number("lora_alpha", 16)
    groups = linear_groups(context, ("lora_A", "lora_B", "gate"), synonyms=_SORA_SYNONYMS)
    rule = f"alpha/r = {alpha:g}/{rank} = {alpha / rank:g}, zero gates dropped"
    return _gated(context, Family.SORA, rule, groups, "gate", alpha / rank)


def _gated(
    context: ReadContext,
    family: Family,
    rule: str,
    groups: Mapping[str, ModuleGroup],
    gate: str,
    scale: float,
) -> Fold:
    """Without the ranks whose gate is closed, and without the modules that have no others."""
    modules = {module: _gated_module(group, gate, scale) for module, group in groups.items()}
    kept = {module: plan for module, plan in modules.items() if plan.rank}
    return fold_with_extras(context, family, rule, kept)


def _gated_module(group: ModuleGroup, gate_part: str, scale: float) -> ModulePlan:
    rank = group.rank("lora_A")
    a = group.take("lora_A", rank, group.in_features)
    b = group.take("lora_B", group.out_features, rank)
    gate = group.vector(gate_part, rank)
    kept = gate != 0
    return ModulePlan(a=a[kept], b=(b * gate * scale)[:, kept].contiguous())
