"""ROAD: pairs of outputs are turned by an angle and scaled: y = R (W x + b).

In each group of k outputs i and j = i + k/2 make a pair; variants 1, 2 and 4 train that many
angles θ and scales α a pair.
"""

from __future__ import annotations

from loraplex_adapter_store.errors import AdapterMismatch, MalformedFile
from loraplex_adapter_store.operators.rotations import PairRotation
from loraplex_adapter_store.plan import Family, ModulePlan

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, linear_groups

__all__ = ["read"]

_VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}  # variant → angles a pair


def read(context: ReadContext) -> Fold:
    variant = context.config.text("variant", "road_1") or ""
    size = context.config.integer("group_size", 64)
    if variant not in _VARIANTS or size < 2 or size % 2:
        raise MalformedFile(
            f"adapter_config.json: ROAD needs a variant of {', '.join(_VARIANTS)} and an even "
            f"group_size, not {variant!r} and {size}"
        )
    groups = linear_groups(context, ("road_theta", "road_alpha"))
    modules = {module: _module(group, variant, size) for module, group in groups.items()}
    return fold_with_extras(context, Family.ROAD, f"none ({variant}, groups of {size})", modules)


def _module(group: ModuleGroup, variant: str, size: int) -> ModulePlan:
    if group.out_features % size:
        raise AdapterMismatch(
            f"{group.module}: groups of {size} do not cut {group.out_features} outputs"
        )
    length = _VARIANTS[variant] * group.out_features // 2
    theta, alpha = group.take("road_theta", length), group.take("road_alpha", length)
    if variant == "road_1":  # both outputs of a pair share angle and scale
        theta, alpha = (
            part.view(-1, size // 2).repeat_interleave(2, dim=0).flatten()
            for part in (theta, alpha)
        )
    if variant == "road_4":  # a pair's own output and the other have each their own
        theta, alpha = theta.view(-1, 2, size), alpha.view(-1, 2, size)
        cos = (alpha[:, 0] * theta[:, 0].cos()).flatten()
        sin = (alpha[:, 1] * theta[:, 1].sin()).flatten()
    else:
        cos, sin = alpha * theta.cos(), alpha * theta.sin()
    return ModulePlan(output_operator=PairRotation(cos - 1, sin, size))
