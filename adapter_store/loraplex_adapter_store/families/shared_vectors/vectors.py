"""Methods that train vectors, not matrices.

Vectors of a module:

IA³    y = l ⊙ (W x + b)                  (attention keys and values)
       y = W (l ⊙ x) + b                  (feed-forward modules: the input is scaled)
BEFT   y = W x + b + v
LoFiT  o_proj((1 + a) ⊙ h + v) per head = W_o ((1 + a) ⊙ h) + W_o v

Factors that are looked up in one trained vector or bank, shared by all modules of an adapter:

VB-LoRA   A and B are cut into pieces of length v. Each piece is Σ_k w_k bank[i_k], with w a softmax
          over its k largest logits. The file holds all logits, or only i and w of the k largest.
Uni-LoRA  A = θ[index_A] ⊙ scale_A, B likewise: every entry is one of the d entries of θ
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, MalformedFile
from loraplex_adapter_store.families.contract import Fold, ReadContext
from loraplex_adapter_store.families.extras import fold_linears, fold_with_extras
from loraplex_adapter_store.families.module_groups import ModuleGroup, check_targets, limit_rank
from loraplex_adapter_store.files.targets import (
    expand_targets,
    is_feedforward,
    module_names,
    resolve_module,
)
from loraplex_adapter_store.plan import Family, ModulePlan

_HEAD = re.compile(r"(?P<attention>.+)\.(?P<part>attn_A|attn_v)\.(?P<head>\d+)")
_BANK, _THETA = "vblora_vector_bank", "unilora_theta_d"


def read_ia3(context: ReadContext) -> Fold:
    return fold_linears(context, Family.IA3, "vectors, no scale", _fold_ia3, ("ia3_l",))


def read_beft(context: ReadContext) -> Fold:
    return fold_linears(context, Family.BEFT, "biases, no scale", _fold_beft, ("beft_bias",))


def read_lofit(context: ReadContext) -> Fold:
    heads: dict[str, dict[str, dict[int, str]]] = {}
    names = module_names(context.base) | {name.rpartition(".")[0] for name in context.base.modules}
    for key in context.ledger.names:
        match = _HEAD.fullmatch(key)
        attention = None if match is None else resolve_module(match["attention"], names)
        if match is not None and attention is not None:
            parts = heads.setdefault(attention, {"attn_A": {}, "attn_v": {}})
            parts[match["part"]][int(match["head"])] = key
    modules: dict[str, ModulePlan] = {}
    for attention, parts in heads.items():
        output = _output_projection(context, attention)
        modules[output] = _lofit_module(context, output, parts)
    if not modules:
        raise AdapterMismatch(
            "no attn_v vectors of this base's attention blocks",
            context.ledger.unclaimed,
            unexpected_keys=context.ledger.unclaimed,
        )
    rule = "head offsets through o_proj, no scale"
    return fold_with_extras(context, Family.LOFIT, rule, modules)


def _fold_beft(group: ModuleGroup) -> ModulePlan:
    return ModulePlan(bias=group.vector("beft_bias", group.out_features))


def _fold_ia3(group: ModuleGroup) -> ModulePlan:
    if is_feedforward(group.config, group.module):
        return ModulePlan(in_scale=group.vector("ia3_l", group.in_features))
    return ModulePlan(out_scale=group.vector("ia3_l", group.out_features))


def _output_projection(context: ReadContext, attention: str) -> str:
    for leaf in ("o_proj", "out_proj", "c_proj", "dense"):
        if f"{attention}.{leaf}" in context.base.modules:
            return f"{attention}.{leaf}"
    raise AdapterMismatch(f"{attention} has no output projection to carry the head offsets")


def _lofit_module(
    context: ReadContext, output: str, parts: Mapping[str, Mapping[int, str]]
) -> ModulePlan:
    base = context.base
    if base.modules[output].in_features != base.n_heads * base.head_dim:
        raise AdapterMismatch(f"{output} does not take {base.n_heads} heads of {base.head_dim}")
    scales = torch.zeros(base.n_heads, base.head_dim)
    offsets = torch.zeros(base.n_heads, base.head_dim)
    for target, name in ((scales, "attn_A"), (offsets, "attn_v")):
        for head, key in parts[name].items():
            if head >= base.n_heads:
                raise AdapterMismatch(f"{key}: the base has {base.n_heads} heads")
            target[head] = context.ledger.take(key, (base.head_dim,))
    bias = base.weight(output) @ offsets.flatten() if parts["attn_v"] else None
    in_scale = 1 + scales.flatten() if parts["attn_A"] else None
    return ModulePlan(bias=bias, in_scale=in_scale)


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
    rule = f"none, top {top_k} of {bank.shape[0]} vectors"
    fold = partial(_fold_vblora, bank=bank, top_k=top_k)
    return fold_linears(context, Family.VBLORA, rule, fold, parts)


def read_unilora(context: ReadContext) -> Fold:
    theta = context.ledger.take(_shared(context, _THETA), (None,))
    rank = context.config.integer("r", 4)
    parts = ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B")
    rule = f"none, {theta.numel()} numbers"
    if context.config.flag("save_indices"):
        fold = partial(_fold_unilora, theta=theta, rank=rank)
        return fold_linears(context, Family.UNILORA, rule, fold, parts)
    return fold_with_extras(context, Family.UNILORA, rule, _drawn_unilora(context, theta, rank))


def _shared(context: ReadContext, name: str) -> str:
    keys = [key for key in context.ledger.names if key == name or key.endswith(f".{name}")]
    if len(keys) != 1:
        raise AdapterMismatch(
            f"the file lacks {name}, which all modules share", missing_keys=(name,)
        )
    return keys[0]


def _fold_vblora(group: ModuleGroup, bank: Tensor, top_k: int) -> ModulePlan:
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
    """Return the pieces of one factor, [*shape, length of a vector]."""
    if side in group:
        top, indices = group.take(side, *shape, bank.shape[0]).topk(top_k, dim=-1)
        weights = top.softmax(dim=-1)
    else:
        indices = group.indices(f"{side}_topk_indices", bank.shape[0], *shape, top_k)
        stored = group.take(f"{side}_topk_weights", *shape, top_k - 1)
        weights = torch.cat([stored, 1 - stored.sum(dim=-1, keepdim=True)], dim=-1)
    return torch.einsum("xyk,xykl->xyl", weights, bank[indices])


def _fold_unilora(group: ModuleGroup, theta: Tensor, rank: int) -> ModulePlan:
    group.limit_rank(rank)
    shapes = {"A": (rank, group.in_features), "B": (group.out_features, rank)}
    a, b = (
        theta[group.indices(f"unilora_indices_{side}", theta.numel(), *shape)]
        * group.take(f"unilora_scales_{side}", *shape)
        for side, shape in shapes.items()
    )
    return ModulePlan(a=a, b=b)


def _drawn_unilora(context: ReadContext, theta: Tensor, rank: int) -> dict[str, ModulePlan]:
    """Fold with indices that are drawn again, as PEFT does at load."""
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
    indices = _draw_indices(
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


def _draw_indices(n_entries: int, n_values: int, seed: int) -> Tensor:
    """Return a permutation, by NumPy's generator, of every index about equally often."""
    generator = np.random.default_rng(seed)
    n_each, n_left = divmod(n_entries, n_values)
    indices = np.repeat(np.arange(n_values), n_each)
    if n_left:
        rest = generator.choice(n_values, size=n_left, replace=False)
        indices = np.concatenate([indices, rest])
    generator.shuffle(indices)
    return torch.from_numpy(indices)


def _cut(flat: Tensor, shapes: Iterable[tuple[int, int]]) -> Sequence[Tensor]:
    starts = [0]
    for rows, columns in shapes:
        starts.append(starts[-1] + rows * columns)
    return [flat[first:last] for first, last in pairwise(starts)]
