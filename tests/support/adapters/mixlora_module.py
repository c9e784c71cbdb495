"""MixLoRA written out from the paper's formulas on transformers' Llama, for autograd.

Nothing here is shared with the trainer: a loop over experts, dense softmaxes, one sequence.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel


class MixLoraModule:
    """A MixLoRA inside ``model``, with the tensors of its file as leaves."""

    def __init__(
        self, model: PreTrainedModel, tensors: Mapping[str, Tensor], scale: float, top_k: int
    ) -> None:
        self.leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
        self.logits: list[Tensor] = []  # of each layer's router, of the last forward
        self._scale, self._top_k = scale, top_k
        for i, layer in enumerate(model.model.layers):
            prefix = f"mixlora.layers.{i}"
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                change = self._change(f"{prefix}.self_attn.{name}")
                getattr(layer.self_attn, name).register_forward_hook(change)
            layer.mlp.forward = partial(self._mlp, layer.mlp, f"{prefix}.mlp")

    def _change(self, name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        return lambda module, inputs, output: output + self._delta(name, inputs[0])

    def _delta(self, name: str, x: Tensor, expert: str = "") -> Tensor:
        a, b = (self.leaves[f"{name}{expert}.lora_{leaf}.weight"] for leaf in "AB")
        return self._scale * linear(linear(x, a), b)

    def _mlp(self, base: nn.Module, name: str, hidden: Tensor) -> Tensor:
        h = hidden[0]
        logits = linear(h, self.leaves[f"{name}.moe_gate.weight"])
        self.logits.append(logits)
        p = logits.softmax(-1)
        top = p.topk(self._top_k).indices
        weights = torch.zeros_like(p).scatter(1, top, p.gather(1, top))
        weights = weights / weights.sum(1, keepdim=True)
        out = torch.zeros_like(h)
        for e in range(p.shape[1]):

            def projected(projection: str, x: Tensor, expert: str = f".experts.{e}") -> Tensor:
                delta = self._delta(f"{name}.{projection}", x, expert)
                return getattr(base, projection)(x) + delta

            act = base.act_fn(projected("gate_proj", h)) * projected("up_proj", h)
            out = out + weights[:, e : e + 1] * projected("down_proj", act)
        return out[None]
