"""Paged attention behind transformers' attention interface.

transformers looks the function up by the config's name. The layer's ``LayerAttention`` is an
attribute of its attention module, so only the name is global.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loraplex_kernels.layers.model_ops import paged_attention, write_kv
from loraplex_kernels.reference.model_ops import block_attention_reference
from loraplex_server.model.tracing.call_recorder import AttentionSpec

from .forward_context import ForwardContext

_NAME = "loraplex_paged"
_SLOT = "loraplex_attention"


class LayerAttention:
    """The attention of one layer over the paged cache. Set ``keys`` and ``values`` first."""

    def __init__(self, spec: AttentionSpec, step: ForwardContext) -> None:
        self.spec = spec
        self._step = step
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map q [T, n_heads, head_dim], k and v [T, n_kv_heads, …] to [T, n_heads, v_head_dim]."""
        if self.keys is None or self.values is None:
            raise RuntimeError("the KV cache is not attached")
        step, spec = self._step, self.spec
        if spec.v_head_dim < spec.head_dim:  # the cache has one width
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
        for block in step.blocks:
            out[block.rows] = block_attention_reference(
                q[block.rows],
                self.keys,
                self.values,
                step.page_table[block.request],
                block.first,
                block.end,
                scale=spec.scale,
                window=spec.window,
                softcap=spec.softcap,
                seen_from=block.seen_from,
            )
        return out[..., : spec.v_head_dim]


def install_attention(
    model: PreTrainedModel,
    decoder: PreTrainedModel,
    attention: Mapping[str, AttentionSpec],
    step: ForwardContext,
) -> list[LayerAttention]:
    """Install paged attention in the attention modules, in the order of ``attention``.

    ``decoder``: the submodule with these modules. Attention outside of it stays as it is.
    """
    if _NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    layers = []
    for name, spec in attention.items():
        layers.append(LayerAttention(spec, step))
        setattr(model.get_submodule(name), _SLOT, layers[-1])
    for module in decoder.modules():
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation = _NAME
    return layers


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Map [1, heads, T, head_dim] to [1, T, heads, head_dim], as transformers calls it.

    Mask, scale and other arguments are those of the trace.
    """
    layer: LayerAttention = getattr(module, _SLOT)
    q, k, v = (t.squeeze(0).transpose(0, 1).contiguous() for t in (query, key, value))
    return layer(q, k, v).unsqueeze(0), None
