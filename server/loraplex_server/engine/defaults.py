"""Defaults that differ between CPUs and GPUs."""

import math
import os
from typing import NamedTuple

import torch

from loraplex_server.model.base_model import BaseModel

from .config import EngineConfig

_GIB = 1 << 30
_HOST_TIER_BYTES = 2 * _GIB
_HOST_TIER_SHARE = 0.25  # of the host's free memory, which a GPU's base does not need
_MAX_HOST_TIER_BYTES = 64 * _GIB


class StepLimits(NamedTuple):
    max_batch_size: int  # requests
    max_step_tokens: int
    max_loras: int  # slots on the device
    max_gap_s: float = math.inf  # estimated, between tokens of a row beside prompts


_OF_A_CPU = StepLimits(64, 128, 64, 0.08)  # with estimates that err by 20 %: gaps of 0.1 s
_OF_A_GPU = StepLimits(256, 2048, 512)
_ENCODER_ON_A_CPU = StepLimits(64, 1024, 64)
_ENCODER_ON_A_GPU = StepLimits(256, 16384, 512)


def step_limits(config: EngineConfig, device: torch.device) -> StepLimits:
    """Return the limits of the config, and the device's defaults where the config has none.

    On a CPU small chunks cost no more per token, and every decoding request waits for a chunk. A
    GPU reads its weights once for 2,048 tokens as for one. A routed adapter takes a slot for each
    expert; a slot costs a GPU about 20 KB.
    """
    return _limits(config, _OF_A_CPU if device.type == "cpu" else _OF_A_GPU)


def encoder_limits(config: EngineConfig, device: torch.device) -> StepLimits:
    """Return the limits of an encoder's steps, which no decoding request waits for."""
    return _limits(config, _ENCODER_ON_A_CPU if device.type == "cpu" else _ENCODER_ON_A_GPU)


def _limits(config: EngineConfig, own: StepLimits) -> StepLimits:
    return StepLimits(
        config.max_batch_size or own.max_batch_size,
        config.max_step_tokens or own.max_step_tokens,
        config.max_loras or own.max_loras,
        own.max_gap_s,
    )


def kv_dtype(config: EngineConfig, model: BaseModel) -> torch.dtype:
    """Return the dtype of the KV cache. Raises ValueError where the option is not served."""
    if config.kv_cache_dtype == "auto":
        own: torch.dtype = model.dtype
        return own
    if config.kv_cache_dtype == "int8":
        if model.device.type != "cpu" or model.shard is not None:
            raise ValueError(
                "--kv-cache-dtype int8 needs a CPU and one process; this base is on "
                f"{'several devices' if model.shard is not None else model.device}; leave it out, "
                "or take fp8 on one GPU"
            )
        return torch.int8
    if model.device.type == "cpu" or model.dtype.itemsize != 2 or model.shard is not None:
        raise ValueError(
            f"--kv-cache-dtype {config.kv_cache_dtype} needs one GPU and a base in 16 bits; this "
            f"base is in {str(model.dtype).removeprefix('torch.')} on "
            f"{'several devices' if model.shard is not None else model.device}; leave it out, or "
            "take int8 on a CPU"
        )
    return torch.float8_e4m3fn


def host_tier_bytes(device: torch.device) -> int:
    """Return the bytes for packed adapters in host memory.

    They are 2 GiB, and with a GPU a quarter of the free memory if that is more.
    """
    if device.type == "cpu":
        return _HOST_TIER_BYTES
    wanted = int(_free_host_bytes() * _HOST_TIER_SHARE)
    return min(max(wanted, _HOST_TIER_BYTES), _MAX_HOST_TIER_BYTES)


def _free_host_bytes() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on this system
        return 0
