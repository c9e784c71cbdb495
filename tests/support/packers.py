"""The simplest packer: every tensor of a plan becomes the packed adapter, the rest is empty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_adapter_store.report import JsonValue

__all__ = ["TensorsAside"]


class TensorsAside:
    def __init__(self, key: str = "1") -> None:
        self.key = key
        self.n_prepared = 0

    def check(self, plan: AdapterPlan) -> None:
        """Serves everything."""

    def prepare(self, plan: AdapterPlan) -> AdapterPlan:
        self.n_prepared += 1
        return replace(plan, modules={}, packed_adapter=tuple(plan.tensors()))

    def dump(self, form: object) -> tuple[JsonValue, Sequence[Tensor]]:
        assert isinstance(form, tuple)
        return len(form), [tensor.contiguous() for tensor in form]

    def restore(self, header: JsonValue, tensors: Sequence[Tensor]) -> object:
        assert header == len(tensors)
        return tuple(tensors)
