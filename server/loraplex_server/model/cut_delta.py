"""Full-rank updates of a linear that a rank has a part of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from loraplex_adapter_store.operators.contract import BaseProduct, Delta
from loraplex_adapter_store.operators.deltas import MaskedWeight, SumDelta

__all__ = ["LinearCut", "apply_delta"]


class LinearCut(NamedTuple):
    """Which inputs and outputs of a linear a rank has; None: all of them."""

    in_features: int  # of the whole linear
    inputs: slice | None
    outputs: slice | None


def apply_delta(delta: Delta, z: Tensor, product: BaseProduct, cut: LinearCut | None) -> Tensor:
    """The rank's part of ΔW z: of its inputs or its outputs, as ``product`` is of W z.

    A delta is held whole and linear in z: inputs that others have are zero here, and of all outputs
    the rank's are kept. One that multiplies W itself is cut with the plan (``plan_cut``).
    """
    if cut is None or isinstance(delta, MaskedWeight):
        return delta.apply(z, product)
    if isinstance(delta, SumDelta):
        parts = [apply_delta(part, z, product, cut) for part in delta.parts]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total
    if cut.inputs is not None:
        z = functional.pad(z, (cut.inputs.start, cut.in_features - cut.inputs.stop))
    found = delta.apply(z, product)
    return found if cut.outputs is None else found[:, cut.outputs]
