"""A closer look at a plan: spectra and intruder dimensions per module, on request only."""

from __future__ import annotations

from dataclasses import dataclass

from .base_spec import BaseSpec
from .plan import AdapterPlan
from .report import JsonValue
from .spectrum import find_intruders, singular_values

__all__ = ["ModuleInspection", "inspect_plan"]


@dataclass(frozen=True, slots=True)
class ModuleInspection:
    module: str
    rank: int
    effective_rank: float  # (Σσ)² / Σσ²
    delta_ratio: float  # ‖ΔW‖/‖W‖
    singular_values: tuple[float, ...]  # of ΔW, descending
    n_intruders: int | None  # None unless asked for

    def to_json(self) -> dict[str, JsonValue]:
        return {
            "module": self.module,
            "rank": self.rank,
            "effective_rank": self.effective_rank,
            "delta_ratio": self.delta_ratio,
            "singular_values": list(self.singular_values),
            "n_intruders": self.n_intruders,
        }


def inspect_plan(
    plan: AdapterPlan,
    base: BaseSpec,
    *,
    intruders: bool = False,
    k: int = 10,
    epsilon: float = 0.5,
) -> tuple[ModuleInspection, ...]:
    """One entry per linear with factors. Intruders cost two SVDs of the base weight each."""
    found: list[ModuleInspection] = []
    targets = [
        (name, module) for name, module in sorted(plan.modules.items()) if name in base.modules
    ]
    for name, module in targets:
        factors = (module.a, module.b)
        if module.shared is not None:
            factors = module.shared.factors()
        a, b = factors
        if a is not None and b is not None:
            sigma = singular_values(a, b)
            count = None
            if intruders:
                count = find_intruders(base.weight(name), a, b, k=k, epsilon=epsilon).n_intruders
            square = float(sigma.square().sum())
            found.append(
                ModuleInspection(
                    module=name,
                    rank=int(a.shape[0]),
                    effective_rank=float(sigma.sum()) ** 2 / square if square else 0.0,
                    delta_ratio=_ratio(base, name, square),
                    singular_values=tuple(sigma.tolist()),
                    n_intruders=count,
                )
            )
    return tuple(found)


def _ratio(base: BaseSpec, name: str, square: float) -> float:
    size = float(base.weight(name).double().norm())
    return square**0.5 / size if size else 0.0
