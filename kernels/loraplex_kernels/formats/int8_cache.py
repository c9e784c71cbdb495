"""A KV cache in codes of eight bits, with a scale for each token of a head.

A value is ``code * scale``. The scale is the token's largest value over 127, in bfloat16 rounded
up, so a value is off by at most half of it: 1/254 of the largest, and 1/128 of that more. The
tensors of keys and values are int8 [n_pages, n_kv_heads, page_size, D + 2]. The block of one
(page, head) holds codes and then the scales [page_size]. Its codes are

    K: [D, page_size]      V: [page_size, D]
"""

from typing import NamedTuple

import torch
from torch import Tensor

_SCALE_BYTES = 2
_LARGEST_CODE = 127


class Codes(NamedTuple):
    """Views of one cache tensor."""

    codes: Tensor  # int8 [n_pages, n_kv_heads, D, page_size] of keys, [.., page_size, D] of values
    scales: Tensor  # bfloat16 [n_pages, n_kv_heads, page_size]


def cache_width(head_dim: int, dtype: torch.dtype) -> int:
    """Return the elements of a token and head in a cache of ``dtype``."""
    return head_dim + _SCALE_BYTES if dtype is torch.int8 else head_dim


def head_dim_of(cache: Tensor) -> int:
    """Return the head size of a cache [n_pages, n_kv_heads, page_size, ...]."""
    return cache.shape[3] - (_SCALE_BYTES if cache.dtype is torch.int8 else 0)


def codes_of(cache: Tensor, *, by_column: bool) -> Codes:
    """Return views of an int8 cache. ``by_column``: of keys."""
    n_pages, n_heads, page_size, _ = cache.shape
    head_dim = head_dim_of(cache)
    blocks = cache.view(n_pages, n_heads, -1)
    codes, scales = blocks[..., : page_size * head_dim], blocks[..., page_size * head_dim :]
    shape = (head_dim, page_size) if by_column else (page_size, head_dim)
    return Codes(codes.view(n_pages, n_heads, *shape), scales.view(torch.bfloat16))


def to_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of ``x`` [..., D] and their scales [...] in bfloat16."""
    wide = x.float()
    bits = (wide.abs().amax(-1) / _LARGEST_CODE).view(torch.int32)
    scales = ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
    scales = scales.where(wide.isfinite().all(-1), torch.nan)
    divisors = scales.where(scales != 0, 1.0).unsqueeze(-1)
    return (wide / divisors).nan_to_num(0.0).round().to(torch.int8), scales.to(torch.bfloat16)
