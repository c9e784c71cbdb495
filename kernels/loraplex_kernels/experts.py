"""Operators of routed experts. A *pair* is (row of the step, choice): the row as an expert sees it.

Pairs are numbered row-major, the rows of one adapter after another's. On a CPU these are native
calls; the PyTorch versions below them are the definition and what runs elsewhere. Deterministic,
and a row's result does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_kernels.cpu.model_ops import dtype_code, is_plain, native_ops

from .layout import LoraSegments

__all__ = [
    "Activation",
    "Grouped",
    "StepPairs",
    "group_pairs",
    "moe_combine",
    "moe_down",
    "moe_gate_up",
    "route_and_group",
    "route_top_k",
    "top_k_of",
    "weighted_sum",
]

Linear = Callable[[Tensor], Tensor]  # a base product
Activation = Callable[[Tensor], Tensor]  # act(gate) ⊙ up: [n, 2·ff] → [n, ff]
LoraOp = Callable[[Tensor, LoraSegments, Tensor], None]  # adds to its last argument in place

_MAX_EXPERTS = 256  # csrc/experts.inc
_LIGHT = 1 << 19  # elements, and
_LIGHT_ROWS = 256  # rows of a gate: up to here a call is too short to let go of Python's lock


class StepPairs(NamedTuple):
    """The pairs of a step by row."""

    rows: Tensor  # int64 [n_pairs]: the row of each pair
    groups: tuple[tuple[Tensor, int], ...]  # an adapter's rows (int64, ascending), experts a row


class Grouped(NamedTuple):
    """Pairs by segment, ascending within each."""

    indices: Tensor  # int32 [n_pairs]
    indptr: Tensor  # int32 [n_segments + 1]
    weights: Tensor  # float32 [n_pairs], in the order of ``indices``


def route_top_k(hidden: Tensor, gate: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``hidden`` [n, width], ``gate`` float32 [n_experts, width] → the k experts with the largest
    products (int32 [n, k], largest first; of equal ones the lower index first) and the softmax over
    these products (float32 [n, k]).
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
    """``route_top_k`` from the products on, [n, n_experts]."""
    values, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    return order[:, :k].int(), torch.softmax(values[:, :k], dim=-1)


def group_pairs(ids: Tensor, weight: Tensor, n_segments: int) -> Grouped:
    """``ids`` int32 [n_pairs] in [0, n_segments), ``weight`` float32 [n_pairs], both contiguous.

    Nothing waits for a device.
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
    """``route_top_k`` and ``group_pairs`` by expert, in one native call where there is one.

    Returns the weights by row (float32 [n, k]) too. ``load`` int64 [n_experts] counts the pairs.
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
    """Writes the weighted sum of each row's pairs to its row of ``act``; other rows stay."""
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
    """Σ_j weight[:, j] · choices[:, j], j ascending: [n, k, width], [n, k] → [n, width]."""
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
    """``x`` [n_rows, in] → the base's gate and up products [n_rows, 2·ff] and, for every pair, the
    activation of its row of them with the segments' product of its row of ``x`` on top
    [n_pairs, ff]. Segments hold each pair once; their weights are for the sum over a row's pairs
    and play no part here.
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
    """``x`` [n_rows, in] → the base's product [n_rows, Σ out] plus, on each row, the sum over its
    pairs of the segments' product of the pair's row of ``of_pairs`` [n_pairs, in].
    """
    out = linear(x)
    delta = out.new_zeros(of_pairs.shape[0], out.shape[1])
    lora(of_pairs, segments, delta)
    first = 0
    for rows, k in pairs.groups:
        n = rows.shape[0]
        # Rows are distinct, so each is added once and no order of additions is open.
        out.index_add_(0, rows, delta[first : first + n * k].view(n, k, -1).sum(dim=1))
        first += n * k
    return out
