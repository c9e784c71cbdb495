"""LoRA, and the methods that save the same tensors: y = W x + s · B A x.

Covers rsLoRA, rank/alpha patterns, layer subsets, embeddings, lm_head, lora_bias, DoRA, KaSA,
activated LoRA, and bases modified in training (PiSSA, OLoRA, LoRA-GA, CorDA), all folded to the
clean base.

A core C between the factors:     ΔW = s · B C A, so B' = s · B C
A projector before them:          ΔW = s · B A (I − Vᵀ V), so A' = A − (A Vᵀ) V   (Comp-LoRA)
DoRA, as an output scale:         y = m/‖W + s·B A‖_row ⊙ (W x + s·B A x) + b

C is [r, r]: ``lora_N`` (NLoRA), ``lora_S`` (LaMDA), or ``q_proj_lora_latent_mapping`` beside
``q_proj`` (LoRA-XS and LoRA-SB; newer PEFT writes ``q_proj.default_lora_latent_mapping``).
Where training subtracted a start, ``lora_A0``/``lora_B0`` hold it.
V is ``comp_projector.weight`` [k, in], with orthonormal rows: directions that the update avoids.
DoRA's training does not scale the base bias b, but the plan does. The plan's bias compensates.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.errors import AdapterMismatch, UnsupportedAdapter
from loraplex_adapter_store.families.contract import Fold, ReadContext
from loraplex_adapter_store.families.extras import fold_with_extras
from loraplex_adapter_store.families.module_groups import (
    ModuleGroup,
    ModuleKind,
    Parts,
    module_groups,
)
from loraplex_adapter_store.families.routed.routed_projections import read_authors_format
from loraplex_adapter_store.families.routed.stacked_parameters import read_stacked
from loraplex_adapter_store.families.scaling import lora_scale, scale_rule
from loraplex_adapter_store.files.adapter_config import AdapterConfig
from loraplex_adapter_store.files.targets import expand_targets
from loraplex_adapter_store.plan import Family, ModulePlan

from .activated import check_activated, read_invocation
from .residual import InitRule, init_rule, subtracted

_PROJECTOR = "comp_projector.weight"
_LATENT = "default_lora_latent_mapping.weight"
_CORE_FAMILIES: Mapping[str, Family] = {  # name of the core tensor → family
    "lora_N.weight": Family.NLORA,
    "lora_S.weight": Family.LAMDA,
    _LATENT: Family.LORA_XS,
}
_A, _B = "lora_A.weight", "lora_B.weight"
_EMBED_A, _EMBED_B = "lora_embedding_A", "lora_embedding_B"
_BIAS, _MAGNITUDE, _DIAG = "lora_B.bias", "lora_magnitude_vector", "lora_diag"
_A0, _B0 = "lora_A0.weight", "lora_B0.weight"
_LINEAR = Parts(
    required=(_A, _B),
    optional=(_BIAS, _MAGNITUDE, _DIAG, _A0, _B0, _PROJECTOR, *_CORE_FAMILIES),
    synonyms={f"{_MAGNITUDE}.weight": _MAGNITUDE, "_lora_latent_mapping.weight": _LATENT},
)
_EMBEDDING = Parts(required=(_EMBED_A, _EMBED_B))

# Features that change the result of the adapter in a way that no plan can express.
_REFUSED = {
    "arrow_config": "Arrow routes between other adapters, by name, on the trainer's machine",
    "layer_replication": "layer_replication changes the depth of the base",
    "use_qalora": "QA-LoRA pools its input in groups of a quantised base",
    "megatron_config": "Megatron LoRA is sharded over ranks",
    "monteclora_config": "MonteCLoRA draws its factors anew in each forward pass",
}
_ROWS_AT_ONCE = 2048
# Settings of the gradients that LoRA-GA's authors start from, in the config of their fork.
_LORAGA_SETTINGS = ("bsz", "direction", "dtype", "iters", "max_length", "scale", "stable_gamma")


def read_loraga(context: ReadContext) -> Fold:
    """Read the files of LoRA-GA's authors: a LORA with settings of its start."""
    for setting in _LORAGA_SETTINGS:
        context.config.get(setting)
    return read(context)


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
    if rule.name and config.is_set("alora_invocation_tokens"):
        raise UnsupportedAdapter(
            f"activated LoRA on a base modified by {rule.name}: refused, since the modification "
            "would act before the invocation too"
        )
    if rule.name:
        context.notes.append(f"base was modified in training ({rule.name}): folded to rank 2r")
    modules = {module: _read_module(group, rule) for module, group in groups.items()}
    family = _family(config, groups.values())
    fold = fold_with_extras(context, family, scale_rule(config), modules)
    plan = replace(fold.plan, stacked=stacked, invocation=read_invocation(context))
    check_activated(plan, context.base)
    return fold._replace(plan=plan)


def _refuse_unservable(config: AdapterConfig) -> None:
    for key, why in _REFUSED.items():
        if config.is_set(key):
            raise UnsupportedAdapter(f"LoRA with {key} cannot be served: {why}")


def _family(config: AdapterConfig, groups: Iterable[ModuleGroup]) -> Family:
    if config.flag("use_dora"):
        return Family.DORA
    groups = tuple(groups)
    if any(_DIAG in group for group in groups):
        return Family.KASA
    cores = {suffix for group in groups for suffix in _CORE_FAMILIES if suffix in group}
    return _CORE_FAMILIES[min(cores)] if cores else Family.LORA


