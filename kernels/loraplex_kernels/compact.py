"""Compact pages: rank rows of bfloat16 in twelve bits a value, without loss.

A lone decode row waits for its factors, not for arithmetic, so a CPU's pool keeps them in three
quarters of the bytes. The values of a rank row are of similar size, so their high bytes are few: a
row has a table of at most sixteen of them for every 768 columns, then for each value its low byte
and the place of its high byte in the table (``cpu/csrc/compact.h`` has the bytes). Rows of Bᵀ are
mixed in twos before that. A page with a row of more high bytes, an odd number of rows, or a width
that is no multiple of 64 stays as it is.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .cpu.native import Isa, isa, library

__all__ = ["COMPACT", "compact_rows", "compacts_well", "open_rows"]

COMPACT = 1  # added to a page's offset in the tables, which is even, where the page is compact
_BLOCK_ROWS, _STRETCH, _TABLE_BYTES, _GROUP, _GROUP_ROWS, _GROUP_BYTES = 8, 768, 16, 64, 2, 192


def compacts_well(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels here read compact pages of ``dtype`` faster than plain ones."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return False
    return (isa() or Isa.PORTABLE) >= Isa.AVX512


def compact_rows(rows: Tensor, *, mixed: bool) -> Tensor | None:
    """``rows`` [n, width] as compact bytes in a flat tensor of bfloat16; None if they do not fit.

    ``mixed``: as rows of Bᵀ are kept. Needs the native library. Any thread.
    """
    n_rows, width = rows.shape
    lib = library()
    if lib is None or rows.dtype != torch.bfloat16:
        raise ValueError("compact rows are bfloat16 and made by native code; ask compacts_well()")
    if n_rows % _GROUP_ROWS or width % _GROUP:
        return None
    rows = rows.contiguous()
    made = torch.empty(n_rows * _row_bytes(width) // 2, dtype=torch.bfloat16)
    fits = lib.loraplex_compact_rows(
        ctypes.c_void_p(rows.data_ptr()),
        ctypes.c_int64(n_rows),
        ctypes.c_int64(width),
        ctypes.c_int64(mixed),
        ctypes.c_void_p(made.data_ptr()),
    )
    return made if fits else None


def open_rows(storage: Tensor, offset: int, n_rows: int, width: int, *, mixed: bool) -> Tensor:
    """The values [n_rows, width] of the compact rows at ``offset``: what the format means."""
    n_bytes = n_rows * _row_bytes(width)
    blocks = storage[offset : offset + n_bytes // 2].view(torch.uint8)
    rows = torch.cat(
        [
            _open_block(block.int(), width)
            for block in torch.split(blocks, _BLOCK_ROWS * _row_bytes(width))
        ]
    )
    if not mixed:
        return rows
    # [pairs, halves of 64 columns, groups, even or odd column, 16 of them, rows] → [n_rows, width]
    in_twos = rows.view(n_rows // 2, 2, -1, 2, 16, 2)
    return in_twos.permute(0, 5, 2, 1, 4, 3).reshape(n_rows, width)


def _open_block(block: Tensor, width: int) -> Tensor:
    n_rows = block.numel() // _row_bytes(width)
    widths = [min(_STRETCH, width - first) for first in range(0, width, _STRETCH)]
    stretches = torch.split(block, [n_rows * _row_bytes(w) for w in widths])
    return torch.cat([_open_stretch(stretch, n_rows) for stretch in stretches], dim=1)


def _open_stretch(stretch: Tensor, n_rows: int) -> Tensor:
    """Bytes → values [n_rows, columns of the stretch]."""
    table = stretch[: n_rows * _TABLE_BYTES].view(n_rows, _TABLE_BYTES)
    groups = stretch[n_rows * _TABLE_BYTES :].view(
        -1, n_rows // _GROUP_ROWS, 1 + _GROUP_ROWS, _GROUP
    )
    both = groups[:, :, 0]
    places = _in_order(torch.stack([both & 15, both >> 4], dim=2), odd_first=True)
    low = _in_order(groups[:, :, 1:], odd_first=False)
    words = low | table.gather(1, places.long()) << 8
    return words.to(torch.int16).view(torch.bfloat16)


def _in_order(parts: Tensor, *, odd_first: bool) -> Tensor:
    """A group's 64 bytes [groups, pairs, 2, 64] by the columns they are of: [n_rows, columns]."""
    even, odd = parts[..., ::2], parts[..., 1::2]
    halves = (odd, even) if odd_first else (even, odd)
    return torch.cat(halves, dim=3).flatten(1, 2).transpose(0, 1).flatten(1)


def _row_bytes(width: int) -> int:
    n_stretches = -(-width // _STRETCH)
    return n_stretches * _TABLE_BYTES + width // _GROUP * (_GROUP_BYTES // _GROUP_ROWS)
