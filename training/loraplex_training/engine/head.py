"""Log-probabilities of targets, whose gradient needs no logits to be kept."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LOGITS = 1 << 24  # that are in memory at once


@dataclass(frozen=True, slots=True)
class OutputHead:
    """The frozen head of a base: logits = cap(scale · h Wᵀ + bias)."""

    read: Callable[[], Tensor]  # [vocabulary, hidden]
    rest: Callable[[], None]
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None  # logits are cap · tanh(logits / cap)

    def logprobs(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities, float32 [m], of int64 [m] after states [m, hidden].

        The second result, bool [m], is True for targets that are the likeliest token.
        """
        result: tuple[Tensor, Tensor] = _LogProbs.apply(hidden, targets, self)  # type: ignore[no-untyped-call]
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [m, vocabulary], which autograd keeps: for few states."""
        logits = (hidden @ self.read().to(hidden.dtype).t()).float()
        logits = (logits if self.bias is None else logits + self.bias) * self.scale
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()


class _LogProbs(torch.autograd.Function):
    """d logp(t) / dh = s · ((1[t] − p) ⊙ cap′) W is computed in the forward, row by row."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: OutputHead
    ) -> tuple[Tensor, Tensor]:
        weights = head.read().to(hidden.dtype)
        rows = max(1, _LOGITS // len(weights))
        logprobs, slopes, likeliest = [], [], []
        for h, target in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            head.rest()
            logits = (h @ weights.t()).float()
            if head.bias is not None:
                logits += head.bias
            if head.scale != 1.0:
                logits *= head.scale
            if head.cap is not None:
                logits = logits.div_(head.cap).tanh_().mul_(head.cap)
            at = target[:, None]
            logp = logits.gather(1, at) - logits.logsumexp(1, keepdim=True)
            logprobs.append(logp.squeeze(1))
            likeliest.append(logits.argmax(1) == target)
            if not ctx.needs_input_grad[0]:
                continue
            slope = logits.sub(logits.gather(1, at) - logp).exp_().neg_()  # −p
            slope.scatter_add_(1, at, torch.ones_like(logp))
            if head.cap is not None:
                slope *= 1 - (logits / head.cap).square_()
            slopes.append((slope.to(h.dtype) @ weights).mul_(head.scale))
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        hits = torch.cat(likeliest)
        ctx.mark_non_differentiable(hits)
        return torch.cat(logprobs), hits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * grads[0].to(slopes.dtype)[:, None], None, None


def head_settings(config: Any) -> tuple[float, float | None]:
    """Return the scale and the cap of logits of a transformers text config."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"the base scales its logits by {scale}")
    return scale, None if cap is None else float(cap)
