"""Panels of weights in blocks, as ``csrc/blocks/block_formats.h`` lays them out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .functions import bind
from .native import library

IN_BLOCKS = 2  # added to the address of such panels
PANEL = 32  # outputs side by side, as in csrc/layers/linear.inc
BLOCK = 32  # inputs that share a scale
_LINE_BYTES = 64


class BlockRows(NamedTuple):
    """Rows of one GGUF tensor type."""

    format: int  # the tensor type's number
    rows: Tensor  # uint8 [n_out, bytes of a row]


def takes_blocks(format: int, in_features: int) -> bool:
    """Return True if native code multiplies by rows of this format here."""
    return (
        library() is not None
        and in_features % BLOCK == 0
        and bind("block_panel_bytes", keep_gil=True)(format, in_features) > 0
    )


def pack_blocks(parts: Sequence[BlockRows], in_features: int) -> Tensor:
    """Return panels of all rows with their starts in front, int64 words at a cache line.

    All parts but the last have a multiple of 32 rows.
    """
    panel_bytes = [
        int(bind("block_panel_bytes", keep_gil=True)(part.format, in_features)) for part in parts
    ]
    n_panels = [-(-part.rows.shape[0] // PANEL) for part in parts]
    first = -(-(sum(n_panels) + 1) * 8 // _LINE_BYTES) * _LINE_BYTES
    n_bytes = first + sum(n * size for n, size in zip(n_panels, panel_bytes, strict=True))
    packed = _lines(n_bytes)
    starts, end = [], first
    for part, n, size in zip(parts, n_panels, panel_bytes, strict=True):
        bind("pack_blocks", keep_gil=False)(
            part.format,
            part.rows.data_ptr(),
            part.rows.shape[0],
            in_features,
            packed.data_ptr() + end,
        )
        starts += [end + i * size + part.format for i in range(n)]
        end += n * size
    packed[: len(starts) + 1] = torch.tensor([*starts, end])
    return packed


def read_blocks(packed: Tensor, in_features: int, outputs: Tensor) -> Tensor:
    """Return rows ``outputs`` int64 [n] of ``pack_blocks``, float32 [n, in_features]."""
    outputs = outputs.contiguous()
    rows = torch.empty((outputs.shape[0], in_features), dtype=torch.float32)
    bind("read_blocks", keep_gil=False)(
        packed.data_ptr(), in_features, outputs.data_ptr(), outputs.shape[0], rows.data_ptr()
    )
    return rows


def _lines(n_bytes: int) -> Tensor:
    """Return int64 words that begin at a cache line."""
    memory = torch.empty((n_bytes + _LINE_BYTES) // 8, dtype=torch.int64)
    skipped = -memory.data_ptr() % _LINE_BYTES // 8
    return memory[skipped : skipped + n_bytes // 8]
