"""Reads a GGUF file: its metadata, and tensors as the blocks or values that it holds.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. gguf-py reads it, too, but
takes seconds for a vocabulary.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from loraplex_kernels.cpu.gguf_weight import BLOCK_TYPES, GgufWeight
from loraplex_server.model.errors import ModelError

Value = str | int | float | bool | list["Value"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where the file names none
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_OTHER_TYPES = {
    9: "Q8_1", 10: "Q2_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    21: "IQ3_S", 22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor's place in the file."""

    name: str
    shape: tuple[int, ...]  # as torch has it: the last axis is contiguous
    type: int
    offset: int  # in the file


class GgufFile:
    """A mapped GGUF file."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError for a file that is not GGUF, cut off, or has an unknown tensor type."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._at = 0
            n_tensors, n_values = self._header()
            self.metadata: Mapping[str, Value] = dict(self._pair() for _ in range(n_values))
            self.tensors: Mapping[str, TensorEntry] = {t.name: t for t in self._entries(n_tensors)}
        except (OSError, ValueError, struct.error, UnicodeDecodeError) as error:
            raise ModelError(f"{str(path)!r} cannot be read as GGUF: {error}") from error

    @property
    def architecture(self) -> str:
        """The name of the architecture, as "llama"."""
        return str(self.metadata.get("general.architecture", ""))

    def integer(self, key: str) -> int | None:
        """Return a whole number of the metadata; None if there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) else None

    def strings(self, key: str) -> list[str]:
        """Return an array of strings of the metadata; an empty one if there is none."""
        value = self.metadata.get(key)
        return [str(item) for item in value] if isinstance(value, list) else []

    def plain(self, name: str) -> Tensor:
        """Return a tensor's values in float32, dequantised."""
        blocks = self.blocks(name, torch.float32)
        if blocks is None:
            return self._values(name).float()
        return blocks.dequantize().view(self.tensors[name].shape)

    def blocks(self, name: str, dtype: torch.dtype) -> GgufWeight | None:
        """Return a matrix in its blocks, or stacked matrices as one; None if it has plain values.

        ``dtype``: that dequantised weights are rounded to. The blocks are those of the mapped file.
        """
        entry = self.tensors[name]
        if entry.type in _PLAIN:
            return None
        rows = self._values(name)
        return GgufWeight(BLOCK_TYPES[entry.type], rows.reshape(-1, rows.shape[-1]), dtype)

    def _values(self, name: str) -> Tensor:
        entry = self.tensors[name]
        if entry.type in _PLAIN:
            dtype = _PLAIN[entry.type]
            n = prod(entry.shape)
            flat = torch.frombuffer(self._bytes, dtype=dtype, count=n, offset=entry.offset)
            return flat.view(entry.shape)
        block = BLOCK_TYPES[entry.type]
        shape = (*entry.shape[:-1], entry.shape[-1] // block.n_values * block.n_bytes)
        flat = torch.frombuffer(
            self._bytes, dtype=torch.uint8, count=prod(shape), offset=entry.offset
        )
        return flat.view(shape)

    def _header(self) -> tuple[int, int]:
        if self._take(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version, n_tensors, n_values = self._unpack("<IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}; {_VERSIONS} are read")
        return n_tensors, n_values

    def _pair(self) -> tuple[str, Value]:
        key = self._string()
        return key, self._value(*self._unpack("<I"))

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            of, n = self._unpack("<IQ")
            if of in _SCALARS:
                letter = _SCALARS[of][1]
                return list(self._unpack(f"<{n}{letter}"))
            return [self._value(of) for _ in range(n)]
        if kind not in _SCALARS:
            raise ValueError(f"a value has the unknown type {kind}")
        value: Value = self._unpack(_SCALARS[kind])[0]
        return value

    def _entries(self, n_tensors: int) -> Iterator[TensorEntry]:
        entries = []
        for _ in range(n_tensors):
            name = self._string()
            (n_axes,) = self._unpack("<I")
            shape = tuple(reversed(self._unpack(f"<{n_axes}Q")))
            entries.append(TensorEntry(name, shape, *self._unpack("<IQ")))
        alignment = self.integer("general.alignment") or _ALIGNMENT
        first = -(-self._at // alignment) * alignment
        for entry in entries:
            end = first + entry.offset + _n_bytes(entry)
            if end > len(self._bytes):
                raise ValueError(f"it ends before {entry.name}; it was not copied completely")
            yield TensorEntry(entry.name, entry.shape, entry.type, first + entry.offset)

    def _string(self) -> str:
        (n,) = self._unpack("<Q")
        return self._take(n).decode("utf-8", errors="replace")

    def _unpack(self, format: str) -> tuple[int, ...]:
        values = struct.unpack_from(format, self._bytes, self._at)
        self._at += struct.calcsize(format)
        return values

    def _take(self, n: int) -> bytes:
        taken = self._bytes[self._at : self._at + n]
        if len(taken) != n:
            raise ValueError("it is cut off")
        self._at += n
        return taken


def _n_bytes(entry: TensorEntry) -> int:
    """Raises ValueError for a type that is not read."""
    if entry.type in _PLAIN:
        return prod(entry.shape) * _PLAIN[entry.type].itemsize
    if entry.type not in BLOCK_TYPES:
        known = ["F32", "F16", "BF16", *(block.name for block in BLOCK_TYPES.values())]
        name = _OTHER_TYPES.get(entry.type, f"number {entry.type}")
        raise ValueError(
            f"{entry.name} has the tensor type {name}; these are read: {', '.join(known)}"
        )
    block = BLOCK_TYPES[entry.type]
    if entry.shape[-1] % block.n_values != 0:
        raise ValueError(f"{entry.name} has rows of {entry.shape[-1]} values in {block.name}")
    return prod(entry.shape) // block.n_values * block.n_bytes
