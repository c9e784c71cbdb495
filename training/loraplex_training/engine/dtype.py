"""The dtype in which a device trains fastest."""

import torch


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which training is fastest on a device.

    A CPU without instructions for bfloat16 computes in float32, ten times as fast.
    """
    is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type != "cpu" or is_fast else torch.float32
