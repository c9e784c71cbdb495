"""The rotary positions of a Llama-like base, as transformers computes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["rotary_of", "rotated"]


def rotary_of(directory: Path) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], int]:
    """The rotary module of the model, and up to which position it is the same in every batch.

    Longer sequences change the angles of all positions where RoPE is "dynamic" or "longrope".
    """
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    longest = int(config.max_position_embeddings)
    if config.rope_parameters["rope_type"] == "longrope":
        longest = int(config.rope_parameters["original_max_position_embeddings"])
    return LlamaRotaryEmbedding(config), longest


def rotated(x: Tensor, cos: Tensor, sin: Tensor, n: int) -> Tensor:
    """`x` [n_tokens, heads, width], the first `n` heads turned by their positions.

    `cos` and `sin` [n_tokens, 1, width], of which both halves are equal.
    """
    half = x.shape[-1] // 2
    y: Tensor = _Rotated.apply(x, cos[..., :half], sin[..., :half], n)  # type: ignore[no-untyped-call]
    return y


class _Rotated(torch.autograd.Function):
    """A rotation: its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.n = n
        return _turned(x, cos, sin, n, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, ctx.n, -1), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, n: int, way: int) -> Tensor:
    half = x.shape[-1] // 2
    y = torch.empty_like(x)
    y[:, n:] = x[:, n:]
    first, second = x[:, :n, :half], x[:, :n, half:]
    torch.mul(first, cos, out=y[:, :n, :half]).addcmul_(second, sin, value=-way)
    torch.mul(second, cos, out=y[:, :n, half:]).addcmul_(first, sin, value=way)
    return y
