"""Which positions a model's attention mask shows a query, found by calling the mask function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import UnsupportedBase

__all__ = ["MaskFunction", "window_of"]

# transformers' convention: (batch, head, query, key) indices, broadcast → bool: may be seen
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def window_of(mask_function: MaskFunction, n_positions: int) -> int | None:
    """The sliding window of a causal mask; None if a query sees every position up to its own.

    The mask is evaluated for queries all over the context, so that masks by chunk or by block are
    told from windows. Raises UnsupportedBase for anything but a causal window.
    """
    last = n_positions - 1
    rows = sorted({0, 1, last // 3, last // 2, last // 2 + 1, max(last - 1, 0), last})
    queries = torch.tensor(rows).view(1, 1, -1, 1)
    keys = torch.arange(n_positions).view(1, 1, 1, -1)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    try:
        visible = mask_function(zero, zero, queries, keys)
    except Exception as error:
        raise UnsupportedBase(f"its attention mask cannot be evaluated ({error})") from error
    visible = visible.expand(1, 1, len(rows), n_positions)
    window = int(visible[0, 0, -1].sum())
    expected = (keys <= queries) & (keys > queries - window)
    if window < 1 or not torch.equal(visible, expected):
        raise UnsupportedBase(
            "its attention mask is neither causal nor a causal sliding window (a mask by chunk or "
            "block, or a bidirectional one)"
        )
    return None if window >= n_positions else window
