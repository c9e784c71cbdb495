"""ABMLL: a Gaussian posterior over LoRA entries; its mean is a plain LoRA, its draws are others.

    mean:   A = μ_A, B = μ_B        draw:  A = μ_A + σ_A ⊙ ε, B = μ_B + σ_B ⊙ ε

``lora_A.weight``/``lora_B.weight`` are the means, ``lora_A.log_std``/``lora_B.log_std`` the spread
per entry. Served as it is: the mean. ``draws`` turns it into S ordinary LoRAs, to be added as S
adapters whose logits a client averages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from loraplex_adapter_store.plan import Family, ModulePlan
from loraplex_adapter_store.tensor_names import group_by_module

from .contract import Fold, ReadContext
from .coverage import check_coverage, require_parts
from .scaling import lora_scale, scale_rule

__all__ = ["draws", "read"]

_A, _B, _A_STD, _B_STD = "lora_A.weight", "lora_B.weight", "lora_A.log_std", "lora_B.log_std"


def read(context: ReadContext) -> Fold:
    grouped = group_by_module(context.ledger.names, (_A, _B, _A_STD, _B_STD), context.base)
    check_coverage(context, grouped)
    modules: dict[str, ModulePlan] = {}
    for module, parts in grouped.items():
        require_parts(module, parts, (_A, _B))
        shape = context.base.modules[module]
        rank, scale = lora_scale(context.config, module)
        a = context.ledger.take(parts[_A], (rank, shape.in_features))
        b = context.ledger.take(parts[_B], (shape.out_features, rank))
        for spread, mean in ((_A_STD, _A), (_B_STD, _B)):
            if spread in parts:
                context.ledger.expect(parts[spread], context.ledger.shape(parts[mean]))
                context.ledger.claim(parts[spread])
        modules[module] = ModulePlan(a=a, b=b * scale)
    context.notes.append("posterior mean; add draws of it as adapters of their own for uncertainty")
    return Fold(Family.ABMLL, f"{scale_rule(context.config)}, posterior mean", modules=modules)


def draws(
    config: Mapping[str, object], tensors: Mapping[str, Tensor], n_draws: int, seed: int
) -> Iterator[tuple[dict[str, object], dict[str, Tensor]]]:
    """``n_draws`` plain LoRA configs and tensors, drawn from the posterior; repeatable by seed."""
    generator = torch.Generator().manual_seed(seed)
    means = {name: t for name, t in tensors.items() if not name.endswith(".log_std")}
    for _ in range(n_draws):
        drawn = {}
        for name, mean in means.items():
            spread = tensors.get(name.removesuffix(".weight") + ".log_std")
            noise = torch.randn(mean.shape, generator=generator)
            drawn[name] = mean if spread is None else mean + spread.float().exp() * noise
        yield {**config, "peft_type": "LORA"}, drawn
