"""The inputs of a step as one buffer, which rank 0 broadcasts to the others."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loraplex_kernels.formats.layout import DeviceSegments, LoraSegments, tile_rows
from loraplex_kernels.lora.native_decoder import LogitsRows
from loraplex_server.model.layers.forward_context import ForwardContext

_ALIGN = 16  # bytes
_INPUTS = ("positions", "slot_mapping", "page_table", "query_starts", "kv_lens")
_SEGMENTS = ("slots", "indptr", "indices", "weights", "tiles", "pair_of", "pair_segments")
_LOGITS, _SEGMENT, _OWN = "logits_rows", "segments.", "own_rows."


def step_tensors(step: ForwardContext) -> dict[str, Tensor]:
    """Return the step's tensors by name, except adapter tensors: each rank has its own."""
    tensors = {name: getattr(step, name) for name in _INPUTS}
    if step.logits_rows is not None:
        tensors[_LOGITS] = step.logits_rows.indices
    if step.segments is not None:
        parts = {name: getattr(step.segments, name, None) for name in _SEGMENTS}
        tensors.update((_SEGMENT + name, part) for name, part in parts.items() if part is not None)
    tensors.update((_OWN + digest, rows) for digest, rows in step.own_rows.items())
    return tensors


def bind_tensors(step: ForwardContext, tensors: Mapping[str, Tensor]) -> None:
    """Fills ``step`` with the tensors that ``step_tensors`` returned on rank 0."""
    for name in _INPUTS:
        setattr(step, name, tensors[name])
    logits = tensors.get(_LOGITS)
    step.logits_rows = None if logits is None else LogitsRows(logits, None)
    parts = {n.removeprefix(_SEGMENT): t for n, t in tensors.items() if n.startswith(_SEGMENT)}
    step.segments = _segments(parts) if parts else None
    step.own_rows = {n.removeprefix(_OWN): t for n, t in tensors.items() if n.startswith(_OWN)}


def _segments(parts: dict[str, Tensor]) -> LoraSegments:
    """Return ``DeviceSegments`` on a GPU, where each row is in one segment at most."""
    if "tiles" not in parts:
        return LoraSegments(**parts)
    n_rows = parts["pair_of"].shape[0]
    return DeviceSegments(**parts, n_rows=n_rows, block_m=tile_rows(n_rows), blocks=None)


def join(tensors: Mapping[str, Tensor]) -> tuple[Tensor, list[list[Any]]]:
    """Return (bytes, [name, dtype, shape] of each tensor), on the tensors' device."""
    pieces, layout = [], []
    for name, tensor in tensors.items():
        flat = tensor.contiguous().flatten()
        data = flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)
        layout.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        pieces += [data, data.new_zeros(-data.numel() % _ALIGN)]
    return torch.cat(pieces), layout


def split(joined: Tensor, layout: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    """Return the tensors by name, each in memory of its own, since kernels need alignment."""
    tensors, at = {}, 0
    for name, dtype_name, shape in layout:
        dtype = getattr(torch, dtype_name)
        n_bytes = torch.Size(shape).numel() * dtype.itemsize
        tensors[name] = joined[at : at + n_bytes].clone().view(dtype).view(shape)
        at += -(-n_bytes // _ALIGN) * _ALIGN
    return tensors
