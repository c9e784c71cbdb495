"""Which generation of GPU a tensor lies on."""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["capability_of"]


@cache
def capability_of(device: torch.device) -> int:
    """Compute capability as 80, 90, …; of a CPU tensor (Triton's interpreter) the lowest."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
