"""Other additive updates that are low-rank in disguise.

MiSS      ΔW x = Dᵀ Σ_blocks x_(block)            A = [I I … I] over blocks of r, B = Dᵀ
TinyLoRA  ΔW = B (Σ_i v_i P_i) A                  A, B from the SVD of W, P random, v trained
LoHa      ΔW = α/r · (W₁a W₁b) ⊙ (W₂a W₂b)        exactly rank r²: Khatri-Rao factors
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, LimitExceeded, UnsupportedAdapter
from loraplex_adapter_store.plan import Family, ModulePlan
from loraplex_adapter_store.tensor_names import group_by_module

from .contract import Fold, ReadContext
from .coverage import check_coverage, require_parts
from .extras import read_extras
from .scaling import pattern_scale

__all__ = ["read_loha", "read_miss", "read_tinylora"]


def read_miss(context: ReadContext) -> Fold:
    if context.config.values.get("init_weights") == "bat":
        raise UnsupportedAdapter("MiSS 'bat' multiplies the base weight: its delta has full rank")
    grouped = group_by_module(context.ledger.names, ("miss_block",), context.base)
    check_coverage(context, grouped)
    modules: dict[str, ModulePlan] = {}
    for module, parts in grouped.items():
        shape = context.base.modules[module]
        block = context.ledger.take(parts["miss_block"], (None, None))
        rank = block.shape[0]
        _check_rank(context, module, rank)
        if shape.out_features % block.shape[1]:
            raise AdapterMismatch(f"{module}: miss_block of width {block.shape[1]} does not tile")
        block = block.repeat(1, shape.out_features // block.shape[1])  # "mini" blocks
        n_tiles = -(-shape.in_features // rank)
        a = torch.eye(rank).repeat(1, n_tiles)[:, : shape.in_features].contiguous()
        modules[module] = ModulePlan(a=a, b=block.t().contiguous())
    return _finish(context, Family.MISS, "none (block sums)", modules)


def read_tinylora(context: ReadContext) -> Fold:
    names = ("tinylora_A", "tinylora_B", "tinylora_P")
    grouped = group_by_module(context.ledger.names, names, context.base)
    check_coverage(context, grouped)
    vectors = _tiny_vectors(context)
    modules: dict[str, ModulePlan] = {}
    order = [name for name in context.base.modules if name in grouped]
    for position, module in enumerate(order):
        parts = grouped[module]
        require_parts(module, parts, names)
        shape = context.base.modules[module]
        rank = context.ledger.shape(parts["tinylora_A"])[0]
        _check_rank(context, module, rank)
        a = context.ledger.take(parts["tinylora_A"], (rank, shape.in_features))
        b = context.ledger.take(parts["tinylora_B"], (shape.out_features, rank))
        vector = vectors[_tiny_group(context, position, len(order), len(vectors))]
        projection = context.ledger.take(parts["tinylora_P"], (vector.numel(), rank, rank))
        core = torch.einsum("u,ujk->jk", vector, projection)
        modules[module] = ModulePlan(a=a, b=b @ core)
    return _finish(context, Family.TINYLORA, "none (core of trained vector)", modules)


def read_loha(context: ReadContext) -> Fold:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    grouped = group_by_module(context.ledger.names, names, context.base)
    check_coverage(context, grouped)
    modules = {
        module: _loha_module(context, module, parts, names) for module, parts in grouped.items()
    }
    rank, alpha = context.config.integer("r", 8), context.config.number("alpha", 8)
    rule = f"alpha/r = {alpha:g}/{rank} = {alpha / rank:g}, unrolled to rank r²"
    return _finish(context, Family.LOHA, rule, modules)


def _loha_module(
    context: ReadContext, module: str, parts: Mapping[str, str], names: tuple[str, ...]
) -> ModulePlan:
    require_parts(module, parts, names)
    shape, ledger = context.base.modules[module], context.ledger
    rank, scale = pattern_scale(context.config, module, "alpha")
    _check_rank(context, module, rank * rank)
    w1a = ledger.take(parts["hada_w1_a"], (shape.out_features, rank))
    w1b = ledger.take(parts["hada_w1_b"], (rank, shape.in_features))
    w2a = ledger.take(parts["hada_w2_a"], (shape.out_features, rank))
    w2b = ledger.take(parts["hada_w2_b"], (rank, shape.in_features))
    a = (w1b.unsqueeze(1) * w2b.unsqueeze(0)).flatten(0, 1)
    b = (w1a.unsqueeze(2) * w2a.unsqueeze(1)).flatten(1) * scale
    return ModulePlan(a=a, b=b)


def _tiny_vectors(context: ReadContext) -> list[Tensor]:
    keys = [key for key in context.ledger.names if ".tinylora_v." in f".{key}"]
    keys.sort(key=lambda key: int(key.rpartition(".")[2]))
    return [context.ledger.take(key, (None,)) for key in keys]


def _tiny_group(context: ReadContext, position: int, n_modules: int, n_groups: int) -> int:
    """With weight tying, consecutive modules share a vector."""
    if n_groups == 0:
        raise AdapterMismatch("the file lacks the trained vectors tinylora_v")
    if n_groups == n_modules:
        return position
    if n_groups == 1:
        return 0
    raise UnsupportedAdapter(
        f"TinyLoRA with {n_groups} vectors for {n_modules} modules: which shares which is not saved"
    )


def _check_rank(context: ReadContext, module: str, rank: int) -> None:
    if rank > context.limits.max_rank:
        raise LimitExceeded(f"{module} has rank {rank}, at most {context.limits.max_rank}")


def _finish(
    context: ReadContext, family: Family, rule: str, modules: Mapping[str, ModulePlan]
) -> Fold:
    extras = read_extras(context, modules)
    return Fold(family, rule, modules=extras.modules, replaced_weights=extras.replaced_weights)
