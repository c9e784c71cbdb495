"""The experts of a mixture in the blocks of a GGUF file."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_kernels.cpu.gguf_weight import GgufWeight
from loraplex_kernels.layers.block_linear import block_linear
from loraplex_server.model.layers.packed_experts import PackedExperts


class ExpertBlocks(NamedTuple):
    """The weights of all experts of a layer, those of one behind those of the one before it."""

    gate: GgufWeight  # [n_experts · width, hidden]
    up: GgufWeight
    down: GgufWeight  # [n_experts · hidden, width]


def block_experts(
    blocks: ExpertBlocks, n_experts: int, activation: Callable[[Tensor], Tensor]
) -> PackedExperts:
    """Return experts whose matrices stay in blocks."""
    gate, up, down = (_divided(weight, n_experts) for weight in blocks)
    readers = {
        "gate_up_proj": partial(_read_gate_up, blocks, n_experts),
        "down_proj": partial(_read, blocks.down, n_experts),
    }
    return PackedExperts(
        [block_linear(pair, (None, None)) for pair in zip(gate, up, strict=True)],
        [block_linear([weight], (None,)) for weight in down],
        activation,
        readers,
    )


def _read_gate_up(blocks: ExpertBlocks, n_experts: int) -> Tensor:
    return torch.cat([_read(weight, n_experts) for weight in (blocks.gate, blocks.up)], dim=1)


def _read(weight: GgufWeight, n_experts: int) -> Tensor:
    """Return the dequantised weights [n_experts, outputs, inputs]."""
    return weight.dequantize().view(n_experts, -1, weight.shape[1])


def _divided(weight: GgufWeight, n_experts: int) -> list[GgufWeight]:
    return [replace(weight, rows=rows) for rows in weight.rows.chunk(n_experts)]
