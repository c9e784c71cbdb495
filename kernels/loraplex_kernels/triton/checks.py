"""Checks that launchers make on the host before a kernel may touch memory."""

import torch
from torch import Tensor

from loraplex_kernels.formats.layout import DeviceSegments, LoraTables, LoraTarget

# Every page, scale and bias offset is a multiple of these elements: the pool aligns to 64 bytes.
OFFSET_ALIGN = 16

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_inputs(
    x: Tensor,
    tables: LoraTables,
    segments: DeviceSegments,
    *,
    n_rows: int | None = None,  # None: the rows of the segments
) -> None:
    """Raise ValueError where shrink would read outside its tensors or misread them."""
    target, storage = tables.target, tables.storage
    if x.dtype not in _DTYPES or storage.dtype != x.dtype:
        raise ValueError(
            f"x is {x.dtype}, the pool {storage.dtype}; both must be one of "
            f"{', '.join(str(dtype) for dtype in _DTYPES)}"
        )
    if x.dim() != 2 or x.shape[1] != target.in_features:
        raise ValueError(f"x is {tuple(x.shape)}, {target.name} reads [*, {target.in_features}]")
    if target.in_features > 1 and x.shape[0] > 0 and x.stride(1) != 1:
        raise ValueError(f"x must be contiguous along its features, stride is {x.stride()}")
    n_rows = segments.n_rows if n_rows is None else n_rows
    if n_rows != x.shape[0]:
        raise ValueError(f"segments were built for {n_rows} rows, x has {x.shape[0]}")
    _check_tables(tables)
    tensors = (storage, tables.ranks, tables.a_pages, segments.tiles, segments.indices)
    if any(tensor.device != x.device for tensor in tensors):
        raise ValueError(f"x is on {x.device}; storage, tables and segments must be there too")


def check_out(out: Tensor, x: Tensor, target: LoraTarget) -> None:
    """Raise ValueError where expand would write outside ``out``."""
    wanted = (x.shape[0], sum(target.out_features))
    if tuple(out.shape) != wanted:
        raise ValueError(f"out is {tuple(out.shape)}, {target.name} writes {wanted}")
    if out.dtype not in _DTYPES or out.device != x.device:
        raise ValueError(f"out is {out.dtype} on {out.device}; x is {x.dtype} on {x.device}")
    if out.shape[0] > 0 and out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(f"out must be contiguous along its features, stride is {out.stride()}")


def _check_tables(tables: LoraTables) -> None:
    target, (n_slots, n_slices) = tables.target, tables.ranks.shape
    wanted = (n_slots, target.n_slices, tables.a_pages.shape[2])
    if n_slices != target.n_slices:
        raise ValueError(f"tables have {n_slices} slices, {target.name} has {target.n_slices}")
    if tuple(tables.a_pages.shape) != wanted or tuple(tables.b_pages.shape) != wanted:
        raise ValueError(f"page tables must both be {wanted}")
    for tensor in (tables.ranks, tables.a_pages, tables.b_pages, tables.scale, tables.bias):
        if not tensor.is_contiguous():
            raise ValueError(f"the tables of {target.name} must be contiguous")
