"""Builds the engine from a config and a model directory, in named steps."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.faults import FaultLog, NoFaultLog
from loraplex_kernels.batch_invariant import BatchInvariant
from loraplex_kernels.cpu import native
from loraplex_kernels.quantized_weight import WeightFormat
from loraplex_kernels.side_stream import CudaSideStream, SideStream
from loraplex_server.model.base_model import BaseModel, load_base_model
from loraplex_server.model.resident_weights import ResidentWeights

from .attention_backend import choose_attention
from .capabilities import EngineCapabilities
from .config import EngineConfig
from .defaults import StepLimits, step_limits
from .device import resolve_device, use_device
from .device_pool import DevicePool
from .engine import Engine
from .engine_loop import EngineLoop
from .graph_recorder import CudaRecorder, Recorder
from .inbox import Inbox
from .kv_cache import KvCache, KvGeometry
from .memory_plan import MemoryPlan, plan_memory
from .messages import Lost, Wake
from .model_runner import ModelRunner
from .parallel.other_pools import NoOtherPools
from .parallel.shard_workers import ShardWorkers
from .parallel.sharded_model import build_sharded
from .scheduler import Scheduler
from .step_profile import profile_memory

__all__ = ["BuiltEngine", "assemble_engine", "build_engine", "dtype_of"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_GIB = 1 << 30
_CPU_KV_BYTES = 1 * _GIB
_CPU_ADAPTER_BYTES = 1 * _GIB
_DEFAULT_THREADS = torch.get_num_threads()  # before any engine lowers it for other threads
_SWITCH_INTERVAL_S = 0.0005  # the engine thread gets the interpreter back quickly


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """``engine`` is started. ``tokenizer`` belongs to the front, ``base_spec`` to the store."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    base_spec: BaseSpec
    model_id: str
    device: torch.device
    weights: ResidentWeights | None  # to train through; None: they are on another device
    max_positions: int  # that the base is right up to


