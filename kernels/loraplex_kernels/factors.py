"""The factors of one (adapter, expert) and how they are cut into pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .errors import BadFactors
from .layout import PAGE_RANK, LoraTarget

__all__ = ["KINDS", "AdapterFactors", "Piece", "SliceFactors", "cut_into_pieces"]


KINDS = ("a", "b", "scale", "bias")  # of pieces, in the order in which the kernels read them


@dataclass(frozen=True, slots=True)
class SliceFactors:
    """What one adapter does to one linear; any part may be absent. Scale is folded into ``b``."""

    a: Tensor | None = None  # [rank, in_features]
    b: Tensor | None = None  # [out_features, rank]
    scale: Tensor | None = None  # [out_features]
    bias: Tensor | None = None  # [out_features]

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]


# target name → one item for each slice of the target; None = the slice is left alone
AdapterFactors = Mapping[str, tuple[SliceFactors | None, ...]]


class Piece(NamedTuple):
    """One contiguous part of the storage: a page of A or Bᵀ, an output scale or a bias."""

    target: str
    slice_index: int
    kind: str  # one of KINDS
    page: int
    source: Tensor  # [rows, width], or [width] of a scale or a bias


def cut_into_pieces(targets: Mapping[str, LoraTarget], factors: AdapterFactors) -> list[Piece]:
    """The pieces of the factors in the order in which the kernels read them. Raises BadFactors."""
    unknown = factors.keys() - targets.keys()
    if unknown:
        raise BadFactors(f"no such targets: {sorted(unknown)}; known: {sorted(targets)}")
    pieces: list[Piece] = []
    for name, target in targets.items():  # not the order of the mapping, which may differ by call
        if name not in factors:
            continue
        slices = factors[name]
        if len(slices) != target.n_slices:
            raise BadFactors(f"{name} has {target.n_slices} slices, got {len(slices)}")
        for i, one in enumerate(slices):
            if one is not None:
                _check(target, i, one)
        for kind in KINDS:
            pieces += _pieces_of(name, slices, kind)
    return pieces


def _pieces_of(name: str, slices: Sequence[SliceFactors | None], kind: str) -> Iterator[Piece]:
    for i, one in enumerate(slices):
        source = None if one is None else getattr(one, kind)
        if source is None:
            continue
        if kind in ("scale", "bias"):
            yield Piece(name, i, kind, 0, source)
            continue
        rows = source if kind == "a" else source.T
        for page, first in enumerate(range(0, rows.shape[0], PAGE_RANK)):
            yield Piece(name, i, kind, page, rows[first : first + PAGE_RANK])


def _check(target: LoraTarget, i: int, one: SliceFactors) -> None:
    width = target.out_features[i]
    if (one.a is None) != (one.b is None):
        raise BadFactors(f"{target.name}[{i}] has only one of its two factors")
    expected = {
        "a": (one.rank, target.in_features),
        "b": (width, one.rank),
        "scale": (width,),
        "bias": (width,),
    }
    for kind, shape in expected.items():
        tensor = getattr(one, kind)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise BadFactors(
                f"{target.name}[{i}].{kind} has shape {tuple(tensor.shape)}, needs {shape}"
            )
