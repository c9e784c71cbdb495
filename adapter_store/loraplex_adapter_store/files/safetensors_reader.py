"""Reads an untrusted safetensors file, and checks the header before mapping anything.

    [u64 little-endian header length][JSON header][tensor data, no holes, no overlap]

Tensors are copied out of the map as float32, and each is checked to be finite. Pickles are refused
by name and never opened.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loraplex_adapter_store.errors import LimitExceeded, MalformedFile, PickleRefused
from loraplex_adapter_store.limits import StoreLimits

from .file_names import is_pickle_name
from .json_size import check_depth, json_size

_MAX_DIMS = 8
_MAX_NAME = 512
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_INTEGERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_DTYPES = {**_FLOATS, **_INTEGERS, "BOOL": torch.bool}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    dtype: str  # in safetensors' spelling
    shape: tuple[int, ...]
    start: int  # byte offsets in the file
    end: int


def is_finite(tensor: Tensor) -> bool:
    """Return True if all values are finite. The sum says so fast, unless it overflows."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


class SafetensorsFile:
    """A checked safetensors file, mapped read-only (private copy-on-write). Use ``with``."""

    def __init__(self, path: Path, limits: StoreLimits) -> None:
        """Check and map the file. Raises MalformedFile, PickleRefused or LimitExceeded."""
        n_bytes = path.stat().st_size
        if is_pickle_name(path.name):
            raise _pickle(path.name)
        if n_bytes > limits.max_file_bytes:
            raise LimitExceeded(
                f"{path.name} has {n_bytes} bytes, this server allows {limits.max_file_bytes}"
            )
        with path.open("rb") as file:
            header, data_start = _read_header(file.read, n_bytes, path.name, limits)
            self.metadata = _metadata(header.pop("__metadata__", None))
            self.entries: Mapping[str, TensorEntry] = _entries(header, data_start, n_bytes)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.n_bytes = n_bytes

    def load(self, name: str) -> Tensor:
        """Return a float32 copy. Raises MalformedFile unless all values are finite floats."""
        entry = self.entries[name]
        if entry.dtype not in _FLOATS:
            raise MalformedFile(f"tensor {name!r} is {entry.dtype}, a floating-point one is needed")
        tensor = self._view(entry, _FLOATS[entry.dtype]).to(torch.float32, copy=True)
        if not is_finite(tensor):
            raise MalformedFile(f"tensor {name!r} holds NaN or Inf")
        return tensor

    def load_indices(self, name: str, n_values: int) -> Tensor:
        """Return an int64 copy. PEFT stores whole numbers as floats on some systems.

        Raises MalformedFile unless every entry is an integer in [0, n_values).
        """
        entry = self.entries[name]
        if entry.dtype in _INTEGERS:
            values = self._view(entry, _INTEGERS[entry.dtype]).to(torch.int64, copy=True)
        else:
            stored = self.load(name)
            values = stored.to(torch.int64)
            if not torch.equal(values.to(torch.float32), stored):
                raise MalformedFile(f"tensor {name!r} holds fractions, indices are needed")
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < n_values:
            raise MalformedFile(
                f"tensor {name!r} holds indices from {int(values.min())} to {int(values.max())}, "
                f"the base allows 0 to {n_values - 1}"
            )
        return values

    def raw(self, name: str) -> memoryview:
        """Return the stored bytes, valid while the file is open."""
        entry = self.entries[name]
        return memoryview(self._map)[entry.start : entry.end]

    def close(self) -> None:
        self._map.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _view(self, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
        count = math.prod(entry.shape)
        if count == 0:  # AdaLoRA saves modules pruned to rank 0
            return torch.empty(entry.shape, dtype=dtype)
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=entry.start)
        return flat.reshape(entry.shape)


def parse_json_object(data: bytes, what: str, max_bytes: int) -> dict[str, object]:
    """Parse strict JSON that must be an object. Raises MalformedFile or LimitExceeded."""
    value = parse_json(data, what, max_bytes)
    if not isinstance(value, dict):
        raise MalformedFile(f"{what} is {json_kind(value)}, an object is needed")
    return value


