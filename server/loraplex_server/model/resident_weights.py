"""The base's weights as they are served, for training beside serving: held once, read when used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loraplex_generation.base_weights import ReadLinear, no_rest
from loraplex_kernels.quantized_linear import BaseLinear

from .base_model import BaseModel

__all__ = ["ResidentWeights"]


class ResidentWeights:
    """A ``BaseWeights``. Any thread: what it reads never changes once the model is built."""

    def __init__(self, model: BaseModel, dtype: torch.dtype) -> None:
        """``dtype``: of what is read; weights that are served in it are not rounded."""
        self._spec, self._dtype = model.spec, dtype
        self._groups = {group.module_names: group.packed for group in model.groups.values()}
        self._rest: Callable[[], None] = no_rest

    def resting(self, rest: Callable[[], None]) -> ResidentWeights:
        """The same weights; who computes with them calls ``rest`` before each short product."""
        others = copy.copy(self)
        others._rest = rest
        return others

    def linear(self, names: Sequence[str]) -> ReadLinear:
        """``names``: all that are packed together, as q, k and v or gate and up are."""
        packed: BaseLinear = self._groups[tuple(names)]
        return ReadLinear(lambda: packed.matrix().to(self._dtype), self._rest)

    def tied(self, table: Tensor) -> ReadLinear:
        return ReadLinear(lambda: table, self._rest)

    def tensor(self, name: str) -> Tensor:
        """Of the embedding, the table itself where it is served in ``dtype``; else a copy."""
        spec = self._spec
        if name == f"{spec.input_embedding}.weight":
            return spec.stored(spec.input_embedding).to(self._dtype)
        return spec.parameter(name).to(self._dtype)
