"""Routed experts in the base model: MixLoRA on MLP blocks; MoLA and LoRAMoE on projections.

    g_e = W_gate h + B_gate^e A_gate^e h        u_e = W_up h + B_up^e A_up^e h
    a_e = act(g_e) ⊙ u_e
    y   = W_down (Σ_e w_e a_e) + Σ_e w_e B_down^e A_down^e a_e

``ForwardContext.routed`` has the blocks and projections that route rows of a step. All others run
as if there were no experts. In a block the base products of gate and up are computed once per row
and copied to the row's k experts. The base's down product is linear, so activations are mixed
before it: the frozen MLP costs what it costs for a plain row, whatever k. Only routed rows are
expanded. Sums over experts run in a fixed order.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from loraplex_adapter_store.plan import ExpertPlan
from loraplex_kernels.formats.host_copy import move_together
from loraplex_kernels.formats.layout import LoraSegments
from loraplex_kernels.lora.experts import StepPairs, moe_combine, weighted_sum
from loraplex_kernels.lora.routed_mlp import add_pairs, gate_pairs, mix_pairs
from loraplex_router.experts.expansion import PlacedExperts, RoutedRows, expand, step_pairs

from .forward_context import CapturedExperts, ForwardContext
from .packed_lora_linear import PackedLoraLinear


def place_experts(
    plans: Mapping[str, ExpertPlan],
    slots: Sequence[int],
    device: torch.device,
    slices: Mapping[str, tuple[int, int]],
) -> dict[str, PlacedExperts]:
    """Return the experts on the device. ``slots[e]`` is the pool slot of expert e, at all sites.

    One copy on the current stream takes the slots of all sites, and nothing waits for it.
    ``slices``: see ``slices_of``. ``PreparedTarget.apply_slice`` counts slots by them.
    """
    of_sites = []
    for name, plan in plans.items():
        index, n_slices = slices.get(name, (0, 1))
        of_sites.append(np.array(slots[: len(plan.experts)], dtype=np.int32) * n_slices + index)
    return {
        name: PlacedExperts(
            gate=plan.gate.to(device, torch.float32),
            slots=of_site,
            strategy=plan.strategy,
            top_k=plan.top_k,
            top_p=plan.top_p,
            shared_down=shares_down(plan),
            load=torch.zeros(len(plan.experts), dtype=torch.int64, device=device),
        )
        for (name, plan), of_site in zip(
            plans.items(), move_together(of_sites, device), strict=True
        )
    }


def shares_down(plan: ExpertPlan) -> bool:
    """Return True if no expert scales or shifts its down output, so they share one product."""
    downs = [
        module
        for expert in plan.experts
        for name, module in expert.items()
        if name.endswith("down_proj")
    ]
    return all(module.out_scale is None and module.bias is None for module in downs)


def slices_of(groups: Iterable[PackedLoraLinear]) -> dict[str, tuple[int, int]]:
    """Return each projection's index in its packed group, and the size of the group."""
    return {
        name: (index, group.target.n_slices)
        for group in groups
        for index, name in enumerate(group.module_names)
    }


def rows_for(experts: Mapping[str, PlacedExperts], rows: Tensor) -> dict[str, RoutedRows]:
    """Return an adapter's routed rows, by block or projection. ``rows`` int64, ascending."""
    by_width: dict[int, Tensor] = {}
    routed = {}
    for name, placed in experts.items():
        if placed.k not in by_width:
            by_width[placed.k] = RoutedRows.pair_rows_of(rows, placed.k)
        routed[name] = RoutedRows(rows, by_width[placed.k], placed)
    return routed


class RoutedMlp(nn.Module):
    """An MLP block with routed experts for rows that have them."""

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

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [..., hidden_size] to [..., hidden_size]."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        return self.run(rows).view_as(hidden)

    def run(self, hidden: Tensor) -> Tensor:
        """Map ``hidden`` [n_rows, hidden_size] to the same shape."""
        captured = self._step.captured_experts
        if captured is not None:
            return self._run_captured(hidden, captured)
        routed = self._step.routed.get(self.name)
        if not routed:
            return self.down(self._activation(self.gate_up(hidden)))
        out = self._run_routed(hidden, routed)
        if self.down.reduce is not None:
            self.down.reduce(out)
        return out

    def _run_routed(self, hidden: Tensor, routed: Sequence[RoutedRows]) -> Tensor:
        """Run the block for all rows of the step, some of which are routed.

        A routed adapter changes the block by its experts alone, not by plain factors beside them.
        """
        gate_up, down = self.gate_up, self.down
        weights, segments = expand(hidden, routed)
        pairs = step_pairs(routed)
        # The pairs' rows are taken before plain deltas land in ``base``.
        base, expert_act = gate_up.bound.moe_gate_up(
            gate_up.packed, self._activation, hidden, pairs, segments
        )
        alone = routed[0].rows.shape[0] == hidden.shape[0]  # one adapter has every row
        if alone:
            act = base.new_empty(base.shape[0], base.shape[1] // 2)
        else:
            gate_up.add_step_adapters(hidden, base)
            act = self._activation(base)  # routed rows are overwritten now
        moe_combine(expert_act, weights, pairs, act)
        act = down.scaled_inputs(act)
        if all(r.experts.shared_down for r in routed):
            out = down.bound.moe_down(down.packed, act, expert_act, pairs, segments)
        else:
            out = self._down_of_each(act, expert_act, pairs, segments, weights)
        if not alone:
            down.add_step_adapters(act, out)
        return out

    def _down_of_each(
        self,
        act: Tensor,
        expert_act: Tensor,
        pairs: StepPairs,
        segments: LoraSegments,
        weights: Sequence[Tensor],
    ) -> Tensor:
        """Return the block's output if experts scale or shift it: each pair has a base product."""
        out: Tensor = self.down.packed(act)
        of_pairs: Tensor = self.down.packed(expert_act)
        self.down.bound(expert_act, replace(segments, weights=None), of_pairs)
        first = 0
        for (rows, _), weight in zip(pairs.groups, weights, strict=True):
            choices = of_pairs[first : first + weight.numel()].view(*weight.shape, -1)
            out.index_copy_(0, rows, weighted_sum(choices, weight).to(out.dtype))
            first += weight.numel()
        return out

    def _run_captured(self, hidden: Tensor, experts: CapturedExperts) -> Tensor:
        """Rows of every adapter are pairs, plain adapters included. Rows of the base are none."""
        gate_up = self.gate_up.packed(hidden)
        pairs = experts.route(self.name, hidden)
        pair_act = gate_pairs(hidden, gate_up, pairs, self.gate_up.bound.tables)
        act = mix_pairs(gate_up, pair_act, pairs)
        out: Tensor = self.down.packed(act)
        add_pairs(pair_act, act, pairs, self.down.bound.tables, out)
        return out


def find_mlps(
    groups: Mapping[str, PackedLoraLinear],
    activation_of: Callable[[str], Callable[[Tensor], Tensor] | None],
    step: ForwardContext,
) -> dict[str, RoutedMlp]:
    """Return every block with packed gate and up projections and a down projection, by name.

    ``activation_of`` returns a block's gated activation, or None if it has none.
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