def build_engine(
    config: EngineConfig,
    model_path: Path,
    *,
    model_id: str | None = None,
    faults: FaultLog = NoFaultLog(),  # noqa: B008  stateless
) -> BuiltEngine:
    """Loads the base, sizes the memories, starts the engine thread.

    Raises ModelError if the model cannot be served and ValueError for a device that is not there.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    if config.kernels == "reference":
        native.use_references()
    device = resolve_device(config.device)
    name = model_id or model_path.name
    tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    dtype = dtype_of(config.dtype)
    if config.tensor_parallel_size > 1:
        sharded = _run_in_temp_thread(
            lambda: build_sharded(model_path, name, config, dtype=dtype, device=device), device
        )
        _warn_of_codes(sharded.spec, device)
        try:
            engine = assemble_engine(
                sharded.model, config, faults=faults, shard_workers=sharded.workers
            )
        except BaseException:
            sharded.workers.close()
            raise
        n = sharded.model.max_positions
        return BuiltEngine(engine, tokenizer, sharded.spec, name, device, None, n)
    model = _run_in_temp_thread(
        lambda: load_base_model(
            model_path,
            name,
            dtype=dtype,
            device=device,
            fuse=config.fuse,
            self_check=config.self_check,
            quantization=None
            if config.quantization == "none"
            else WeightFormat(config.quantization),
        ),
        device,
    )
    _warn_of_codes(model.spec, device)
    engine = assemble_engine(model, config, faults=faults)
    weights = ResidentWeights(model, torch.bfloat16) if device.type == "cpu" else None
    n = model.max_positions
    return BuiltEngine(engine, tokenizer, model.spec, name, device, weights, n)


def assemble_engine(
    model: BaseModel,
    config: EngineConfig,
    *,
    faults: FaultLog = NoFaultLog(),  # noqa: B008  stateless
    shard_workers: ShardWorkers | None = None,
) -> Engine:
    """The engine around a model that is already loaded; started.

    ``shard_workers``: the other ranks of a model that is cut; the engine closes them.
    """
    engine = _run_in_temp_thread(
        lambda: _assemble(model, config, faults, shard_workers), model.device
    )
    engine.start()
    return engine


def _run_in_temp_thread(work: Callable[[], _T], device: torch.device) -> _T:
    """Runs ``work`` in a thread that ends with it, and with that thread its team of OpenMP threads.

    ``device`` is its current one.

    A team lives as long as the thread that first used it. With one left behind beside the
    engine's, libgomp counts more threads than cores and lets waiting ones sleep instead of spin:
    every small operator of a step then pays a wake-up (one decode step of 16 rows: 18.4 ms, 14.6
    without).
    """
    with ThreadPoolExecutor(
        1, thread_name_prefix="loraplex-build", initializer=use_device, initargs=(device,)
    ) as executor:
        return executor.submit(work).result()


def _assemble(
    model: BaseModel, config: EngineConfig, faults: FaultLog, workers: ShardWorkers | None
) -> Engine:
    limits = step_limits(config, model.device)
    max_model_len = _context(model, config)
    model.step.batch_invariant = config.deterministic
    arithmetic = _arithmetic(config, model.device)
    flashinfer = choose_attention(config, model)
    with arithmetic:
        memory = _plan(model, config, limits, max_model_len)
    kv_cache = _kv_cache(model, config, limits, max_model_len, memory.kv_bytes)
    inbox = Inbox(max_queue=config.max_queue)
    layout = None if workers is None else workers.layout
    recorder = _recorder(config, model.device)
    adapters = DevicePool(
        model.groups,
        n_bytes=memory.adapter_bytes,
        max_adapters=limits.max_loras,
        capabilities=EngineCapabilities.of_model(
            model, max_rank=config.max_lora_rank, layout=layout
        ),
        dtype=model.dtype,
        device=model.device,
        on_loaded=lambda: inbox.post(Wake()),
        exponent_coding=None if workers is None else False,  # sizes are the same on all ranks
        layout=layout,
        others=NoOtherPools() if workers is None else workers,
        faults=faults,
        records_steps=recorder is not None,
    )
    if workers is not None:
        workers.pack_with(adapters.packer)
    runner = ModelRunner(
        model,
        kv_cache,
        adapters,
        recorder,
        _side_stream(config, model.device),
        flashinfer,
        max_recorded_tokens=min(config.cuda_graph_tokens, limits.max_step_tokens),
    )
    scheduler = Scheduler(
        kv_cache,
        adapters,
        max_batch_size=limits.max_batch_size,
        max_step_tokens=limits.max_step_tokens,
    )
    loop = EngineLoop(
        runner,
        kv_cache,
        adapters,
        scheduler,
        inbox,
        max_model_len=max_model_len,
        eos_token_ids=model.eos_token_ids,
        n_threads=config.threads or max(1, _DEFAULT_THREADS // config.tensor_parallel_size),
        forced_tokens=config.forced_tokens,
        arithmetic=arithmetic,
        overlaps=config.async_scheduling and model.device.type != "cpu",
        faults=faults,
    )
    _log.info(
        "engine: %s on %s in %s%s, %s layers, context %d, KV %d pages of %d tokens, "
        "adapter pool %d MiB",
        model.spec.model_id,
        model.device,
        str(model.dtype).removeprefix("torch."),
        f" with {model.spec.quantization} linears" if model.spec.quantization else "",
        "fused" if model.is_fused else "transformers'",
        max_model_len,
        kv_cache.n_pages,
        kv_cache.page_size,
        adapters.pool.bytes_total >> 20,
    )
    if workers is None:
        return Engine(loop, inbox, max_model_len=max_model_len)
    workers.when_lost(lambda why: inbox.post(Lost(why)))
    return Engine(loop, inbox, max_model_len=max_model_len, on_closed=workers.close)


def dtype_of(name: str) -> torch.dtype:
    """What ``EngineConfig.dtype`` means."""
    if name != "auto":
        return {"float32": torch.float32, "float16": torch.float16}.get(name, torch.bfloat16)
    return torch.bfloat16


def _warn_of_codes(spec: BaseSpec, device: torch.device) -> None:
    if spec.quantization is not None and device.type == "cpu":
        _log.warning(
            "%s linears save memory on a CPU, and every step takes many times as long",
            spec.quantization,
        )


def _arithmetic(config: EngineConfig, device: torch.device) -> AbstractContextManager[object]:
    """How the engine's thread multiplies. A CPU's kernels sum in one order as they are."""
    if not config.deterministic or device.type == "cpu":
        return nullcontext()
    if config.tensor_parallel_size > 1:
        raise ValueError(
            "--deterministic with --tensor-parallel-size is not served on GPUs: NCCL's sums follow "
            "the batch; take one of them away"
        )
    return BatchInvariant()


def _recorder(config: EngineConfig, device: torch.device) -> Recorder | None:
    if config.tensor_parallel_size > 1:  # the other ranks run each step as it is told
        return None
    return CudaRecorder() if config.cuda_graphs and device.type != "cpu" else None


def _side_stream(config: EngineConfig, device: torch.device) -> SideStream | None:
    return CudaSideStream(device) if config.lora_side_stream and device.type != "cpu" else None


def _context(model: BaseModel, config: EngineConfig) -> int:
    wanted = config.max_model_len or model.max_positions
    if wanted > model.max_positions:
        raise ValueError(
            f"--max-model-len is {wanted}, but this base is right up to {model.max_positions} "
            "positions only; give at most that"
        )
    return wanted


def _plan(
    model: BaseModel, config: EngineConfig, limits: StepLimits, max_model_len: int
) -> MemoryPlan:
    if model.device.type == "cpu":
        return MemoryPlan(
            config.kv_memory_bytes or _CPU_KV_BYTES,
            config.adapter_memory_bytes or _CPU_ADAPTER_BYTES,
        )
    n_pages = -(-max_model_len // config.page_size)
    return plan_memory(
        profile_memory(model, n_tokens=limits.max_step_tokens, n_requests=limits.max_batch_size),
        utilization=config.gpu_memory_utilization,
        kv_bytes=config.kv_memory_bytes,
        adapter_bytes=config.adapter_memory_bytes,
        min_kv_bytes=0
        if config.kv_memory_bytes is not None
        else n_pages * _geometry(model).page_bytes(config.page_size, model.dtype),
    )


def _geometry(model: BaseModel) -> KvGeometry:
    return KvGeometry(len(model.layers), model.n_kv_heads, model.head_dim)


def _kv_cache(
    model: BaseModel,
    config: EngineConfig,
    limits: StepLimits,
    max_model_len: int,
    n_bytes: int,
) -> KvCache:
    geometry = _geometry(model)
    n_pages = n_bytes // geometry.page_bytes(config.page_size, model.dtype)
    if n_pages < 1:
        raise ValueError(
            f"--kv-memory {n_bytes} bytes does not hold one page of "
            f"{geometry.page_bytes(config.page_size, model.dtype)} bytes; give it more"
        )
    return KvCache(
        geometry,
        n_pages=n_pages,
        page_size=config.page_size,
        max_requests=limits.max_batch_size,
        max_model_len=max_model_len,
        dtype=model.dtype,
        device=model.device,
        prefix_cache=config.prefix_cache,
        shard=model.shard,
    )
