"""Settings that a CPU and a GPU have other defaults for."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from .config import EngineConfig

__all__ = ["StepLimits", "host_tier_bytes", "step_limits"]

_GIB = 1 << 30
_HOST_TIER_BYTES = 2 * _GIB
_HOST_TIER_SHARE = 0.25  # of the host's free memory, which a GPU's base does not need
_MAX_HOST_TIER_BYTES = 64 * _GIB


class StepLimits(NamedTuple):
    max_batch_size: int  # requests
    max_step_tokens: int
    max_loras: int  # slots on the device


_OF_A_CPU = StepLimits(64, 128, 64)
_OF_A_GPU = StepLimits(256, 2048, 512)


def step_limits(config: EngineConfig, device: torch.device) -> StepLimits:
    """Those of the config, and the device's own where it leaves them open.

    A CPU is as fast per token in small chunks, and everybody who decodes waits for a chunk; a GPU
    reads its weights once for 2,048 tokens as for one. A routed adapter takes a slot for each
    expert, and a slot costs a GPU some 20 KB.
    """
    own = _OF_A_CPU if device.type == "cpu" else _OF_A_GPU
    return StepLimits(
        config.max_batch_size or own.max_batch_size,
        config.max_step_tokens or own.max_step_tokens,
        config.max_loras or own.max_loras,
    )


def host_tier_bytes(device: torch.device) -> int:
    """Of packed adapters in host memory: 2 GiB, and beside a GPU a quarter of what is free."""
    if device.type == "cpu":
        return _HOST_TIER_BYTES
    wanted = int(_free_host_bytes() * _HOST_TIER_SHARE)
    return min(max(wanted, _HOST_TIER_BYTES), _MAX_HOST_TIER_BYTES)


def _free_host_bytes() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on this system
        return 0
