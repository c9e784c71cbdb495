"""A MixLoRA adapter in training: plain LoRA on attention, routed LoRA experts on each MLP.

    p = softmax(W_r h);  w_e = p_e / Σ_{j∈top-k} p_j
    y = W_down Σ_e w_e a_e + s Σ_e w_e B_down^e A_down^e a_e,
    a_e = act(W_gate h + s B_gate^e A_gate^e h) ⊙ (W_up h + s B_up^e A_up^e h)

Dropout follows ``train()`` and ``eval()`` everywhere, experts included.
"""

import math
from collections.abc import Iterator, Sequence
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from .attached import AdapterModules
from .config import AdapterShape, ExpertShape

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_ROUTER_INIT = 0.02  # standard deviation of the gate's first weights


class BalanceLoss(Enum):
    """The loss that keeps the experts in use, from the gates' logits of one forward.

    pooled (as in the public code)  N · Σ_e F_e P_e, summed over the k picks; F_e the share of
                                    tokens whose j-th pick is e; logits of all layers pooled.
                                    k at balance.
    argmax (as in the paper)        N · Σ_e F_e P_e with F_e the share of tokens whose best expert
                                    is e; per layer, then averaged. 1 at balance.
    """

    POOLED = "pooled"
    ARGMAX = "argmax"
    NONE = "none"


DEFAULT_COEFFICIENT = {BalanceLoss.POOLED: 1e-3, BalanceLoss.ARGMAX: 1e-2, BalanceLoss.NONE: 0.0}


def balance_loss(
    logits: Sequence[Tensor],  # per layer float32 [n_tokens, n_experts]
    kind: BalanceLoss,
    *,
    top_k: int,
    token_mask: Tensor | None = None,  # bool [n_tokens]; False = padding
) -> Tensor:
    """Return the loss without its coefficient; 0 for NONE."""
    if token_mask is not None:
        logits = [layer[token_mask] for layer in logits]
    if kind is BalanceLoss.NONE:
        return logits[0].new_zeros(())
    if kind is BalanceLoss.POOLED:
        return _product(torch.cat(list(logits)), top_k)
    return torch.stack([_product(layer, 1) for layer in logits]).mean()


def _product(logits: Tensor, n_picks: int) -> Tensor:
    n_experts = logits.shape[-1]
    p = torch.softmax(logits, dim=-1)
    picks = p.topk(n_picks, dim=-1).indices  # [n, n_picks]
    shares = one_hot(picks, n_experts).float().mean(dim=0)  # [n_picks, n_experts]
    return n_experts * (shares * p.mean(dim=0)).sum()


class _Factors(nn.Module):
    """s · B A, with PEFT's initial A and B = 0."""

    def __init__(self, in_features: int, out_features: int, shape: AdapterShape) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(shape.rank, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, shape.rank))
        self.scale = shape.alpha / shape.rank
        self.dropout = nn.Dropout(shape.dropout)
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(
            nn.functional.linear(self.dropout(x), self.a), self.b * self.scale
        )


class _AttentionLora(nn.Module):
    def __init__(self, base: nn.Linear, shape: AdapterShape) -> None:
        super().__init__()
        self.base = base
        self.lora = _Factors(base.in_features, base.out_features, shape)

    def forward(self, x: Tensor) -> Tensor:
        delta: Tensor = self.lora(x)
        out: Tensor = self.base(x)
        return out + delta.to(x.dtype)


