"""What an operator is: a part of a module plan that acts on the rows of its own adapter, in torch.

A module plan has at most one ``RowMap`` at its input, one ``Delta`` beside its product and one
``RowMap`` at its output (see ``ModulePlan``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Self

from torch import Tensor

__all__ = ["BaseProduct", "Delta", "Operator", "RowMap"]

BaseProduct = Callable[[Tensor], Tensor]  # rows [n, in_features] → W x [n, out_features], no bias


class Operator(ABC):
    """A frozen dataclass of tensors and plain values, each with its shape in a comment.

    Tensors are float32, or int32 for places; on a device floats have the model's dtype. So they are
    differences from the base or from the identity, which lose little by it. Fields are what is
    kept, moved to the device and written to the plan's file. Immutable; any thread.
    """

    __slots__ = ()

    @abstractmethod
    def n_products(self, in_features: int, out_features: int) -> int:
        """Multiplications a row, for the load report; sizes are those of the linear."""

    @property
    @abstractmethod
    def acts(self) -> bool:
        """Whether it changes anything: not if what was trained is zero."""

    def tensors(self) -> Iterator[Tensor]:
        for spec in fields(self):  # type: ignore[arg-type]
            value = getattr(self, spec.name)
            if isinstance(value, Tensor):
                yield value


class RowMap(Operator):
    """R of x ← R x or y ← R y."""

    __slots__ = ()

    @property
    def acts(self) -> bool:
        return any(bool(tensor.any()) for tensor in self.tensors() if tensor.is_floating_point())

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """``x`` [n_rows, width] → [n_rows, width], in x's dtype and on its device."""


class Delta(Operator):
    """ΔW of y ← y + ΔW x. Linear in its tensors' scale, so that it mixes with others."""

    __slots__ = ()

    @property
    def acts(self) -> bool:
        return all(bool(tensor.any()) for tensor in self.tensors() if tensor.is_floating_point())

    @abstractmethod
    def apply(self, x: Tensor, product: BaseProduct) -> Tensor:
        """``x`` [n_rows, in] → [n_rows, out], in x's dtype and on its device.

        ``product`` is there for who needs the base's own weight.
        """

    @abstractmethod
    def scaled(self, weight: float) -> Self:
        """``weight`` · ΔW."""
