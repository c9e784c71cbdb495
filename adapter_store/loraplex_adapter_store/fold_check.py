"""Checks every folded plan, whatever its family: names, shapes, ranks, values.

A family that reads its tensors by ``families.module_groups`` passes. What goes around it, or
overflows while it is folded, is refused here and never reaches the engine.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loraplex_adapter_store.families.contract import Fold

from .base_spec import BaseSpec
from .errors import AdapterMismatch, LimitExceeded, MalformedFile
from .limits import StoreLimits
from .operators.table import operator_name
from .plan import ExpertPlan, ModulePlan, PrefixPlan, SharedBasis

__all__ = ["check_fold"]

Shape = tuple[int, ...]


def check_fold(fold: Fold, base: BaseSpec, limits: StoreLimits) -> None:
    """Raises AdapterRefused that names the module and the part; returns nothing else."""
    for name, plan in fold.modules.items():
        _check_module(name, plan, base, limits)
    for name, block in fold.experts.items():
        _check_experts(name, block, base, limits)
    if fold.prefix is not None:
        _check_prefix(fold.prefix, base, limits)
    for what, rows in (("embedding", fold.embedding_rows), ("head", fold.head_rows)):
        for token, row in rows.items():
            if not 0 <= token < base.vocab_size:
                raise AdapterMismatch(
                    f"{what} row {token}: the base's vocabulary ends at {base.vocab_size - 1}"
                )
            _check_tensor(f"{what} row {token}", row, (base.hidden_size,))
    if fold.head is not None:
        n_labels = len(fold.head.labels)
        _check_tensor("the head", fold.head.weight, (n_labels, base.hidden_size))
        if fold.head.bias is not None:
            _check_tensor("the head's bias", fold.head.bias, (n_labels,))
    for name, weight in fold.replaced_weights.items():
        _check_tensor(f"{name}.weight", weight, _weight_shape(name, base))
    for name, factors in fold.stacked.items():
        n_experts, n_rows, n_columns = _stacked_shape(name, base)
        rank = factors.left.shape[-1]
        _check_tensor(f"{name}: left", factors.left, (n_experts, n_rows, rank))
        _check_tensor(f"{name}: right", factors.right, (n_experts, rank, n_columns))
    for name, norm in fold.norms.items():
        for part, tensor in (("weight", norm.weight), ("bias", norm.bias)):
            if tensor is not None:
                _check_tensor(f"{name}.{part}", tensor, _norm_shape(name, part, base))


def _check_module(name: str, plan: ModulePlan, base: BaseSpec, limits: StoreLimits) -> None:
    n_in, n_out = _sizes(name, base)
    rank = plan.rank
    if (plan.a is None) != (plan.b is None):
        raise AdapterMismatch(f"{name} has one factor of two")
    if rank > limits.max_rank:
        raise LimitExceeded(
            f"{name} has rank {rank} once folded, this server allows {limits.max_rank}"
        )
    parts: list[tuple[str, Tensor | None, Shape]] = [
        ("A", plan.a, (rank, n_in)),
        ("B", plan.b, (n_out, rank)),
        ("out_scale", plan.out_scale, (n_out,)),
        ("bias", plan.bias, (n_out,)),
        ("in_scale", plan.in_scale, (n_in,)),
    ]
    others = [part for _, part, _ in parts[2:] if part is not None]
    if name not in base.modules and (others or plan.operators):
        raise AdapterMismatch(f"{name} is an embedding: it takes low-rank factors only")
    for part, tensor, shape in parts:
        if tensor is not None:
            _check_tensor(f"{name}: {part}", tensor, shape)
    if plan.shared is not None:
        for part, tensor, shape in _shared_parts(plan.shared, n_in, n_out):
            _check_tensor(f"{name}: shared {part}", tensor, shape)
    for operator in plan.operators:
        for tensor in operator.tensors():
            _check_tensor(f"{name}: {operator_name(operator)}", tensor, tuple(tensor.shape))
    _check_widths(name, plan, n_in, n_out)


def _check_widths(name: str, plan: ModulePlan, n_in: int, n_out: int) -> None:
    """Operators have no common shape: each says by one row of zeros whether it fits."""

    def product(x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], n_out)

    widths: list[tuple[int, Tensor]] = []
    if plan.input_operator is not None:
        widths.append((n_in, plan.input_operator.apply(torch.zeros(1, n_in))))
    if plan.delta_operator is not None:
        widths.append((n_out, plan.delta_operator.apply(torch.zeros(1, n_in), product)))
    if plan.output_operator is not None:
        widths.append((n_out, plan.output_operator.apply(torch.zeros(1, n_out))))
    for width, row in widths:
        if tuple(row.shape) != (1, width):
            raise AdapterMismatch(
                f"{name}: an operator gives {row.shape[1]} numbers a row, the base needs {width}"
            )


def _shared_parts(
    shared: SharedBasis, n_in: int, n_out: int
) -> Iterator[tuple[str, Tensor, Shape]]:
    rank, n_blocks = shared.rank_scale.shape
    k, m = (n_out, n_in) if shared.transposed else (n_in, n_out)
    yield "A", shared.a, (rank, k)
    yield "B", shared.b, (m, rank * n_blocks)
    yield "rank_scale", shared.rank_scale, (rank, n_blocks)
    if shared.block_scale is not None:
        yield "block_scale", shared.block_scale, (n_blocks, k)
    if shared.out_scale is not None:
        yield "out_scale", shared.out_scale, (m,)


def _check_experts(name: str, block: ExpertPlan, base: BaseSpec, limits: StoreLimits) -> None:
    n_experts = len(block.experts)
    if not 1 <= n_experts <= limits.max_experts:
        raise LimitExceeded(
            f"{name} has {n_experts} experts, this server allows {limits.max_experts}"
        )
    if not 1 <= block.top_k <= n_experts:
        raise MalformedFile(f"{name}: top_k {block.top_k} does not fit {n_experts} experts")
    is_projection = name in base.modules
    width = base.modules[name].in_features if is_projection else base.hidden_size
    if not is_projection and not any(known.startswith(f"{name}.") for known in base.modules):
        raise AdapterMismatch(f"{name} is no module of the base")
    _check_tensor(f"{name}: gate", block.gate, (n_experts, width))
    for number, expert in enumerate(block.experts):
        for module, plan in expert.items():
            if module != name and not module.startswith(f"{name}."):
                raise AdapterMismatch(f"{name}: expert {number} adapts {module}, outside of it")
            _check_module(module, plan, base, limits)


def _check_prefix(prefix: PrefixPlan, base: BaseSpec, limits: StoreLimits) -> None:
    n_virtual = prefix.n_virtual
    if n_virtual > limits.max_virtual_tokens:
        raise LimitExceeded(
            f"{n_virtual} virtual tokens, this server allows {limits.max_virtual_tokens}"
        )
    if prefix.embeddings is not None:
        _check_tensor("virtual tokens", prefix.embeddings, (n_virtual, base.hidden_size))
        return
    for what, layers in (("keys", prefix.keys), ("values", prefix.values)):
        if len(layers) != base.n_layers:
            raise AdapterMismatch(
                f"the prefix has {what} of {len(layers)} layers, not {base.n_layers}"
            )
        for layer, tensor in enumerate(layers):
            shape = (n_virtual, base.n_kv_heads, base.head_dim)
            _check_tensor(f"prefix {what} of layer {layer}", tensor, shape)


def _sizes(name: str, base: BaseSpec) -> tuple[int, int]:
    if name in base.modules:
        return base.modules[name].in_features, base.modules[name].out_features
    if name in base.embeddings:
        return base.embeddings[name].n_rows, base.embeddings[name].width
    raise AdapterMismatch(f"{name} is no linear and no embedding of the base")


def _weight_shape(name: str, base: BaseSpec) -> Shape:
    shape = base.parameters.get(f"{name}.weight")
    if shape is None:
        raise AdapterMismatch(f"{name} of the base has no weight")
    return shape[::-1] if name in base.conv1d else shape


def _stacked_shape(name: str, base: BaseSpec) -> Shape:
    shape = base.parameters.get(name, ())
    if len(shape) != 3:
        raise AdapterMismatch(f"{name} is no tensor of stacked experts of the base")
    return shape


def _norm_shape(name: str, part: str, base: BaseSpec) -> Shape:
    shape = base.parameters.get(f"{name}.{part}")
    if shape is None or name in base.modules or name in base.embeddings:
        raise AdapterMismatch(f"{name} is no norm of the base with a {part}")
    return shape


def _check_tensor(what: str, tensor: Tensor, shape: Shape) -> None:
    if tuple(tensor.shape) != shape:
        raise AdapterMismatch(
            f"{what} has shape {list(tensor.shape)}, the base needs {list(shape)}"
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise MalformedFile(f"{what} overflows float32: the product of its factors is not finite")
