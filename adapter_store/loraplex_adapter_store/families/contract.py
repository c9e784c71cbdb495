"""The input and the result of a family reader."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.files.adapter_config import AdapterConfig
from loraplex_adapter_store.files.ledger import TensorLedger
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.plan import AdapterPlan


@dataclass(frozen=True, slots=True)
class ReadContext:
    """An adapter being read. ``notes`` and ``warnings`` grow, and go to the load report."""

    config: AdapterConfig
    ledger: TensorLedger
    base: BaseSpec
    limits: StoreLimits
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Fold(NamedTuple):
    """An adapter folded to the clean base. The plan has no digest and no ``n_bytes`` yet."""

    plan: AdapterPlan
    scale_rule: str
    kept_energy: float | None = None


FamilyReader = Callable[[ReadContext], Fold]
