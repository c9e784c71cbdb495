"""Scales of inputs: each row by the vector of its adapter, in place or for each of some linears.

    x[row, k] ← x[row, k] · scale[k]        rows whose slot has a vector; no other row is touched
    out[i, row, k] = x[row, k] · scale_i[k], or x[row, k] where linear i has no vector of the slot

Shapes: x [n_rows, K], row_slots [n_rows], offsets [n_slots] or [n_slots, N], out [N, n_rows, K].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import aligned
from .checks import OFFSET_ALIGN

__all__ = ["check_scales", "scale_inputs_of_each_triton", "scale_inputs_triton"]

_BLOCK = 1024


@triton.jit
def scale_inputs_kernel(
    x_ptr, row_slots_ptr, offsets_ptr, storage_ptr, stride_xm, stride_os,
    K: tl.constexpr, BLOCK: tl.constexpr, OFFSET_ALIGN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots_ptr + row).to(tl.int64)
    offset = tl.load(offsets_ptr + slot * stride_os, mask=slot >= 0, other=-1)
    if offset < 0:
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    pointers = x_ptr + row * stride_xm + columns
    x = tl.load(pointers, mask=inside, other=0.0)
    scale = tl.load(storage_ptr + aligned(offset, OFFSET_ALIGN) + columns, mask=inside, other=0.0)
    tl.store(pointers, (x.to(tl.float32) * scale.to(tl.float32)).to(x.dtype), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def scale_inputs_of_each_kernel(
    x_ptr, row_slots_ptr, offsets_ptr, storage_ptr, out_ptr, n_rows, stride_xm, stride_os,
    K: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, OFFSET_ALIGN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots_ptr + row).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    x = tl.load(x_ptr + row * stride_xm + columns, mask=inside, other=0.0)
    for i in tl.static_range(N):
        offset = tl.load(offsets_ptr + slot * stride_os + i, mask=slot >= 0, other=-1)
        y = x
        if offset >= 0:
            pointers = storage_ptr + aligned(offset, OFFSET_ALIGN) + columns
            scale = tl.load(pointers, mask=inside, other=0.0)
            y = (x.to(tl.float32) * scale.to(tl.float32)).to(x.dtype)
        tl.store(out_ptr + (i * n_rows + row) * K + columns, y, mask=inside)


def scale_inputs_triton(x: Tensor, row_slots: Tensor, storage: Tensor, offsets: Tensor) -> None:
    """``input_scales.scale_inputs``. Allocates nothing.

    Raises ValueError before the launch when a shape, stride, dtype or device does not fit.
    """
    check_scales(x, row_slots, storage, offsets)
    n_rows, width = x.shape
    if n_rows == 0:
        return
    block = min(_BLOCK, triton.next_power_of_2(width))
    scale_inputs_kernel[(n_rows, triton.cdiv(width, block))](
        x, row_slots, offsets, storage, x.stride(0), offsets.stride(0),
        K=width, BLOCK=block, OFFSET_ALIGN=OFFSET_ALIGN, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def scale_inputs_of_each_triton(
    x: Tensor, row_slots: Tensor, storage: Tensor, offsets: Tensor, *, out: Tensor
) -> None:
    """``input_scales.scale_inputs_of_each`` into ``out`` [n_linears, n_rows, width], contiguous.

    Allocates nothing. Raises ValueError before the launch when a shape, stride, dtype or device
    does not fit.
    """
    if offsets.dim() != 2 or offsets.stride(1) != 1:
        raise ValueError(f"offsets must be [n_slots, n_linears], is {tuple(offsets.shape)}")
    check_scales(x, row_slots, storage, offsets[:, 0])
    (n_rows, width), n_linears = x.shape, offsets.shape[1]
    if out.shape != (n_linears, n_rows, width) or not out.is_contiguous():
        raise ValueError(f"out must be [{n_linears}, {n_rows}, {width}], is {tuple(out.shape)}")
    if out.dtype != x.dtype or out.device != x.device:
        raise ValueError(f"out is {out.dtype} on {out.device}, x {x.dtype} on {x.device}")
    if n_rows == 0:
        return
    block = min(_BLOCK, triton.next_power_of_2(width))
    scale_inputs_of_each_kernel[(n_rows, triton.cdiv(width, block))](
        x, row_slots, offsets, storage, out, n_rows, x.stride(0), offsets.stride(0),
        K=width, N=n_linears, BLOCK=block, OFFSET_ALIGN=OFFSET_ALIGN, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip


def check_scales(x: Tensor, row_slots: Tensor, storage: Tensor, offsets: Tensor) -> None:
    """Raises ValueError where rows would be scaled by what is no vector of theirs."""
    if x.dim() != 2 or (x.shape[0] > 0 and x.stride(1) != 1):
        raise ValueError(f"x must be rows, is {tuple(x.shape)} with strides {x.stride()}")
    if storage.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype}, the pool {storage.dtype}")
    if row_slots.shape != (x.shape[0],) or row_slots.dtype != torch.int32:
        raise ValueError(f"row_slots must be int32 [{x.shape[0]}], is {tuple(row_slots.shape)}")
    if offsets.dim() != 1 or offsets.dtype != torch.int64:
        raise ValueError(f"offsets must be int64 [n_slots], is {tuple(offsets.shape)}")
    if any(tensor.device != x.device for tensor in (row_slots, storage, offsets)):
        raise ValueError(f"x is on {x.device}; slots, storage and offsets must be there too")
