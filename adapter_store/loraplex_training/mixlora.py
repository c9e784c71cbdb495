"""A MixLoRA adapter in training: plain LoRA on attention, routed LoRA experts on each MLP.

    p = softmax(W_r h);  w_e = p_e / Σ_{j∈top-k} p_j
    y = W_down Σ_e w_e a_e + s Σ_e w_e B_down^e A_down^e a_e,
    a_e = act(W_gate h + s B_gate^e A_gate^e h) ⊙ (W_up h + s B_up^e A_up^e h)

Modules are put into a model that the caller owns, and taken out again by ``detach``. Dropout obeys
``train()`` and ``eval()`` everywhere, experts included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attached import Attached, fill
from .balance_loss import DEFAULT_COEFFICIENT, BalanceLoss, balance_loss

__all__ = ["MixLora", "MixLoraConfig", "attach"]

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class MixLoraConfig:
    """``balance_coefficient`` None takes the usual one of the chosen loss."""

    r: int = 4
    alpha: float = 8.0
    dropout: float = 0.05
    n_experts: int = 8
    top_k: int = 2
    balance: BalanceLoss = BalanceLoss.POOLED
    balance_coefficient: float | None = None
    router_init_range: float = 0.02

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    @property
    def coefficient(self) -> float:
        own = self.balance_coefficient
        return DEFAULT_COEFFICIENT[self.balance] if own is None else own


class _Factors(nn.Module):
    """s · B A, with A drawn as PEFT draws it and B zero."""

    def __init__(self, in_features: int, out_features: int, config: MixLoraConfig) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(config.r, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, config.r))
        self.scale = config.scale
        self.dropout = nn.Dropout(config.dropout)
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(
            nn.functional.linear(self.dropout(x), self.a), self.b * self.scale
        )


class _AttentionLora(nn.Module):
    def __init__(self, base: nn.Linear, config: MixLoraConfig) -> None:
        super().__init__()
        self.base = base
        self.lora = _Factors(base.in_features, base.out_features, config)

    def forward(self, x: Tensor) -> Tensor:
        delta: Tensor = self.lora(x)
        out: Tensor = self.base(x)
        return out + delta.to(x.dtype)


class _ExpertFactors(nn.Module):
    """The factors of all experts of one projection, applied to each token's own k in one product.

    The rank rows of experts that a token does not use are masked to zero. That multiplies some
    zeros, and needs neither a loop over experts nor a gather, whose gradients are slow.
    """

    def __init__(self, in_features: int, out_features: int, config: MixLoraConfig) -> None:
        super().__init__()
        n, r = config.n_experts, config.r
        self.a = nn.Parameter(torch.empty(n, r, in_features))
        self.b = nn.Parameter(torch.zeros(n, out_features, r))
        self.scale = config.scale
        self.dropout = nn.Dropout(config.dropout)
        for expert in self.a:
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))

    def shrink(self, x: Tensor) -> Tensor:
        """[..., in] → [..., n_experts, r]."""
        y: Tensor = nn.functional.linear(self.dropout(x), self.a.flatten(0, 1))
        return y.view(*y.shape[:-1], *self.a.shape[:2])

    def expand(self, z: Tensor) -> Tensor:
        """[..., n_experts, r] → [..., out], scaled."""
        b = (self.b * self.scale).transpose(1, 2).flatten(0, 1)  # [n_experts · r, out]
        return z.flatten(-2) @ b


class _RoutedMlp(nn.Module):
    def __init__(self, base: nn.Module, config: MixLoraConfig) -> None:
        super().__init__()
        self.base = base
        self.config = config
        gate_proj: nn.Linear = base.gate_proj  # type: ignore[assignment]
        d, ff = gate_proj.in_features, gate_proj.out_features
        self.gate = nn.Parameter(torch.randn(config.n_experts, d) * config.router_init_range)
        self.gate_proj = _ExpertFactors(d, ff, config)
        self.up_proj = _ExpertFactors(d, ff, config)
        self.down_proj = _ExpertFactors(ff, d, config)
        self.logits: Tensor | None = None  # of the last forward, float32 [n_tokens, n_experts]

    def forward(self, hidden: Tensor) -> Tensor:
        base = self.base
        h = hidden.reshape(-1, hidden.shape[-1])  # [n_tokens, hidden]
        with torch.autocast(h.device.type, enabled=False):  # a gate in bfloat16 flips experts
            self.logits = h.float() @ self.gate.float().T
            top = self.logits.topk(self.config.top_k, dim=-1)
            weight = torch.softmax(top.values, dim=-1).unsqueeze(-1)  # [n_tokens, k, 1]
            chosen = nn.functional.one_hot(top.indices, self.config.n_experts)
            mask = chosen.to(h.dtype).unsqueeze(-1)  # [n_tokens, k, n_experts, 1]
        g = self._projected(base.gate_proj, self.gate_proj, h, mask)  # [n_tokens, k, ff]
        u = self._projected(base.up_proj, self.up_proj, h, mask)
        a = base.act_fn(g) * u  # type: ignore[operator]
        weight = weight.to(a.dtype)
        mixed = (weight * a).sum(dim=1)  # before the base product, which is linear
        down = (weight.unsqueeze(-1) * mask * self.down_proj.shrink(a)).sum(dim=1)
        out = base.down_proj(mixed) + self.down_proj.expand(down)  # type: ignore[operator]
        result: Tensor = out.to(hidden.dtype).view_as(hidden)
        return result

    @staticmethod
    def _projected(base: object, factors: _ExpertFactors, h: Tensor, mask: Tensor) -> Tensor:
        """W h + s B_e A_e h for the k experts of each token: [n_tokens, k, ff]."""
        z = factors.shrink(h).unsqueeze(1) * mask
        product: Tensor = base(h)  # type: ignore[operator]
        return product.unsqueeze(1) + factors.expand(z)


def attach(model: nn.Module, config: MixLoraConfig) -> Attached:
    """Freezes ``model`` and puts a new adapter into it."""
    model.requires_grad_(False)
    adapter = MixLora(model, config)
    device = next(model.parameters()).device
    return Attached(model.to(device), adapter)


class MixLora:
    """The adapter inside ``model``, a frozen causal LM of the Llama layout."""

    def __init__(self, model: nn.Module, config: MixLoraConfig) -> None:
        self.config = config
        self._layers = list(model.model.layers)  # type: ignore[union-attr,arg-type]
        for layer in self._layers:
            for name in _ATTENTION:
                base = getattr(layer.self_attn, name)
                setattr(layer.self_attn, name, _AttentionLora(base, config))
            layer.mlp = _RoutedMlp(layer.mlp, config)

    def auxiliary_loss(self, token_mask: Tensor | None = None) -> Tensor:
        """Coefficient times the balance loss of the last forward; mask bool [n_tokens]."""
        logits = [layer.mlp.logits for layer in self._layers]
        loss = balance_loss(
            logits, self.config.balance, top_k=self.config.top_k, token_mask=token_mask
        )
        return self.config.coefficient * loss

    def tensors(self) -> dict[str, Tensor]:
        """The adapter under the published tensor names, as they are (no scale folded)."""
        return {name: tensor.detach() for name, tensor in self._named()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Fills the parameters from ``tensors``; the names must match exactly."""
        fill(dict(self._named()), tensors)

    def adapter_config(self, base_model: str) -> dict[str, object]:
        c = self.config
        return {
            "peft_type": "MIXLORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "bias": "none",
            "r": c.r,
            "lora_alpha": c.alpha,
            "lora_dropout": c.dropout,
            "use_dora": False,
            "use_rslora": False,
            "target_modules": [*_ATTENTION, *_MLP],
            "routing_strategy": "mixlora",
            "num_experts": c.n_experts,
            "top_k": c.top_k,
            "act_fn": "silu",
            "router_aux_loss_coef": c.coefficient,
            "router_init_range": c.router_init_range,
            "jitter_noise": 0.0,
        }

    def detach(self) -> None:
        """Gives the model its own modules back."""
        for layer in self._layers:
            for name in _ATTENTION:
                setattr(layer.self_attn, name, getattr(layer.self_attn, name).base)
            layer.mlp = layer.mlp.base

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for i, layer in enumerate(self._layers):
            prefix = f"mixlora.layers.{i}"
            for name in _ATTENTION:
                factors = getattr(layer.self_attn, name).lora
                yield f"{prefix}.self_attn.{name}.lora_A.weight", factors.a
                yield f"{prefix}.self_attn.{name}.lora_B.weight", factors.b
            yield f"{prefix}.mlp.moe_gate.weight", layer.mlp.gate
            for name in _MLP:
                stacked = getattr(layer.mlp, name)
                for e in range(self.config.n_experts):
                    yield f"{prefix}.mlp.{name}.experts.{e}.lora_A.weight", stacked.a[e]
                    yield f"{prefix}.mlp.{name}.experts.{e}.lora_B.weight", stacked.b[e]
