"""Maps of a linear's rows that no pair of low-rank factors expresses (OFT, LoKr, ROAD and kin).

A module plan has at most one at its input, one beside its product and one at its output (see
``ModulePlan``). The engine applies them to their adapter's rows alone, in torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from torch import Tensor
from torch.nn import functional

__all__ = ["OPERATORS", "DenseDelta", "Operator"]


class Operator(ABC):
    """A frozen dataclass of float32 tensors and plain values, each with its shape in a comment.

    Fields are what is kept, moved to the device and written to the plan's file.
    """

    __slots__ = ()

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """``x`` [n_rows, width] → [n_rows, width of the result], in x's dtype and on its device."""

    def tensors(self) -> Iterator[Tensor]:
        for spec in fields(self):  # type: ignore[arg-type]
            value = getattr(self, spec.name)
            if isinstance(value, Tensor):
                yield value


@dataclass(frozen=True, slots=True)
class DenseDelta(Operator):
    """Δ x for a Δ of full rank. As large as the weight itself: the last resort."""

    weight: Tensor  # [out_features, in_features]

    def apply(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype))


# by the name under which plan files keep them
OPERATORS: Mapping[str, type[Operator]] = {cls.__name__: cls for cls in (DenseDelta,)}
