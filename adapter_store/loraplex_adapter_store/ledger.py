"""Accounts for every tensor of a file: each is used once, or the adapter is refused."""

from __future__ import annotations

from torch import Tensor

from .errors import AdapterMismatch
from .safetensors_reader import SafetensorsFile

__all__ = ["TensorLedger"]


class TensorLedger:
    """Belongs to one read. ``take`` claims; ``unclaimed`` is what nobody wanted."""

    def __init__(self, tensors: SafetensorsFile) -> None:
        self._tensors = tensors
        self._claimed: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.entries[name].shape

    def take(self, name: str, shape: tuple[int | None, ...] | None = None) -> Tensor:
        """Claims and loads float32; ``shape`` with None for any size. Raises AdapterMismatch."""
        self.expect(name, shape)
        self._claimed.add(name)
        return self._tensors.load(name)

    def take_indices(self, name: str, shape: tuple[int | None, ...], n_values: int) -> Tensor:
        """Claims and loads int64 in [0, n_values). Raises AdapterMismatch or MalformedFile."""
        self.expect(name, shape)
        self._claimed.add(name)
        return self._tensors.load_indices(name, n_values)

    def expect(self, name: str, shape: tuple[int | None, ...] | None) -> None:
        found = self.shape(name)
        if shape is None:
            return
        fits = len(found) == len(shape) and all(
            want is None or want == have for want, have in zip(shape, found, strict=True)
        )
        if not fits:
            wanted = "[" + ", ".join("any" if want is None else str(want) for want in shape) + "]"
            raise AdapterMismatch(
                f"tensor {name!r} has shape {list(found)}, the base needs {wanted}"
            )

    def claim(self, name: str) -> None:
        """Accounts for a tensor that is known to be redundant, without loading it."""
        self._claimed.add(name)

    def raw(self, name: str) -> memoryview:
        return self._tensors.raw(name)

    @property
    def claimed(self) -> tuple[str, ...]:
        return tuple(sorted(self._claimed))

    @property
    def unclaimed(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._tensors.entries) - self._claimed))
