"""Chooses a GPU's attention: FlashInfer if it is installed and fits, else the Triton kernel.

Several ranks use Triton: only rank 0 knows lengths on the host, and the slowest rank decides.
"""

import itertools
import logging

import numpy as np
import torch

from loraplex_kernels.errors import KernelUnavailable
from loraplex_kernels.layers.flashinfer_attention import (
    CapturedAttention,
    FlashInferAttention,
    PlannedAttention,
)
from loraplex_kernels.layers.model_ops import paged_attention
from loraplex_server.model.base_model import BaseModel

from .config import EngineConfig
from .defaults import kv_dtype

_log = logging.getLogger(__name__)


@torch.inference_mode()
def choose_attention(config: EngineConfig, model: BaseModel) -> FlashInferAttention | None:
    """Return FlashInfer if it runs each kind of layer, else None for Triton. Logs the choice.

    Called before memory is planned, since FlashInfer takes some. The device must be current.
    """
    if model.device.type == "cpu" or config.attention_backend == "triton":
        return None
    if config.deterministic:
        _log.info("attention: Triton, since FlashInfer's sums follow the batch")
        return None
    if model.shard is not None:
        _log.info("attention: Triton, since FlashInfer would run on rank 0 only")
        return None
    try:
        capability = torch.cuda.get_device_capability(model.device)
        misfit = FlashInferAttention.misfit(capability, model.dtype, model.head_dim)
        if misfit is not None:
            raise KernelUnavailable(misfit)
        library = FlashInferAttention(model.device)
        _try(library, model, kv_dtype(config, model))
    except Exception as error:  # also errors of its compiler
        level = logging.WARNING if config.attention_backend == "flashinfer" else logging.INFO
        _log.log(level, "attention: Triton, not FlashInfer: %s", error)
        return None
    _log.info("attention: FlashInfer")
    return library


def _try(library: FlashInferAttention, model: BaseModel, kv_dtype: torch.dtype) -> None:
    """Runs a row of each kind of layer in both wrappers. Waits. Raises compiler errors, too."""
    device, cache = model.device, (1, model.n_kv_heads, 16, model.head_dim)
    keys = torch.zeros(cache, dtype=kv_dtype, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    starts, one = torch.arange(2, dtype=torch.int32, device=device), np.ones(1, dtype=np.int64)
    wrappers: tuple[PlannedAttention | CapturedAttention, ...] = (
        PlannedAttention(library, one, one, table),
        CapturedAttention(library, table, torch.zeros_like(table[0])),
    )
    specs = {layer.spec for layer in model.layers if layer.spec.sinks is None}
    for spec, planned in itertools.product(specs, wrappers):
        q = torch.zeros(1, spec.n_heads, model.head_dim, dtype=model.dtype, device=device)
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
