"""Binds the operator of a device pool to the model's packed linears."""

from __future__ import annotations

from collections.abc import Iterable

from loraplex_kernels.ops import PreparedTarget
from loraplex_kernels.pool import LoraPool
from loraplex_kernels.side_stream import SideStream
from loraplex_server.model.packed_lora_linear import PackedLoraLinear

from .slice_operator import SliceOperator

__all__ = ["bind_pool"]


def bind_pool(
    groups: Iterable[PackedLoraLinear], pool: LoraPool, side: SideStream | None = None
) -> None:
    """From now on the groups apply the pool's adapters. ``side``: for shrinks, see ``ops``."""
    for group in groups:
        group.lora = PreparedTarget(pool, group.target.name, side)
        group.apply_slice = SliceOperator(pool, group)
