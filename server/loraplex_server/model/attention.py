"""Paged attention behind transformers' attention interface.

transformers looks the function up by the config's name; what it needs of the step hangs on the
attention module of the instance we own, so that nothing is global but the name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loraplex_kernels.model_ops import paged_attention, write_kv

from .errors import ModelError
from .forward_context import ForwardContext

__all__ = ["LayerAttention", "install_attention"]

_NAME = "loraplex_paged"
_SLOT = "loraplex_attention"


class LayerAttention:
    """Attention of one layer over the paged cache. Set ``keys`` and ``values`` before the run."""

    def __init__(self, step: ForwardContext) -> None:
        self._step = step
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """q [T, n_heads, head_dim], k and v [T, n_kv_heads, head_dim] → [T, n_heads, head_dim]."""
        if self.keys is None or self.values is None:
            raise RuntimeError("the KV cache is not attached")
        step = self._step
        write_kv(k, v, self.keys, self.values, step.slot_mapping)
        out = torch.empty_like(q)
        paged_attention(
            q,
            self.keys,
            self.values,
            step.page_table,
            step.query_starts,
            step.kv_lens,
            scale=scale,
            window=window,
            softcap=softcap,
            out=out,
        )
        return out


def install_attention(model: PreTrainedModel, step: ForwardContext) -> list[LayerAttention]:
    """Puts paged attention into every self-attention of the instance, in layer order.

    Raises ModelError if the model does not go through transformers' attention interface.
    """
    if _NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    layers: dict[int, LayerAttention] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if index is not None and type(module).__name__.endswith("Attention"):
            layers[index] = LayerAttention(step)
            setattr(module, _SLOT, layers[index])
    if sorted(layers) != list(range(len(layers))) or not layers:
        raise ModelError(
            f"{type(model).__name__} has no attention layers that this server knows how to replace"
        )
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation = _NAME
    return [layers[index] for index in range(len(layers))]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' calling convention: [1, heads, T, head_dim] in, [1, T, heads, head_dim] out."""
    layer: LayerAttention = getattr(module, _SLOT)
    q, k, v = (t.squeeze(0).transpose(0, 1).contiguous() for t in (query, key, value))
    out = layer(
        q,
        k,
        v,
        scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out.unsqueeze(0), None
