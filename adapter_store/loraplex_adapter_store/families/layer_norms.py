"""LN tuning: the norms' own weights and biases are trained, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_adapter_store.plan import Family, NormPlan
from loraplex_adapter_store.targets import targets_among
from loraplex_adapter_store.tensor_names import module_names

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import module_keys

__all__ = ["read"]

_LAYER = "ln_tuning_layers"


def read(context: ReadContext) -> Fold:
    base = context.base
    targets = targets_among(context.config, base, module_names(base))
    others = sorted(name for name in targets if name in base.modules or name in base.embeddings)
    if others:
        raise UnsupportedAdapter(
            f"LN_TUNING adapts norms only, its config targets {', '.join(others[:3])}; leave them "
            "out of target_modules and name them in modules_to_save",
            others,
        )
    suffixes = (f"{_LAYER}.weight", f"{_LAYER}.bias")
    found = module_keys(context, targets, suffixes)
    norms: dict[str, NormPlan] = {}
    for module, keys in found.items():
        weight, bias = (_part(context, module, part, keys) for part in ("weight", "bias"))
        norms[module] = NormPlan(weight=weight, bias=bias)
    fold = fold_with_extras(context, Family.LN_TUNING, "norms replaced, no scale", {})
    return replace(fold, norms={**fold.norms, **norms})


def _part(context: ReadContext, module: str, part: str, keys: Mapping[str, str]) -> Tensor | None:
    """A parameter that the base's norm has, as the file has it: PEFT copies the whole norm."""
    stored = context.base.parameters.get(f"{module}.{part}")
    suffix = f"{_LAYER}.{part}"
    if stored is None and suffix in keys:
        raise AdapterMismatch(f"{keys[suffix]}: {module} of the base has no {part}")
    if stored is None:
        return None
    if suffix not in keys:
        lost = f"{module}.{suffix}"
        raise AdapterMismatch(f"{module} is incomplete: it lacks {lost}", missing_keys=(lost,))
    return context.ledger.take(keys[suffix], stored)
