"""The public LoRA operator: the fastest implementation for where the tensors are."""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex_kernels.cpu.lora import NativeLora, serves

from .experts import Activation, StepPairs, moe_down, moe_gate_up
from .layout import LoraSegments, LoraTables, LoraTarget
from .model_ops import silu_mul
from .moe_by_slot import RoutedPairs, add_pairs, gate_pairs
from .pool import LoraPool
from .quantized_linear import BaseLinear
from .reference import lora_apply_reference
from .side_stream import SideStream

__all__ = ["PreparedTarget", "lora_apply"]

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def lora_apply(
    x: Tensor,
    storage: Tensor,
    target: LoraTarget,
    tables: LoraTables,
    segments: LoraSegments,
    *,
    out: Tensor,
) -> None:
    """Adds each segment's low-rank product to ``out`` in place (the formula: ``layout.py``).

    Deterministic, and a row's result does not depend on the other rows. For a target of a pool,
    ``PreparedTarget`` is quicker.
    """
    if segments.slots.shape[0] == 0:
        return
    if x.device.type == "cpu" and x.dtype == storage.dtype == out.dtype and serves(x.dtype):
        NativeLora(storage, target, tables)(x, segments, out)
    elif _takes_triton(x, storage):
        from .triton import lora_apply_triton  # imports Triton, which a CPU does not need

        lora_apply_triton(x, storage, target, tables, segments, out=out)
    else:
        lora_apply_reference(x, storage, target, tables, segments, out=out)


class PreparedTarget:
    """One target of a pool, bound to the fastest kernel: ``prepared(x, segments, out)``.

    Follows the pool when it replaces the target's tables. ``side`` hides shrinks on a GPU.
    """

    def __init__(self, pool: LoraPool, target_name: str, side: SideStream | None = None) -> None:
        self._pool, self._side = pool, side
        self._target = pool.targets[target_name]
        self._tables = pool.tables(target_name)
        self._native: NativeLora | None = None
        self._bind()

    def __call__(self, x: Tensor, segments: LoraSegments, out: Tensor) -> None:
        native = self.native()
        if native is not None:
            native(x, segments, out)
        else:
            lora_apply(x, self._pool.storage, self._target, self._tables, segments, out=out)

    def linear_with_lora(self, packed: BaseLinear, x: Tensor, segments: LoraSegments) -> Tensor:
        """``x`` [n_rows, in_features] → the base's product with the segments' products on top.

        The same bits as ``packed(x)`` and a call: native code fetches factors meanwhile, a GPU
        shrinks on the side.
        """
        native, weights = self.native(), packed.native
        if self._side is not None and _takes_triton(x, self._pool.storage):
            from .triton import linear_with_lora_triton

            return linear_with_lora_triton(
                lambda: packed(x),
                x,
                self._pool.storage,
                self._target,
                self._tables,
                segments,
                side=self._side,
            )
        if native is None or weights is None or packed.dtype != self.dtype:
            out = packed(x)
            self(x, segments, out)
            return out
        out = torch.empty((x.shape[0], packed.n_out), dtype=x.dtype)
        native.linear_with_lora(weights, x, segments, out)
        return out

    def moe_gate_up(
        self,
        packed: BaseLinear,
        activation: Activation,
        x: Tensor,
        pairs: StepPairs,
        segments: LoraSegments,
    ) -> tuple[Tensor, Tensor]:
        """``experts.moe_gate_up`` over the base's product."""
        native, weights = self.native(), packed.native
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
        native.moe_gate_up(weights, x, segments, pairs.rows, out, expert_act)
        return out, expert_act

    def moe_down(
        self,
        packed: BaseLinear,
        x: Tensor,
        of_pairs: Tensor,
        pairs: StepPairs,
        segments: LoraSegments,
    ) -> Tensor:
        """``experts.moe_down`` over the base's product."""
        native, weights = self.native(), packed.native
        if native is None or weights is None or packed.dtype != self.dtype:
            return moe_down(packed, self, x, of_pairs, pairs, segments)
        out = torch.empty((x.shape[0], packed.n_out), dtype=x.dtype)
        native.moe_down(weights, x, segments, pairs.rows, out, of_pairs)
        return out

    def gate_pairs(self, x: Tensor, gate_up: Tensor, pairs: RoutedPairs) -> Tensor:
        """``moe_by_slot.gate_pairs`` over the pool's current tables."""
        return gate_pairs(x, gate_up, pairs, *self._operands())

    def add_pairs(self, pair_act: Tensor, act: Tensor, pairs: RoutedPairs, out: Tensor) -> None:
        """``moe_by_slot.add_pairs`` over the pool's current tables."""
        add_pairs(pair_act, act, pairs, *self._operands(), out)

    @property
    def dtype(self) -> torch.dtype:
        return self._pool.storage.dtype

    def native(self) -> NativeLora | None:
        """The native kernel of the pool's current tables, where it may be called."""
        tables = self._pool.tables(self._target.name)
        if tables is not self._tables:
            self._tables = tables
            self._bind()
        return self._native

    def _operands(self) -> tuple[Tensor, LoraTarget, LoraTables]:
        self.native()  # follows the pool
        return self._pool.storage, self._target, self._tables

    def _bind(self) -> None:
        storage = self._pool.storage
        if storage.device.type == "cpu" and serves(storage.dtype):
            self._native = NativeLora(storage, self._target, self._tables)


def _takes_triton(x: Tensor, storage: Tensor) -> bool:
    return x.is_cuda and x.dtype == storage.dtype and x.dtype in _TRITON_DTYPES
