"""Factors in the layout of the pool: packed once, outside of steps; loaded by copying."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .exponent_coding import encode_rows
from .factors import KINDS, AdapterFactors, Piece, cut_into_pieces
from .layout import LoraTarget

__all__ = ["ALIGNMENT_BYTES", "PackedFactors", "pack_factors"]

ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class PackedFactors:
    """The factors of one (adapter, expert) for all targets, cast and laid end to end.

    Every piece (see ``factors.Piece``) starts at a multiple of the alignment; what lies between
    is zero.
    """

    image: Tensor  # [n_elements] in the pool's dtype, on the host
    starts: NDArray[np.int64]  # [n_pieces], elements of ``image``
    lengths: NDArray[np.int64]  # [n_pieces], elements, up to the start of the next
    keys: NDArray[np.int64]  # [n_pieces, 5]: target, slice, index in KINDS, page, 1 if coded
    ranks: NDArray[np.int64]  # [n_slices, 3]: target, slice, rank

    @property
    def n_bytes(self) -> int:
        return self.image.nbytes


def pack_factors(
    targets: Mapping[str, LoraTarget],
    factors: AdapterFactors,
    dtype: torch.dtype,
    *,
    exponent_coding: bool = False,  # pages that can be, in twelve bits a value
    pin_memory: bool = False,  # for the copy engine of a GPU
) -> PackedFactors:
    """Casts and copies; tens of milliseconds for a large adapter. Any thread. Raises BadFactors."""
    pieces = cut_into_pieces(targets, factors)
    encoded = [_encode_page(piece, dtype) if exponent_coding else None for piece in pieces]
    bodies = [
        piece.source if made is None else made for piece, made in zip(pieces, encoded, strict=True)
    ]
    index_of = {name: index for index, name in enumerate(targets)}
    unit = ALIGNMENT_BYTES // dtype.itemsize
    lengths = np.array([-(-body.numel() // unit) * unit for body in bodies], dtype=np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    n_elements = int(ends[-1]) if pieces else 0
    image = torch.empty(n_elements, dtype=dtype, pin_memory=pin_memory)
    for body, start, length in zip(bodies, starts.tolist(), lengths.tolist(), strict=True):
        _copy_body(image, body, start, length)
    return PackedFactors(
        image=image,
        starts=starts,
        lengths=lengths,
        keys=np.array(
            [
                (index_of[p.target], p.slice_index, KINDS.index(p.kind), p.page, made is not None)
                for p, made in zip(pieces, encoded, strict=True)
            ],
            dtype=np.int64,
        ).reshape(-1, 5),
        ranks=np.array(
            [
                (index_of[name], i, one.rank)
                for name, slices in factors.items()
                for i, one in enumerate(slices)
                if one is not None
            ],
            dtype=np.int64,
        ).reshape(-1, 3),
    )


def _encode_page(piece: Piece, dtype: torch.dtype) -> Tensor | None:
    if piece.kind not in ("a", "b"):
        return None
    return encode_rows(piece.source.to(dtype))


def _copy_body(image: Tensor, body: Tensor, start: int, length: int) -> None:
    n_elements = body.numel()
    image[start : start + n_elements].view(body.shape).copy_(body)
    if n_elements < length:
        image[start + n_elements : start + length] = 0
