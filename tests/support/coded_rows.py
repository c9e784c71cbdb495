"""Reads exponent-coded rows of factors. The layout is that of ``csrc/layers/exponent_coding.h``."""

import torch
from torch import Tensor

_BLOCK_ROWS, _COLUMN_BLOCK, _CODEBOOK_BYTES = 8, 768, 16
_TILE_COLUMNS, _TILE_ROWS, _TILE_BYTES = 64, 2, 192


def decode_rows(storage: Tensor, offset: int, n_rows: int, width: int) -> Tensor:
    """Return the values [n_rows, width] of the coded rows at ``offset``."""
    n_bytes = n_rows * _row_bytes(width)
    blocks = storage[offset : offset + n_bytes // 2].view(torch.uint8)
    parts = torch.split(blocks, _BLOCK_ROWS * _row_bytes(width))
    return torch.cat([_decode_row_block(part.int(), width) for part in parts])


def _decode_row_block(block: Tensor, width: int) -> Tensor:
    """Decode up to eight rows, by column block: values [rows, width]."""
    n_rows = block.numel() // _row_bytes(width)
    widths = [min(_COLUMN_BLOCK, width - first) for first in range(0, width, _COLUMN_BLOCK)]
    parts = torch.split(block, [n_rows * _row_bytes(w) for w in widths])
    return torch.cat([_decode_column_block(part, n_rows) for part in parts], dim=1)


def _decode_column_block(part: Tensor, n_rows: int) -> Tensor:
    """Decode one column block: values [n_rows, columns of the block]."""
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
    """Reorder the bytes of tiles [tiles, pairs, 2, 64] by column: [n_rows, columns]."""
    even, odd = parts[..., ::2], parts[..., 1::2]
    halves = (odd, even) if odd_first else (even, odd)
    return torch.cat(halves, dim=3).flatten(1, 2).transpose(0, 1).flatten(1)


def _row_bytes(width: int) -> int:
    n_blocks = -(-width // _COLUMN_BLOCK)
    return n_blocks * _CODEBOOK_BYTES + width // _TILE_COLUMNS * (_TILE_BYTES // _TILE_ROWS)
