"""Writes checkpoints in AutoAWQ's format and returns their dequantised weights.

Written from AutoAWQ's published layout "gemm" (``awq/modules/linear/gemm.py``), bit by bit:

    qweight int32 [in, out / 8]         four bits i of word j: output 8 j + ORDER[i]
    qzeros  int32 [n_groups, out / 8]   the same
    scales  float16 [n_groups, out]
    W[o, k] = (code[k, o] - zero[k // group, o]) · scale[k // group, o]
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq_config(group_size: int) -> dict[str, object]:
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


def awq_tensors(weight: Tensor, group_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """Quantise ``weight`` [out, in]. Returns AWQ's tensors and W as float32 [out, in]."""
    n_out, n_in = weight.shape
    groups = weight.float().view(n_out, -1, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low).clamp_min(1e-5) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = ((groups / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, 15)
    wanted = (codes - zeros[..., None]) * scales.float()[..., None]
    stored = {
        "qweight": _words(codes.view(n_out, n_in).t()),
        "qzeros": _words(zeros.t()),
        "scales": scales.t().contiguous(),
    }
    return stored, wanted.view(n_out, n_in)


def save_as_awq(folder: Path, group_size: int) -> dict[str, Tensor]:
    """Quantise the layers' linears of the checkpoint in ``folder``. Returns W by name."""
    file, config_file = folder / "model.safetensors", folder / "config.json"
    tensors, wanted = load_file(file), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        module = name.removesuffix(".weight")
        stored, wanted[module] = awq_tensors(tensors.pop(name), group_size)
        tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in stored.items()}
    save_file(tensors, file)
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "quantization_config": awq_config(group_size)}))
    return wanted


def _words(codes: Tensor) -> Tensor:
    """Pack [n, m] of 0 … 15 into int32 [n, m / 8]."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for i, output in enumerate(ORDER):
        words |= codes[:, output::8].long() << (4 * i)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
