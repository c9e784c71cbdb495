"""The spec of a served base, whose weights are unpacked on demand."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.model.layers.packed_lora_linear import PackedLoraLinear
from loraplex_server.model.tracing.call_recorder import AttentionSpec


class PackedSlice(NamedTuple):
    """The position of a checkpoint's linear in its packed group."""

    group: PackedLoraLinear
    position: int  # in the group

    def weight(self) -> Tensor:
        """Return the weight, float32 [out, in] on the CPU."""
        return self.stored().to("cpu", torch.float32)

    def stored(self) -> Tensor:
        """Return the weight [out, in] in the model's dtype, on the model's device."""
        return self.group.packed.part(self.position)

    def bias(self) -> Tensor | None:
        """Return the bias, float32 [out] on the CPU; zeros if only other linears have one."""
        packed = self.group.packed
        if packed.bias is None:
            return None
        parts = torch.split(packed.bias, list(packed.out_features))
        return parts[self.position].detach().to("cpu", torch.float32)


def served_spec(
    spec: BaseSpec,
    model: nn.Module,
    packed: Mapping[str, PackedSlice],
    *,
    linears: Collection[str],
    attention: AttentionSpec | None = None,
) -> BaseSpec:
    """Return ``spec`` with these ``linears`` and the heads of ``attention``; None: its own.

    Holds none of the model's tensors. They are read on demand from ``packed``, which is filled
    later, and from the rest of the model.
    """
    modules = {name: shape for name, shape in spec.modules.items() if name in linears}
    conv1d = spec.conv1d

    def held(name: str) -> Tensor:
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        computed: Mapping[str, Callable[[], Tensor]] = getattr(owner, "stacked_weights", {})
        tensor: Tensor = computed[leaf]() if leaf in computed else getattr(owner, leaf)
        return tensor.detach()

    def rest(name: str) -> Tensor:
        return held(name).to("cpu", torch.float32, copy=True)

    def weight(name: str) -> Tensor:
        return packed[name].weight() if name in packed else rest(f"{name}.weight")

    def stored(name: str) -> Tensor:
        if name in packed:
            return packed[name].stored()
        own = held(f"{name}.weight")
        return own.t() if name in conv1d else own

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

    if attention is not None:
        spec = dataclasses.replace(
            spec,
            n_heads=attention.n_heads,
            n_kv_heads=attention.n_kv_heads,
            head_dim=attention.head_dim,
        )
    return dataclasses.replace(
        spec,
        modules=MappingProxyType(modules),
        weight=weight,
        stored=stored,
        bias=bias,
        parameter=parameter,
    )
