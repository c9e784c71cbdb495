"""Operators of routed experts. A *pair* (row of the step, choice) is a row as one expert sees it.

Pairs are numbered row-major, adapter by adapter. On a CPU native code runs. The PyTorch versions
here define the result and run elsewhere. Results are deterministic, and a row's result does not
depend on other rows.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_kernels.cpu.model_ops import dtype_code, is_plain, native_ops
from loraplex_kernels.formats.layout import LoraSegments

Linear = Callable[[Tensor], Tensor]  # a base product
Activation = Callable[[Tensor], Tensor]  # act(gate) ⊙ up: [n, 2·ff] → [n, ff]
LoraOp = Callable[[Tensor, LoraSegments, Tensor], None]  # adds to its last argument in place

_MAX_EXPERTS = 256  # csrc/lora/moe.inc
_LIGHT = 1 << 19  # up to this many elements, and
_LIGHT_ROWS = 256  # up to this many rows of a gate, a call keeps Python's lock


class StepPairs(NamedTuple):
    """The pairs of a step by row."""

    rows: Tensor  # int64 [n_pairs]: the row of each pair
    groups: tuple[tuple[Tensor, int], ...]  # (rows int64 ascending, experts a row) by adapter


class Grouped(NamedTuple):
    """Pairs by segment, ascending within each."""

    indices: Tensor  # int32 [n_pairs]
    indptr: Tensor  # int32 [n_segments + 1]
    weights: Tensor  # float32 [n_pairs], in the order of ``indices``


def route_top_k(hidden: Tensor, gate: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k experts with the largest products, and the softmax over these products.

    ``hidden`` is [n, width], ``gate`` float32 [n_experts, width]. Experts are int32 [n, k], largest
    product first, of equal products the lower index first. Weights are float32 [n, k].
    """
    code = _gate_code(hidden, gate)
    if code is None:
        return top_k_of(torch.mm(hidden.float(), gate.T), k)
    n_rows = hidden.shape[0]
    index = torch.empty((n_rows, k), dtype=torch.int32)
    weight = torch.empty((n_rows, k), dtype=torch.float32)
    native_ops(keep_gil=n_rows <= _LIGHT_ROWS).route(
        code,
        hidden.data_ptr(),
        hidden.stride(0),
        n_rows,
        gate.data_ptr(),
        *gate.shape,
        k,
        index.data_ptr(),
        weight.data_ptr(),
    )
    return index, weight


