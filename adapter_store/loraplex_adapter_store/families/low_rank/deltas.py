"""Other additive updates; most of them are low-rank.

MiSS      ΔW x = Dᵀ Σ_blocks x_(block)            A = [I I … I] over blocks of r, B = Dᵀ
          "bat": each block of r × r is ΔW_oj = W_oj D_o + D_o, of full rank
TinyLoRA  ΔW = B (Σ_i v_i P_i) A                  A, B from the SVD of W, P random, v trained
LoHa      ΔW = α/r · (W₁a W₁b) ⊙ (W₂a W₂b)        exactly rank r²: Khatri-Rao factors
LoKr      ΔW = α/r · W₁ ⊗ W₂                      each factor whole or as a product of rank r
AdaLoRA   ΔW = α/(r₀ + 1e-5) · B diag(E) A        r₀ = init_r, whatever was pruned since
SoRA      ΔW = α/r · B diag(g) A                  g = 0 drops a rank; r is the original rank
ABMLL     a Gaussian posterior over the entries of a LoRA, of which the mean is served
DeLoRA    ΔW = λ/r · Σ_i (b_i/‖b_i‖) (a_i/‖a_i‖)ᵀ ⊙ w
          w[k] = ‖W[:, k]‖ at the start, stored in the file
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_adapter_store.families.contract import Fold, ReadContext
from loraplex_adapter_store.families.extras import fold_linears, fold_with_extras
from loraplex_adapter_store.families.module_groups import ModuleGroup, linear_groups
from loraplex_adapter_store.families.scaling import (
    lora_scale,
    pattern_scale,
    positive_rank,
    scale_rule,
)
from loraplex_adapter_store.operators.kinds import DenseDelta, Kronecker
from loraplex_adapter_store.plan import Family, ModulePlan

_TINY_VECTOR = "tinylora_v."
_SHORTEST = 1e-4  # PEFT's floor for a length
_LOKR_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
_MEAN_A, _MEAN_B, _A_STD, _B_STD = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_A.log_std",
    "lora_B.log_std",
)
_RANKNUM_EPSILON = 1e-5  # PEFT divides by ranknum + this
_SORA_SYNONYMS = {"lora.lora_A": "lora_A", "lora.lora_B": "lora_B", "lora.gate": "gate"}


def read_miss(context: ReadContext) -> Fold:
    fold = _fold_bat if context.config.get("init_weights") == "bat" else _fold_miss
    return fold_linears(context, Family.MISS, "none (block sums)", fold, ("miss_block",))


def read_tinylora(context: ReadContext) -> Fold:
    groups = linear_groups(context, ("tinylora_A", "tinylora_B", "tinylora_P"))
    vectors = _tiny_vectors(context)
    modules: dict[str, ModulePlan] = {}
    order = [name for name in context.base.modules if name in groups]
    for position, module in enumerate(order):
        group = groups[module]
        a, b = group.factors("tinylora_A", "tinylora_B")
        vector = vectors[_tiny_index(position, len(order), len(vectors))]
        projection = group.take("tinylora_P", vector.numel(), a.shape[0], a.shape[0])
        core = torch.einsum("u,ujk->jk", vector, projection)
        modules[module] = ModulePlan(a=a, b=b @ core)
    return fold_with_extras(context, Family.TINYLORA, "none (core of trained vector)", modules)


def read_loha(context: ReadContext) -> Fold:
    parts = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    rank, alpha = positive_rank(context.config, 8), context.config.number("alpha", 8)
    rule = f"alpha/r = {alpha:g}/{rank}, unrolled to rank r²"
    return fold_linears(context, Family.LOHA, rule, _fold_loha, parts)


def _fold_miss(group: ModuleGroup) -> ModulePlan:
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


def _fold_bat(group: ModuleGroup) -> ModulePlan:
    n_blocks, size, _ = group.shape("miss_block", 3)
    if n_blocks * size != group.out_features or group.in_features % size:
        raise AdapterMismatch(
            f"{group.module}: {n_blocks} blocks of {size} do not tile "
            f"[{group.out_features}, {group.in_features}]"
        )
    blocks = group.take("miss_block", n_blocks, size, size).unsqueeze(1)
    weight = group.base_weight()
    tiles = weight.view(n_blocks, size, -1, size).transpose(1, 2)  # [out block, in block, r, r]
    delta = (tiles @ blocks + blocks).transpose(1, 2).reshape(weight.shape)
    return ModulePlan(delta_operator=DenseDelta(delta))


def _fold_loha(group: ModuleGroup) -> ModulePlan:
    rank, scale = pattern_scale(group.config, group.module, "alpha")
    group.limit_rank(rank * rank)
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
        _, separator, number = f".{key}".rpartition(f".{_TINY_VECTOR}")
        if separator and number.isdecimal():
            keys[int(number)] = key
    return [context.ledger.take(keys[number], (None,)) for number in sorted(keys)]


def _tiny_index(position: int, n_modules: int, n_vectors: int) -> int:
    """Return the vector of a module. With full weight tying, all modules share one vector."""
    if n_vectors == 0:
        raise AdapterMismatch("the file lacks the trained vectors tinylora_v")
    if n_vectors == n_modules:
        return position
    if n_vectors == 1:
        return 0
    raise UnsupportedAdapter(
        f"TinyLoRA with {n_vectors} vectors for {n_modules} modules: the file does not say which "
        "modules share a vector"
    )


def read_delora(context: ReadContext) -> Fold:
    parts = ("delora_A", "delora_B", "delora_lambda")
    rule = "λ/r over normalised factors"
    return fold_linears(context, Family.DELORA, rule, _fold_delora, parts, ("delora_w_norm",))


def _fold_delora(group: ModuleGroup) -> ModulePlan:
    a, b = group.factors("delora_A", "delora_B")
    strength = group.take("delora_lambda", 1) / a.shape[0]
    lengths = a.norm(dim=1).clamp_min(_SHORTEST) * b.norm(dim=0).clamp_min(_SHORTEST)
    if "delora_w_norm" in group:
        columns = group.take("delora_w_norm", group.in_features)
    else:
        columns = group.base_weight().norm(dim=0)
    return ModulePlan(a=a * columns, b=b * (strength / lengths))


def read_lokr(context: ReadContext) -> Fold:
    context.config.get("init_weights")  # the start of the factors does not change the base
    rank, alpha = context.config.integer("r", 8), context.config.number("alpha", 8)
    return fold_linears(
        context, Family.LOKR, f"alpha/r = {alpha:g}/{rank}", _fold_lokr, (), _LOKR_PARTS
    )


def _fold_lokr(group: ModuleGroup) -> ModulePlan:
    scale = pattern_scale(group.config, group.module, "alpha").scale
    left, right = _lokr_factor(group, "lokr_w1"), _lokr_factor(group, "lokr_w2")
    shape = (left.shape[0] * right.shape[0], left.shape[1] * right.shape[1])
    if shape != (group.out_features, group.in_features):
        raise AdapterMismatch(
            f"{group.module}: factors of {list(left.shape)} and {list(right.shape)} make "
            f"{list(shape)}, the base needs [{group.out_features}, {group.in_features}]"
        )
    return ModulePlan(delta_operator=Kronecker(left * scale, right))


def _lokr_factor(group: ModuleGroup, name: str) -> Tensor:
    if name in group:
        return group.take(name, None, None)
    a, b = f"{name}_a", f"{name}_b"
    group.require(a, b)
    rank = group.rank(b)
    return group.take(a, None, rank) @ group.take(b, rank, None)


def read_abmll(context: ReadContext) -> Fold:
    context.notes.append("posterior mean; add draws of it as adapters of their own for uncertainty")
    rule = f"{scale_rule(context.config)}, posterior mean"
    return fold_linears(
        context, Family.ABMLL, rule, _fold_abmll, (_MEAN_A, _MEAN_B), (_A_STD, _B_STD)
    )


def draws(
    config: Mapping[str, object], tensors: Mapping[str, Tensor], n_draws: int, seed: int
) -> Iterator[tuple[dict[str, object], dict[str, Tensor]]]:
    """Draw ``n_draws`` plain LoRA configs and tensors from an ABMLL, repeatably by seed.

    A draw is A = μ_A + σ_A ⊙ ε, B = μ_B + σ_B ⊙ ε. The file has the means as ``lora_A.weight`` and
    ``lora_B.weight``, and the spread of each entry as ``lora_A.log_std`` and ``lora_B.log_std``.
    A client adds the draws as adapters of their own, and averages their logits.
    """
    generator = torch.Generator().manual_seed(seed)
    means = {name: t for name, t in tensors.items() if not name.endswith(".log_std")}
    for _ in range(n_draws):
        drawn = {}
        for name, mean in means.items():
            spread = tensors.get(name.removesuffix(".weight") + ".log_std")
            noise = torch.randn(mean.shape, generator=generator)
            drawn[name] = mean if spread is None else mean + spread.float().exp() * noise
        yield {**config, "peft_type": "LORA"}, drawn


def _fold_abmll(group: ModuleGroup) -> ModulePlan:
    rank, scale = lora_scale(group.config, group.module)
    a, b = group.factors(_MEAN_A, _MEAN_B, rank)
    for spread, mean in ((_A_STD, a), (_B_STD, b)):
        if spread in group:
            group.take(spread, *mean.shape)
    return ModulePlan(a=a, b=b * scale)


def read_adalora(context: ReadContext) -> Fold:
    init_rank = positive_rank(context.config, 12, key="init_r")
    alpha = context.config.number("lora_alpha", 8)
    scale = (alpha if alpha > 0 else float(init_rank)) / (init_rank + _RANKNUM_EPSILON)
    groups = linear_groups(context, ("lora_A", "lora_B", "lora_E"))
    rule = f"alpha/init_r = {alpha:g}/{init_rank} = {scale:g}, times lora_E per rank"
    return _gated(context, Family.ADALORA, rule, groups, "lora_E", scale)


def read_sora(context: ReadContext) -> Fold:
    rank, alpha = positive_rank(context.config, 8), context.config.number("lora_alpha", 16)
    groups = linear_groups(context, ("lora_A", "lora_B", "gate"), synonyms=_SORA_SYNONYMS)
    rule = f"alpha/r = {alpha:g}/{rank} = {alpha / rank:g}, zero gates dropped"
    return _gated(context, Family.SORA, rule, groups, "gate", alpha / rank)


def _gated(
    context: ReadContext,
    family: Family,
    rule: str,
    groups: Mapping[str, ModuleGroup],
    gate: str,
    scale: float,
) -> Fold:
    """Drop the ranks with a zero gate, and modules without any other rank."""
    modules = {module: _gated_module(group, gate, scale) for module, group in groups.items()}
    remaining = {module: plan for module, plan in modules.items() if plan.rank}
    return fold_with_extras(context, family, rule, remaining)


def _gated_module(group: ModuleGroup, gate_part: str, scale: float) -> ModulePlan:
    a, b = group.factors("lora_A", "lora_B")
    gate = group.vector(gate_part, a.shape[0])
    is_open = gate != 0
    return ModulePlan(a=a[is_open], b=(b * gate * scale)[:, is_open].contiguous())
