"""Mixed-adapter low-rank kernels: one operator, its reference, Triton and native CPU versions."""

from .errors import BadFactors, KernelsError, PoolFull
from .factors import AdapterFactors, SliceFactors
from .layout import NO_PAGE, PAGE_RANK, LoraSegments, LoraTables, LoraTarget
from .model_ops import (
    PackedLinear,
    add_rms_norm,
    paged_attention,
    read_kv,
    rms_norm,
    rope_and_cache,
    silu_mul,
    write_kv,
)
from .ops import PreparedTarget, lora_apply
from .packed_factors import PackedFactors
from .pool import LoraPool
from .reference import lora_apply_reference
from .segments import build_segments, expand_routed

__all__ = [
    "NO_PAGE",
    "PAGE_RANK",
    "AdapterFactors",
    "BadFactors",
    "KernelsError",
    "LoraPool",
    "LoraSegments",
    "LoraTables",
    "LoraTarget",
    "PackedFactors",
    "PackedLinear",
    "PoolFull",
    "PreparedTarget",
    "SliceFactors",
    "add_rms_norm",
    "build_segments",
    "expand_routed",
    "lora_apply",
    "lora_apply_reference",
    "paged_attention",
    "read_kv",
    "rms_norm",
    "rope_and_cache",
    "silu_mul",
    "write_kv",
]
