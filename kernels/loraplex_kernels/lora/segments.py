"""Builds the segments of a step: rows grouped by adapter slot."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.formats.layout import LoraSegments


def build_segments(
    row_slots: Tensor, weights: Tensor | None = None, *, n_slots: int | None = None
) -> LoraSegments:
    """Group rows by slot. ``row_slots`` int32 [n_rows]; negative = the row has no adapter.

    Rows ascend within a segment and segments ascend by slot. On a CPU sizes are exact. On a GPU
    nothing waits for the device: there are as many segments and pairs as rows, and spare segments
    are padding (slot -1), as the fixed shapes of a CUDA graph need. ``n_slots``: the number of
    distinct slots, if the host knows it. There are then no more segments than that.
    """
    if row_slots.is_cuda:
        from loraplex_kernels.triton.group_rows import build_device_segments

        return build_device_segments(row_slots, weights, n_slots=n_slots)
    rows = torch.arange(row_slots.shape[0], dtype=torch.int32, device=row_slots.device)
    return _group(row_slots, rows, weights)


def group_runs(slots: Sequence[int], n_rows: Sequence[int]) -> LoraSegments:
    """``build_segments`` on a CPU for ``n_rows[i]`` neighbouring rows of ``slots[i]``.

    This is plain Python: at the start of a step the code of array operators is not in the cache, so
    a dozen of them take ten times as long as in a loop.
    """
    rows_of: dict[int, list[int]] = {}
    end = 0
    for slot, n in zip(slots, n_rows, strict=True):
        first, end = end, end + n
        if slot >= 0 and n > 0:
            rows_of.setdefault(slot, []).extend(range(first, end))
    used = sorted(rows_of)
    indptr, indices = [0], list[int]()
    for slot in used:
        indices += rows_of[slot]
        indptr.append(len(indices))
    together = torch.from_numpy(np.array(used + indptr + indices, dtype=np.int32))
    n = len(used)
    return LoraSegments(together[:n], together[n : 2 * n + 1], together[2 * n + 1 :])


def expand_routed(slots: Tensor, weights: Tensor, *, n_slots: int | None = None) -> LoraSegments:
    """Build segments of routed experts: row ``t`` uses slot ``slots[t, j]`` with ``weights[t, j]``.

    ``slots`` int32 [n_rows, k] (negative = none), ``weights`` float32 [n_rows, k]. A row names a
    slot at most once. On a GPU ``n_slots`` bounds the number of segments.
    """
    if slots.is_cuda:
        from loraplex_kernels.triton.group_rows import build_device_segments

        return build_device_segments(slots, weights, n_slots=n_slots)
    n_rows, k = slots.shape
    rows = torch.arange(n_rows, dtype=torch.int32, device=slots.device).repeat_interleave(k)
    return _group(slots.reshape(-1), rows, weights.reshape(-1))


def _group(slots: Tensor, rows: Tensor, weights: Tensor | None) -> LoraSegments:
    host = slots.numpy()
    order = np.argsort(host, kind="stable")
    n_without = int(np.count_nonzero(host < 0))
    order = order[n_without:]
    ordered = host[order]
    heads = np.flatnonzero(np.diff(ordered, prepend=-1))
    indptr = np.append(heads, len(order)).astype(np.int32)
    index = torch.from_numpy(order)
    return LoraSegments(
        slots=torch.from_numpy(ordered[heads].astype(np.int32, copy=False)),
        indptr=torch.from_numpy(indptr),
        indices=rows[index],
        weights=None if weights is None else weights[index].float(),
    )
