"""The base model's operators in native code: argument types, and which tensors they take."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .native import library

__all__ = [
    "NativeOps",
    "dtype_code",
    "is_plain",
    "native_ops",
    "takes_cache",
    "takes_heads",
    "takes_norm",
]

_LANES = 16  # widths and sizes of heads come in such steps
_MAX_HEAD_DIM = 256
_CODES = {torch.float32: 0, torch.bfloat16: 1}

_P, _N, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_SIGNATURES = {
    "loraplex_linear": (_N, _P, _N, _P, _P, _P, _N, _N, _N, _N),
    "loraplex_linear_argmax": (_N, _P, _N, _P, _P, _N, _N, _N, _P),
    "loraplex_rms_norm": (_N, _P, _P, _P, _P, _N, _N, _F, _F),
    "loraplex_gate": (_N, _P, _P, _N, _N, _N),
    "loraplex_rope_and_cache": (_N, _P, _P, *(_N,) * 6, _P, _P, _N, _N, *(_P,) * 4, _N),
    "loraplex_route": (_N, _P, _N, _N, _P, _N, _N, _N, _P, _P),
    "loraplex_route_and_group": (_N, _P, _N, _N, _P, _N, _N, _N, *(_P,) * 6),
    "loraplex_mix": (_N, *(_P,) * 4, _N, _N, _N),
    "loraplex_group": (_P, _P, _N, _N, _P, _P, _P),
    "loraplex_paged_attention": (_N, _P, _N, *(_P,) * 3, _N, *(_P,) * 3, *(_N,) * 7, _F, _F),
}


class NativeOps(NamedTuple):
    """The C functions. ``csrc/model_ops.cpp`` names their arguments."""

    linear: Callable[..., None]
    linear_argmax: Callable[..., None]
    rms_norm: Callable[..., None]
    gate: Callable[..., None]
    rope_and_cache: Callable[..., None]
    route: Callable[..., None]
    route_and_group: Callable[..., None]
    mix: Callable[..., None]
    group: Callable[..., None]
    paged_attention: Callable[..., None]


def dtype_code(dtype: torch.dtype) -> int | None:
    """The number that native code knows ``dtype`` by; None if it does not or is not built."""
    return _CODES.get(dtype) if library() is not None else None


@functools.cache
def native_ops(*, keep_gil: bool) -> NativeOps:
    """The operators, for calls that keep Python's lock and for calls that let it go.

    Work of a few microseconds keeps the lock: taking it back from a busy thread costs up to the
    interpreter's switch interval (5 ms), a hundred times per step. Longer work lets it go.
    """
    lib = library()
    assert lib is not None
    held = ctypes.PyDLL(lib._name) if keep_gil else ctypes.CDLL(lib._name)
    functions = []
    for name, arguments in _SIGNATURES.items():
        function = held[name]
        function.argtypes = arguments
        function.restype = None
        functions.append(function)
    return NativeOps(*functions)


def is_plain(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether native code may walk ``x`` as one array of ``dtype``."""
    return x.dtype is dtype and x.is_cpu and x.is_contiguous()


def takes_norm(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether native code norms rows of ``dtype`` with this weight [width]."""
    return is_plain(weight, dtype) and weight.shape[0] % _LANES == 0


def takes_cache(keys: Tensor, values: Tensor, dtype: torch.dtype) -> bool:
    """Whether native code may walk a paged cache of ``dtype``."""
    return is_plain(keys, dtype) and is_plain(values, dtype)


def takes_heads(head_dim: int, page_size: int) -> bool:
    """Whether native attention has such heads and pages."""
    return head_dim % _LANES == 0 and head_dim <= _MAX_HEAD_DIM and page_size % _LANES == 0
