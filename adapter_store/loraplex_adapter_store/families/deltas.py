"""Other additive updates; most of them are low-rank.

MiSS      ΔW x = Dᵀ Σ_blocks x_(block)            A = [I I … I] over blocks of r, B = Dᵀ
          "bat": each block of r × r is ΔW_oj = W_oj D_o + D_o, of full rank
TinyLoRA  ΔW = B (Σ_i v_i P_i) A                  A, B from the SVD of W, P random, v trained
LoHa      ΔW = α/r · (W₁a W₁b) ⊙ (W₂a W₂b)        exactly rank r²: Khatri-Rao factors
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_adapter_store.operators.deltas import DenseDelta
from loraplex_adapter_store.plan import Family, ModulePlan

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, limit_rank, linear_groups
from .scaling import pattern_scale, positive_rank

__all__ = ["read_loha", "read_miss", "read_tinylora"]

_TINY_VECTOR = "tinylora_v."


def read_miss(context: ReadContext) -> Fold:
    is_bat = context.config.get("init_weights") == "bat"
    groups = linear_groups(context, ("miss_block",))
    modules = {
        module: _bat_module(group) if is_bat else _miss_module(group)
        for module, group in groups.items()
    }
    return fold_with_extras(context, Family.MISS, "none (block sums)", modules)


def read_tinylora(context: ReadContext) -> Fold:
    groups = linear_groups(context, ("tinylora_A", "tinylora_B", "tinylora_P"))
    vectors = _tiny_vectors(context)
    modules: dict[str, ModulePlan] = {}
    order = [name for name in context.base.modules if name in groups]
    for position, module in enumerate(order):
        group = groups[module]
        rank = group.rank("tinylora_A")
        a = group.take("tinylora_A", rank, group.in_features)
        b = group.take("tinylora_B", group.out_features, rank)
        vector = vectors[_tiny_group(position, len(order), len(vectors))]
        projection = group.take("tinylora_P", vector.numel(), rank, rank)
        core = torch.einsum("u,ujk->jk", vector, projection)
        modules[module] = ModulePlan(a=a, b=b @ core)
    return fold_with_extras(context, Family.TINYLORA, "none (core of trained vector)", modules)


def read_loha(context: ReadContext) -> Fold:
    groups = linear_groups(context, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
    modules = {module: _loha_module(group) for module, group in groups.items()}
    rank, alpha = positive_rank(context.config, 8), context.config.number("alpha", 8)
    rule = f"alpha/r = {alpha:g}/{rank}, unrolled to rank r²"
    return fold_with_extras(context, Family.LOHA, rule, modules)


def _miss_module(group: ModuleGroup) -> ModulePlan:
    rank = group.rank("miss_block")
    block = group.take("miss_block", rank, None)
    if rank == 0 or block.shape[1] == 0 or group.out_features % block.shape[1]:
        raise AdapterMismatch(
            f"tensor {group.keys['miss_block']!r} has shape {list(block.shape)}: its width must "
            f"divide the {group.out_features} outputs of {group.module}"
        )
    block = block.repeat(1, group.out_features // block.shape[1])  # "mini" blocks
    n_tiles = -(-group.in_features // rank)
    a = torch.eye(rank).repeat(1, n_tiles)[:, : group.in_features].contiguous()
    return ModulePlan(a=a, b=block.t().contiguous())


def _bat_module(group: ModuleGroup) -> ModulePlan:
    n_blocks, size, _ = group.shape("miss_block", 3)
    if n_blocks * size != group.out_features or group.in_features % size:
        raise AdapterMismatch(
            f"{group.module}: {n_blocks} blocks of {size} do not tile "
            f"[{group.out_features}, {group.in_features}]"
        )
    blocks = group.take("miss_block", n_blocks, size, size).unsqueeze(1)
    weight = group.context.base.weight(group.module)
    tiles = weight.view(n_blocks, size, -1, size).transpose(1, 2)  # [out block, in block, r, r]
    delta = (tiles @ blocks + blocks).transpose(1, 2).reshape(weight.shape)
    return ModulePlan(delta_operator=DenseDelta(delta))


def _loha_module(group: ModuleGroup) -> ModulePlan:
    rank, scale = pattern_scale(group.context.config, group.module, "alpha")
    limit_rank(group.context, group.module, rank * rank)
    w1a = group.take("hada_w1_a", group.out_features, rank)
    w1b = group.take("hada_w1_b", rank, group.in_features)
    w2a = group.take("hada_w2_a", group.out_features, rank)
    w2b = group.take("hada_w2_b", rank, group.in_features)
    a = (w1b.unsqueeze(1) * w2b.unsqueeze(0)).flatten(0, 1)
    b = (w1a.unsqueeze(2) * w2a.unsqueeze(1)).flatten(1) * scale
    return ModulePlan(a=a, b=b)


def _tiny_vectors(context: ReadContext) -> list[Tensor]:
    keys: dict[int, str] = {}
    for key in context.ledger.names:
        _, found, number = f".{key}".rpartition(f".{_TINY_VECTOR}")
        if found and number.isdecimal():
            keys[int(number)] = key
    return [context.ledger.take(keys[number], (None,)) for number in sorted(keys)]


def _tiny_group(position: int, n_modules: int, n_groups: int) -> int:
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
