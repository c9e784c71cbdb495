"""Finds LoRAs trained on a residual base, whose files look like those of a plain LoRA.

PiSSA's and BA-LoRA's scripts save W − s·B₀A₀ as a base of its own, where s·B₀A₀ is the principal
part of W, and then an adapter whose config does not say so. On the clean base that part would count
twice. Subtracting s·B A from W takes away

    ρ = (2⟨W, s·B A⟩ − ‖s·B A‖²) / ‖W‖² ÷ (r / min(in, out))

times the energy of an average matrix of rank r. Files trained on a residual have a mean ρ of 1.5
to 12 (PiSSA and OLoRA of ranks 1 to 32, trained to a loss of 0.2). Ordinary LoRAs have −18 to 0,
because their products are nearly orthogonal to W (|cos| ≤ 0.01).
"""

from collections.abc import Mapping

import torch

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import UnsupportedAdapter
from loraplex_adapter_store.plan import AdapterPlan, Family, ModulePlan

_RESIDUAL = 0.5  # of ρ and of ‖s·B A‖² by the same measure
_N_SAMPLED = 8  # modules whose weight is read


def check_residual(
    adapter: AdapterPlan, base: BaseSpec, ratios: Mapping[str, float | None]
) -> None:
    """Raise UnsupportedAdapter if the factors hold the base's own principal part.

    ``ratios``: the ``delta_ratio`` of each module. Reads at most ``_N_SAMPLED`` weights, and none
    of an adapter whose products are too small.
    """
    if adapter.family not in (Family.LORA, Family.DORA):
        return
    modules = adapter.modules
    sizes = {
        name: ratio**2 / _share(base, name, plan)  # ‖B A‖² / ‖W‖² ÷ (r / min(in, out))
        for name, plan in modules.items()
        if name in base.modules and (ratio := ratios[name])
    }
    if not sizes or sum(sizes.values()) < _RESIDUAL * len(sizes):
        return
    sampled = sorted(sizes)[:: -(-len(sizes) // _N_SAMPLED)]
    if sum(2 * _overlap(base, name, modules[name]) - sizes[name] for name in sampled) < (
        _RESIDUAL * len(sampled)
    ):
        return
    raise UnsupportedAdapter(
        "the factors hold the largest singular values of the base's own weights: the adapter was "
        "trained on a base without them (PiSSA, BA-LoRA) and saved as a plain LoRA. Repair it with "
        "`loraplex adapters convert ADAPTER NEW --initial pissa_init`, where pissa_init is the "
        "adapter as saved before training, or with `--init pissa` if that is lost"
    )


def _overlap(base: BaseSpec, module: str, plan: ModulePlan) -> float:
    """Return ⟨W, B A⟩ / ‖W‖² by the same measure."""
    assert plan.a is not None
    assert plan.b is not None
    product = ((base.weight(module) @ plan.a.t()) * plan.b).sum(dtype=torch.float64)
    return float(product) / base.norms[module] ** 2 / _share(base, module, plan)


def _share(base: BaseSpec, module: str, plan: ModulePlan) -> float:
    linear = base.modules[module]
    return plan.rank / min(linear.in_features, linear.out_features)
