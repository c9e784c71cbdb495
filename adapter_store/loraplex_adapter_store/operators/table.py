"""Every operator, by the name under which plan files keep it."""

from __future__ import annotations

from collections.abc import Mapping

from .contract import Operator
from .deltas import (
    Circulant,
    DenseDelta,
    FourierDelta,
    Kronecker,
    MaskedWeight,
    SparseDelta,
    SumDelta,
)
from .rotations import BlockRotation, ButterflyRotation, PairRotation

__all__ = ["OPERATORS"]

_ALL: tuple[type[Operator], ...] = (
    *(Circulant, DenseDelta, FourierDelta, Kronecker, MaskedWeight, SparseDelta, SumDelta),
    *(BlockRotation, ButterflyRotation, PairRotation),
)
OPERATORS: Mapping[str, type[Operator]] = {cls.__name__: cls for cls in _ALL}
