"""Packs the linears of a base by shared input and replaces them on the instance."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_kernels.cpu.gguf_weight import GgufWeight
from loraplex_kernels.formats.quantized_weight import QuantizedWeight
from loraplex_kernels.formats.storage import WeightRange
from loraplex_kernels.layers.base_linear import BaseLinear
from loraplex_kernels.layers.block_linear import block_linear
from loraplex_kernels.layers.packed_linear import PackedLinear, packed_words
from loraplex_kernels.layers.quantized_linear import coded_linear

from .errors import UnsupportedBase
from .layers.adapted_modules import PlainTable, Table
from .layers.forward_context import ForwardContext
from .layers.packed_lora_linear import LinearCut, LoraLinear, PackedLoraLinear
from .layers.tensor_parallel import Shard
from .loading.served_spec import PackedSlice
from .quantized.quantized_modules import (
    BlockEmbedding,
    CodedWeight,
    QuantizedModule,
    coded_weight,
)
from .targets import group_modules


def replace_linears(
    model: PreTrainedModel,
    spec: BaseSpec,
    step: ForwardContext,
    slices: dict[str, PackedSlice],
    *,
    within: Collection[str] | None = None,
    exponent_coding: bool,
    shard: Shard | None = None,
) -> dict[str, PackedLoraLinear]:
    """Pack the linears of ``spec`` and fill ``slices``; return the groups by name.

    Frees a group's weights before packing the next. ``shard``: the linears are one rank's.
    ``within``: the names of linears that are packed; None: all.
    """
    groups: dict[str, PackedLoraLinear] = {}
    packed_names = [name for name in spec.modules if within is None or name in within]
    grouped = list(group_modules(spec.model_type, packed_names))
    memory = WeightRange(sum(_words_of(model, spec, names) for names in grouped))
    for names in grouped:
        modules = [model.get_submodule(name) for name in names]
        packed = _pack(names, modules, exponent_coding, memory)
        del modules
        group = PackedLoraLinear(
            _group_name(names),
            names,
            packed,
            step,
            _reduce_of(shard, names),
            _cuts_of(shard, names, packed.in_features),
        )
        groups[group.target.name] = group
        for name, module in zip(names, LoraLinear.of_group(group), strict=True):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module)
        slices.update((name, PackedSlice(group, i)) for i, name in enumerate(names))
        if model.device.type != "cpu":
            torch.cuda.empty_cache()  # the next group's tensors have other sizes
    return groups


def table_of_base(
    embedding: nn.Embedding, *, head: BaseLinear, head_weight: CodedWeight | None
) -> Table:
    """Return the rows of an embedding; of one in blocks that the head is tied to, the head's.

    ``head_weight``: of the head before it was packed; None if it was plain.
    """
    if not isinstance(embedding, BlockEmbedding):
        return PlainTable(embedding.weight)
    return (
        head if embedding.quantized is head_weight else block_linear([embedding.quantized], [None])
    )


def _reduce_of(shard: Shard | None, names: Sequence[str]) -> Callable[[Tensor], None] | None:
    if shard is None or not shard.layout.is_summed(names[0]):
        return None
    return shard.collective.all_reduce


def _cuts_of(
    shard: Shard | None, names: Sequence[str], in_features: int
) -> tuple[LinearCut, ...] | None:
    """Return each linear's cut; None without ranks. ``in_features``: of this rank."""
    if shard is None:
        return None
    layout, rank = shard.layout, shard.rank
    if layout.is_summed(names[0]):
        in_features *= layout.size
    return tuple(
        LinearCut(in_features, layout.inputs(name, rank), layout.outputs(name, rank))
        for name in names
    )


def _words_of(model: PreTrainedModel, spec: BaseSpec, names: Sequence[str]) -> int:
    """Return the size of the packed weights in words; 0 on a GPU."""
    coded = (isinstance(model.get_submodule(name), QuantizedModule) for name in names)
    if model.device.type != "cpu" or any(coded):
        return 0
    shapes = [spec.modules[name] for name in names]
    dtype = model.get_parameter(f"{names[0]}.weight").dtype
    return packed_words([s.out_features for s in shapes], shapes[0].in_features, dtype)


def _pack(
    names: Sequence[str], modules: Sequence[nn.Module], exponent_coding: bool, memory: WeightRange
) -> BaseLinear:
    """Return one product of the modules ``names``, which read the same input."""
    biases = [getattr(module, "bias", None) for module in modules]
    coded = [weight for weight in map(coded_weight, modules) if weight is not None]
    blocks = [weight for weight in coded if isinstance(weight, GgufWeight)]
    quantized = [weight for weight in coded if isinstance(weight, QuantizedWeight)]
    if len(blocks) == len(modules):
        return block_linear(blocks, biases)
    if not quantized:
        weights = [_weight(module) for module in modules]
        own = None if blocks else memory  # blocks beside plain weights are not counted in it
        return PackedLinear(weights, biases, exponent_coding=exponent_coding, memory=own)
    if len(quantized) < len(modules):
        raise UnsupportedBase(f"some of {', '.join(names)} are quantised and some are not")
    try:
        return coded_linear(quantized, biases)
    except ValueError as error:
        raise UnsupportedBase(f"{', '.join(names)}: {error}") from error


def _weight(module: nn.Module) -> Tensor:
    """Return a linear's weight [out, in]; transformers' Conv1D (GPT-2) stores the transpose."""
    if isinstance(module, nn.Linear):
        return module.weight
    transposed: Tensor = module.get_parameter("weight").t()
    return transposed.contiguous()


def _group_name(names: Sequence[str]) -> str:
    """ "model.layers.0.self_attn.q_proj+k_proj+v_proj"."""
    prefix = names[0].rpartition(".")[0]
    leaves = "+".join(name.rpartition(".")[2] for name in names)
    return f"{prefix}.{leaves}" if prefix else leaves
