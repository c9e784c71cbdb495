"""The operators of a base model's step, each in its fastest version for the tensors it is given."""

from __future__ import annotations

from .model_ops_reference import (
    add_rms_norm_reference as add_rms_norm,
)
from .model_ops_reference import (
    paged_attention_reference as paged_attention,
)
from .model_ops_reference import (
    read_kv,
)
from .model_ops_reference import (
    rms_norm_reference as rms_norm,
)
from .model_ops_reference import (
    rope_and_cache_reference as rope_and_cache,
)
from .model_ops_reference import (
    silu_mul_reference as silu_mul,
)
from .model_ops_reference import (
    write_kv_reference as write_kv,
)
from .packed_linear import PackedLinear

__all__ = [
    "PackedLinear",
    "add_rms_norm",
    "paged_attention",
    "read_kv",
    "rms_norm",
    "rope_and_cache",
    "silu_mul",
    "write_kv",
]
