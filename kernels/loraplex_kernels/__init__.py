"""Mixed-adapter low-rank kernels: one operator, its reference, a Triton and a native CPU version."""

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
from .reference import lora_apply_reference

__all__ = [
    "NO_PAGE",
    "PAGE_RANK",
    "LoraSegments",
    "LoraTables",
    "LoraTarget",
    "PackedLinear",
    "add_rms_norm",
    "lora_apply_reference",
    "paged_attention",
    "read_kv",
    "rms_norm",
    "rope_and_cache",
    "silu_mul",
    "write_kv",
]
