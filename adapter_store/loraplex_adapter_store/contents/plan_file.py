"""A folded plan on disk, in a layout that loads fast: one read, one hash, then views.

    [u64 header length][JSON header][padding to 64 bytes][data: float32, int32 for positions]

Folding takes Python time per tensor (and an SVD for some families), and would hold the interpreter
lock while others decode. Loading this file holds the lock for a few milliseconds.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from loraplex_adapter_store.errors import StoredAdapterDamaged
from loraplex_adapter_store.operators.kinds import OPERATORS
from loraplex_adapter_store.plan import (
    Activation,
    AdapterPlan,
    ExpertPlan,
    Family,
    HeadPlan,
    HeadTask,
    ModulePlan,
    NormPlan,
    PoolingMode,
    PoolingPlan,
    PrefixPlan,
    RoutingStrategy,
    SharedBasis,
    StackedFactors,
)

_ALIGN = 64
_PLANS = (
    *(AdapterPlan, ExpertPlan, HeadPlan, ModulePlan, NormPlan, PoolingPlan, PrefixPlan),
    *(SharedBasis, StackedFactors),
)
_CLASSES: dict[str, type[Any]] = {**{cls.__name__: cls for cls in _PLANS}, **OPERATORS}
_ENUMS = {cls.__name__: cls for cls in (Activation, Family, HeadTask, PoolingMode, RoutingStrategy)}


class PackedPlan(NamedTuple):
    chunks: tuple[bytes | memoryview, ...]
    sha256: str  # of all chunks


def pack_plan(plan: AdapterPlan) -> PackedPlan:
    """Serialise a plan. Storages that several tensors share are written once."""
    starts: dict[int, int] = {}  # storage pointer → first element in the data
    n_before = 0
    flat: list[Tensor] = []
    for tensor in plan.tensors():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in starts:
            starts[storage.data_ptr()] = n_before
            n_elements = storage.nbytes() // 4
            n_before += n_elements
            flat.append(torch.as_strided(tensor, (n_elements,), (1,), 0))
    chunks: list[bytes | memoryview] = [pack_header({"version": 1, "plan": _encode(plan, starts)})]
    chunks += [part.view(torch.uint8).numpy().data for part in flat if part.numel()]
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return PackedPlan(tuple(chunks), digest.hexdigest())


def read_plan(path: Path, sha256: str) -> AdapterPlan:
    """Read a plan whose tensors are views of one buffer. Raises StoredAdapterDamaged."""
    try:
        n_bytes = path.stat().st_size
        buffer = torch.empty(n_bytes, dtype=torch.uint8)
        with path.open("rb") as file:
            n_read = file.readinto(buffer.numpy().data)
    except OSError as error:
        raise StoredAdapterDamaged(
            f"cannot read {path.name}: {error.strerror or 'it gives no reason'}"
        ) from error
    if n_read != n_bytes or hashlib.sha256(buffer.numpy().data).hexdigest() != sha256:
        raise StoredAdapterDamaged(
            f"the stored plan of {path.parent.name[:12]} changed on disk; add the adapter again"
        )
    return parse_plan(buffer)


def peek_plan(path: Path) -> AdapterPlan:
    """Map a plan: names and shapes now, values from the file on access. Checks no hash.

    Raises StoredAdapterDamaged if there is no plan in the file.
    """
    try:
        n_bytes = path.stat().st_size
        return parse_plan(torch.from_file(str(path), size=n_bytes, dtype=torch.uint8))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise StoredAdapterDamaged(
            f"the stored plan of {path.parent.name[:12]} cannot be read; add the adapter again"
        ) from error


def parse_plan(buffer: Tensor) -> AdapterPlan:
    """Return the plan in these uint8 bytes, as views. ``buffer`` starts at a multiple of 4."""
    header, data_at = parse_header(buffer)
    return cast(AdapterPlan, _decode(header["plan"], buffer[data_at:].view(torch.float32)))


def pack_header(value: object) -> bytes:
    """Return [u64 length][JSON], padded with spaces to a multiple of 64 bytes."""
    text = json.dumps(value).encode()
    text = text.ljust(aligned(8 + len(text)) - 8)
    return len(text).to_bytes(8, "little") + text


def parse_header(buffer: Tensor) -> tuple[Any, int]:
    """Return the value of ``pack_header`` at the start of these bytes, and its end."""
    end = 8 + int.from_bytes(bytes(buffer[:8].numpy()), "little")
    return json.loads(bytes(buffer[8:end].numpy())), aligned(end)


def aligned(n_bytes: int) -> int:
    """Return the next multiple of 64, where a tensor may start."""
    return -(-n_bytes // _ALIGN) * _ALIGN


def _encode(value: object, starts: Mapping[int, int]) -> object:
    if isinstance(value, Tensor):
        start = starts[value.untyped_storage().data_ptr()] + value.storage_offset()
        place: list[object] = [start, list(value.shape), list(value.stride())]
        return {"t": place if value.dtype is torch.float32 else [*place, "int32"]}
    if isinstance(value, Enum):
        return {"e": [type(value).__name__, value.value]}
    if isinstance(value, Mapping):
        return {"m": [[key, _encode(item, starts)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"l": [_encode(item, starts) for item in value]}
    if type(value).__name__ in _CLASSES:
        parts = {name: _encode(getattr(value, name), starts) for name in _set_fields(value)}
        return {"c": [type(value).__name__, parts]}
    return value


def _set_fields(value: object) -> Iterator[str]:
    for spec in fields(value):  # type: ignore[arg-type]
        if getattr(value, spec.name) is not None:
            yield spec.name


def _decode(value: object, data: Tensor) -> object:
    if not isinstance(value, dict):
        return value
    ((kind, body),) = value.items()
    if kind == "t":
        start, shape, stride, *dtype = body
        data = data.view(torch.int32) if dtype else data
        return torch.as_strided(data, shape, stride, data.storage_offset() + start)
    if kind == "c":
        name, parts = body
        decoded: dict[str, Any] = {key: _decode(part, data) for key, part in parts.items()}
        return _CLASSES[name](**decoded)
    if kind == "m":
        return {key: _decode(item, data) for key, item in body}
    if kind == "l":
        return tuple(_decode(item, data) for item in body)
    return _ENUMS[body[0]](body[1])
