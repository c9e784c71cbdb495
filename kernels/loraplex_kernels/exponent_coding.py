"""Exponent coding: bfloat16 in twelve bits a value, without loss, for adapter factors and weights.

A decode step on a CPU waits for memory, not for arithmetic, so values are kept in three quarters of
their bytes. The upper byte of a bfloat16 holds the sign and seven bits of the exponent. Values that
belong together are of similar size, so few such bytes occur among them. They go into a *codebook*
of at most sixteen, and each value is kept as its lower byte and a four-bit *index* into the
codebook. ``cpu/csrc/exponent_coding.h`` has the bytes.

- A page of a factor has a codebook for each rank row and 768 columns (a *column block*). A page
  stays as it is if a codebook would need more than sixteen bytes, if its rows are odd in number, or
  if its width is no multiple of 64.
- A panel of packed weights (32 outputs) has a codebook for every 64 inputs. Inputs that need more
  than sixteen bytes stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .cpu import native
from .cpu.functions import bind

__all__ = [
    "EXPONENT_CODED",
    "coded_starts",
    "decode_outputs",
    "decode_rows",
    "encode_panels",
    "encode_rows",
    "prefers_coded_pages",
]

# Added to the offset of a page or the address of packed weights, both even, where they are coded.
EXPONENT_CODED = 1
_BLOCK_ROWS, _COLUMN_BLOCK, _CODEBOOK_BYTES = 8, 768, 16
_TILE_COLUMNS, _TILE_ROWS, _TILE_BYTES = 64, 2, 192
_PANEL_BLOCK_WORDS, _PANEL_OUTPUTS, _PANEL_ALIGNMENT = 32, 32, 64
_LARGEST_SHARE = 0.9  # of the plain bytes: above that, decoding is not worth it


def prefers_coded_pages(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels here read coded pages of ``dtype`` faster than plain ones."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return False
    return native.prefers_coded_pages()


def encode_rows(rows: Tensor) -> Tensor | None:
    """``rows`` [n, width] coded, in a flat tensor of bfloat16; None if they cannot be.

    Needs the native library. Any thread.
    """
    n_rows, width = rows.shape
    if not native.available() or rows.dtype != torch.bfloat16:
        raise ValueError("coded rows are bfloat16 and made by native code; prefers_coded_pages()")
    if n_rows % _TILE_ROWS or width % _TILE_COLUMNS:
        return None
    rows = rows.contiguous()
    coded = torch.empty(n_rows * _row_bytes(width) // 2, dtype=torch.bfloat16)
    fits = bind("encode_rows", keep_gil=False)(rows.data_ptr(), n_rows, width, coded.data_ptr())
    return coded if fits else None


def decode_rows(storage: Tensor, offset: int, n_rows: int, width: int) -> Tensor:
    """The values [n_rows, width] of the coded rows at ``offset``. Defines the format of pages."""
    n_bytes = n_rows * _row_bytes(width)
    blocks = storage[offset : offset + n_bytes // 2].view(torch.uint8)
    parts = torch.split(blocks, _BLOCK_ROWS * _row_bytes(width))
    return torch.cat([_decode_row_block(part.int(), width) for part in parts])


def coded_starts(panels: Iterable[Tensor], n_panels: int, n_words: int) -> Tensor | None:
    """Where each coded panel would begin, int64 [n_panels + 1], in bytes; None if none should be.

    ``panels``: int32 [n, n_words, 32], pairs of bfloat16, in order. None where native code reads
    plain panels as fast, or where they hardly become smaller. Runs on torch's threads.
    """
    if not native.prefers_coded_weights() or n_words % _PANEL_BLOCK_WORDS:
        return None
    sizes = torch.empty(n_panels, dtype=torch.int64)
    first = 0
    for part in panels:
        starts = torch.empty(part.shape[0] + 1, dtype=torch.int64)
        _encode_panels(part, starts, 0)
        sizes[first : first + part.shape[0]] = starts.diff()
        first += part.shape[0]
    head = -(-(n_panels + 1) * 8 // _PANEL_ALIGNMENT) * _PANEL_ALIGNMENT
    starts = torch.cat([torch.tensor([head]), head + sizes.cumsum(0)])
    if int(starts[-1]) > _LARGEST_SHARE * n_panels * n_words * _PANEL_OUTPUTS * 4:
        return None
    return starts


def encode_panels(panels: Iterable[Tensor], starts: Tensor, out: Tensor) -> None:
    """Writes what ``coded_starts`` measured to ``out``, flat int32 [starts[-1] / 4].

    It may be moved to any address that is a multiple of 64 bytes.
    """
    out[: 2 * starts.shape[0]] = starts.view(torch.int32)
    first = 0
    for part in panels:
        _encode_panels(part, starts[first:], out.data_ptr())
        first += part.shape[0]


def decode_outputs(panels: Tensor, n_words: int, ids: Tensor) -> Tensor:
    """Outputs ``ids`` int64 [T] of coded ``panels``: bfloat16 [T, 2 · n_words]."""
    ids = ids.contiguous()
    rows = torch.empty((ids.shape[0], 2 * n_words), dtype=torch.bfloat16)
    bind("decode_outputs", keep_gil=False)(
        panels.data_ptr(), n_words, ids.data_ptr(), ids.shape[0], rows.data_ptr()
    )
    return rows


def _encode_panels(words: Tensor, starts: Tensor, address: int) -> None:
    """Fills ``starts`` (address 0), or writes panel i to ``address`` + starts[i]."""
    n_panels, n_words, _ = words.shape
    bind("encode_panels", keep_gil=False)(
        words.data_ptr(), n_panels, n_words, starts.data_ptr(), address
    )


def _decode_row_block(block: Tensor, width: int) -> Tensor:
    """Up to eight rows, one column block after the other → values [rows, width]."""
    n_rows = block.numel() // _row_bytes(width)
    widths = [min(_COLUMN_BLOCK, width - first) for first in range(0, width, _COLUMN_BLOCK)]
    parts = torch.split(block, [n_rows * _row_bytes(w) for w in widths])
    return torch.cat([_decode_column_block(part, n_rows) for part in parts], dim=1)


def _decode_column_block(part: Tensor, n_rows: int) -> Tensor:
    """Bytes → values [n_rows, columns of the block]."""
    codebooks = part[: n_rows * _CODEBOOK_BYTES].view(n_rows, _CODEBOOK_BYTES)
    tiles = part[n_rows * _CODEBOOK_BYTES :].view(
        -1, n_rows // _TILE_ROWS, 1 + _TILE_ROWS, _TILE_COLUMNS
    )
    both = tiles[:, :, 0]
    index = _by_column(torch.stack([both & 15, both >> 4], dim=2), odd_first=True)
    lower = _by_column(tiles[:, :, 1:], odd_first=False)
    words = lower | codebooks.gather(1, index.long()) << 8
    return words.to(torch.int16).view(torch.bfloat16)


def _by_column(parts: Tensor, *, odd_first: bool) -> Tensor:
    """Bytes of tiles [tiles, pairs, 2, 64] in the order of their columns: [n_rows, columns]."""
    even, odd = parts[..., ::2], parts[..., 1::2]
    halves = (odd, even) if odd_first else (even, odd)
    return torch.cat(halves, dim=3).flatten(1, 2).transpose(0, 1).flatten(1)


def _row_bytes(width: int) -> int:
    n_blocks = -(-width // _COLUMN_BLOCK)
    return n_blocks * _CODEBOOK_BYTES + width // _TILE_COLUMNS * (_TILE_BYTES // _TILE_ROWS)
