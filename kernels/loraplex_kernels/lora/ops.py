"""The public LoRA operator, in the fastest implementation for the device of the tensors."""

import torch
from torch import Tensor

from loraplex_kernels.cpu.lora import NativeLora, serves
from loraplex_kernels.formats.layout import LoraSegments, LoraTables, LoraTarget
from loraplex_kernels.layers.base_linear import BaseLinear
from loraplex_kernels.layers.model_ops import silu_mul
from loraplex_kernels.reference.lora import lora_apply_reference

from .experts import Activation, StepPairs, moe_down, moe_gate_up
from .pool import LoraPool

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def lora_apply(x: Tensor, tables: LoraTables, segments: LoraSegments, *, out: Tensor) -> None:
    """Add each segment's low-rank product to ``out`` in place. ``formats.layout`` has the formula.

    The result is deterministic, and a row's result does not depend on other rows. For a target of a
    pool ``PreparedTarget`` is faster.
    """
    if segments.slots.shape[0] == 0:
        return
    dtype = tables.storage.dtype
    if x.device.type == "cpu" and x.dtype == dtype == out.dtype and serves(dtype):
        NativeLora(tables)(x, segments, out)
    elif x.is_cuda and x.dtype == dtype and dtype in _TRITON_DTYPES:
        from loraplex_kernels.triton.lora import lora_apply_triton

        lora_apply_triton(x, tables, segments, out=out)
    else:
        lora_apply_reference(x, tables, segments, out=out)


class PreparedTarget:
    """A target of a pool, bound to the fastest kernel: ``prepared(x, segments, out)``."""

    def __init__(self, pool: LoraPool, target_name: str) -> None:
        self.tables = pool.tables(target_name)
        self._slices = _tables_of_slices(self.tables)
        self.native: NativeLora | None = None  # None without native code
        if pool.device.type == "cpu" and serves(pool.storage.dtype):
            self.native = NativeLora(self.tables)

    def __call__(self, x: Tensor, segments: LoraSegments, out: Tensor) -> None:
        if self.native is not None:
            self.native(x, segments, out)
        else:
            lora_apply(x, self.tables, segments, out=out)

    def linear_with_lora(self, packed: BaseLinear, x: Tensor, segments: LoraSegments) -> Tensor:
        """Return the base product of ``x`` [n_rows, in_features] plus the segments' products.

        The bits are those of ``packed(x)`` and then this object's ``__call__``. Native code fetches
        the factors while it computes the base's product.
        """
        native, weights = self.native, packed.native
        if native is None or weights is None or packed.dtype != self.dtype:
            out = packed(x)
            self(x, segments, out)
            return out
        out = torch.empty((x.shape[0], packed.n_out), dtype=x.dtype)
        native.over_base("linear_with_lora", weights, x, segments, out)
        return out

    def moe_gate_up(
        self,
        packed: BaseLinear,
        activation: Activation,
        x: Tensor,
        pairs: StepPairs,
        segments: LoraSegments,
    ) -> tuple[Tensor, Tensor]:
        """``experts.moe_gate_up`` over a base linear."""
        native, weights = self.native, packed.native
        ff = packed.n_out // 2
        if (
            native is None
            or weights is None
            or packed.dtype != self.dtype
            or activation is not silu_mul
            or packed.out_features != (ff, ff)
            or ff % 16
        ):
            return moe_gate_up(packed, self, activation, x, pairs, segments)
        out = torch.empty((x.shape[0], packed.n_out), dtype=x.dtype)
        expert_act = torch.empty((pairs.rows.shape[0], ff), dtype=x.dtype)
        native.over_base("moe_gate_up", weights, x, segments, out, (pairs.rows, expert_act))
        return out, expert_act

    def moe_down(
        self,
        packed: BaseLinear,
        x: Tensor,
        of_pairs: Tensor,
        pairs: StepPairs,
        segments: LoraSegments,
    ) -> Tensor:
        """``experts.moe_down`` over a base linear."""
        native, weights = self.native, packed.native
        if native is None or weights is None or packed.dtype != self.dtype:
            return moe_down(packed, self, x, of_pairs, pairs, segments)
        out = torch.empty((x.shape[0], packed.n_out), dtype=x.dtype)
        native.over_base("moe_down", weights, x, segments, out, (pairs.rows, of_pairs))
        return out

    def apply_slice(self, index: int, x: Tensor, segments: LoraSegments, out: Tensor) -> None:
        """Add the products of linear ``index`` alone to ``out``, for experts whose gates differ.

        Segments count slots over all slices: slot e of the pool is ``e · n_slices + index`` here,
        in one table of all slices, so nothing is copied.
        """
        lora_apply(x, self._slices[index], segments, out=out)

    @property
    def dtype(self) -> torch.dtype:
        return self.tables.storage.dtype


def _tables_of_slices(tables: LoraTables) -> list[LoraTables]:
    target = tables.target
    names = ("ranks", "a_pages", "b_pages", "scale", "bias")
    parts = [getattr(tables, name).flatten(0, 1).unsqueeze(1) for name in names]
    return [
        LoraTables(
            LoraTarget(f"{target.name}[{i}]", target.in_features, (width,)), tables.storage, *parts
        )
        for i, width in enumerate(target.out_features)
    ]
