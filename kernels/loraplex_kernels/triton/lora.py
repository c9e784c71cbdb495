"""The LoRA operator on a GPU: chooses launches from the tuning table and runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from loraplex_kernels.layout import PAGE_RANK, LoraSegments, LoraTables, LoraTarget
from loraplex_kernels.side_stream import SideStream

from .arithmetic import reduction
from .capability import capability_of
from .expand import lora_expand
from .fused import lora_fused
from .routing import DeviceSegments, route_segments
from .shrink import lora_shrink, planes_shape
from .tuning import ExpandChoice, FusedChoice, ShrinkChoice, TuningTable, default_table, key_for

__all__ = ["linear_with_lora_triton", "lora_apply_triton", "two_launches"]


def lora_apply_triton(
    x: Tensor,
    storage: Tensor,
    target: LoraTarget,
    tables: LoraTables,
    segments: LoraSegments,
    *,
    out: Tensor,
    table: TuningTable | None = None,
    capability: int | None = None,
) -> None:
    """``lora_apply_reference`` on a GPU: adds every segment's product to ``out`` in place.

    With ``DeviceSegments`` nothing waits for the device and the launches depend on shapes only, so
    a CUDA graph may replay them for other segments; plain ``LoraSegments`` are routed first, which
    waits. A row's bits depend on that row and its adapters only. Raises ValueError before any
    launch.
    """
    routed = route_segments(segments, x.shape[0])
    choice = _choose(x, target, tables, routed, table, capability)
    _run(lambda: out, (x, storage, target, tables, routed), choice)


def linear_with_lora_triton(
    base: Callable[[], Tensor],
    x: Tensor,
    storage: Tensor,
    target: LoraTarget,
    tables: LoraTables,
    segments: LoraSegments,
    *,
    side: SideStream,
    table: TuningTable | None = None,
    capability: int | None = None,
) -> Tensor:
    """``base()`` with ``lora_apply_triton`` on top, the same bits: the shrink runs beside it.

    Where one launch does shrink and expand, there is nothing to put beside and it follows.
    """
    routed = route_segments(segments, x.shape[0])
    choice = _choose(x, target, tables, routed, table, capability)
    return _run(base, (x, storage, target, tables, routed), choice, side=side)


def _run(
    base: Callable[[], Tensor],
    inputs: tuple[Tensor, Tensor, LoraTarget, LoraTables, DeviceSegments],
    choice: FusedChoice | TwoLaunches,
    *,
    side: SideStream | None = None,
) -> Tensor:
    if isinstance(choice, FusedChoice):
        out = base()
        lora_fused(*inputs, choice, out=out)
        return out
    planes = torch.empty(choice.planes_shape, dtype=torch.float32, device=inputs[0].device)
    shrink = partial(lora_shrink, *inputs, choice.shrink, planes=planes)
    if side is None:
        shrink()
        out = base()
    else:
        side.launch(shrink)
        out = base()
        side.join()
    lora_expand(planes, *inputs, choice.expand, out=out)
    return out


@dataclass(frozen=True, slots=True)
class TwoLaunches:
    shrink: ShrinkChoice
    expand: ExpandChoice
    planes_shape: tuple[int, int, int, int, int]  # of the workspace between them


def _choose(
    x: Tensor,
    target: LoraTarget,
    tables: LoraTables,
    routed: DeviceSegments,
    table: TuningTable | None,
    capability: int | None,
) -> FusedChoice | TwoLaunches:
    if routed.blocks is None:
        chosen = default_table() if table is None else table
        bounds = _bounds(x, tables, routed, capability)
        fused = chosen.fused(key_for("fused", x.dtype, width=target.in_features, **bounds))
        if fused.enabled:
            return fused
    return two_launches(x, target, tables, routed, table, capability)


def two_launches(
    x: Tensor,
    target: LoraTarget,
    tables: LoraTables,
    routed: DeviceSegments,
    table: TuningTable | None,
    capability: int | None,
) -> TwoLaunches:
    """Shrink and expand as ``table`` has them (None: the shipped one); ``x`` for dtype and device.

    ``capability`` None: the device's.
    """
    chosen = default_table() if table is None else table
    bounds = _bounds(x, tables, routed, capability)
    in_features, n_out = target.in_features, sum(target.out_features)
    shrink = chosen.shrink(key_for("shrink", x.dtype, width=in_features, **bounds))
    expand = chosen.expand(key_for("expand", x.dtype, width=n_out, **bounds))
    n_planes = 1 if shrink.serial else reduction(in_features, x.element_size()).n_chunks
    shape = planes_shape(target, tables, routed, n_planes=n_planes)
    return TwoLaunches(shrink, expand, shape)


def _bounds(
    x: Tensor, tables: LoraTables, routed: DeviceSegments, capability: int | None
) -> dict[str, int]:
    return {
        "capability": capability or capability_of(x.device),
        "rank": tables.a_pages.shape[2] * PAGE_RANK,
        "rows": routed.indices.shape[0],
    }
