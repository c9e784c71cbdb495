"""Checks every folded adapter, whatever its family: shapes, ranks, finite values, and an effect.

Readers check each tensor of the file as they load it. ``check_fold`` finds what goes wrong
afterwards: a fold that overflows float32, grows beyond the rank limit, or does not fit its module.
``check_effect`` refuses adapters that compute the same as the base.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import AdapterMismatch, LimitExceeded, MalformedFile
from loraplex_adapter_store.files.safetensors_reader import is_finite
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.operators.contract import tensors_of
from loraplex_adapter_store.operators.kinds import operator_name
from loraplex_adapter_store.plan import (
    AdapterPlan,
    ExpertPlan,
    ModulePlan,
    NormPlan,
    RoutingStrategy,
    SharedBasis,
)

from .spectrum import factor_norm

Shape = tuple[int, ...]
_ROUNDING = 1e-5  # relative: smaller changes are float32 noise of the fold, not training
_EPSILON = 1e-7  # of float32
# Their weights do not sum to 1: the block changes even if every expert equals the base.
_RESCALING = (RoutingStrategy.TOP_P, RoutingStrategy.SWITCH)


def check_fold(adapter: AdapterPlan, base: BaseSpec, limits: StoreLimits) -> None:
    """Raises AdapterRefused that names the module and the part."""
    for name, plan in adapter.modules.items():
        _check_module(name, plan, base, limits)
    for block in adapter.experts.values():
        for expert in block.experts:
            for name, plan in expert.items():
                _check_module(name, plan, base, limits)
    others = {
        "virtual tokens": adapter.prefix,
        "embedding rows": adapter.embedding_rows,
        "head rows": adapter.head_rows,
        "the head": adapter.head,
        **adapter.replaced_weights,
        **adapter.norms,
        **adapter.stacked,
    }
    for part, value in others.items():
        for tensor in tensors_of(value):
            _check_finite(part, tensor)


def _check_module(name: str, plan: ModulePlan, base: BaseSpec, limits: StoreLimits) -> None:
    n_in, n_out = _sizes(name, base)
    if (plan.a is None) != (plan.b is None):
        raise AdapterMismatch(f"{name} has one factor of two")
    if plan.rank > limits.max_rank:
        raise LimitExceeded(
            f"{name} has rank {plan.rank} once folded, this server allows {limits.max_rank}"
        )
    scales = {
        "out_scale": (plan.out_scale, (n_out,)),
        "bias": (plan.bias, (n_out,)),
        "in_scale": (plan.in_scale, (n_in,)),
    }
    has_scale = any(tensor is not None for tensor, _ in scales.values())
    if name not in base.modules and (has_scale or plan.operators):
        raise AdapterMismatch(f"{name} is an embedding: it takes low-rank factors only")
    parts: dict[str, tuple[Tensor | None, Shape]] = {
        "A": (plan.a, (plan.rank, n_in)),
        "B": (plan.b, (n_out, plan.rank)),
        **scales,
        **({} if plan.shared is None else _shared_parts(plan.shared, n_in, n_out)),
    }
    for part, (tensor, shape) in parts.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise AdapterMismatch(
                f"{name}: {part} has shape {list(tensor.shape)}, the base needs {list(shape)}"
            )
    for part, (tensor, _) in parts.items():
        if tensor is not None:
            _check_finite(f"{name}: {part}", tensor)
    for operator in plan.operators:
        for tensor in operator.tensors():
            _check_finite(f"{name}: {operator_name(operator)}", tensor)


def _shared_parts(
    shared: SharedBasis, n_in: int, n_out: int
) -> dict[str, tuple[Tensor | None, Shape]]:
    rank, n_blocks = shared.rank_scale.shape
    k, m = (n_out, n_in) if shared.transposed else (n_in, n_out)
    return {
        "shared A": (shared.a, (rank, k)),
        "shared B": (shared.b, (m, rank * n_blocks)),
        "shared rank_scale": (shared.rank_scale, (rank, n_blocks)),
        "shared block_scale": (shared.block_scale, (n_blocks, k)),
        "shared out_scale": (shared.out_scale, (m,)),
    }


def _sizes(name: str, base: BaseSpec) -> tuple[int, int]:
    if name in base.modules:
        return base.modules[name].in_features, base.modules[name].out_features
    if name in base.embeddings:
        return base.embeddings[name].n_rows, base.embeddings[name].width
    raise AdapterMismatch(f"{name} is no linear and no embedding of the base")


def _check_finite(part: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not is_finite(tensor):
        raise MalformedFile(f"{part} overflows float32: the product of its factors is not finite")


def check_effect(adapter: AdapterPlan, base: BaseSpec) -> None:
    """Raises AdapterMismatch with the parts if none of them changes the base."""
    inert: list[str] = []
    for part, acts in _parts(adapter, base):
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


def _parts(adapter: AdapterPlan, base: BaseSpec) -> Iterator[tuple[str, bool]]:
    """Yield each part in words, and True if it changes the result."""
    if adapter.prefix is not None:
        yield f"{adapter.prefix.n_virtual} virtual tokens", True
    if adapter.head is not None:
        yield "the head is zero", bool(adapter.head.weight.any())
    for name, plan in adapter.modules.items():
        yield f"{name}: the delta is zero", _module_acts(name, plan, base)
    for name, block in adapter.experts.items():
        yield f"{name}: every expert equals the base", _experts_act(name, block, base)
    for name, weight in adapter.replaced_weights.items():
        yield f"{name}.weight: equals the base's", not torch.equal(weight, base.weight(name))
    for name, factors in adapter.stacked.items():
        yield f"{name}: the delta is exactly zero", bool(factors.left.any() and factors.right.any())
    for name, norm in adapter.norms.items():
        yield f"{name}: equals the base's", _norm_acts(name, norm, base)
    for module, rows in (
        (base.input_embedding, adapter.embedding_rows),
        (base.output_head, adapter.head_rows),
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
    """False if W + B A rounds to W, or if the factors cancel (an untrained residual LoRA)."""
    if plan.a is None or plan.b is None:
        return False
    delta = factor_norm(plan.a, plan.b)
    size = float(plan.a.double().norm() * plan.b.double().norm())
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
