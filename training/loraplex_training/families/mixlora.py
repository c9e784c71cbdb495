"""MixLoRA (Li et al. 2024, arXiv 2404.15159): plain LoRA on attention, routed LoRA experts on
each MLP, and a loss that keeps the experts in use. ``engine.routed_experts`` has the formula.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from loraplex_training.config import AdapterShape, ExpertShape
from loraplex_training.engine.adapter import LearningAdapter
from loraplex_training.engine.routed_experts import PROJECTIONS, Experts
from loraplex_training.errors import TrainingError

from .decoder_start import DecoderStart

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_ROUTER_INIT = 0.02  # standard deviation of the router's first weights


class BalanceLoss(Enum):
    """The loss that keeps the experts in use, from the routers' logits of one forward.

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
) -> Tensor:
    """Return the loss without its coefficient; 0 for NONE."""
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


class MixLora(LearningAdapter):
    """A MixLoRA. The balance loss counts each token of a batch once, shared heads too."""

    def __init__(self, start: DecoderStart, shape: AdapterShape) -> None:
        """Raises TrainingError for a base whose MLPs or attention have another layout."""
        own = shape.experts or ExpertShape()
        self._options, self._balance = own, BalanceLoss(own.balance)
        default = DEFAULT_COEFFICIENT[self._balance]
        self._coefficient = default if own.balance_coefficient is None else own.balance_coefficient
        self._act_fn = start.model.activation
        attention = replace(start, shape=replace(start.shape, targets=_ATTENTION)).fresh()
        super().__init__(attention.shape, attention.factors, start.seed)
        self._experts = {
            name: _experts(start, name, own, i) for i, name in enumerate(start.model.mlps)
        }
        if len(self._experts) != start.model.n_layers:
            raise TrainingError(
                "MixLoRA needs a base whose MLPs all have gate_proj, up_proj and down_proj; this "
                "base has others"
            )
        self.parameters = dict(self._stacked())

    @property
    def experts(self) -> Mapping[str, Experts]:
        return self._experts

    def router_penalty(self, logits: Sequence[Tensor]) -> Tensor | None:
        if self._balance is BalanceLoss.NONE:
            return None
        return self._coefficient * balance_loss(logits, self._balance, top_k=self._options.top_k)

    def named_tensors(self) -> Mapping[str, Tensor]:
        tensors = {}
        for name, tensor in self._stacked():
            projection, _, leaf = name.rpartition(".experts.")
            if not projection:
                tensors[name] = tensor
                continue
            for e, own in enumerate(tensor.unbind()):
                tensors[f"{projection}.experts.{e}.{leaf}"] = own
        return tensors

    def peft_config(self, base_name: str) -> dict[str, object]:
        return {
            "peft_type": "MIXLORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "bias": "none",
            "r": self.shape.rank,
            "lora_alpha": self.shape.alpha,
            "lora_dropout": self.shape.dropout,
            "use_dora": False,
            "use_rslora": False,
            "target_modules": [*_ATTENTION, *PROJECTIONS],
            "routing_strategy": "mixlora",
            "num_experts": self._options.n_experts,
            "top_k": self._options.top_k,
            "act_fn": self._act_fn,
            "router_aux_loss_coef": self._coefficient,
            "router_init_range": _ROUTER_INIT,
            "jitter_noise": 0.0,
        }

    def _stacked(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the trained tensors, those of all experts of a projection in one."""
        for name, (a, b) in self.factors.items():
            yield f"{_file_name(name)}.lora_A.weight", a
            yield f"{_file_name(name)}.lora_B.weight", b
        for name, experts in self._experts.items():
            yield f"{_file_name(name)}.moe_gate.weight", experts.router
            for projection, (a, b) in experts.factors.items():
                yield f"{_file_name(name)}.{projection}.experts.lora_A.weight", a
                yield f"{_file_name(name)}.{projection}.experts.lora_B.weight", b


def _file_name(name: str) -> str:
    """Return the name of a module in MixLoRA's files."""
    return f"mixlora.{name.removeprefix('model.')}"


def _experts(start: DecoderStart, name: str, options: ExpertShape, index: int) -> Experts:
    model, rank, n = start.model, start.shape.rank, options.n_experts
    random = torch.Generator().manual_seed((start.seed << 16) + index + 1)
    factors = {}
    for projection in PROJECTIONS:
        n_in, n_out = model.linears[f"{name}.{projection}"]
        a = torch.empty(n, rank, n_in).uniform_(-1, 1, generator=random) / math.sqrt(n_in)
        factors[projection] = (
            _learnt(a, model.device),
            _learnt(torch.zeros(n, n_out, rank), model.device),
        )
    hidden = model.linears[f"{name}.gate_proj"][0]
    router = torch.randn(n, hidden, generator=random) * _ROUTER_INIT
    return Experts(_learnt(router, model.device), factors, start.shape.scale, options.top_k)


def _learnt(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device).requires_grad_()
