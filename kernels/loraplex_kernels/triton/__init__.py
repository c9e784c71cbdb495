"""Triton kernels of the LoRA operator, of a base's step and of sampling. Importing needs no GPU."""

from .attention import AttentionWorkspace, attention_workspace, max_head_dim, paged_attention_triton
from .input_scales import scale_inputs_of_each_triton, scale_inputs_triton
from .kv_cache import rope_and_cache_triton, write_kv_triton
from .lora import linear_with_lora_triton, lora_apply_triton
from .matmul import matmul_triton
from .moe import (
    add_pairs_triton,
    gate_pairs_triton,
    mix_pairs_triton,
    segments_of_pairs,
    sum_pairs_triton,
)
from .quantized_linear import quantized_linear_triton
from .rms_norm import norm_heads_triton, rms_norm_triton
from .router import route_by_slot_triton
from .routing import (
    DeviceSegments,
    allocate_segments,
    build_device_segments,
    fill_device_segments,
    route_segments,
)
from .sampling import sample_tokens_triton
from .silu_mul import silu_mul_triton

__all__ = [
    "AttentionWorkspace",
    "DeviceSegments",
    "add_pairs_triton",
    "allocate_segments",
    "attention_workspace",
    "build_device_segments",
    "fill_device_segments",
    "gate_pairs_triton",
    "linear_with_lora_triton",
    "lora_apply_triton",
    "matmul_triton",
    "max_head_dim",
    "mix_pairs_triton",
    "norm_heads_triton",
    "paged_attention_triton",
    "quantized_linear_triton",
    "rms_norm_triton",
    "rope_and_cache_triton",
    "route_by_slot_triton",
    "route_segments",
    "sample_tokens_triton",
    "scale_inputs_of_each_triton",
    "scale_inputs_triton",
    "segments_of_pairs",
    "silu_mul_triton",
    "sum_pairs_triton",
    "write_kv_triton",
]
