"""Every operator, by the name under which plan files keep it."""

from __future__ import annotations

import re
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

__all__ = ["OPERATORS", "operator_name"]

_ALL: tuple[type[Operator], ...] = (
    *(Circulant, DenseDelta, FourierDelta, Kronecker, MaskedWeight, SparseDelta, SumDelta),
    *(BlockRotation, ButterflyRotation, PairRotation),
)
OPERATORS: Mapping[str, type[Operator]] = {cls.__name__: cls for cls in _ALL}


def operator_name(operator: Operator) -> str:
    """For people: ``BlockRotation`` is a "block rotation"."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", type(operator).__name__).lower()
