"""Paged attention behind transformers' attention interface.

transformers looks the function up by the config's name; what it needs of the step hangs on the
attention module of the instance we own, so that nothing is global but the name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loraplex_kernels.model_ops import paged_attention, write_kv

from .call_recorder import AttentionSpec
from .forward_context import ForwardContext

__all__ = ["LayerAttention", "install_attention"]

_NAME = "loraplex_paged"
_SLOT = "loraplex_attention"


class LayerAttention:
    """Attention of one layer over the paged cache. Set ``keys`` and ``values`` before the run."""

    def __init__(self, spec: AttentionSpec, step: ForwardContext) -> None:
        self.spec = spec
        self._step = step
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, n_heads, head_dim], k and v [T, n_kv_heads, …] → [T, n_heads, v_head_dim]."""
        if self.keys is None or self.values is None:
            raise RuntimeError("the KV cache is not attached")
        step, spec = self._step, self.spec
        if spec.v_head_dim < spec.head_dim:  # the cache has one width for keys and values
            v = functional.pad(v, (0, spec.head_dim - spec.v_head_dim))
        write_kv(k, v, self.keys, self.values, step.slot_mapping)
        out = torch.empty_like(q)
        paged_attention(
            q,
            self.keys,
            self.values,
            step.page_table,
            step.query_starts,
            step.kv_lens,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            sinks=spec.sinks,
            out=out,
            planned=step.planned_attention,
            batch_invariant=step.batch_invariant,
        )
        return out[..., : spec.v_head_dim]


def install_attention(
    model: PreTrainedModel, attention: Mapping[str, AttentionSpec], step: ForwardContext
) -> list[LayerAttention]:
    """Puts paged attention into the attention modules of the instance, in the order given."""
    if _NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    layers = []
    for name, spec in attention.items():
        layers.append(LayerAttention(spec, step))
        setattr(model.get_submodule(name), _SLOT, layers[-1])
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation = _NAME
    return layers


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """transformers' calling convention: [1, heads, T, head_dim] in, [1, T, heads, head_dim] out.

    Mask, scale and so on are those that the layer was traced with.
    """
    layer: LayerAttention = getattr(module, _SLOT)
    q, k, v = (t.squeeze(0).transpose(0, 1).contiguous() for t in (query, key, value))
    return layer(q, k, v).unsqueeze(0), None
