"""Operators: parts of a module plan that run in torch on the rows of their own adapter.

A module plan has at most one ``RowMap`` at its input, one ``Delta`` beside its product and one
``RowMap`` at its output (see ``ModulePlan``).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

BaseProduct = Callable[[Tensor], Tensor]  # rows [n, in_features] → W x [n, out_features], no bias


class Operator(ABC):
    """A frozen dataclass of tensors and plain values, each with its shape in a comment.

    Tensors are float32, or int32 for positions. On a device, floats have the model's dtype, so they
    hold differences from the base or the identity, which lose little by rounding. All fields are
    moved to the device and written to the plan's file. Immutable; any thread.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def acts(self) -> bool:
        """Return False if all trained values are zero, so the operator changes nothing."""

    def tensors(self) -> Iterator[Tensor]:
        return tensors_of(self)


class RowMap(Operator):
    """A map x ← R x of inputs, or y ← R y of outputs."""

    __slots__ = ()

    @property
    def acts(self) -> bool:
        return any(bool(tensor.any()) for tensor in self.tensors() if tensor.is_floating_point())

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """``x`` [n_rows, width] → [n_rows, width], in x's dtype and on its device."""


class Delta(Operator):
    """An update y ← y + ΔW x. It can be scaled, so that it mixes with others."""

    __slots__ = ()
    linear_in: ClassVar[str] = "values"  # the field that scales ΔW

    @property
    def acts(self) -> bool:
        return all(bool(tensor.any()) for tensor in self.tensors() if tensor.is_floating_point())

    @abstractmethod
    def apply(self, x: Tensor, product: BaseProduct) -> Tensor:
        """``x`` [n_rows, in] → [n_rows, out], in x's dtype and on its device.

        ``product`` multiplies by the base's own weight.
        """

    def scaled(self, weight: float) -> Self:
        """Return ``weight`` · ΔW."""
        parts = {self.linear_in: getattr(self, self.linear_in) * weight}
        return replace(self, **parts)  # type: ignore[type-var]


def tensors_of(part: object) -> Iterator[Tensor]:
    """Yield the tensors in a plan or a part of a plan, field by field."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, Mapping):
        for value in part.values():
            yield from tensors_of(value)
    elif isinstance(part, tuple):
        for value in part:
            yield from tensors_of(value)
    elif is_dataclass(part):
        for spec in fields(part):
            yield from tensors_of(getattr(part, spec.name))
