"""What a row of an adapter costs beyond low-rank factors, for the load report.

Such parts run in torch on the rows of their own adapter, module by module; what changes the input
of a linear asks for its product once more. A scale of inputs does so only where other linears read
the same input; elsewhere it is a product of vectors, which costs nothing beside a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

from .base_spec import BaseSpec
from .plan import ModulePlan

__all__ = ["row_cost_note"]

# Linears that the engine packs with others that read the same input.
_SHARE_INPUTS = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})


def row_cost_note(modules: Mapping[str, ModulePlan], base: BaseSpec) -> str | None:
    """A sentence for the report; None where the LoRA kernels apply all of it."""
    costs = [
        _flops(name, module, base.modules[name].in_features, base.modules[name].out_features)
        for name, module in modules.items()
        if name in base.modules and _runs_in_torch(name, module)
    ]
    if not costs:
        return None
    of_base = 2 * sum(shape.in_features * shape.out_features for shape in base.modules.values())
    return (
        f"applied to its own rows in torch: about {_text(sum(costs) // len(costs))} a token and "
        f"module, {_text(sum(costs))} a token on {len(costs)} modules; the base's linears take "
        f"{_text(of_base)}"
    )


def _runs_in_torch(name: str, module: ModulePlan) -> bool:
    return _is_beyond_the_pool(module) or _needs_own_product(name, module)


def _is_beyond_the_pool(module: ModulePlan) -> bool:
    return bool(module.operators or module.shared is not None)


def _needs_own_product(name: str, module: ModulePlan) -> bool:
    if module.in_scale is None:
        return module.input_operator is not None
    return _is_beyond_the_pool(module) or name.rpartition(".")[2] in _SHARE_INPUTS


def _flops(name: str, module: ModulePlan, n_in: int, n_out: int) -> int:
    products = sum(operator.n_products(n_in, n_out) for operator in module.operators)
    if _needs_own_product(name, module):
        products += n_in * n_out
    if _is_beyond_the_pool(module):  # else the LoRA kernels apply the factors
        products += module.rank * (n_in + n_out)
    if module.shared is not None:
        products += module.shared.rank * (n_in + n_out)
    return 2 * products


def _text(flops: int) -> str:
    return f"{flops / 1e6:.2g} MFLOP" if flops < 1e8 else f"{flops / 1e6:,.0f} MFLOP"
