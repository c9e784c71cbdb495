"""Factor gradients: sums the outer products of a segment's rows, for the backward of a LoRA.

    out[page(slot, p)][r, n] = Σ_{t of slot} planes[p, t, r] · z[row(t), n]      t ascending

With h of the forward and the gradient of y this is the gradient of Bᵀ; with g · B and x it is that
of A. Shapes: planes [max_pages, n_pairs, 16] float32, a slice of what shrink wrote; z [n_rows, N];
out flat float32, laid out as the pool's storage. A program sums one page and one block of columns
over all rows of its slot, so the bits do not depend on other segments and no atomics are needed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.formats.layout import PAGE_RANK, DeviceSegments

from .arithmetic import PAGE, aligned, dot_float32
from .checks import OFFSET_ALIGN

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK_T = 32  # rows of one product


@triton.jit(do_not_specialize=["n_pairs", "max_pages"])
def factor_gradients_kernel(
    planes_ptr,
    z_ptr,
    ranks_ptr,
    pages_ptr,
    indptr_ptr,
    rows_ptr,
    out_ptr,
    stride_zm,
    n_pairs,
    max_pages,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OFFSET_ALIGN: tl.constexpr,
):
    slot = tl.program_id(0) // max_pages
    page = tl.program_id(0) % max_pages
    left = tl.load(ranks_ptr + slot) - page * PAGE
    if left <= 0:
        return
    ranks = tl.arange(0, PAGE)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(indptr_ptr + slot + 1)
    total = tl.zeros((PAGE, BLOCK_N), dtype=tl.float32)
    for first in range(tl.load(indptr_ptr + slot), end, BLOCK_T):
        pairs = first + tl.arange(0, BLOCK_T)
        inside = pairs < end
        rows = tl.load(rows_ptr + pairs, mask=inside, other=0)
        of_page = planes_ptr + page.to(tl.int64) * n_pairs * PAGE
        h = tl.load(of_page + pairs[None, :] * PAGE + ranks[:, None], mask=inside[None, :], other=0)
        z_ptrs = z_ptr + rows[:, None].to(tl.int64) * stride_zm + columns[None, :]
        z = tl.load(z_ptrs, mask=inside[:, None] & (columns[None, :] < N), other=0)
        total = dot_float32(h, z, total)
    offset = aligned(tl.load(pages_ptr + slot * max_pages + page), OFFSET_ALIGN)
    pointers = out_ptr + offset + ranks[:, None] * N + columns[None, :]
    tl.store(pointers, total, mask=(ranks[:, None] < left) & (columns[None, :] < N))


def lora_factor_gradients(
    planes: Tensor,
    z: Tensor,
    ranks: Tensor,
    pages: Tensor,
    segments: DeviceSegments,
    *,
    out: Tensor,
) -> None:
    """Write the gradients of the pages of every slot to ``out``, flat float32.

    ``ranks`` int32 [n_slots] and ``pages`` int64 [n_slots, max_pages] are those of one slice; slot
    s has the pairs of segment s. Allocates nothing. Raises ValueError before the launch when a
    shape, stride, dtype or device does not fit.
    """
    n_slots, max_pages = pages.shape
    n_pairs = segments.indices.shape[0]
    if tuple(planes.shape) != (max_pages, n_pairs, PAGE_RANK) or not planes.is_contiguous():
        wanted = (max_pages, n_pairs, PAGE_RANK)
        raise ValueError(f"planes must be contiguous {wanted}, not {tuple(planes.shape)}")
    if z.dim() != 2 or z.shape[0] != segments.n_rows or (z.shape[1] > 1 and z.stride(1) != 1):
        raise ValueError(f"z is {tuple(z.shape)}, stride {z.stride()}; rows {segments.n_rows}")
    if z.dtype not in _DTYPES or planes.dtype != torch.float32 or out.dtype != torch.float32:
        raise ValueError(f"z is {z.dtype}, planes {planes.dtype}, out {out.dtype}")
    if tuple(ranks.shape) != (n_slots,) or segments.indptr.shape[0] != n_slots + 1:
        raise ValueError(f"{n_slots} slots have {tuple(ranks.shape)} ranks and other segments")
    if not (ranks.is_contiguous() and pages.is_contiguous() and out.is_contiguous()):
        raise ValueError("ranks, pages and out must be contiguous")
    if any(t.device != z.device for t in (planes, ranks, pages, segments.indptr, out)):
        raise ValueError(f"z is on {z.device}; planes, tables, segments and out must be there too")
    if n_pairs == 0 or n_slots == 0:
        return
    width, block_n = z.shape[1], 128 if z.element_size() == 2 else 64
    factor_gradients_kernel[(n_slots * max_pages, triton.cdiv(width, block_n))](
        planes, z, ranks, pages, segments.indptr, segments.indices, out,
        z.stride(0), n_pairs, max_pages,
        N=width, BLOCK_T=_BLOCK_T, BLOCK_N=block_n, OFFSET_ALIGN=OFFSET_ALIGN,
        num_warps=4, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip
