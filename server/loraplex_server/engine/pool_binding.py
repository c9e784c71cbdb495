"""Binds the operator of a device pool to the model's packed linears."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from loraplex_kernels.layout import LoraSegments, LoraTables, LoraTarget
from loraplex_kernels.ops import PreparedTarget, lora_apply
from loraplex_kernels.pool import LoraPool
from loraplex_kernels.side_stream import SideStream
from loraplex_server.model.packed_lora_linear import ApplySlice, PackedLoraLinear

__all__ = ["bind_pool"]


def bind_pool(
    groups: Iterable[PackedLoraLinear], pool: LoraPool, side: SideStream | None = None
) -> None:
    """From now on the groups apply the pool's adapters. ``side``: for shrinks, see ``ops``."""
    for group in groups:
        group.lora = PreparedTarget(pool, group.target.name, side)
        group.apply_slice = _bind_slices(pool, group)


def _bind_slices(pool: LoraPool, group: PackedLoraLinear) -> ApplySlice:
    """The operator on one packed linear alone, for experts whose gates differ between them."""
    targets = [
        LoraTarget(name, group.target.in_features, (width,))
        for name, width in zip(group.module_names, group.target.out_features, strict=True)
    ]

    def apply(index: int, x: Tensor, segments: LoraSegments, out: Tensor) -> None:
        tables = pool.tables(group.target.name)
        part = LoraTables(
            *(
                table[:, index : index + 1].contiguous()
                for table in (
                    tables.ranks,
                    tables.a_pages,
                    tables.b_pages,
                    tables.scale,
                    tables.bias,
                )
            )
        )
        lora_apply(x, pool.storage, targets[index], part, segments, out=out)

    return apply
