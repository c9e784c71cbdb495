"""The spec of a base that is served: weights are read back from their packed form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loraplex_adapter_store.base_spec import BaseSpec

from .model_trace import ModelTrace
from .packed_lora_linear import PackedLoraLinear

__all__ = ["PackedSlice", "served_spec"]


class PackedSlice(NamedTuple):
    """Where a linear of the checkpoint lies."""

    group: PackedLoraLinear
    place: int  # among the group's linears

    def weight(self) -> Tensor:
        """float32 [out, in] on the CPU."""
        return self.stored().to("cpu", torch.float32)

    def stored(self) -> Tensor:
        """[out, in] in the model's dtype, where the packed weights lie."""
        return self.group.packed.part(self.place)

    def bias(self) -> Tensor | None:
        """float32 [out] on the CPU; zeros beside linears that have one."""
        packed = self.group.packed
        if packed.bias is None:
            return None
        parts = torch.split(packed.bias, list(packed.out_features))
        return parts[self.place].detach().to("cpu", torch.float32)


def served_spec(
    spec: BaseSpec, trace: ModelTrace, model: nn.Module, packed: Mapping[str, PackedSlice]
) -> BaseSpec:
    """With the heads that the layers were seen to use, and the linears that are called as such.

    Holds none of the model's tensors: they are read back from ``packed``, which is filled later,
    and from what is left of the model.
    """
    modules = {name: shape for name, shape in spec.modules.items() if name in trace.linears}
    conv1d = spec.conv1d

    def held(name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(model.get_submodule(module), leaf)
        return tensor.detach()

    def rest(name: str) -> Tensor:
        return held(name).to("cpu", torch.float32, copy=True)

    def weight(name: str) -> Tensor:
        return packed[name].weight() if name in packed else rest(f"{name}.weight")

    def stored(name: str) -> Tensor:
        if name in packed:
            return packed[name].stored()
        kept = held(f"{name}.weight")
        return kept.t() if name in conv1d else kept

    def bias(name: str) -> Tensor | None:
        return packed[name].bias() if modules[name].has_bias else None

    def parameter(name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        if module not in packed:
            return rest(name)
        if leaf == "bias":
            value = bias(module)
            if value is None:
                raise KeyError(name)
            return value
        full = packed[module].weight()
        return full.t().contiguous() if module in conv1d else full

    first = next(iter(trace.attention.values()))
    return dataclasses.replace(
        spec,
        modules=MappingProxyType(modules),
        n_heads=first.n_heads,
        n_kv_heads=first.n_kv_heads,
        head_dim=first.head_dim,
        weight=weight,
        stored=stored,
        bias=bias,
        parameter=parameter,
    )
