"""LoRA and all that saves as such: y = W x + s · B A x.

Covers rsLoRA, rank/alpha patterns, layer subsets, embeddings, lm_head, lora_bias, DoRA, KaSA, and
bases modified in training (PiSSA, OLoRA, LoRA-GA, CorDA), all folded to the clean base.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loraplex_adapter_store.adapter_config import AdapterConfig
from loraplex_adapter_store.errors import AdapterMismatch, LimitExceeded, UnsupportedAdapter
from loraplex_adapter_store.plan import Family, ModulePlan
from loraplex_adapter_store.tensor_names import group_by_module

from .contract import Fold, ReadContext
from .core_matrix import CORE_SUFFIXES, PROJECTOR, fold_core, fold_projector
from .coverage import check_coverage, require_parts
from .dora import dora_module
from .extras import read_extras
from .residual import InitRule, init_rule, subtracted
from .scaling import lora_scale, scale_rule

__all__ = ["read"]

_A, _B = "lora_A.weight", "lora_B.weight"
_EMBED_A, _EMBED_B = "lora_embedding_A", "lora_embedding_B"
_BIAS, _MAGNITUDE, _DIAG = "lora_B.bias", "lora_magnitude_vector", "lora_diag"
_A0, _B0 = "lora_A0.weight", "lora_B0.weight"
_SUFFIXES = (
    *(_A, _B, _EMBED_A, _EMBED_B, _BIAS, _MAGNITUDE, f"{_MAGNITUDE}.weight", _DIAG, _A0, _B0),
    PROJECTOR,
    *CORE_SUFFIXES,
)

# Features that change what the adapter computes in a way no plan can express.
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA (aLoRA) acts only after its invocation tokens",
    "arrow_config": "Arrow routes between other adapters, by name, on the trainer's machine",
    "layer_replication": "layer_replication changes the depth of the base",
    "target_parameters": "target_parameters adapts fused expert tensors of a MoE base",
    "use_qalora": "QA-LoRA pools its input in groups of a quantised base",
    "megatron_config": "Megatron LoRA is sharded over ranks",
    "monteclora_config": "MonteCLoRA draws its factors anew in each forward pass",
}


def read(context: ReadContext) -> Fold:
    config = context.config
    _refuse_unservable(config)
    rule = init_rule(config)
    grouped = group_by_module(context.ledger.names, _SUFFIXES, context.base)
    check_coverage(context, grouped)
    if rule.name:
        context.notes.append(f"base was modified in training ({rule.name}): folded to rank 2r")
    modules = {
        module: _read_module(context, module, parts, rule) for module, parts in grouped.items()
    }
    extras = read_extras(context, modules)
    family = Family.LORA
    if config.flag("use_dora"):
        family = Family.DORA
    elif config.is_set("kasa_config"):
        family = Family.KASA
    elif any(suffix in parts for parts in grouped.values() for suffix in CORE_SUFFIXES):
        family = Family.LORA_XS
    return Fold(
        family=family,
        scale_rule=scale_rule(config),
        modules=extras.modules,
        embedding_rows=extras.embedding_rows,
        head_rows=extras.head_rows,
        replaced_weights=extras.replaced_weights,
    )


def _refuse_unservable(config: AdapterConfig) -> None:
    for key, why in _REFUSED.items():
        if config.is_set(key):
            raise UnsupportedAdapter(f"LoRA with {key} cannot be served: {why}")


def _read_module(
    context: ReadContext, module: str, parts: Mapping[str, str], rule: InitRule
) -> ModulePlan:
    if module in context.base.embeddings:
        return _read_embedding(context, module, parts)
    require_parts(module, parts, (_A, _B))
    shape = context.base.modules[module]
    rank, scale = _rank_and_scale(context, module, parts[_A])
    a = _factor(context, parts[_A], (rank, shape.in_features))
    b = _factor(context, parts[_B], (shape.out_features, rank)) * scale
    a, b = fold_projector(context, parts, a), fold_core(context, parts, b, rank)
    a, b = _on_clean_base(context, module, parts, rule, a, b, rank, scale)
    bias = None
    if _BIAS in parts:
        bias = context.ledger.take(parts[_BIAS], (shape.out_features,)) * scale
    magnitude = parts.get(_MAGNITUDE, parts.get(f"{_MAGNITUDE}.weight"))
    if context.config.flag("use_dora"):
        if magnitude is None:
            raise AdapterMismatch(f"{module} lacks lora_magnitude_vector, use_dora is true")
        vector = context.ledger.take(magnitude, (shape.out_features,))
        return dora_module(context.base, module, a, b, vector, lora_bias=bias)
    return ModulePlan(a=a, b=b, bias=bias)


def _rank_and_scale(context: ReadContext, module: str, a_key: str) -> tuple[int, float]:
    rank, scale = lora_scale(context.config, module)
    found = context.ledger.shape(a_key)[0]
    if found > context.limits.max_rank:
        raise LimitExceeded(
            f"{module} has rank {found}, this server allows {context.limits.max_rank}"
        )
    if found != rank:
        raise AdapterMismatch(
            f"{a_key} has rank {found}, the config says {rank}: the scale would be wrong"
        )
    return rank, scale


def _factor(context: ReadContext, key: str, shape: tuple[int, int]) -> Tensor:
    """One factor; BD-LoRA stores the blocks of a block-diagonal one below each other."""
    blocks = context.config.section("use_bdlora")
    n_blocks = 1 if blocks is None else blocks.integer("nblocks", 1)
    if n_blocks > 1 and context.ledger.shape(key) == (shape[0], shape[1] // n_blocks):
        stacked = context.ledger.take(key, (shape[0], shape[1] // n_blocks))
        dense = stacked.new_zeros(shape)
        for number, block in enumerate(stacked.chunk(n_blocks)):
            rows, columns = block.shape
            place = (slice(number * rows, None), slice(number * columns, None))
            dense[place][:rows, :columns] = block
        return dense
    return context.ledger.take(key, shape)


def _on_clean_base(
    context: ReadContext,
    module: str,
    parts: Mapping[str, str],
    rule: InitRule,
    a: Tensor,
    b: Tensor,
    rank: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Adds what training subtracted from the base, so that the factors fit the clean one."""
    kasa = context.config.is_set("kasa_config")
    if kasa:
        require_parts(module, parts, (_DIAG,))
        b = b * context.ledger.take(parts[_DIAG], (rank,))
    if _A0 in parts or _B0 in parts:
        require_parts(module, parts, (_A0, _B0))
        a0 = context.ledger.take(parts[_A0], (None, a.shape[1]))
        b0 = context.ledger.take(parts[_B0], (b.shape[0], a0.shape[0])) * scale
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
    if module in context.base.conv1d:
        raise UnsupportedAdapter(f"{name} on the Conv1D module {module} cannot be recomputed")
    took = subtracted(name, context.base.weight(module), rank, scale)
    return torch.cat([a, took.a]), torch.cat([b, -took.b], dim=1)


def _read_embedding(context: ReadContext, module: str, parts: Mapping[str, str]) -> ModulePlan:
    require_parts(module, parts, (_EMBED_A, _EMBED_B))
    if context.config.flag("use_dora"):
        raise UnsupportedAdapter(f"DoRA on the embedding {module} scales rows by hidden position")
    shape = context.base.embeddings[module]
    rank, scale = _rank_and_scale(context, module, parts[_EMBED_A])
    a = context.ledger.take(parts[_EMBED_A], (rank, shape.n_rows))
    b = context.ledger.take(parts[_EMBED_B], (shape.width, rank)) * scale
    return ModulePlan(a=a, b=b)
