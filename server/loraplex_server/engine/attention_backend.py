"""Whose attention a GPU runs: FlashInfer's where it is installed and fits, else ours in Triton.

Steps that are recorded as a whole keep ours: FlashInfer plans each step anew. So do several ranks:
a step is as fast as the slowest, and others than rank 0 know no lengths on the host.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from loraplex_kernels.errors import KernelUnavailable
from loraplex_kernels.flashinfer_attention import FlashInferAttention, PlannedAttention
from loraplex_kernels.model_ops import paged_attention
from loraplex_server.model.base_model import BaseModel

from .config import EngineConfig

__all__ = ["choose_attention"]

_log = logging.getLogger(__name__)


@torch.inference_mode()
def choose_attention(config: EngineConfig, model: BaseModel) -> FlashInferAttention | None:
    """FlashInfer, tried with one row of each kind of layer; None = ours. Logs which, once.

    Before memories are sized: it holds some. Its device must be current.
    """
    if model.device.type == "cpu" or config.attention_backend == "triton":
        return None
    if config.deterministic:
        _log.info("attention: Triton, since FlashInfer's sums follow the batch")
        return None
    if model.shard is not None:
        _log.info("attention: Triton, which all ranks have; FlashInfer would be rank 0's alone")
        return None
    try:
        capability = torch.cuda.get_device_capability(model.device)
        misfit = FlashInferAttention.misfit(capability, model.dtype, model.head_dim)
        if misfit is not None:
            raise KernelUnavailable(misfit)
        library = FlashInferAttention(model.device)
        _try(library, model)
    except Exception as error:  # what its compiler raises, too
        level = logging.WARNING if config.attention_backend == "flashinfer" else logging.INFO
        _log.log(level, "attention: Triton, not FlashInfer: %s", error)
        return None
    _log.info("attention: FlashInfer in steps with prompts, Triton in recorded ones")
    return library


def _try(library: FlashInferAttention, model: BaseModel) -> None:
    """Raises what compiling or running it raises. Waits for the device."""
    device, cache = model.device, (1, model.n_kv_heads, 16, model.head_dim)
    keys = torch.zeros(cache, dtype=model.dtype, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    starts, one = torch.arange(2, dtype=torch.int32, device=device), np.ones(1, dtype=np.int64)
    planned = PlannedAttention(library, one, one, table)
    for spec in {layer.spec for layer in model.layers if layer.spec.sinks is None}:
        q = keys.new_zeros(1, spec.n_heads, model.head_dim)
        paged_attention(
            q,
            keys,
            keys,
            table,
            starts,
            starts[1:],
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            planned=planned,
        )
    torch.cuda.synchronize(device)
