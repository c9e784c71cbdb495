"""The experts of a mixture in the blocks of a GGUF file, in place of transformers' stacked ones."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loraplex_kernels.cpu.gguf_weight import GgufWeight
from loraplex_kernels.layers.base_linear import BaseLinear
from loraplex_kernels.layers.block_linear import block_linear


class ExpertBlocks(NamedTuple):
    """The weights of all experts of a layer, those of one behind those of the one before it."""

    gate: GgufWeight  # [n_experts · width, hidden]
    up: GgufWeight
    down: GgufWeight  # [n_experts · hidden, width]


class BlockExperts(nn.Module):
    """Experts whose matrices stay in blocks; ``stacked_weights`` stand for their parameters.

    Each expert that some row chose runs on its rows, in the order of the experts, as in
    transformers.
    """

    def __init__(
        self, blocks: ExpertBlocks, n_experts: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        gate, up, down = (_divided(weight, n_experts) for weight in blocks)
        pairs = zip(gate, up, strict=True)
        self._gate_up: list[BaseLinear] = [block_linear(pair, (None, None)) for pair in pairs]
        self._down: list[BaseLinear] = [block_linear([weight], (None,)) for weight in down]
        self._blocks, self._n_experts, self._activation = blocks, n_experts, activation

    @property
    def stacked_weights(self) -> Mapping[str, Callable[[], Tensor]]:
        """Readers of the dequantised weights, under the names of transformers' parameters.

        Shapes: [n_experts, 2 · width, hidden] and [n_experts, hidden, width].
        """
        return {"gate_up_proj": self._read_gate_up, "down_proj": partial(self._read, 2)}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Map rows [n, hidden] by their experts [n, k], weighted by [n, k]."""
        return self.run_with({}, (hidden_states, top_k_index, top_k_weights))

    def run_with(self, changes: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        """Run ``forward`` of ``inputs`` with the weights in ``changes`` in place of its own."""
        hidden, index, weights = inputs
        out = torch.zeros_like(hidden)
        for expert in torch.unique(index).tolist():
            rows, places = torch.where(index == expert)
            x = hidden[rows]
            gate_up = self._product("gate_up_proj", self._gate_up, changes, expert, x)
            gate, up = gate_up.chunk(2, dim=-1)
            inner = self._activation(gate) * up
            y = self._product("down_proj", self._down, changes, expert, inner)
            y = y * weights[rows, places, None]
            out.index_add_(0, rows, y.to(out.dtype))
        return out

    @staticmethod
    def _product(
        name: str, linears: list[BaseLinear], changes: Mapping[str, Tensor], expert: int, x: Tensor
    ) -> Tensor:
        if name in changes:
            return nn.functional.linear(x, changes[name][expert])
        return linears[expert](x)

    def _read_gate_up(self) -> Tensor:
        return torch.cat([self._read(0), self._read(1)], dim=1)

    def _read(self, part: int) -> Tensor:
        weight = self._blocks[part]
        return weight.dequantize().view(self._n_experts, -1, weight.shape[1])


def _divided(weight: GgufWeight, n_experts: int) -> list[GgufWeight]:
    return [replace(weight, rows=rows) for rows in weight.rows.chunk(n_experts)]
