"""Builds the model of rank 0 and starts the other ranks."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_kernels.formats.quantized_weight import WeightFormat
from loraplex_server.engine.config import EngineConfig
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.layers.tensor_parallel import Shard
from loraplex_server.model.loading.shard_loader import Checkpoint

from .shard_workers import ShardWorkers, WorkerSettings

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShardedModel:
    model: BaseModel  # rank 0's
    spec: BaseSpec  # of the whole base
    workers: ShardWorkers  # to be closed


def build_sharded(
    path: Path, model_id: str, config: EngineConfig, *, dtype: torch.dtype, device: torch.device
) -> ShardedModel:
    """Load the base on all ranks. Raises ModelError if it cannot be split over them."""
    if not config.fuse:
        raise ValueError("--no-fuse and --tensor-parallel-size exclude each other; leave one out")
    size = config.tensor_parallel_size
    devices = devices_of(device, size)
    quantization = None if config.quantization == "none" else WeightFormat(config.quantization)
    checkpoint = Checkpoint(path, size, quantization)  # raises before a process starts
    workers = ShardWorkers(
        WorkerSettings(
            path=str(path),
            model_id=model_id,
            size=size,
            dtype=str(dtype).removeprefix("torch."),
            quantization=quantization,
            devices=tuple(map(str, devices)),
            kernels=config.kernels,
            n_threads=config.threads or max(1, torch.get_num_threads() // size),
        ),
        checkpoint.layout,
    )
    try:
        own = checkpoint.load(0, dtype=dtype, device=devices[0])
        spec = checkpoint.spec(model_id, dtype)
        shard = Shard(checkpoint.layout, 0, workers.join(), workers)
        if config.self_check:
            _log.warning(
                "a base in %d parts is not held against transformers' own forward at start", size
            )
        model = BaseModel(own, model_id, self_check=False, shard=shard)
    except BaseException:
        workers.close()
        raise
    return ShardedModel(model, spec, workers)


def devices_of(first: torch.device, size: int) -> tuple[torch.device, ...]:
    """Return the device of each rank: GPUs from ``first`` on, or the CPU. Raises ValueError."""
    if first.type == "cpu":
        return (first,) * size
    n_devices, index = torch.cuda.device_count(), first.index or 0
    if index + size > n_devices:
        raise ValueError(
            f"--tensor-parallel-size {size} needs as many GPUs from cuda:{index} on, and torch "
            f"sees {n_devices}; choose fewer, or see CUDA_VISIBLE_DEVICES"
        )
    return tuple(torch.device("cuda", index + rank) for rank in range(size))
