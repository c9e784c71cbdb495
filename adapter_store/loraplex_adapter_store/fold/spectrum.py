"""Norms and spectra of updates, computed from their factors without a dense ΔW."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.plan import AdapterPlan, ModulePlan
from loraplex_adapter_store.report import JsonValue


def factor_norm(a: Tensor, b: Tensor) -> float:
    """Return ‖B A‖_F = √tr((BᵀB)(A Aᵀ)), computed in float64."""
    a64, b64 = a.double(), b.double()
    square = ((b64.t() @ b64) * (a64 @ a64.t())).sum()
    return float(square.clamp_min(0).sqrt())


def delta_ratio(base: BaseSpec, module: str, plan: ModulePlan) -> float | None:
    """Return ‖ΔW‖/‖W‖ of the low-rank part; None if the module has none."""
    if plan.a is None or plan.b is None:
        return None
    size = base.norms.get(module, 0.0)
    return factor_norm(plan.a, plan.b) / size if size else None


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Return the singular values of B A, descending [rank], by two thin QRs and an r×r SVD."""
    _, left = torch.linalg.qr(b.double())
    _, right = torch.linalg.qr(a.double().t())
    values: Tensor = torch.linalg.svdvals(left @ right.t())
    return values.float()


def count_intruders(
    weight: Tensor, a: Tensor, b: Tensor, *, k: int = 10, epsilon: float = 0.5
) -> int:
    """Count the intruder dimensions as the released code of "LoRA vs Full Fine-tuning" does.

    An intruder is one of the first ``k`` left singular vectors of W + BA whose cosine with every
    left singular vector of W is below ``epsilon``.
    """
    u_base = torch.linalg.svd(weight, full_matrices=False)[0]
    u_tuned = torch.linalg.svd(weight + b @ a, full_matrices=False)[0][:, :k]
    best = (u_tuned.t() @ u_base).abs().amax(dim=1)
    return int((best < epsilon).sum())


@dataclass(frozen=True, slots=True)
class ModuleInspection:
    module: str
    rank: int
    effective_rank: float  # (Σσ)² / Σσ²
    delta_ratio: float  # ‖ΔW‖/‖W‖
    singular_values: tuple[float, ...]  # of ΔW, descending
    n_intruders: int | None  # None unless requested

    def to_json(self) -> dict[str, JsonValue]:
        return {**asdict(self), "singular_values": list(self.singular_values)}


def inspect_plan(
    plan: AdapterPlan,
    base: BaseSpec,
    *,
    intruders: bool = False,
    k: int = 10,
    epsilon: float = 0.5,
) -> tuple[ModuleInspection, ...]:
    """Return an entry per linear with factors. Intruders take two SVDs of each base weight."""
    inspections: list[ModuleInspection] = []
    for name, module in sorted(plan.modules.items()):
        a, b = (module.a, module.b) if module.shared is None else module.shared.factors()
        if name not in base.modules or a is None or b is None:
            continue
        sigma = singular_values(a, b)
        n_intruders = None
        if intruders:
            n_intruders = count_intruders(base.weight(name), a, b, k=k, epsilon=epsilon)
        square = float(sigma.square().sum())
        inspections.append(
            ModuleInspection(
                module=name,
                rank=int(a.shape[0]),
                effective_rank=float(sigma.sum()) ** 2 / square if square else 0.0,
                delta_ratio=_weight_ratio(base, name, square),
                singular_values=tuple(sigma.tolist()),
                n_intruders=n_intruders,
            )
        )
    return tuple(inspections)


def _weight_ratio(base: BaseSpec, name: str, square: float) -> float:
    size = float(base.weight(name).double().norm())
    return square**0.5 / size if size else 0.0