def top_k_of(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``route_top_k`` of the products [n, n_experts]."""
    values, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    return order[:, :k].int(), torch.softmax(values[:, :k], dim=-1)


def group_pairs(ids: Tensor, weight: Tensor, n_segments: int) -> Grouped:
    """Group pairs by segment. Nothing waits for a device.

    ``ids`` int32 [n_pairs] in [0, n_segments) and ``weight`` float32 [n_pairs] are contiguous.
    """
    if ids.is_cpu and dtype_code(torch.float32) is not None:
        grouped = _empty_groups(ids.shape[0], n_segments)
        native_ops(keep_gil=True).group(
            ids.data_ptr(),
            weight.data_ptr(),
            ids.shape[0],
            n_segments,
            grouped.indptr.data_ptr(),
            grouped.indices.data_ptr(),
            grouped.weights.data_ptr(),
        )
        return grouped
    in_order, order = torch.sort(ids, stable=True)
    edges = torch.arange(n_segments + 1, dtype=ids.dtype, device=ids.device)
    indptr = torch.searchsorted(in_order, edges, out_int32=True)
    return Grouped(order.int(), indptr, weight[order])


def route_and_group(
    hidden: Tensor, gate: Tensor, k: int, load: Tensor | None
) -> tuple[Tensor, Grouped]:
    """``route_top_k``, then ``group_pairs`` by expert, in one native call on a CPU.

    Returns the weights by row, float32 [n, k], and the groups. Adds the pairs of each expert to
    ``load`` int64 [n_experts].
    """
    code = _gate_code(hidden, gate)
    n_experts = gate.shape[0]
    if code is None:
        index, weight = route_top_k(hidden, gate, k)
        grouped = group_pairs(index.reshape(-1), weight.reshape(-1), n_experts)
        if load is not None:
            load += grouped.indptr.diff()
        return weight, grouped
    n_rows = hidden.shape[0]
    index = torch.empty((n_rows, k), dtype=torch.int32)
    weight = torch.empty((n_rows, k), dtype=torch.float32)
    grouped = _empty_groups(n_rows * k, n_experts)
    native_ops(keep_gil=n_rows <= _LIGHT_ROWS).route_and_group(
        code,
        hidden.data_ptr(),
        hidden.stride(0),
        n_rows,
        gate.data_ptr(),
        n_experts,
        gate.shape[1],
        k,
        index.data_ptr(),
        weight.data_ptr(),
        grouped.indptr.data_ptr(),
        grouped.indices.data_ptr(),
        grouped.weights.data_ptr(),
        None if load is None else load.data_ptr(),
    )
    return weight, grouped


def _gate_code(hidden: Tensor, gate: Tensor) -> int | None:
    n_experts, width = gate.shape
    if not hidden.is_cpu or width % 16 or n_experts > _MAX_EXPERTS or hidden.stride(1) != 1:
        return None
    return dtype_code(hidden.dtype)


def _empty_groups(n_pairs: int, n_segments: int) -> Grouped:
    return Grouped(
        torch.empty(n_pairs, dtype=torch.int32),
        torch.empty(n_segments + 1, dtype=torch.int32),
        torch.empty(n_pairs, dtype=torch.float32),
    )


def moe_combine(
    expert_act: Tensor,  # [n_pairs, ff]
    weights: tuple[Tensor, ...],  # float32 [n, k] of each group of ``pairs``, contiguous
    pairs: StepPairs,
    act: Tensor,  # [n_rows, ff], contiguous
) -> None:
    """Write the weighted sum of each row's pairs to its row of ``act``. Other rows stay."""
    ff = act.shape[1]
    code = dtype_code(act.dtype) if ff % 16 == 0 else None
    if code is not None and not (is_plain(expert_act, act.dtype) and is_plain(act, act.dtype)):
        code = None
    first = 0
    for (rows, k), weight in zip(pairs.groups, weights, strict=True):
        n = rows.shape[0]
        if code is None:
            choices = expert_act[first : first + n * k].view(n, k, -1)
            act.index_copy_(0, rows, weighted_sum(choices, weight).to(act.dtype))
        else:
            native_ops(keep_gil=n * k * ff < _LIGHT).moe_combine(
                code,
                expert_act.data_ptr() + first * ff * act.element_size(),
                weight.data_ptr(),
                rows.data_ptr(),
                act.data_ptr(),
                n,
                k,
                ff,
            )
        first += n * k


def weighted_sum(choices: Tensor, weight: Tensor) -> Tensor:
    """Return Σ_j weight[:, j] · choices[:, j], j ascending: [n, k, width], [n, k] → [n, width]."""
    mixed = choices[:, 0] * weight[:, :1]
    for j in range(1, choices.shape[1]):
        mixed = torch.addcmul(mixed, choices[:, j], weight[:, j : j + 1])
    return mixed


def moe_gate_up(
    linear: Linear,
    lora: LoraOp,
    activation: Activation,
    x: Tensor,
    pairs: StepPairs,
    segments: LoraSegments,
) -> tuple[Tensor, Tensor]:
    """Return the base's gate and up products of ``x`` [n_rows, 2·ff], and the pairs' activations.

    The activation of a pair [n_pairs, ff] is that of its row's base product plus the segments'
    product of its row of ``x`` [n_rows, in]. Segments hold each pair once. Their weights, which are
    for the sum over a row's pairs, are not used.
    """
    out = linear(x)
    of_pairs = out.index_select(0, pairs.rows)
    lora(x.index_select(0, pairs.rows), replace(segments, weights=None), of_pairs)
    return out, activation(of_pairs)


def moe_down(
    linear: Linear,
    lora: LoraOp,
    x: Tensor,
    of_pairs: Tensor,
    pairs: StepPairs,
    segments: LoraSegments,
) -> Tensor:
    """Return the base product of ``x`` [n_rows, in] plus the segments' products of its pairs.

    ``of_pairs`` [n_pairs, in] holds the inputs of the pairs. The result is [n_rows, Σ out].
    """
    out = linear(x)
    delta = out.new_zeros(of_pairs.shape[0], out.shape[1])
    lora(of_pairs, segments, delta)
    first = 0
    for rows, k in pairs.groups:
        n = rows.shape[0]
        # Rows are distinct, so each row is added once and the order of additions is fixed.
        out.index_add_(0, rows, delta[first : first + n * k].view(n, k, -1).sum(dim=1))
        first += n * k
    return out
