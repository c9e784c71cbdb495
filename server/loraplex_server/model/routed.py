"""Routed experts inside the base model: MixLoRA on an MLP block, MoLA and kin on one projection.

The maths is the router's (``loraplex_router.experts``); here it meets the model's packed linears.
``ForwardContext.routed`` names the blocks and projections that some rows of a step route;
everything else runs as if no expert existed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from loraplex_adapter_store.plan import ExpertPlan
from loraplex_router.experts import MlpBlock, PlacedExperts, RoutedRows, mixed_mlp

from .adapters_by_slot import AdaptersBySlot
from .forward_context import ForwardContext
from .packed_lora_linear import PackedLoraLinear

__all__ = ["RoutedMlp", "find_mlps", "place_experts", "rows_for", "shares_down", "slices_of"]


def place_experts(
    plans: Mapping[str, ExpertPlan],
    slots: Sequence[int],
    device: torch.device,
    slices: Mapping[str, tuple[int, int]],
) -> dict[str, PlacedExperts]:
    """``slots[e]`` is the pool slot of expert e, whose factors span all blocks.

    ``slices``: see ``slices_of``. The operator of a slice counts slots by them
    (``engine.slice_operator``); an MLP block's experts span groups.
    """
    pool_slots = torch.tensor(slots, dtype=torch.int32)
    placed = {}
    for name, plan in plans.items():
        index, n_slices = slices.get(name, (0, 1))
        of_place = pool_slots[: len(plan.experts)] * n_slices + index
        placed[name] = PlacedExperts(
            gate=plan.gate.to(device, torch.float32),
            slots=of_place.to(device),
            strategy=plan.strategy,
            top_k=plan.top_k,
            top_p=plan.top_p,
            shared_down=shares_down(plan),
            load=torch.zeros(len(plan.experts), dtype=torch.int64, device=device),
        )
    return placed


def shares_down(plan: ExpertPlan) -> bool:
    """Whether one down product serves all experts of a block: none scales or shifts its own."""
    downs = [
        module
        for expert in plan.experts
        for name, module in expert.items()
        if name.endswith("down_proj")
    ]
    return all(module.out_scale is None and module.bias is None for module in downs)


def slices_of(groups: Iterable[PackedLoraLinear]) -> dict[str, tuple[int, int]]:
    """Of each projection its index in its packed group, and how many are in that."""
    return {
        name: (index, group.target.n_slices)
        for group in groups
        for index, name in enumerate(group.module_names)
    }


def rows_for(experts: Mapping[str, PlacedExperts], rows: Tensor) -> dict[str, RoutedRows]:
    """One adapter's rows of a step, by block or projection. ``rows`` int64, ascending."""
    by_width: dict[int, Tensor] = {}
    routed = {}
    for name, placed in experts.items():
        if placed.k not in by_width:
            by_width[placed.k] = RoutedRows.pair_rows_of(rows, placed.k)
        routed[name] = RoutedRows(rows, by_width[placed.k], placed)
    return routed


class RoutedMlp(nn.Module):
    """Replaces an MLP. Without routed rows it computes what the MLP does."""

    def __init__(
        self,
        name: str,
        gate_up: PackedLoraLinear,
        down: PackedLoraLinear,
        activation: Callable[[Tensor], Tensor],  # act(gate) ⊙ up: [n, 2·ff] → [n, ff]
        step: ForwardContext,
    ) -> None:
        super().__init__()
        self.name = name
        self.gate_up, self.down, self._activation = gate_up, down, activation
        self._step = step
        self._block = MlpBlock(
            activation=activation,
            down=down.packed,
            lora_down=down.apply_segments,
            moe_gate_up=gate_up.moe_gate_up,
            moe_down=down.moe_down,
            plain_gate_up=gate_up.add_step_adapters,
            plain_down=down.add_step_adapters,
            scaled_down=down.scaled_inputs,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] → [..., hidden_size]."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        return self.run(rows).view_as(hidden)

    def run(self, hidden: Tensor) -> Tensor:
        """``hidden`` [n_rows, hidden_size]."""
        by_slot = self._step.by_slot
        if by_slot is not None and by_slot.routes(self.name):
            return self._run_by_slot(hidden, by_slot)
        routed = self._step.routed.get(self.name)
        if routed:
            out = mixed_mlp(hidden, self._block, routed)
            if self.down.reduce is not None:
                self.down.reduce(out)
            return out
        return self.down(self._activation(self.gate_up(hidden)))

    def _run_by_slot(self, hidden: Tensor, by_slot: AdaptersBySlot) -> Tensor:
        """Every adapter's rows as pairs, plain ones too; rows of the base are none."""
        gate_up = self.gate_up.base_product(hidden)
        self.gate_up.add_projection_experts(hidden, gate_up)
        pairs = by_slot.pairs(self.name, hidden)
        pair_act = self.gate_up.gate_pairs(hidden, gate_up, pairs)
        act = by_slot.mix(gate_up, pair_act, pairs, self.down.module_names[0])
        out = self.down.down_pairs(pair_act, act, pairs)
        self.down.add_projection_experts(act, out)
        return out


def find_mlps(
    groups: Mapping[str, PackedLoraLinear],
    activation_of: Callable[[str], Callable[[Tensor], Tensor] | None],
    step: ForwardContext,
) -> dict[str, RoutedMlp]:
    """Every block with packed gate and up projections and a down projection, by module name.

    ``activation_of`` tells the gated activation of a block, None if it is not a gated one.
    """
    by_module = {name: group for group in groups.values() for name in group.module_names}
    mlps = {}
    for group in groups.values():
        if len(group.module_names) != 2 or not group.module_names[0].endswith(".gate_proj"):
            continue
        name = group.module_names[0].rpartition(".")[0]
        down, activation = by_module.get(f"{name}.down_proj"), activation_of(name)
        if down is not None and activation is not None:
            mlps[name] = RoutedMlp(name, group, down, activation, step)
    return mlps
