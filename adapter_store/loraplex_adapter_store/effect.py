"""Does an adapter do anything? One that computes what the base computes is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from loraplex_adapter_store.families.contract import Fold

from .base_spec import BaseSpec
from .errors import AdapterMismatch
from .plan import ExpertPlan, ModulePlan, NormPlan, RoutingStrategy
from .spectrum import factor_norm

__all__ = ["check_effect"]

_ROUNDING = 1e-5  # relative: what is smaller is float32 noise of the fold, not training
_EPSILON = 1e-7  # of float32

# Their weights do not sum to 1: the block changes even where every expert equals the base.
_RESCALING = (RoutingStrategy.TOP_P, RoutingStrategy.SWITCH)


def check_effect(fold: Fold, base: BaseSpec) -> None:
    """Raises AdapterMismatch with the parts, if all of them leave the base as it is."""
    inert: list[str] = []
    for part, acts in _parts(fold, base):
        if acts:
            return
        inert.append(part)
    if not inert:
        raise AdapterMismatch("the adapter holds nothing that differs from the base")
    raise AdapterMismatch(
        f"the adapter would do nothing: all {len(inert)} of its parts leave the base as it is "
        "(was it saved before it was trained?)",
        inert,
    )


def _parts(fold: Fold, base: BaseSpec) -> Iterator[tuple[str, bool]]:
    """Each part in words, and whether it changes what is computed."""
    if fold.prefix is not None:
        yield f"{fold.prefix.n_virtual} virtual tokens", True
    if fold.head is not None:
        yield "the head is zero", bool(fold.head.weight.any())
    for name, plan in fold.modules.items():
        yield f"{name}: the delta is zero", _module_acts(name, plan, base)
    for name, block in fold.experts.items():
        yield f"{name}: every expert equals the base", _experts_act(name, block, base)
    for name, weight in fold.replaced_weights.items():
        yield f"{name}.weight: equals the base's", not torch.equal(weight, base.weight(name))
    for name, factors in fold.stacked.items():
        yield f"{name}: the delta is exactly zero", bool(factors.left.any() and factors.right.any())
    for name, norm in fold.norms.items():
        yield f"{name}: equals the base's", _norm_acts(name, norm, base)
    for module, rows in (
        (base.input_embedding, fold.embedding_rows),
        (base.output_head, fold.head_rows),
    ):
        if rows:
            yield f"{module}: the {len(rows)} rows equal the base's", _rows_act(module, rows, base)


def _module_acts(name: str, plan: ModulePlan, base: BaseSpec) -> bool:
    if _low_rank_acts(name, plan, base):
        return True
    if any(operator.acts for operator in plan.operators):
        return True
    if plan.bias is not None and bool(plan.bias.any()):
        return True
    if plan.shared is not None:
        shared = plan.shared
        diagonals = (shared.rank_scale, shared.block_scale, shared.out_scale)
        if all(scale is None or bool(scale.any()) for scale in diagonals):
            return True
    scales = (plan.in_scale, plan.out_scale)
    return any(
        scale is not None and bool(((scale - 1).abs() > _ROUNDING).any()) for scale in scales
    )


def _low_rank_acts(name: str, plan: ModulePlan, base: BaseSpec) -> bool:
    """Not if W + B A rounds to W, nor if the factors cancel, as of a residual LoRA untrained."""
    if plan.a is None or plan.b is None:
        return False
    delta, size = (
        factor_norm(plan.a, plan.b),
        float(plan.a.double().norm() * plan.b.double().norm()),
    )
    return delta > _ROUNDING * size and delta > _EPSILON * base.norms.get(name, 0.0)


def _experts_act(name: str, block: ExpertPlan, base: BaseSpec) -> bool:
    if name not in base.modules and block.strategy in _RESCALING:
        return True
    return any(
        _module_acts(module, plan, base)
        for expert in block.experts
        for module, plan in expert.items()
    )


def _norm_acts(name: str, norm: NormPlan, base: BaseSpec) -> bool:
    parts = (("weight", norm.weight), ("bias", norm.bias))
    return any(
        tensor is not None and not torch.equal(tensor, base.parameter(f"{name}.{part}"))
        for part, tensor in parts
    )


def _rows_act(module: str, rows: Mapping[int, Tensor], base: BaseSpec) -> bool:
    weight = base.weight(module)
    return any(not torch.equal(row, weight[token]) for token, row in rows.items())