def _read_module(group: ModuleGroup, rule: InitRule) -> ModulePlan:
    if group.kind is ModuleKind.EMBEDDING:
        return _read_embedding(group)
    rank, scale = _rank_and_scale(group, _A)
    a = _factor(group, _A, (rank, group.in_features))
    b = _factor(group, _B, (group.out_features, rank)) * scale
    a, b = _fold_projector(group, a), _fold_core(group, b, rank)
    a, b = _on_clean_base(group, rule, a, b, rank, scale)
    bias = None
    if group.config.flag("lora_bias") or _BIAS in group:
        bias = _required(group, _BIAS, group.out_features) * scale
    if group.config.flag("use_dora"):
        vector = _required(group, _MAGNITUDE, group.out_features)
        return _dora_module(group.context.base, group.module, a, b, vector, lora_bias=bias)
    return ModulePlan(a=a, b=b, bias=bias)


def _rank_and_scale(group: ModuleGroup, part: str) -> tuple[int, float]:
    rank, scale = lora_scale(group.config, group.module)
    stored = group.rank(part)
    if stored != rank:
        raise AdapterMismatch(
            f"{group.keys[part]} has rank {stored}, the config says {rank}: "
            "the scale would be wrong"
        )
    return rank, scale


def _factor(group: ModuleGroup, part: str, shape: tuple[int, int]) -> Tensor:
    """Load one factor. BD-LoRA stacks the blocks of a block-diagonal factor."""
    blocks = group.config.section("use_bdlora")
    n_blocks = 1 if blocks is None else blocks.integer("nblocks", 1)
    if n_blocks > 1 and group.shape(part, 2) == (shape[0], shape[1] // n_blocks):
        stacked = group.take(part, shape[0], shape[1] // n_blocks)
        dense = stacked.new_zeros(shape)
        for number, block in enumerate(stacked.chunk(n_blocks)):
            rows, columns = block.shape
            row, column = number * rows, number * columns
            dense[row : row + rows, column : column + columns] = block
        return dense
    return group.take(part, *shape)


def _on_clean_base(
    group: ModuleGroup, rule: InitRule, a: Tensor, b: Tensor, rank: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Append the factors that training subtracted from the base, so that A and B fit the base."""
    kasa = ""
    if group.config.is_set("kasa_config") or _DIAG in group:
        kasa = "kasa" if group.config.is_set("kasa_config") else "kasa-authors"
        b = b * _required(group, _DIAG, rank)
    if _A0 in group or _B0 in group:
        a0 = _required(group, _A0, None, a.shape[1])
        b0 = _required(group, _B0, b.shape[0], a0.shape[0]) * scale
        return torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
    name = kasa or rule.name
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
    start = subtracted(name, group.base_weight(), rank, scale)
    return torch.cat([a, start.a]), torch.cat([b, -start.b], dim=1)


def _required(group: ModuleGroup, part: str, *shape: int | None) -> Tensor:
    """``take`` a part that this variant of LoRA needs."""
    group.require(part)
    return group.take(part, *shape)


def _read_embedding(group: ModuleGroup) -> ModulePlan:
    if group.config.flag("use_dora"):
        raise UnsupportedAdapter(
            f"DoRA on the embedding {group.module} scales rows by hidden position"
        )
    rank, scale = _rank_and_scale(group, _EMBED_A)
    a = group.take(_EMBED_A, rank, group.in_features)
    b = group.take(_EMBED_B, group.out_features, rank) * scale
    return ModulePlan(a=a, b=b)


def _fold_projector(group: ModuleGroup, a: Tensor) -> Tensor:
    """Return A (I − Vᵀ V) if the module has a projector, else A."""
    if _PROJECTOR not in group:
        return a
    v = group.take(_PROJECTOR, None, a.shape[1])
    return a - (a @ v.t()) @ v


def _fold_core(group: ModuleGroup, b: Tensor, rank: int) -> Tensor:
    """Return B C for the cores of the module. C is stored as a linear's weight: y = B (C (A x))."""
    for suffix in _CORE_FAMILIES:
        if suffix in group:
            b = b @ group.take(suffix, rank, rank)
    return b


def _dora_module(
    base: BaseSpec,
    module: str,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    *,
    lora_bias: Tensor | None = None,
) -> ModulePlan:
    """``b`` has the scale folded in; ``magnitude`` [out]; ``lora_bias`` [out] is scaled like B."""
    scale = magnitude / row_norms(base.stored(module), a, b)
    bias = None if lora_bias is None else scale * lora_bias
    base_bias = base.bias(module)
    if base_bias is not None:
        compensation = base_bias * (1 - scale)
        bias = compensation if bias is None else bias + compensation
    return ModulePlan(a=a, b=b, out_scale=scale, bias=bias)


def row_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ‖W + B A‖ per row, float32 [out] on the host, computed on the device of ``weight``.

    ‖w + b A‖² = ‖w‖² + 2 (w Aᵀ)·b + b (A Aᵀ) bᵀ, in float64: the terms cancel when ΔW ≈ −W. B A is
    not formed, and a GPU holds a few rows of W in float64 at a time.
    """
    device = weight.device
    a64 = a.to(device, torch.float64)
    n_rows = weight.shape[0] if device.type == "cpu" else _ROWS_AT_ONCE
    norms = [
        _row_norms(rows.double(), a64, own.to(device, torch.float64))
        for rows, own in zip(torch.split(weight, n_rows), torch.split(b, n_rows), strict=True)
    ]
    return torch.cat(norms).cpu()


def _row_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    cross = ((weight @ a.t()) * b).sum(dim=1)
    own = ((b @ (a @ a.t())) * b).sum(dim=1)
    square = weight.square().sum(dim=1) + 2 * cross + own
    return square.clamp_min(torch.finfo(torch.float64).tiny).sqrt().float()
