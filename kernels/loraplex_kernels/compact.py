"""Compact pages: rank rows of bfloat16 in twelve bits a value, without loss.

A lone decode row waits for its factors, not for arithmetic, so a CPU's pool keeps them in three
quarters of the bytes. The values of a rank row are of similar size and have few exponents: a row is
a table of at most sixteen of them, then sign, mantissa and the exponent's place in the table for
each value (``cpu/csrc/compact.h`` has the bytes). A page with a row of more exponents, or whose
width is no multiple of 64, stays as it is.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .cpu.native import Isa, isa, library

__all__ = ["COMPACT", "compact_rows", "compacts_well", "open_rows"]

COMPACT = 1  # added to a page's offset in the tables, which is even, where the page is compact
_BLOCK_ROWS, _TABLE_BYTES, _GROUP, _GROUP_BYTES = 8, 16, 64, 96


def compacts_well(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels here read compact pages of ``dtype`` faster than plain ones."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return False
    return (isa() or Isa.PORTABLE) >= Isa.AVX512


def compact_rows(rows: Tensor) -> Tensor | None:
    """``rows`` [n, width] as compact bytes in a flat tensor of bfloat16; None if they do not fit.

    Needs the native library. Any thread.
    """
    n_rows, width = rows.shape
    lib = library()
    if lib is None or rows.dtype != torch.bfloat16:
        raise ValueError("compact rows are bfloat16 and made by native code; ask compacts_well()")
    if width % _GROUP:
        return None
    rows = rows.contiguous()
    made = torch.empty(n_rows * _row_bytes(width) // 2, dtype=torch.bfloat16)
    fits = lib.loraplex_compact_rows(
        ctypes.c_void_p(rows.data_ptr()),
        ctypes.c_int64(n_rows),
        ctypes.c_int64(width),
        ctypes.c_void_p(made.data_ptr()),
    )
    return made if fits else None


def open_rows(storage: Tensor, offset: int, n_rows: int, width: int) -> Tensor:
    """The values [n_rows, width] of the compact rows at ``offset``: what the format means."""
    n_bytes = n_rows * _row_bytes(width)
    blocks = storage[offset : offset + n_bytes // 2].view(torch.uint8)
    return torch.cat(
        [
            _open_block(block.int(), width)
            for block in torch.split(blocks, _BLOCK_ROWS * _row_bytes(width))
        ]
    )


def _open_block(block: Tensor, width: int) -> Tensor:
    n_rows = block.numel() // _row_bytes(width)
    table = block[: n_rows * _TABLE_BYTES].view(n_rows, _TABLE_BYTES)
    groups = block[n_rows * _TABLE_BYTES :].view(-1, n_rows, _GROUP_BYTES).transpose(0, 1)
    rest = groups[..., :_GROUP].reshape(n_rows, -1, _GROUP // 2, 2).transpose(-1, -2)
    places = torch.stack([groups[..., _GROUP:] & 15, groups[..., _GROUP:] >> 4], dim=-2)
    exponents = table.gather(1, places.flatten(1).long()).view_as(rest)
    bits = (rest & 0x80) << 8 | exponents << 7 | rest & 0x7F
    values: Tensor = bits.to(torch.int16).view(torch.bfloat16)
    return values.reshape(n_rows, width)


def _row_bytes(width: int) -> int:
    return _TABLE_BYTES + width // _GROUP * _GROUP_BYTES
