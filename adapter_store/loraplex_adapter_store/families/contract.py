"""What a family reader gets and gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from loraplex_adapter_store.adapter_config import AdapterConfig
from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.ledger import TensorLedger
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.plan import (
    ExpertPlan,
    Family,
    HeadPlan,
    ModulePlan,
    NormPlan,
    PrefixPlan,
    StackedFactors,
)

__all__ = ["FamilyReader", "Fold", "ReadContext"]


@dataclass(frozen=True, slots=True)
class ReadContext:
    """One adapter being read. ``notes`` and ``warnings`` grow; they end in the load report."""

    config: AdapterConfig
    ledger: TensorLedger
    base: BaseSpec
    limits: StoreLimits
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Fold:
    """An adapter folded to the clean base. Parts are as in ``AdapterPlan``."""

    family: Family
    scale_rule: str
    modules: Mapping[str, ModulePlan] = field(default_factory=dict)
    experts: Mapping[str, ExpertPlan] = field(default_factory=dict)
    prefix: PrefixPlan | None = None
    embedding_rows: Mapping[int, Tensor] = field(default_factory=dict)
    head_rows: Mapping[int, Tensor] = field(default_factory=dict)
    replaced_weights: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, NormPlan] = field(default_factory=dict)
    stacked: Mapping[str, StackedFactors] = field(default_factory=dict)
    head: HeadPlan | None = None
    kept_energy: float | None = None


FamilyReader = Callable[[ReadContext], Fold]
