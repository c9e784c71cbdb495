"""The pool's operator on one linear of a packed group, for experts whose gates differ."""

from __future__ import annotations

from torch import Tensor

from loraplex_kernels.layout import LoraSegments, LoraTables, LoraTarget
from loraplex_kernels.ops import lora_apply
from loraplex_kernels.pool import LoraPool
from loraplex_server.model.packed_lora_linear import PackedLoraLinear

__all__ = ["SliceOperator"]


class SliceOperator:
    """Slot e of the pool is slot ``e · n_slices + index`` here: the tables of all slices are one.

    So nothing is copied; segments name these slots (``model.routed.place_experts``).
    """

    def __init__(self, pool: LoraPool, group: PackedLoraLinear) -> None:
        self._pool = pool
        self._name = group.target.name
        self._targets = [
            LoraTarget(name, group.target.in_features, (width,))
            for name, width in zip(group.module_names, group.target.out_features, strict=True)
        ]
        self._of: LoraTables | None = None
        self._merged: LoraTables | None = None

    def __call__(self, index: int, x: Tensor, segments: LoraSegments, out: Tensor) -> None:
        """Adds to ``out`` [n_rows, width of slice ``index``] in place."""
        target = self._targets[index]
        lora_apply(x, self._pool.storage, target, self._tables(), segments, out=out)

    def _tables(self) -> LoraTables:
        tables = self._pool.tables(self._name)
        if self._merged is None or self._of is not tables:
            self._of = tables
            self._merged = LoraTables(
                *(
                    part.flatten(0, 1).unsqueeze(1)
                    for part in (
                        tables.ranks,
                        tables.a_pages,
                        tables.b_pages,
                        tables.scale,
                        tables.bias,
                    )
                )
            )
        return self._merged
