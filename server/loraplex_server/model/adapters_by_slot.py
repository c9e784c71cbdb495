"""The adapters of a recorded step, where which adapter a row has is data on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loraplex_kernels.input_scales import scale_inputs, scale_inputs_of_each
from loraplex_kernels.layout import LoraSegments
from loraplex_kernels.moe_by_slot import InputScales, RoutedPairs, mix_pairs, route_pairs
from loraplex_kernels.routers import RouterTable, route_by_slot
from loraplex_kernels.segments import expand_routed

__all__ = ["AdaptersBySlot"]


@dataclass(frozen=True, slots=True)
class AdaptersBySlot:
    """What layers apply beside low-rank factors. Tables hold every adapter; launches depend on
    the number of rows alone."""

    row_slots: Tensor  # int32 [n_rows]; −1 = no adapter
    storage: Tensor  # of the pool
    pair_ids: Tensor  # int32: 0, 1, 2 …, as ``route_pairs`` needs them
    routers: Mapping[str, RouterTable]  # by MLP block or projection
    in_scales: Mapping[str, Tensor]  # by linear: offsets int64 [n_slots], see ``scale_inputs``
    # by first linear of a group that shares its input: offsets int64 [n_slots, linears of it]
    slice_scales: Mapping[str, Tensor]
    own_downs: bool  # whether experts of MLP blocks may scale or shift their down outputs

    def scale_inputs(self, linear: str, x: Tensor) -> None:
        """In place, where an adapter has scales of this linear's inputs."""
        offsets = self.in_scales.get(linear)
        if offsets is not None:
            scale_inputs(x, self.row_slots, self.storage, offsets)

    def inputs_of_each(self, first_linear: str, x: Tensor) -> Tensor | None:
        """What each linear of a group reads of ``x`` [n_rows, width], [n_linears, n_rows, width];
        None if these layers scale no linear's inputs for itself."""
        offsets = self.slice_scales.get(first_linear)
        if offsets is None:
            return None
        return scale_inputs_of_each(x, self.row_slots, self.storage, offsets)

    def routes(self, block: str) -> bool:
        """Whether the MLP block runs over pairs."""
        return block in self.routers

    def pairs(self, block: str, hidden: Tensor) -> RoutedPairs:
        """``hidden`` [n_rows, hidden_size]: the block's input."""
        return route_pairs(hidden, self.row_slots, self.storage, self.routers[block], self.pair_ids)

    def mix(self, gate_up: Tensor, pair_act: Tensor, pairs: RoutedPairs, down: str) -> Tensor:
        """What the linear ``down`` reads, scales of its inputs included."""
        offsets = self.in_scales.get(down)
        scales = None if offsets is None else InputScales(self.row_slots, self.storage, offsets)
        return mix_pairs(gate_up, pair_act, pairs, scales)

    def projection_segments(
        self, projection: str, x: Tensor, *, slice_index: int, n_slices: int
    ) -> LoraSegments | None:
        """The rows of ``x`` by expert of a projection, as ``SliceOperator`` names them."""
        table = self.routers.get(projection)
        if table is None:
            return None
        slots, weights = route_by_slot(
            x, self.row_slots, self.storage, table, slice_index=slice_index, n_slices=n_slices
        )
        return expand_routed(slots, weights, n_slots=table.load.shape[0] * n_slices)
