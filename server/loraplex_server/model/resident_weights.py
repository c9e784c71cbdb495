"""The served weights of the base, for training beside serving without a second copy."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from loraplex_kernels.layers.base_linear import BaseLinear

from .base_model import BaseModel


class ResidentWeights:
    """The training engine's ``BaseWeights`` of a served model.

    Any thread: the weights never change.
    """

    def __init__(self, model: BaseModel) -> None:
        self._spec = model.spec
        self._packed: dict[tuple[str, ...], BaseLinear] = {
            group.module_names: group.packed for group in model.groups.values()
        }
        self.head = model.spec.output_head
        self.groups: Mapping[tuple[str, ...], Sequence[int]] = {
            names: packed.out_features
            for names, packed in self._packed.items()
            if names != (self.head,)
        }

    def linear(self, names: tuple[str, ...]) -> Callable[[], Tensor]:
        return self._packed[names].matrix

    def bias(self, names: tuple[str, ...]) -> Tensor | None:
        return self._packed[names].bias

    def embedding(self) -> Callable[[], Tensor]:
        return lambda: self._spec.stored(self._spec.input_embedding)

    def tensor(self, name: str) -> Tensor:
        return self._spec.parameter(name)
