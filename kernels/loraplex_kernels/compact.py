"""Compact pages: rank rows of bfloat16 in twelve bits a value, without loss.

A lone decode row waits for its factors, not for arithmetic, so a CPU's pool keeps them in three
quarters of the bytes. The values of a rank row are of similar size and have few exponents: a row is
a table of at most sixteen of them, then sign, mantissa and the exponent's place in the table for
each value (``cpu/csrc/compact.h`` has the bytes). Rows of Bᵀ are mixed in twos before that. A page
with a row of more exponents, an odd number of rows, or a width that is no multiple of 64 stays as
it is.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .cpu.native import Isa, isa, library

__all__ = ["COMPACT", "compact_rows", "compacts_well", "open_rows"]

COMPACT = 1  # added to a page's offset in the tables, which is even, where the page is compact
_BLOCK_ROWS, _TABLE_BYTES, _GROUP, _GROUP_ROWS, _GROUP_BYTES = 8, 16, 64, 2, 192


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
    table = block[: n_rows * _TABLE_BYTES].view(n_rows, _TABLE_BYTES)
    low, high = block[n_rows * _TABLE_BYTES :].view(-1, 2).unbind(1)
    words = (low | high << 8).view(-1, n_rows // _GROUP_ROWS, 1 + _GROUP_ROWS, _GROUP // 2)
    places = torch.stack([words[:, :, 0] >> shift & 15 for shift in (0, 4, 8, 12)], dim=2)
    rest = words[:, :, 1:]
    halves = torch.stack([rest, rest >> 8 | rest << 8], dim=3) & 0x807F
    # [groups, pairs, places or halves of them, 32] → [n_rows, width]
    places, halves = (t.reshape(-1, n_rows, _GROUP).transpose(0, 1) for t in (places, halves))
    exponents = table.gather(1, places.flatten(1).long())
    values: Tensor = (halves.flatten(1) | exponents << 7).to(torch.int16).view(torch.bfloat16)
    return values


def _row_bytes(width: int) -> int:
    return _TABLE_BYTES + width // _GROUP * (_GROUP_BYTES // _GROUP_ROWS)
