"""A Block-LoRA adapter in training: one shared down-projection, n up-projections.

    rank axis      A_s [r/n, in],  B_1 … B_n [out, r/n]:   y = W x + s Σ_i B_i (A_s x)
    feature axis   A_f [r, in/n],  B [out, r]:             y = W x + s B A_f Σ_j x_(j)

On the rank axis every B_i multiplies the same A_s x, so all have the same gradient: ΔW is a LoRA of
rank r/n whose B is the sum of the B_i, and one optimiser step moves that sum n times as far. They
start apart (noise that sums to zero), each with its dropout mask; nothing else makes them differ.
The feature axis is not degenerate in this way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from .attached import Attached, fill

__all__ = ["BlockAxis", "BlockLora", "BlockLoraConfig", "attach"]

_PEFT_PREFIX = "base_model.model"
_ARM_NOISE = 1e-3


class BlockAxis(Enum):
    RANK = "rank"
    FEATURE = "feature"


@dataclass(frozen=True, slots=True)
class BlockLoraConfig:
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    n_blocks: int = 4
    axis: BlockAxis = BlockAxis.RANK
    target_modules: Sequence[str] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )

    @property
    def scale(self) -> float:
        return self.alpha / self.r


class _BlockLinear(nn.Module):
    def __init__(self, base: nn.Linear, config: BlockLoraConfig) -> None:
        super().__init__()
        n, r = config.n_blocks, config.r
        divided = r if config.axis is BlockAxis.RANK else base.in_features
        if divided % n:
            raise ValueError(
                f"n_blocks is {n}, must divide {divided} ({config.axis.value} axis of the linear)"
            )
        self.base, self.config = base, config
        self.dropout = nn.Dropout(config.dropout)
        if config.axis is BlockAxis.RANK:
            self.a = nn.Parameter(torch.empty(r // n, base.in_features))
            noise = torch.randn(n, base.out_features, r // n) * _ARM_NOISE
            self.b = nn.Parameter(noise - noise.mean(dim=0))
        else:
            self.a = nn.Parameter(torch.empty(r, base.in_features // n))
            self.b = nn.Parameter(torch.zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        return out + (self.config.scale * self._delta(x)).to(out.dtype)

    def _delta(self, x: Tensor) -> Tensor:
        n = self.config.n_blocks
        if self.config.axis is BlockAxis.FEATURE:
            head = self.dropout(x).unflatten(-1, (n, -1)).sum(dim=-2)
            return nn.functional.linear(nn.functional.linear(head, self.a), self.b)
        head = nn.functional.linear(x, self.a)  # [..., r/n], the one head
        if not (self.training and self.config.dropout > 0):
            return nn.functional.linear(head, self.b.sum(dim=0))  # n products become additions
        arms = [nn.functional.linear(self.dropout(head), arm) for arm in self.b]
        return torch.stack(arms).sum(dim=0)


def attach(model: nn.Module, config: BlockLoraConfig) -> Attached:
    """Freezes ``model`` and puts a new adapter into it."""
    model.requires_grad_(False)
    adapter = BlockLora(model, config)
    device = next(model.parameters()).device
    return Attached(model.to(device), adapter)


class BlockLora:
    """The adapter's modules inside ``model``, whose own weights are frozen by the caller."""

    def __init__(self, model: nn.Module, config: BlockLoraConfig) -> None:
        self.config = config
        self._places: list[tuple[str, nn.Module, str]] = []  # full name, parent, attribute
        for name, module in list(model.named_modules()):
            attribute = name.rpartition(".")[2]
            if isinstance(module, nn.Linear) and attribute in config.target_modules:
                parent = model.get_submodule(name.rpartition(".")[0])
                setattr(parent, attribute, _BlockLinear(module, config))
                self._places.append((name, parent, attribute))
        if not self._places:
            raise ValueError(f"no linear of the model is called one of {config.target_modules}")

    def auxiliary_loss(self, token_mask: Tensor | None = None) -> Tensor:
        del token_mask
        return torch.zeros(())

    def tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._named()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Fills the parameters from ``tensors``; the names must match exactly."""
        fill(dict(self._named()), tensors)

    def adapter_config(self, base_model: str) -> dict[str, object]:
        c = self.config
        return {
            "peft_type": "BLOCK_LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "bias": "none",
            "r": c.r,
            "lora_alpha": c.alpha,
            "lora_dropout": c.dropout,
            "n_blocks": c.n_blocks,
            "block_axis": c.axis.value,
            "use_rslora": False,
            "target_modules": list(c.target_modules),
        }

    def detach(self) -> None:
        """Gives the model its own linears back."""
        for _, parent, attribute in self._places:
            setattr(parent, attribute, getattr(parent, attribute).base)

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parent, attribute in self._places:
            linear = getattr(parent, attribute)
            yield f"{_PEFT_PREFIX}.{name}.block_lora_A.weight", linear.a
            yield f"{_PEFT_PREFIX}.{name}.block_lora_B.weight", linear.b
