"""Factors that are looked up in one trained store, shared by all modules of the adapter.

VB-LoRA   A and B are cut into pieces of length v; each piece is Σ_k w_k bank[i_k], a softmax over
          the k largest of its logits. The file holds the logits, or only (i, w) of those k.
Uni-LoRA  A = θ[index_A] ⊙ scale_A, B likewise: every entry is one of the d entries of θ
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, MalformedFile
from loraplex_adapter_store.plan import Family, ModulePlan
from loraplex_adapter_store.targets import expand_targets

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import ModuleGroup, check_targets, limit_rank, linear_groups

__all__ = ["read_unilora", "read_vblora"]

_BANK, _THETA = "vblora_vector_bank", "unilora_theta_d"


def read_vblora(context: ReadContext) -> Fold:
    bank = context.ledger.take(_shared(context, _BANK), (None, None))
    top_k = context.config.integer("topk", 2)
    if not 1 <= top_k <= bank.shape[0]:
        raise MalformedFile(
            f"adapter_config.json: topk {top_k} of a bank of {bank.shape[0]} vectors"
        )
    sides = ("vblora_logits_A", "vblora_logits_B")
    if context.config.flag("save_only_topk_weights"):
        parts = tuple(f"{side}_topk_{what}" for side in sides for what in ("indices", "weights"))
    else:
        parts = sides
    groups = linear_groups(context, parts)
    modules = {module: _vblora_module(group, bank, top_k) for module, group in groups.items()}
    rule = f"none, top {top_k} of {bank.shape[0]} vectors"
    return fold_with_extras(context, Family.VBLORA, rule, modules)


def read_unilora(context: ReadContext) -> Fold:
    theta = context.ledger.take(_shared(context, _THETA), (None,))
    rank = context.config.integer("r", 4)
    parts = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")
    if context.config.flag("save_indices"):
        groups = linear_groups(context, parts)
        modules = {module: _unilora_saved(group, theta, rank) for module, group in groups.items()}
    else:
        modules = _unilora_drawn(context, theta, rank)
    return fold_with_extras(context, Family.UNILORA, f"none, {theta.numel()} numbers", modules)


def _shared(context: ReadContext, name: str) -> str:
    found = [key for key in context.ledger.names if key == name or key.endswith(f".{name}")]
    if len(found) != 1:
        raise AdapterMismatch(
            f"the file lacks {name}, which all modules share", missing_keys=(name,)
        )
    return found[0]


def _vblora_module(group: ModuleGroup, bank: Tensor, top_k: int) -> ModulePlan:
    length = bank.shape[1]
    if not length or group.in_features % length or group.out_features % length:
        raise AdapterMismatch(
            f"{group.module}: vectors of length {length} do not tile "
            f"[{group.out_features}, {group.in_features}]"
        )
    n_in, n_out = group.in_features // length, group.out_features // length
    key = "vblora_logits_A" if "vblora_logits_A" in group else "vblora_logits_A_topk_indices"
    rank = group.rank(key, n_dims=3)
    a = _pieces(group, "vblora_logits_A", (rank, n_in), bank, top_k)
    b = _pieces(group, "vblora_logits_B", (n_out, rank), bank, top_k)
    return ModulePlan(
        a=a.reshape(rank, group.in_features),
        b=b.transpose(1, 2).reshape(group.out_features, rank),
    )


def _pieces(
    group: ModuleGroup, side: str, shape: tuple[int, int], bank: Tensor, top_k: int
) -> Tensor:
    """[*shape, length of a vector]."""
    if side in group:
        top, indices = group.take(side, *shape, bank.shape[0]).topk(top_k, dim=-1)
        weights = top.softmax(dim=-1)
    else:
        indices = group.indices(f"{side}_topk_indices", bank.shape[0], *shape, top_k)
        known = group.take(f"{side}_topk_weights", *shape, top_k - 1)
        weights = torch.cat([known, 1 - known.sum(dim=-1, keepdim=True)], dim=-1)
    return torch.einsum("xyk,xykl->xyl", weights, bank[indices])


def _unilora_saved(group: ModuleGroup, theta: Tensor, rank: int) -> ModulePlan:
    limit_rank(group.context, group.module, rank)
    shapes = {"A": (rank, group.in_features), "B": (group.out_features, rank)}
    a, b = (
        theta[group.indices(f"unilora_indices_{side}", theta.numel(), *shape)]
        * group.take(f"unilora_scales_{side}", *shape)
        for side, shape in shapes.items()
    )
    return ModulePlan(a=a, b=b)


def _unilora_drawn(context: ReadContext, theta: Tensor, rank: int) -> dict[str, ModulePlan]:
    """The indices drawn anew, as PEFT does when it loads: a permutation by NumPy's generator."""
    wanted = expand_targets(context.config, context.base)
    targets = [module for module in context.base.modules if module in wanted]
    check_targets(context, wanted, targets)
    for module in targets:
        limit_rank(context, module, rank)
    shapes = [
        shape
        for linear in (context.base.modules[module] for module in targets)
        for shape in ((rank, linear.in_features), (linear.out_features, rank))
    ]
    indices = _drawn(
        sum(rows * columns for rows, columns in shapes),
        theta.numel(),
        context.config.integer("proj_seed", 42),
    )
    counts = torch.bincount(indices, minlength=theta.numel()).float()
    values = theta * torch.where(counts > 0, counts.rsqrt(), torch.zeros(()))
    factors = [
        values[part].view(shape) for part, shape in zip(_cut(indices, shapes), shapes, strict=True)
    ]
    pairs = zip(targets, factors[::2], factors[1::2], strict=True)
    return {module: ModulePlan(a=a, b=b) for module, a, b in pairs}


def _drawn(n_entries: int, n_values: int, seed: int) -> Tensor:
    generator = np.random.default_rng(seed)
    each, left = divmod(n_entries, n_values)
    drawn = np.repeat(np.arange(n_values), each)
    if left:
        drawn = np.concatenate([drawn, generator.choice(n_values, size=left, replace=False)])
    generator.shuffle(drawn)
    return torch.from_numpy(drawn)


def _cut(flat: Tensor, shapes: Iterable[tuple[int, int]]) -> Sequence[Tensor]:
    starts = [0]
    for rows, columns in shapes:
        starts.append(starts[-1] + rows * columns)
    return [flat[first:last] for first, last in pairwise(starts)]
