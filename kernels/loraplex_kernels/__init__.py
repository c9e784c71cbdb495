"""Mixed-adapter low-rank kernels: one operator, its reference, a Triton and a native CPU version."""

from .layout import NO_PAGE, PAGE_RANK, LoraSegments, LoraTables, LoraTarget
from .reference import lora_apply_reference

__all__ = [
    "NO_PAGE",
    "PAGE_RANK",
    "LoraSegments",
    "LoraTables",
    "LoraTarget",
    "lora_apply_reference",
]
