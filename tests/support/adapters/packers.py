"""The simplest packer: every tensor of a plan moves to the packed form."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_adapter_store.report import JsonValue


@dataclass(frozen=True)
class TensorForm:
    tensors: tuple[Tensor, ...]

    @property
    def n_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def dump(self) -> tuple[JsonValue, Sequence[Tensor]]:
        return len(self.tensors), [tensor.contiguous() for tensor in self.tensors]


class TensorsAside:
    def __init__(self, key: str = "1") -> None:
        self.key = key
        self.n_prepared = 0

    def check(self, plan: AdapterPlan) -> None:
        """Accept every plan."""

    def prepare(self, plan: AdapterPlan) -> AdapterPlan:
        self.n_prepared += 1
        return replace(plan, modules={}, packed_adapter=TensorForm(tuple(plan.tensors())))

    def restore(self, header: JsonValue, tensors: Sequence[Tensor]) -> TensorForm:
        assert header == len(tensors)
        return TensorForm(tuple(tensors))
