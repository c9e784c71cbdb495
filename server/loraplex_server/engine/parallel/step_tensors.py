"""What the other ranks need to know of a step, as one buffer that is broadcast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loraplex_kernels.cpu.decoder import LogitsRows
from loraplex_kernels.layout import LoraSegments
from loraplex_server.model.forward_context import ForwardContext

__all__ = ["bind_tensors", "join", "n_joined", "split", "step_tensors"]

_ALIGN = 16  # bytes
_PLACES = ("positions", "slot_mapping", "page_table", "query_starts", "kv_lens")
_SEGMENTS = ("slots", "indptr", "indices", "weights")
_LOGITS, _SEGMENT, _OWN = "logits_rows", "segments.", "own_rows."


def step_tensors(step: ForwardContext) -> dict[str, Tensor]:
    """By name. All but the adapters' parts, which each rank has itself."""
    found = {name: getattr(step, name) for name in _PLACES}
    if step.logits_rows is not None:
        found[_LOGITS] = step.logits_rows.indices
    if step.segments is not None:
        parts = {name: getattr(step.segments, name) for name in _SEGMENTS}
        found.update((_SEGMENT + name, part) for name, part in parts.items() if part is not None)
    found.update((_OWN + digest, rows) for digest, rows in step.own_rows.items())
    return found


def bind_tensors(step: ForwardContext, tensors: Mapping[str, Tensor]) -> None:
    """Fills ``step`` with what ``step_tensors`` found, elsewhere."""
    for name in _PLACES:
        setattr(step, name, tensors[name])
    logits = tensors.get(_LOGITS)
    step.logits_rows = None if logits is None else LogitsRows(logits, None)
    parts = {n.removeprefix(_SEGMENT): t for n, t in tensors.items() if n.startswith(_SEGMENT)}
    step.segments = LoraSegments(**parts) if parts else None
    step.own_rows = {n.removeprefix(_OWN): t for n, t in tensors.items() if n.startswith(_OWN)}


def join(tensors: Mapping[str, Tensor]) -> tuple[Tensor, list[list[Any]]]:
    """(bytes, where each tensor lies among them). On the device of the tensors."""
    pieces, places = [], []
    for name, tensor in tensors.items():
        flat = tensor.contiguous().flatten()
        data = flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)
        places.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        pieces += [data, data.new_zeros(-data.numel() % _ALIGN)]
    return torch.cat(pieces), places


def split(joined: Tensor, places: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    """Each in memory of its own: kernels are compiled for pointers of some alignment."""
    found, at = {}, 0
    for name, dtype_name, shape in places:
        dtype = getattr(torch, dtype_name)
        n_bytes = torch.Size(shape).numel() * dtype.itemsize
        found[name] = joined[at : at + n_bytes].clone().view(dtype).view(shape)
        at += -(-n_bytes // _ALIGN) * _ALIGN
    return found


def n_joined(places: Sequence[Sequence[Any]]) -> int:
    """Bytes of what ``join`` made."""
    sizes = (
        torch.Size(shape).numel() * getattr(torch, dtype).itemsize for _, dtype, shape in places
    )
    return sum(-(-size // _ALIGN) * _ALIGN for size in sizes)
