"""Block-LoRA: one shared down-projection and n up-projections.

    rank axis      A_s [r/n, in],  B_1 … B_n [out, r/n]:   ΔW = s Σ_i B_i A_s
    feature axis   A_f [r, in/n],  B [out, r]:             ΔW = s B [A_f … A_f]

On the rank axis all B_i have the same gradient: ΔW is a LoRA of rank r/n whose B is the sum of the
B_i, and a step moves that sum n times as far. The B_i differ by their initial noise, which sums to
zero. The feature axis is not degenerate in this way.
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from loraplex_training.config import AdapterShape, BlockShape
from loraplex_training.engine.adapter import PREFIX
from loraplex_training.errors import TrainingError
from loraplex_training.recipes.recipe import Part, Recipe, RecipeAdapter, Start

_ARM_NOISE = 1e-3


class BlockLora(RecipeAdapter):
    """A Block-LoRA, which the engine computes as the LoRA that it amounts to."""

    def __init__(self, start: Start, shape: AdapterShape) -> None:
        """Raises TrainingError for blocks that do not divide the rank or the inputs."""
        self._rank, self._blocks = shape.rank, shape.blocks or BlockShape()
        super().__init__(block_recipe(self._blocks), start)

    def named_tensors(self) -> dict[str, Tensor]:
        return {
            f"{PREFIX}{name}.block_lora_{leaf}.weight": tensor
            for name, part in self.parts.items()
            for leaf, tensor in part.trained.items()
        }

    def peft_config(self, base_name: str) -> dict[str, object]:
        return super().peft_config(base_name) | {
            "peft_type": "BLOCK_LORA",
            "r": self._rank,
            "lora_alpha": self.scale * self._rank,
            "use_rslora": False,
            "n_blocks": self._blocks.n_blocks,
            "block_axis": self._blocks.axis,
        }


def block_recipe(blocks: BlockShape) -> Recipe:
    """Return the recipe of a LoRA of blocks, which is saved as the LoRA that it amounts to."""
    return Recipe(partial(_start, blocks), partial(_factors, blocks))


def _start(blocks: BlockShape, start: Start) -> Mapping[str, Part]:
    random = torch.Generator().manual_seed(start.seed)
    parts, n, rank = {}, blocks.n_blocks, start.shape.rank
    for name in start.linears:
        n_in, n_out = start.base.linears[name]
        divided = rank if blocks.axis == "rank" else n_in
        if divided % n:
            raise TrainingError(
                f"n_blocks is {n}, must divide {divided} ({blocks.axis} axis of {name})"
            )
        if blocks.axis == "rank":
            a = torch.empty(rank // n, n_in)
            noise = torch.randn(n, n_out, rank // n, generator=random) * _ARM_NOISE
            b = noise - noise.mean(dim=0)
        else:
            a, b = torch.empty(rank, n_in // n), torch.zeros(n_out, rank)
        a.uniform_(-1, 1, generator=random).div_(math.sqrt(a.shape[1]))
        device = start.base.device
        parts[name] = Part({"A": a.to(device), "B": b.to(device)})
    return parts


def _factors(blocks: BlockShape, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    if blocks.axis == "rank":
        return part["A"], part["B"].sum(0)
    return part["A"].repeat(1, blocks.n_blocks), part["B"]
