"""The C functions and their argument types. csrc/**/*.cpp document each argument."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from .native import library

_P, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ROWS = (_P, _N, _P, _N, _N)  # x and its stride, out and its stride, n_rows
_PAIRS = (_P, _N, _P, _N)  # pair_rows, n_pairs, the pairs' tensor and its stride
_GATE = (_N, _P, _N, _N, _P, _N, _N, _N, _P, _P)  # dtype, x, …, gate, …, k, index, weight

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "linear": (_N, _P, _N, _P, _P, _P, _N, _N, _N, _N),
    "linear_argmax": (_N, _P, _N, _P, _P, _N, _N, _N, _P, _N, _P),
    "rms_norm": (_N, _P, _P, _P, _P, _N, _N, _F, _F),
    "gate": (_N, _P, _P, _N, _N, _N),
    "rope_and_cache": (_N, _P, _P, *(_N,) * 6, _P, _P, _N, _N, *(_P,) * 4, _N, _N),
    "paged_attention": (_N, _P, _N, *(_P,) * 3, _N, *(_P,) * 3, *(_N,) * 7, _F, _F, _N),
    "route": _GATE,
    "route_and_group": (*_GATE, *(_P,) * 4),
    "group": (_P, _P, _N, _N, _P, _P, _P),
    "select_allowed": (_P, _P, _N, _P, _P),
    "experts": (_N, _P, *(_N,) * 5, *(_P,) * 5),
    "moe_combine": (_N, *(_P,) * 4, _N, _N, _N),
    "lora_apply": (_P, *_ROWS, _P),  # target first, segments last
    "linear_with_lora": (_P, _P, _P, *_ROWS, _P),  # packed weights and bias behind the target
    "moe_gate_up": (_P, _P, _P, *_ROWS, _P, *_PAIRS),
    "moe_down": (_P, _P, _P, *_ROWS, _P, *_PAIRS),
    "decoder": (_P, _P, _N),
    "encode_rows": (_P, _N, _N, _P),
    "encode_panels": (_P, _N, _N, _P, _P),
    "decode_outputs": (_P, _N, _P, _N, _P),
    "block_panel_bytes": (_N, _N),
    "pack_blocks": (_N, _P, _N, _N, _P),
    "read_blocks": (_P, _N, _P, _N, _P),
}
_RESULTS: dict[str, Any] = {
    **dict.fromkeys(("lora_apply", "linear_with_lora", "moe_gate_up", "moe_down"), ctypes.c_int),
    "decoder": _N,
    "block_panel_bytes": _N,
    "select_allowed": _N,
    "encode_rows": ctypes.c_int,
}


@functools.cache
def bind(name: str, *, keep_gil: bool) -> Callable[..., Any]:
    """Return ``loraplex_<name>`` of the library, which must be loaded.

    ``keep_gil``: keep Python's lock, for work of a few microseconds. Taking the lock back from a
    busy thread may cost the interpreter's switch interval (5 ms), a hundred times a step. Longer
    work releases the lock.
    """
    lib = library()
    assert lib is not None
    function = (ctypes.PyDLL if keep_gil else ctypes.CDLL)(lib._name)["loraplex_" + name]
    function.argtypes = _SIGNATURES[name]
    function.restype = _RESULTS.get(name)
    return function
