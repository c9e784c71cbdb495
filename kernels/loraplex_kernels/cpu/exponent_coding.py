"""Exponent coding: lossless bfloat16 in twelve bits a value, for adapter factors and weights.

A decode step on a CPU waits for memory, not for arithmetic, so values are stored in three quarters
of their bytes. The upper byte of a bfloat16 holds the sign and seven bits of the exponent. Values
of one row are of similar size, so few different upper bytes occur among them. These bytes form a
*codebook* of at most sixteen. Each value is stored as its lower byte and a four-bit *index* into
the codebook. ``csrc/layers/exponent_coding.h`` has the layout.

- A page of a factor has a codebook for each rank row and 768 columns (a *column block*). A page is
  not coded if a codebook would need more than sixteen bytes, if the number of its rows is odd, or
  if its width is not a multiple of 64.
- A panel of packed weights (32 outputs) has a codebook for every 64 inputs. Inputs that need more
  than sixteen bytes are not coded.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from . import native
from .functions import bind

# Added to the offset of a coded page or the address of coded weights, which are even.
EXPONENT_CODED = 1
_COLUMN_BLOCK, _CODEBOOK_BYTES = 768, 16
_TILE_COLUMNS, _TILE_ROWS, _TILE_BYTES = 64, 2, 192
_PANEL_BLOCK_WORDS, _PANEL_OUTPUTS, _PANEL_ALIGNMENT = 32, 32, 64
_LARGEST_SHARE = 0.9  # of the plain bytes; above this share decoding costs more than it saves


def prefers_coded_pages(dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if the kernels here read coded pages of ``dtype`` faster than plain ones."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return False
    return native.prefers_coded_pages()


def encode_rows(rows: Tensor) -> Tensor | None:
    """Return ``rows`` [n, width] coded in a flat bfloat16 tensor; None if they cannot be coded.

    Needs the native library. Any thread.
    """
    n_rows, width = rows.shape
    if not native.available() or rows.dtype != torch.bfloat16:
        raise ValueError("native code codes bfloat16 rows; ask prefers_coded_pages() first")
    if n_rows % _TILE_ROWS or width % _TILE_COLUMNS:
        return None
    rows = rows.contiguous()
    coded = torch.empty(n_rows * _row_bytes(width) // 2, dtype=torch.bfloat16)
    fits = bind("encode_rows", keep_gil=False)(rows.data_ptr(), n_rows, width, coded.data_ptr())
    return coded if fits else None


def coded_starts(panels: Iterable[Tensor], n_panels: int, n_words: int) -> Tensor | None:
    """Return the byte offsets of coded panels, int64 [n_panels + 1]; None if coding does not pay.

    ``panels``: int32 [n, n_words, 32], pairs of bfloat16, in order. Coding does not pay where
    native code reads plain panels as fast, or where panels hardly become smaller. Runs on torch's
    threads.
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
    """Write the coded panels to ``out``, flat int32 [starts[-1] / 4], at ``starts``.

    The result may be moved to any address that is a multiple of 64 bytes.
    """
    out[: 2 * starts.shape[0]] = starts.view(torch.int32)
    first = 0
    for part in panels:
        _encode_panels(part, starts[first:], out.data_ptr())
        first += part.shape[0]


def decode_outputs(panels: Tensor, n_words: int, ids: Tensor) -> Tensor:
    """Return outputs ``ids`` int64 [T] of coded ``panels``: bfloat16 [T, 2 · n_words]."""
    ids = ids.contiguous()
    rows = torch.empty((ids.shape[0], 2 * n_words), dtype=torch.bfloat16)
    bind("decode_outputs", keep_gil=False)(
        panels.data_ptr(), n_words, ids.data_ptr(), ids.shape[0], rows.data_ptr()
    )
    return rows


def _encode_panels(words: Tensor, starts: Tensor, address: int) -> None:
    """Fill ``starts`` (address 0), or write panel i to ``address`` + starts[i]."""
    n_panels, n_words, _ = words.shape
    bind("encode_panels", keep_gil=False)(
        words.data_ptr(), n_panels, n_words, starts.data_ptr(), address
    )


def _row_bytes(width: int) -> int:
    n_blocks = -(-width // _COLUMN_BLOCK)
    return n_blocks * _CODEBOOK_BYTES + width // _TILE_COLUMNS * (_TILE_BYTES // _TILE_ROWS)