class _ExpertFactors(nn.Module):
    """The factors of all experts of one projection, applied in one product.

    The rank rows of experts that a token does not use are masked to zero. This multiplies zeros,
    but needs no loop over experts and no gather, whose gradient is slow.
    """

    def __init__(self, n: int, in_features: int, out_features: int, shape: AdapterShape) -> None:
        """``n``: the number of experts."""
        super().__init__()
        r = shape.rank
        self.a = nn.Parameter(torch.empty(n, r, in_features))
        self.b = nn.Parameter(torch.zeros(n, out_features, r))
        self.scale = shape.alpha / shape.rank
        self.dropout = nn.Dropout(shape.dropout)
        for expert in self.a:
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))

    def shrink(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., n_experts, r]."""
        y: Tensor = nn.functional.linear(self.dropout(x), self.a.flatten(0, 1))
        return y.view(*y.shape[:-1], *self.a.shape[:2])

    def expand(self, z: Tensor) -> Tensor:
        """Map [..., n_experts, r] to [..., out], scaled."""
        b = (self.b * self.scale).transpose(1, 2).flatten(0, 1)  # [n_experts · r, out]
        return z.flatten(-2) @ b


class _RoutedMlp(nn.Module):
    def __init__(self, base: nn.Module, shape: AdapterShape, experts: ExpertShape) -> None:
        super().__init__()
        self.base, self.experts = base, experts
        gate_proj: nn.Linear = base.gate_proj  # type: ignore[assignment]
        d, ff = gate_proj.in_features, gate_proj.out_features
        n = experts.n_experts
        self.gate = nn.Parameter(torch.randn(n, d) * _ROUTER_INIT)
        self.gate_proj = _ExpertFactors(n, d, ff, shape)
        self.up_proj = _ExpertFactors(n, d, ff, shape)
        self.down_proj = _ExpertFactors(n, ff, d, shape)
        self.logits: Tensor | None = None  # of the last forward, float32 [n_tokens, n_experts]

    def forward(self, hidden: Tensor) -> Tensor:
        base = self.base
        h = hidden.reshape(-1, hidden.shape[-1])  # [n_tokens, hidden]
        with torch.autocast(h.device.type, enabled=False):  # a gate in bfloat16 flips experts
            self.logits = h.float() @ self.gate.float().T
            top = self.logits.topk(self.experts.top_k, dim=-1)
            weight = torch.softmax(top.values, dim=-1).unsqueeze(-1)  # [n_tokens, k, 1]
            chosen = one_hot(top.indices, self.experts.n_experts)
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
        """Return W h + s B_e A_e h for the k experts of each token, [n_tokens, k, ff]."""
        z = factors.shrink(h).unsqueeze(1) * mask
        product: Tensor = base(h)  # type: ignore[operator]
        return product.unsqueeze(1) + factors.expand(z)


class MixLora(AdapterModules):
    """The adapter inside ``model``, a causal LM of the Llama layout."""

    def __init__(self, model: nn.Module, shape: AdapterShape) -> None:
        self._shape, self._experts = shape, shape.experts or ExpertShape()
        self._balance = BalanceLoss(self._experts.balance)
        own = self._experts.balance_coefficient
        self._coefficient = DEFAULT_COEFFICIENT[self._balance] if own is None else own
        self._layers = list(model.model.layers)  # type: ignore[union-attr,arg-type]
        for layer in self._layers:
            for name in _ATTENTION:
                base = getattr(layer.self_attn, name)
                setattr(layer.self_attn, name, _AttentionLora(base, shape))
            layer.mlp = _RoutedMlp(layer.mlp, shape, self._experts)

    def auxiliary_loss(self, token_mask: Tensor | None) -> Tensor:
        """Return the weighted balance loss of the last forward; mask bool [n_tokens]."""
        logits = [layer.mlp.logits for layer in self._layers]
        loss = balance_loss(logits, self._balance, top_k=self._experts.top_k, token_mask=token_mask)
        return self._coefficient * loss

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for i, layer in enumerate(self._layers):
            prefix = f"mixlora.layers.{i}"
            for name in _ATTENTION:
                factors = getattr(layer.self_attn, name).lora
                yield f"{prefix}.self_attn.{name}.lora_A.weight", factors.a
                yield f"{prefix}.self_attn.{name}.lora_B.weight", factors.b
            yield f"{prefix}.mlp.moe_gate.weight", layer.mlp.gate
            for name in _MLP:
                stacked = getattr(layer.mlp, name)
                for e in range(self._experts.n_experts):
                    yield f"{prefix}.mlp.{name}.experts.{e}.lora_A.weight", stacked.a[e]
                    yield f"{prefix}.mlp.{name}.experts.{e}.lora_B.weight", stacked.b[e]

    def adapter_config(self, base_model: str) -> dict[str, object]:
        return {
            "peft_type": "MIXLORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "bias": "none",
            "r": self._shape.rank,
            "lora_alpha": self._shape.alpha,
            "lora_dropout": self._shape.dropout,
            "use_dora": False,
            "use_rslora": False,
            "target_modules": [*_ATTENTION, *_MLP],
            "routing_strategy": "mixlora",
            "num_experts": self._experts.n_experts,
            "top_k": self._experts.top_k,
            "act_fn": "silu",
            "router_aux_loss_coef": self._coefficient,
            "router_init_range": _ROUTER_INIT,
            "jitter_noise": 0.0,
        }