def parse_json(data: bytes, what: str, max_bytes: int) -> object:
    """Parse strict JSON: UTF-8, no lone surrogates, duplicate keys or NaN, numbers of 64 bits.

    Raises MalformedFile or LimitExceeded.
    """
    if len(data) > max_bytes:
        raise LimitExceeded(f"{what} has {len(data)} bytes, this server allows {max_bytes}")
    try:
        check_depth(data)
        value: object = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constants,
            parse_int=_int64,
            parse_float=_finite,
        )
        if rb"\u" in data:  # half of a surrogate pair could be written to no answer and no file
            json.dumps(value, ensure_ascii=False).encode()
    except ValueError as error:
        raise MalformedFile(f"{what} is not valid JSON: {error}") from None
    return value


def _read_header(
    read: Callable[[int], bytes], n_bytes: int, name: str, limits: StoreLimits
) -> tuple[dict[str, object], int]:
    start = read(8)
    if len(start) < 8:
        raise MalformedFile(f"{name} has {n_bytes} bytes: too short for a safetensors header")
    length = int.from_bytes(start, "little")
    if length > limits.max_header_bytes:
        if start.startswith(_PICKLE_STARTS):
            raise _pickle(name)
        raise MalformedFile(
            f"{name} claims a header of {length} bytes, at most {limits.max_header_bytes}: "
            "not a safetensors file, or a damaged one"
        )
    if 8 + length > n_bytes:
        raise MalformedFile(f"{name} is truncated: header of {length} bytes, file of {n_bytes}")
    text = read(length)
    n_objects = limits.max_tensors + 2  # one for each tensor, the header itself, its metadata
    if any(size.n_objects > n_objects for size in json_size(text)):
        raise LimitExceeded(
            f"{name} holds more than {limits.max_tensors:,} tensors, which is this server's limit"
        )
    return parse_json_object(text, f"header of {name}", limits.max_header_bytes), 8 + length


def _metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise MalformedFile("__metadata__ of the header must map strings to strings")
    return value


def _entries(header: Mapping[str, object], data_start: int, n_bytes: int) -> dict[str, TensorEntry]:
    entries = {name: _entry(name, value, data_start) for name, value in header.items()}
    if not entries:
        raise MalformedFile("the file holds no tensors")
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            kind = "overlaps another one" if entry.start < end else "leaves a hole before it"
            raise MalformedFile(f"tensor {name!r} {kind}: starts at {entry.start}, not at {end}")
        end = entry.end
    if end != n_bytes:
        raise MalformedFile(
            f"tensors end at byte {end}, the file at {n_bytes}: truncated or padded"
        )
    return entries


def _entry(name: str, value: object, data_start: int) -> TensorEntry:
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise MalformedFile(f"tensor name {name[:80]!r} is empty, too long or not printable")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise MalformedFile(f"header entry of {name!r} needs exactly dtype, shape, data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise MalformedFile(f"tensor {name!r} has dtype {dtype!r}; known: {', '.join(_DTYPES)}")
    if not _naturals(shape) or len(shape) > _MAX_DIMS:
        raise MalformedFile(f"tensor {name!r} has shape {shape!r}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise MalformedFile(f"tensor {name!r} has data_offsets {offsets!r}")
    n_bytes = math.prod(shape) * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != n_bytes:
        raise MalformedFile(
            f"tensor {name!r} of {dtype} {shape} needs {n_bytes} bytes, has offsets {offsets}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 48
        for item in value
    )


def _no_duplicates(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate keys")
    return result


def _int64(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= int(text) < 1 << 64:
        raise ValueError(f"the number {text[:20]}… is larger than 64 bits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is larger than any float")
    return value


def _no_constants(value: str) -> object:
    raise ValueError(f"{value} is not a JSON number")


def _pickle(name: str) -> PickleRefused:
    return PickleRefused(
        f"{name} is a pickle, which can run code when opened; convert it with "
        "`loraplex adapters convert`, which does so in a locked-down process"
    )


def json_kind(value: object) -> str:
    """Return the kind in the words of JSON, as "a list"."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case Mapping():
            return "an object"
        case Sequence():
            return "a list"
    return "no JSON"
