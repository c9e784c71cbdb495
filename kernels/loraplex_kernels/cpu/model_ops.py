"""The base model's operators in native code, and checks of the tensors that they accept."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_kernels.formats.int8_cache import head_dim_of

from .functions import bind
from .native import library

_LANES = 16  # widths and head sizes must be multiples
_MAX_HEAD_DIM = 256
_CODES = {torch.float32: 0, torch.bfloat16: 1}


class NativeOps(NamedTuple):
    """The C functions. ``csrc/layers/model_ops.cpp`` documents their arguments."""

    linear: Callable[..., None]
    linear_argmax: Callable[..., None]
    rms_norm: Callable[..., None]
    gate: Callable[..., None]
    rope_and_cache: Callable[..., None]
    route: Callable[..., None]
    route_and_group: Callable[..., None]
    moe_combine: Callable[..., None]
    experts: Callable[..., None]
    group: Callable[..., None]
    select_allowed: Callable[..., int]
    paged_attention: Callable[..., None]


def dtype_code(dtype: torch.dtype) -> int | None:
    """Return native code's number for ``dtype``; None if it has none or is not built."""
    return _CODES.get(dtype) if library() is not None else None


@functools.cache
def native_ops(*, keep_gil: bool) -> NativeOps:
    """Return the operators, bound to keep or to release Python's lock (see ``bind``)."""
    return NativeOps(**{name: bind(name, keep_gil=keep_gil) for name in NativeOps._fields})


def is_plain(x: Tensor, dtype: torch.dtype) -> bool:
    """Return True if native code may read ``x`` as one array of ``dtype``."""
    return x.dtype is dtype and x.is_cpu and x.is_contiguous()


def takes_norm(weight: Tensor, dtype: torch.dtype) -> bool:
    """Return True if native code can norm rows of ``dtype`` with this weight [width]."""
    return is_plain(weight, dtype) and weight.shape[0] % _LANES == 0


def takes_cache(keys: Tensor, values: Tensor, dtype: torch.dtype) -> bool:
    """Return True if native code may read a paged cache of ``dtype`` or of int8 beside it."""
    if keys.dtype is torch.int8 and dtype_code(dtype) is not None:
        dtype = torch.int8
        if not takes_heads(head_dim_of(keys), keys.shape[2]):
            return False
    return is_plain(keys, dtype) and is_plain(values, dtype)


def takes_heads(head_dim: int, page_size: int) -> bool:
    """Return True if native attention supports these sizes of heads and pages."""
    return head_dim % _LANES == 0 and head_dim <= _MAX_HEAD_DIM and page_size % _LANES == 0
