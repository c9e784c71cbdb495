"""The factors of one (adapter, expert), and their division into pages."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from loraplex_kernels.errors import BadFactors

from .layout import PAGE_RANK, LoraTarget

KINDS = ("a", "b", "scale", "bias")  # kinds of pieces, in the order in which kernels read them


@dataclass(frozen=True, slots=True)
class SliceFactors:
    """The parts of one adapter for one linear. Any part may be absent. ``b`` includes alpha/r."""

    a: Tensor | None = None  # [rank, in_features]
    b: Tensor | None = None  # [out_features, rank]
    scale: Tensor | None = None  # [out_features]
    bias: Tensor | None = None  # [out_features]

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]


# target name → one item for each slice of the target; None = the slice is unchanged
AdapterFactors = Mapping[str, tuple[SliceFactors | None, ...]]


class Piece(NamedTuple):
    """A contiguous part of the storage: a page of A or Bᵀ, an output scale or a bias."""

    target: str
    slice_index: int
    kind: str  # one of KINDS
    page: int
    source: Tensor  # [rows, width], or [width] for a scale or a bias


def cut_into_pieces(targets: Mapping[str, LoraTarget], factors: AdapterFactors) -> list[Piece]:
    """Return the pieces in the order in which kernels read them. Raises BadFactors."""
    unknown = factors.keys() - targets.keys()
    if unknown:
        raise BadFactors(f"unknown targets {sorted(unknown)}; known: {sorted(targets)}")
    pieces: list[Piece] = []
    for name, target in targets.items():  # not the order of the mapping, which may differ by call
        if name not in factors:
            continue
        slices = factors[name]
        if len(slices) != target.n_slices:
            raise BadFactors(f"{name} has {target.n_slices} slices, got {len(slices)}")
        for i, part in enumerate(slices):
            if part is not None:
                _check(target, i, part)
        for kind in KINDS:
            pieces += _pieces_of(name, slices, kind)
    return pieces


def _pieces_of(name: str, slices: Sequence[SliceFactors | None], kind: str) -> Iterator[Piece]:
    for i, part in enumerate(slices):
        source = None if part is None else getattr(part, kind)
        if source is None:
            continue
        if kind in ("scale", "bias"):
            yield Piece(name, i, kind, 0, source)
            continue
        rows = source if kind == "a" else source.T
        for page, first in enumerate(range(0, rows.shape[0], PAGE_RANK)):
            yield Piece(name, i, kind, page, rows[first : first + PAGE_RANK])


def _check(target: LoraTarget, i: int, part: SliceFactors) -> None:
    width = target.out_features[i]
    if (part.a is None) != (part.b is None):
        raise BadFactors(f"{target.name}[{i}] has only one of its two factors")
    expected = {
        "a": (part.rank, target.in_features),
        "b": (width, part.rank),
        "scale": (width,),
        "bias": (width,),
    }
    for kind, shape in expected.items():
        tensor = getattr(part, kind)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise BadFactors(
                f"{target.name}[{i}].{kind} has shape {tuple(tensor.shape)}, needs {shape}"
            )
