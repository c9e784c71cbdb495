"""Factors in the layout of the pool. They are packed once, outside of steps, and then copied."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.cpu.exponent_coding import encode_rows
from loraplex_kernels.formats.factors import KINDS, AdapterFactors, Piece, cut_into_pieces
from loraplex_kernels.formats.layout import LoraTarget

from .pinned_memory import PinnedMemory

ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class PackedFactors:
    """The factors of one (adapter, expert) for all targets, cast and concatenated.

    Every piece (see ``factors.Piece``) starts at a multiple of the alignment, with zeros between
    pieces.
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
    exponent_coding: bool = False,  # code pages in twelve bits a value where possible
    pinned: PinnedMemory | None = None,  # for the copy engine of a GPU
) -> PackedFactors:
    """Cast and copy the factors, in tens of milliseconds. Any thread. Raises BadFactors."""
    pieces = cut_into_pieces(targets, factors)
    encoded = [_encode_page(piece, dtype) if exponent_coding else None for piece in pieces]
    bodies = [
        piece.source if coded is None else coded
        for piece, coded in zip(pieces, encoded, strict=True)
    ]
    index_of = {name: index for index, name in enumerate(targets)}
    unit = ALIGNMENT_BYTES // dtype.itemsize
    lengths = np.array([-(-body.numel() // unit) * unit for body in bodies], dtype=np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    n_elements = int(ends[-1]) if pieces else 0
    empty = torch.empty if pinned is None else pinned.empty
    image = empty(n_elements, dtype=dtype)
    for body, start, length in zip(bodies, starts.tolist(), lengths.tolist(), strict=True):
        _copy_body(image, body, start, length)
    return PackedFactors(
        image=image,
        starts=starts,
        lengths=lengths,
        keys=np.array(
            [
                (index_of[p.target], p.slice_index, KINDS.index(p.kind), p.page, coded is not None)
                for p, coded in zip(pieces, encoded, strict=True)
            ],
            dtype=np.int64,
        ).reshape(-1, 5),
        ranks=np.array(
            [
                (index_of[name], i, part.rank)
                for name, slices in factors.items()
                for i, part in enumerate(slices)
                if part is not None
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
