"""The weights of a transformers model, for training outside of a server."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex_adapter_store.base_spec import BaseSpec


class ModelWeights:
    """The ``BaseWeights`` of a model in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        spec = self._spec = BaseSpec.of(model, "base")
        self.head = spec.output_head
        self.groups: Mapping[tuple[str, ...], Sequence[int]] = {
            (name,): (shape.out_features,)
            for name, shape in spec.modules.items()
            if name != spec.output_head
        }

    def linear(self, names: tuple[str, ...]) -> Callable[[], Tensor]:
        return lambda: torch.cat([self._spec.stored(name) for name in names])

    def bias(self, names: tuple[str, ...]) -> Tensor | None:
        biases = [self._spec.bias(name) for name in names]
        present = [bias for bias in biases if bias is not None]
        return torch.cat(present) if present else None

    def embedding(self) -> Callable[[], Tensor]:
        return lambda: self._spec.stored(self._spec.input_embedding)

    def tensor(self, name: str) -> Tensor:
        return self._spec.parameter(name)
