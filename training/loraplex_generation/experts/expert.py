"""Experts: plain LoRAs of one form, their inner products, and their weighted sums.

    ΔW = Σ w_k ΔW_k = Σ w_k B_k A_k,   A = [A_1; A_2; …],   B = [w_1 B_1, w_2 B_2, …]

Sums are of ΔW, as PEFT's ``add_weighted_adapter(combination_type="cat")``. A sum of the factors
would be wrong, because adapters that were trained apart have factors in bases of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_adapter_store.plan import AdapterPlan, ModulePlan
from loraplex_generation.errors import UnfitExpert

_IGNORED = frozenset({"digest", "family", "modules", "n_bytes", "chat_template", "pooling"})
Form = tuple[tuple[str, int, int, int], ...]  # module, out_features, rank, in_features


class Factors(NamedTuple):
    a: Tensor  # float32 [rank, in_features]
    b: Tensor  # float32 [out_features, rank], the scale folded in


@dataclass(frozen=True, slots=True)
class Expert:
    """An adapter that a library mixes."""

    name: str
    description: str
    factors: Mapping[str, Factors]  # by module of the base, "model.layers.0.self_attn.q_proj"
    prompts: tuple[str, ...] = ()  # unlabelled inputs of the task

    @classmethod
    def of_plan(
        cls, name: str, description: str, plan: AdapterPlan, prompts: Sequence[str] = ()
    ) -> "Expert":
        """Raises UnfitExpert unless the plan is factors of one rank and nothing else."""
        others = [f.name for f in fields(plan) if f.name not in _IGNORED and getattr(plan, f.name)]
        if others or not all(_is_plain(module) for module in plan.modules.values()):
            raise UnfitExpert(f"adapter {name!r} ({plan.family}) is more than a plain LoRA")
        factors = {path: Factors(m.a, m.b) for path, m in sorted(plan.modules.items())}  # type: ignore[arg-type]
        if len({len(a) for a, _ in factors.values()}) != 1:
            raise UnfitExpert(f"adapter {name!r} has modules of several ranks")
        return cls(name, description, factors, tuple(prompts))

    @property
    def form(self) -> Form:
        """The modules and sizes. Only experts of one form are mixed, as in the paper."""
        return tuple((path, len(b), *a.shape) for path, (a, b) in self.factors.items())


def gram_of(experts: Sequence[Expert]) -> Tensor:
    """Return the inner products ⟨ΔW_k, ΔW_l⟩ of experts of one form, float64 [n, n]."""
    n = len(experts)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for path, (a, _) in experts[0].factors.items():
        rank = len(a)
        left = torch.cat([expert.factors[path].a for expert in experts])
        right = torch.cat([expert.factors[path].b.t() for expert in experts])
        products = (left @ left.t()) * (right @ right.t())
        gram += products.view(n, rank, n, rank).sum((1, 3)).double()
    return gram


def weighted_sum(
    experts: Sequence[Expert],
    weights: Sequence[float],
    base_name: str,
    task_type: str | None = "CAUSAL_LM",
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Return Σ w_k ΔW_k as a PEFT LoRA (config, tensors), of the sum of the experts' ranks."""
    tensors: dict[str, Tensor] = {}
    for path in experts[0].factors:
        parts = [expert.factors[path] for expert in experts]
        stem = f"base_model.model.{path}"
        tensors[f"{stem}.lora_A.weight"] = torch.cat([a for a, _ in parts])
        scaled = [w * b for (_, b), w in zip(parts, weights, strict=True)]
        tensors[f"{stem}.lora_B.weight"] = torch.cat(scaled, 1).contiguous()
    rank = sum(form[0][2] for form in (expert.form for expert in experts))
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(experts[0].factors),
        "inference_mode": True,
    }
    return config, tensors


class Span(NamedTuple):
    """The space of the experts' weighted sums, with coordinates that keep distances of ΔW."""

    points: Tensor  # float32 [n_experts, n_points]: the experts; mean 0, mean square 1
    weights: Tensor  # float32 [n_points, n_experts]: a point t is the sum with 1/n + t @ weights

    @classmethod
    def of_gram(cls, gram: Tensor) -> "Span":
        """Raises UnfitExpert if all experts are equal."""
        n = len(gram)
        centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
        values, vectors = torch.linalg.eigh(centred)
        kept = values > 1e-6 * gram.diagonal().mean()
        if not kept.any():
            raise UnfitExpert(f"the {n} adapters are equal; nothing can be learnt from them")
        lengths, vectors = values[kept].sqrt(), vectors[:, kept]
        scale = (lengths.square().sum() / (n * len(lengths))).sqrt()
        weights = vectors.t() / lengths[:, None] * scale
        return cls((vectors * lengths / scale).float(), weights.float())

    def weights_of(self, point: Tensor) -> Tensor:
        """Return the weights [n_experts], which sum to one, of a point [n_points]."""
        return 1 / len(self.points) + point @ self.weights


def fewest(weights: Tensor, gram: Tensor, n_most: int) -> tuple[list[int], list[float]]:
    """Return at most ``n_most`` experts and the weights whose ΔW is nearest to the full sum."""
    strength = weights.double().abs() * gram.diagonal().sqrt()
    kept = strength.topk(min(n_most, len(weights))).indices
    if len(kept) == len(weights):
        return kept.tolist(), weights[kept].tolist()
    solved = torch.linalg.lstsq(gram[kept][:, kept], (gram[kept] @ weights.double())[:, None])
    return kept.tolist(), solved.solution[:, 0].tolist()


def _is_plain(module: ModulePlan) -> bool:
    others = (f.name for f in fields(module) if f.name not in ("a", "b"))
    return module.a is not None and all(getattr(module, name) is None for name in others)
