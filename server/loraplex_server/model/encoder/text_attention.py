"""Attention over a packed batch: each row sees the rows of its own text or image.

transformers looks the function up by the config's name, as it does for paged attention. Texts of
one length are computed together, so nothing is padded.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loraplex_server.model.layers.forward_context import ForwardContext

_NAME = "loraplex_texts"
_SLOT = "loraplex_step"


def install_text_attention(model: PreTrainedModel, step: ForwardContext) -> None:
    """Make all attention modules of ``model`` attend within ``step.texts``."""
    if _NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation = _NAME
            setattr(module, _SLOT, step)


def text_groups(lengths: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
    """Return ``ForwardContext.texts`` of texts of these lengths that follow each other."""
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    return tuple(
        (starts[sizes == length].unsqueeze(1) + torch.arange(length)).to(device)
        for length in sorted(set(lengths))
    )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """Map [1, heads, T, head_dim] to [1, T, heads, head_dim], as transformers calls it.

    ``sliding_window``: a row sees rows less than this far away, on both sides. ``is_causal``: a
    row sees no later rows, as in CLIP's texts.
    """
    step: ForwardContext = getattr(module, _SLOT)
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))  # [T, heads, head_dim]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for rows in step.texts:
        queries, keys, values = (t[rows].transpose(1, 2) for t in (q, k, v))
        out[rows] = functional.scaled_dot_product_attention(  # [n, heads, length, head_dim]
            queries,
            keys,
            values,
            attn_mask=_band(rows, sliding_window),
            scale=scaling,
            is_causal=bool(is_causal),
        ).transpose(1, 2)
    return out.unsqueeze(0), None


def _band(rows: Tensor, window: int | None) -> Tensor | None:
    """Return the mask [length, length] of a sliding window; None if every row sees all others."""
    length = rows.shape[1]
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=rows.device)
    return (at.unsqueeze(0) - at.unsqueeze(1)).abs() < window
