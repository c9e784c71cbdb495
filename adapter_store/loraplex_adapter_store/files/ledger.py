"""Accounts for every tensor of a file. An adapter with an unused tensor is refused."""

from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch

from .safetensors_reader import SafetensorsFile


class TensorLedger:
    """Tracks which tensors of an adapter's file were used. ``take`` marks a tensor as used."""

    def __init__(self, tensors: SafetensorsFile) -> None:
        self._tensors = tensors
        self._claimed: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.entries[name].shape

    def take(self, name: str, shape: tuple[int | None, ...] | None = None) -> Tensor:
        """Claim and load a tensor, float32; None in ``shape`` stands for any size.

        Raises AdapterMismatch or MalformedFile.
        """
        self.expect(name, shape)
        self._claimed.add(name)
        return self._tensors.load(name)

    def take_indices(self, name: str, shape: tuple[int | None, ...], n_values: int) -> Tensor:
        """Claim and load int64 in [0, n_values). Raises AdapterMismatch or MalformedFile."""
        self.expect(name, shape)
        self._claimed.add(name)
        return self._tensors.load_indices(name, n_values)

    def expect(self, name: str, shape: tuple[int | None, ...] | None) -> None:
        """Raises AdapterMismatch unless the stored shape matches ``shape``."""
        stored = self.shape(name)
        if shape is None or (
            len(stored) == len(shape)
            and all(want in (None, have) for want, have in zip(shape, stored, strict=True))
        ):
            return
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise AdapterMismatch(
            f"tensor {name!r} has shape {list(stored)}, the base needs [{wanted}]"
        )

    def claim(self, name: str) -> None:
        """Account for a redundant tensor without loading it."""
        self._claimed.add(name)

    def raw(self, name: str) -> memoryview:
        return self._tensors.raw(name)

    @property
    def claimed(self) -> tuple[str, ...]:
        return tuple(sorted(self._claimed))

    @property
    def unclaimed(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._tensors.entries) - self._claimed))
