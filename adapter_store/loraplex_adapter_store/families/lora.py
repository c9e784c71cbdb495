"""LoRA, and the methods that save the same tensors: y = W x + s · B A x.

Covers rsLoRA, rank/alpha patterns, layer subsets, embeddings, lm_head, lora_bias, DoRA, KaSA, and
bases modified in training (PiSSA, OLoRA, LoRA-GA, CorDA), all folded to the clean base.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from loraplex_adapter_store.adapter_config import AdapterConfig
from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_adapter_store.plan import Family, ModulePlan
from loraplex_adapter_store.targets import expand_targets

from .contract import Fold, ReadContext
from .core_matrix import CORE_FAMILIES, PROJECTOR, fold_core, fold_projector
from .dora import dora_module
from .extras import fold_with_extras
from .module_groups import ModuleGroup, ModuleKind, Parts, module_groups
from .residual import InitRule, init_rule, subtracted
from .routed_projections import read_authors_format
from .scaling import lora_scale, scale_rule
from .stacked_parameters import read_stacked

__all__ = ["read"]

_A, _B = "lora_A.weight", "lora_B.weight"
_EMBED_A, _EMBED_B = "lora_embedding_A", "lora_embedding_B"
_BIAS, _MAGNITUDE, _DIAG = "lora_B.bias", "lora_magnitude_vector", "lora_diag"
_A0, _B0 = "lora_A0.weight", "lora_B0.weight"
_LINEAR = Parts(
    required=(_A, _B),
    optional=(_BIAS, _MAGNITUDE, _DIAG, _A0, _B0, PROJECTOR, *CORE_FAMILIES),
    synonyms={f"{_MAGNITUDE}.weight": _MAGNITUDE},
)
_EMBEDDING = Parts(required=(_EMBED_A, _EMBED_B))

# Features that change what the adapter computes in a way no plan can express.
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA (aLoRA) acts only after its invocation tokens",
    "arrow_config": "Arrow routes between other adapters, by name, on the trainer's machine",
    "layer_replication": "layer_replication changes the depth of the base",
    "use_qalora": "QA-LoRA pools its input in groups of a quantised base",
    "megatron_config": "Megatron LoRA is sharded over ranks",
    "monteclora_config": "MonteCLoRA draws its factors anew in each forward pass",
}


def read(context: ReadContext) -> Fold:
    config = context.config
    routed = read_authors_format(context)
    if routed is not None:
        return routed
    _refuse_unservable(config)
    rule = init_rule(config)
    stacked = read_stacked(context)
    if stacked and rule.name:
        raise UnsupportedAdapter(
            f"target_parameters beside a base modified by {rule.name}: refused"
        )
    kinds = {ModuleKind.LINEAR: _LINEAR, ModuleKind.EMBEDDING: _EMBEDDING}
    has_modules = not stacked or expand_targets(config, context.base)
    groups = module_groups(context, kinds) if has_modules else {}
    if rule.name:
        context.notes.append(f"base was modified in training ({rule.name}): folded to rank 2r")
    modules = {module: _read_module(group, rule) for module, group in groups.items()}
    family = _family(config, groups.values())
    fold = fold_with_extras(context, family, scale_rule(config), modules)
    return replace(fold, stacked=stacked)


def _refuse_unservable(config: AdapterConfig) -> None:
    for key, why in _REFUSED.items():
        if config.is_set(key):
            raise UnsupportedAdapter(f"LoRA with {key} cannot be served: {why}")


def _family(config: AdapterConfig, groups: Iterable[ModuleGroup]) -> Family:
    if config.flag("use_dora"):
        return Family.DORA
    if config.is_set("kasa_config"):
        return Family.KASA
    cores = {suffix for group in groups for suffix in CORE_FAMILIES if suffix in group}
    return CORE_FAMILIES[min(cores)] if cores else Family.LORA


def _read_module(group: ModuleGroup, rule: InitRule) -> ModulePlan:
    if group.kind is ModuleKind.EMBEDDING:
        return _read_embedding(group)
    rank, scale = _rank_and_scale(group, _A)
    a = _factor(group, _A, (rank, group.in_features))
    b = _factor(group, _B, (group.out_features, rank)) * scale
    a, b = fold_projector(group, a), fold_core(group, b, rank)
    a, b = _on_clean_base(group, rule, a, b, rank, scale)
    bias = None
    if group.context.config.flag("lora_bias") or _BIAS in group:
        bias = _required(group, _BIAS, group.out_features) * scale
    if group.context.config.flag("use_dora"):
        vector = _required(group, _MAGNITUDE, group.out_features)
        return dora_module(group.context.base, group.module, a, b, vector, lora_bias=bias)
    return ModulePlan(a=a, b=b, bias=bias)


def _rank_and_scale(group: ModuleGroup, part: str) -> tuple[int, float]:
    rank, scale = lora_scale(group.context.config, group.module)
    found = group.rank(part)
    if found != rank:
        raise AdapterMismatch(
            f"{group.keys[part]} has rank {found}, the config says {rank}: the scale would be wrong"
        )
    return rank, scale


def _factor(group: ModuleGroup, part: str, shape: tuple[int, int]) -> Tensor:
    """One factor; BD-LoRA stores the blocks of a block-diagonal one below each other."""
    blocks = group.context.config.section("use_bdlora")
    n_blocks = 1 if blocks is None else blocks.integer("nblocks", 1)
    if n_blocks > 1 and group.shape(part, 2) == (shape[0], shape[1] // n_blocks):
        stacked = group.take(part, shape[0], shape[1] // n_blocks)
        dense = stacked.new_zeros(shape)
        for number, block in enumerate(stacked.chunk(n_blocks)):
            rows, columns = block.shape
            place = (slice(number * rows, None), slice(number * columns, None))
            dense[place][:rows, :columns] = block
        return dense
    return group.take(part, *shape)


def _on_clean_base(
    group: ModuleGroup, rule: InitRule, a: Tensor, b: Tensor, rank: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Adds what training subtracted from the base, so that the factors fit the clean one."""
    kasa = group.context.config.is_set("kasa_config")
    if kasa:
        b = b * _required(group, _DIAG, rank)
    if _A0 in group or _B0 in group:
        a0 = _required(group, _A0, None, a.shape[1])
        b0 = _required(group, _B0, b.shape[0], a0.shape[0]) * scale
        return torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
    name = "kasa" if kasa else rule.name
    if not name:
        return a, b
    if rule.why_factors:
        raise UnsupportedAdapter(
            f"{rule.name} modified the base in training and the initial factors are not in the "
            f"file ({rule.why_factors}); save with path_initial_model_for_weight_conversion, or "
            "add them with `loraplex adapters convert --initial`"
        )
    if group.module in group.context.base.conv1d:
        raise UnsupportedAdapter(f"{name} on the Conv1D module {group.module} cannot be recomputed")
    took = subtracted(name, group.context.base.weight(group.module), rank, scale)
    return torch.cat([a, took.a]), torch.cat([b, -took.b], dim=1)


def _required(group: ModuleGroup, part: str, *shape: int | None) -> Tensor:
    """A part that this variant of LoRA needs."""
    if part not in group:
        key = f"{group.module}.{part}"
        raise AdapterMismatch(f"{group.module} is incomplete: it lacks {key}", missing_keys=(key,))
    return group.take(part, *shape)


def _read_embedding(group: ModuleGroup) -> ModulePlan:
    if group.context.config.flag("use_dora"):
        raise UnsupportedAdapter(
            f"DoRA on the embedding {group.module} scales rows by hidden position"
        )
    rank, scale = _rank_and_scale(group, _EMBED_A)
    a = group.take(_EMBED_A, rank, group.in_features)
    b = group.take(_EMBED_B, group.out_features, rank) * scale
    return ModulePlan(a=a, b=b)
