"""A Block-LoRA adapter in training: one shared down-projection, n up-projections.

    rank axis      A_s [r/n, in],  B_1 … B_n [out, r/n]:   y = W x + s Σ_i B_i (A_s x)
    feature axis   A_f [r, in/n],  B [out, r]:             y = W x + s B A_f Σ_j x_(j)

On the rank axis every B_i multiplies the same A_s x, so all B_i have the same gradient. ΔW is a
LoRA of rank r/n whose B is the sum of the B_i, and an optimiser step moves that sum n times as far.
Only the initial noise, which sums to zero, and the dropout masks make the B_i differ. The feature
axis is not degenerate in this way.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .attached import AdapterModules
from .config import AdapterShape, BlockShape

_PEFT_PREFIX = "base_model.model"
_ARM_NOISE = 1e-3
_ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class _BlockLinear(nn.Module):
    def __init__(self, base: nn.Linear, shape: AdapterShape, blocks: BlockShape) -> None:
        super().__init__()
        n, r = blocks.n_blocks, shape.rank
        divided = r if blocks.axis == "rank" else base.in_features
        if divided % n:
            raise ValueError(
                f"n_blocks is {n}, must divide {divided} ({blocks.axis} axis of the linear)"
            )
        self.base, self.blocks, self.scale = base, blocks, shape.alpha / r
        self.dropout = nn.Dropout(shape.dropout)
        if blocks.axis == "rank":
            self.a = nn.Parameter(torch.empty(r // n, base.in_features))
            noise = torch.randn(n, base.out_features, r // n) * _ARM_NOISE
            self.b = nn.Parameter(noise - noise.mean(dim=0))
        else:
            self.a = nn.Parameter(torch.empty(r, base.in_features // n))
            self.b = nn.Parameter(torch.zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        return out + (self.scale * self._delta(x)).to(out.dtype)

    def _delta(self, x: Tensor) -> Tensor:
        if self.blocks.axis == "feature":
            head = self.dropout(x).unflatten(-1, (self.blocks.n_blocks, -1)).sum(dim=-2)
            return nn.functional.linear(nn.functional.linear(head, self.a), self.b)
        head = nn.functional.linear(x, self.a)  # [..., r/n], shared by all blocks
        if not (self.training and self.dropout.p > 0):
            return nn.functional.linear(head, self.b.sum(dim=0))  # one product instead of n
        arms = [nn.functional.linear(self.dropout(head), arm) for arm in self.b]
        return torch.stack(arms).sum(dim=0)


class BlockLora(AdapterModules):
    """The adapter's modules inside ``model``. Raises ValueError for a shape that does not fit."""

    def __init__(self, model: nn.Module, shape: AdapterShape) -> None:
        self._shape, self._blocks = shape, shape.blocks or BlockShape()
        is_all = tuple(shape.targets) == ("all-linear",)
        self._targets = _ALL_LINEAR if is_all else tuple(shape.targets)
        self._linears: dict[str, _BlockLinear] = {}  # by full name
        for name, module in list(model.named_modules()):
            parent, _, attribute = name.rpartition(".")
            if isinstance(module, nn.Linear) and attribute in self._targets:
                self._linears[name] = _BlockLinear(module, shape, self._blocks)
                setattr(model.get_submodule(parent), attribute, self._linears[name])
        if not self._linears:
            raise ValueError(f"no linear of the model is called one of {self._targets}")

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, linear in self._linears.items():
            yield f"{_PEFT_PREFIX}.{name}.block_lora_A.weight", linear.a
            yield f"{_PEFT_PREFIX}.{name}.block_lora_B.weight", linear.b

    def adapter_config(self, base_model: str) -> dict[str, object]:
        return {
            "peft_type": "BLOCK_LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "bias": "none",
            "r": self._shape.rank,
            "lora_alpha": self._shape.alpha,
            "lora_dropout": self._shape.dropout,
            "n_blocks": self._blocks.n_blocks,
            "block_axis": self._blocks.axis,
            "use_rslora": False,
            "target_modules": list(self._targets),
        }
