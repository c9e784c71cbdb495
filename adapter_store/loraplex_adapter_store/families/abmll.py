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

from .contract import Fold, ReadContext
from .extras import fold_with_extras
from .module_groups import linear_groups
from .scaling import lora_scale, scale_rule

__all__ = ["draws", "read"]

_A, _B, _A_STD, _B_STD = "lora_A.weight", "lora_B.weight", "lora_A.log_std", "lora_B.log_std"


def read(context: ReadContext) -> Fold:
    modules: dict[str, ModulePlan] = {}
    for module, group in linear_groups(context, (_A, _B), (_A_STD, _B_STD)).items():
        rank, scale = lora_scale(context.config, module)
        group.rank(_A)
        a = group.take(_A, rank, group.in_features)
        b = group.take(_B, group.out_features, rank)
        for spread, mean in ((_A_STD, a), (_B_STD, b)):
            if spread in group:
                group.take(spread, *mean.shape)
        modules[module] = ModulePlan(a=a, b=b * scale)
    context.notes.append("posterior mean; add draws of it as adapters of their own for uncertainty")
    rule = f"{scale_rule(context.config)}, posterior mean"
    return fold_with_extras(context, Family.ABMLL, rule, modules)


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
