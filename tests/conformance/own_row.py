"""Rows of methods that PEFT lacks: a file, and the formula of its training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from tests.conformance.oracle import Forward


class Random:
    """Normal draws that depend on the row's id alone."""

    def __init__(self, row_id: str) -> None:
        self._generator = torch.Generator().manual_seed(crc32(row_id.encode()))

    def __call__(self, *shape: int, std: float) -> Tensor:
        return std * torch.randn(shape, generator=self._generator)


@dataclass(frozen=True)
class FormulaAdapter:
    """An adapter to upload, and the forwards of transformers' modules under it."""

    config: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    forwards: Mapping[str, Forward]


@dataclass(frozen=True)
class OwnRow:
    id: str  # docs/families.md names it
    build: Callable[[PreTrainedModel, Random], FormulaAdapter]
    executor: bool = False  # with the references and unfused too: one row for each way to serve
    refused: str | None = None  # pattern of the reason, where it is not served
    wrong: str | None = None  # what the server does instead, while it is wrong


def low_rank_sum(scale: float, *factors: Tensor) -> Forward:
    """y = W x + scale · (last … first) x, with factors as linears' weights in order of use."""

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        hidden = x
        for factor in factors:
            hidden = F.linear(hidden, factor)
        return F.linear(x, module.weight) + scale * hidden

    return forward
