"""Builds the engine from a config and a model directory."""

import logging
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.plan import HeadPlan
from loraplex_kernels.cpu import native
from loraplex_kernels.formats.quantized_weight import WeightFormat
from loraplex_kernels.layers.batch_invariant import BatchInvariant
from loraplex_server.model.base_model import BaseModel, load_base_model
from loraplex_server.model.encoder.encoder import Encoder, Modality
from loraplex_server.model.encoder.image_encoder import ImageEncoder
from loraplex_server.model.encoder.image_processor import ImageProcessor, no_tokens
from loraplex_server.model.encoder.image_reader import ImageReader
from loraplex_server.model.encoder.loading import (
    encoder_kind,
    load_image_encoder,
    load_text_encoder,
)
from loraplex_server.model.resident_weights import ResidentWeights
from loraplex_server.model.trunk import Trunk
from loraplex_server.model.vision.layouts import layout_of

from .adapters.adapter_loader import OtherPools
from .adapters.device_pool import DevicePool
from .attention_backend import choose_attention
from .config import EngineConfig
from .defaults import StepLimits, encoder_limits, kv_dtype, step_limits
from .engine import Engine
from .engine_loop import EngineLoop, LoopSettings
from .memory.cache_identity import cache_identity
from .memory.device import resolve_device, use_device
from .memory.kv_cache import PAGE_SIZE, KvCache, KvGeometry
from .memory.memory_plan import MemoryPlan, PoolLimits, plan_memory
from .memory.page_files import PageFiles
from .memory.window import Window
from .parallel.shard_workers import ShardWorkers
from .parallel.sharded_model import build_sharded
from .requests.inbox import Inbox
from .scheduling.scheduler import Scheduler
from .scheduling.step_cost import StepCost
from .steps.encoder_runner import EncoderRunner
from .steps.model_runner import ModelRunner
from .steps.step_mode import StepMode
from .steps.step_profile import profile_memory

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_GIB = 1 << 30
_CPU_KV_BYTES = 1 * _GIB
_CPU_ADAPTER_BYTES = 1 * _GIB
_DEFAULT_THREADS = torch.get_num_threads()  # before any engine lowers it for other threads
_SWITCH_INTERVAL_S = 0.0005  # the engine thread gets the interpreter back quickly


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A started engine, with the model and adapter parts that its owner uses."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    base_spec: BaseSpec
    model_id: str
    device: torch.device
    weights: ResidentWeights | None  # for training; None on a GPU or with several ranks
    max_positions: int  # the longest context of the base
    head: HeadPlan | None = None  # of an encoder that is a classifier itself
    writes_text: bool = True  # False: an encoder, which makes vectors and classes
    image_encoder: ImageReader | None = None


def build_engine(
    config: EngineConfig,
    model_path: Path,
    *,
    model_id: str | None = None,
) -> BuiltEngine:
    """Load the base, plan the memory and start the engine thread.

    Raises ModelError if the model cannot be served and ValueError for a device that is not there.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    if config.kernels == "reference":
        native.use_references()
    device = resolve_device(config.device)
    name = model_id or model_path.name
    kind = encoder_kind(model_path)
    if kind is not None:
        return _build_encoder(config, model_path, name, kind, device)
    tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    dtype = dtype_of(config.dtype)
    workers: ShardWorkers | None = None
    if layout_of(model_path) is not None:
        _refuse_cuts_and_codes(config, name, "a vision-language model")
    if config.tensor_parallel_size > 1:
        sharded = _run_in_temp_thread(
            lambda: build_sharded(model_path, name, config, dtype=dtype, device=device), device
        )
        model, spec, workers = sharded.model, sharded.spec, sharded.workers
    else:
        plain = config.quantization == "none"
        model = _run_in_temp_thread(
            lambda: load_base_model(
                model_path,
                name,
                dtype=dtype,
                device=device,
                fuse=config.fuse,
                self_check=config.self_check,
                quantization=None if plain else WeightFormat(config.quantization),
            ),
            device,
        )
        spec = model.spec
    try:
        engine = assemble_engine(model, config, shard_workers=workers, model_path=model_path)
    except BaseException:
        if workers is not None:
            workers.close()
        raise
    is_whole = device.type == "cpu" and workers is None and model.images is None
    weights = ResidentWeights(model) if is_whole else None
    return BuiltEngine(engine, tokenizer, spec, name, device, weights, model.max_positions)


def _refuse_cuts_and_codes(config: EngineConfig, name: str, kind: str) -> None:
    """Raises ValueError for options that a base of this kind is not served with."""
    if config.tensor_parallel_size > 1 or config.quantization != "none":
        raise ValueError(
            f"{name} is {kind}: it is served whole and unquantised; leave "
            "--tensor-parallel-size and --quantization out"
        )


def _build_encoder(
    config: EngineConfig, path: Path, name: str, kind: Modality, device: torch.device
) -> BuiltEngine:
    """Build the engine of an encoder. Raises ValueError for options of decoders alone."""
    article = "a" if kind is Modality.TEXT else "an"
    _refuse_cuts_and_codes(config, name, f"{article} {kind.value} encoder")
    dtype, self_check = dtype_of(config.dtype), config.self_check
    processor = ImageProcessor.load(path) if kind is Modality.IMAGE else None

    def load() -> Encoder:
        if kind is Modality.TEXT:
            return load_text_encoder(path, name, dtype=dtype, device=device, self_check=self_check)
        return load_image_encoder(
            path, name, processor, dtype=dtype, device=device, self_check=self_check
        )

    encoder = _run_in_temp_thread(load, device)
    reads_texts = Modality.TEXT in encoder.towers
    return BuiltEngine(
        assemble_engine(encoder, config),
        AutoTokenizer.from_pretrained(path, local_files_only=True) if reads_texts else no_tokens(),
        encoder.spec,
        name,
        device,
        None,
        encoder.max_positions,
        head=encoder.head_plan,
        writes_text=False,
        image_encoder=ImageReader(processor, encoder)
        if isinstance(encoder, ImageEncoder)
        else None,
    )


def assemble_engine(
    model: Trunk,
    config: EngineConfig,
    *,
    shard_workers: ShardWorkers | None = None,
    mode: StepMode | None = None,
    model_path: Path | None = None,
) -> Engine:
    """Build and start an engine around a loaded model.

    ``shard_workers``: the other ranks of a sharded model. The engine closes them.
    ``mode``: how steps run; None: as the config and the device say.
    ``model_path``: the folder that the model was loaded from; stored KV pages belong to its files.
    """

    def assemble() -> Engine:
        if isinstance(model, Encoder):
            return _assemble_encoder(model, config)
        step_mode = mode or StepMode.of(config, model.device)
        return _assemble(model, config, step_mode, shard_workers, model_path)

    engine = _run_in_temp_thread(assemble, model.device)
    engine.start()
    return engine


def _run_in_temp_thread(work: Callable[[], _T], device: torch.device) -> _T:
    """Runs ``work`` in a thread of its own, with ``device`` current, and waits for it.

    An OpenMP team lives as long as the thread that first used it. A second team beside the
    engine's makes libgomp count more threads than cores and let idle ones sleep instead of spin.
    Every small operator of a step then pays a wake-up: a decode step of 16 rows takes 18.4 ms
    instead of 14.6.
    """
    with ThreadPoolExecutor(
        1, thread_name_prefix="loraplex-build", initializer=use_device, initargs=(device,)
    ) as executor:
        return executor.submit(work).result()


def _assemble(
    model: BaseModel,
    config: EngineConfig,
    mode: StepMode,
    workers: ShardWorkers | None,
    model_path: Path | None,
) -> Engine:
    limits = step_limits(config, model.device)
    max_model_len = _max_model_len(model, config)
    model.step.batch_invariant = config.deterministic
    arithmetic = _arithmetic(config, model.device)
    flashinfer = choose_attention(config, model)
    with arithmetic:
        memory = _plan_memory(model, config, limits, max_model_len)
    kv_cache = _kv_cache(model, config, limits, max_model_len, memory.kv_bytes)
    inbox = Inbox(max_queue=config.max_queue)
    if config.prefix_cache_dir is not None:
        kv_cache.keep_in(
            PageFiles(
                config.prefix_cache_dir.expanduser(),
                cache_identity(model, kv_cache.geometry, config, model_path),
                page_bytes=kv_cache.token_bytes * PAGE_SIZE,
                max_bytes=config.prefix_cache_disk_bytes,
            ),
            n_written=max(1, limits.max_step_tokens // PAGE_SIZE),
            on_arrival=lambda: inbox.post(_wake),
        )
    adapters = DevicePool(
        model,
        PoolLimits(memory.adapter_bytes, limits.max_loras, config.max_lora_rank),
        on_loaded=lambda: inbox.post(_wake),
        others=OtherPools() if workers is None else workers,
        captures_steps=mode.capture is not None,
    )
    if workers is not None:
        workers.pack_with(adapters.packer)
    runner = ModelRunner(
        model,
        kv_cache,
        adapters,
        mode,
        flashinfer,
        max_captured_tokens=min(config.cuda_graph_tokens, limits.max_step_tokens),
    )
    scheduler = Scheduler(
        kv_cache,
        adapters,
        StepCost(kv_cache.token_bytes),
        max_batch_size=limits.max_batch_size,
        max_step_tokens=limits.max_step_tokens,
        max_gap_s=limits.max_gap_s,
    )
    settings = LoopSettings(
        max_model_len=max_model_len,
        eos_token_ids=model.eos_token_ids,
        n_threads=config.threads or max(1, _DEFAULT_THREADS // config.tensor_parallel_size),
        jump_forward=config.jump_forward,
        drafts=config.drafts == "auto" and not mode.overlaps,
        overlaps=mode.overlaps,
        arithmetic=arithmetic,
    )
    loop = EngineLoop(settings, runner, kv_cache, adapters, scheduler, inbox)
    _log.info(
        "engine: %s on %s in %s%s, %s layers, context %d, KV %d pages of %d tokens in %s, "
        "adapter pool %d MiB",
        model.spec.model_id,
        model.device,
        str(model.dtype).removeprefix("torch."),
        f" with {model.spec.quantization} linears" if model.spec.quantization else "",
        "fused" if model.fused is not None else "transformers'",
        max_model_len,
        kv_cache.n_pages,
        kv_cache.page_size,
        str(kv_dtype(config, model)).removeprefix("torch."),
        adapters.pool.bytes_total >> 20,
    )
    if workers is None:
        return Engine(loop, inbox)
    workers.when_lost(lambda why: inbox.post(partial(loop.lose_rank, why)))
    return Engine(loop, inbox, on_closed=workers.close)


def _assemble_encoder(model: Encoder, config: EngineConfig) -> Engine:
    """Return the engine of an encoder: no KV cache, and inputs that are never divided."""
    limits = encoder_limits(config, model.device)
    max_model_len = _max_model_len(model, config)
    n_pages = limits.max_batch_size * (-(-max_model_len // PAGE_SIZE) + 1)
    kv_cache = KvCache(
        KvGeometry(n_layers=0, n_kv_heads=0, head_dim=0),
        n_pages=n_pages,
        page_size=PAGE_SIZE,
        max_requests=limits.max_batch_size,
        max_model_len=max_model_len,
        dtype=model.dtype,
        device=model.device,
        prefix_cache=False,
    )
    inbox = Inbox(max_queue=config.max_queue)
    adapters = DevicePool(
        model,
        PoolLimits(
            config.adapter_memory_bytes or _CPU_ADAPTER_BYTES,
            limits.max_loras,
            config.max_lora_rank,
        ),
        on_loaded=lambda: inbox.post(_wake),
    )
    spec = model.spec
    scheduler = Scheduler(
        kv_cache,
        adapters,
        StepCost(2 * spec.n_layers * spec.hidden_size * model.dtype.itemsize),
        max_batch_size=limits.max_batch_size,
        max_step_tokens=limits.max_step_tokens,
        whole_prompts=True,
    )
    settings = LoopSettings(
        max_model_len=max_model_len,
        eos_token_ids=model.eos_token_ids,
        n_threads=config.threads or _DEFAULT_THREADS,
        arithmetic=_arithmetic(config, model.device),
    )
    runner = EncoderRunner(model, kv_cache, adapters)
    _log.info(
        "engine: the encoder %s on %s in %s, up to %d rows a text or image, adapter pool %d MiB",
        spec.model_id,
        model.device,
        str(model.dtype).removeprefix("torch."),
        max_model_len,
        adapters.pool.bytes_total >> 20,
    )
    return Engine(EngineLoop(settings, runner, kv_cache, adapters, scheduler, inbox), inbox)


def _wake() -> None:
    """Makes the engine thread look for loads that are done."""


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype of ``EngineConfig.dtype``."""
    return {"float32": torch.float32, "float16": torch.float16}.get(name, torch.bfloat16)


def _arithmetic(config: EngineConfig, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which the engine thread computes. A CPU needs none: its kernels always
    sum in one order."""
    if not config.deterministic or device.type == "cpu":
        return nullcontext()
    if config.tensor_parallel_size > 1:
        raise ValueError(
            "--deterministic with --tensor-parallel-size is not served on GPUs: NCCL's sums follow "
            "the batch; take one of them away"
        )
    return BatchInvariant()


def _max_model_len(model: Trunk, config: EngineConfig) -> int:
    wanted = config.max_model_len or model.max_positions
    if wanted > model.max_positions:
        raise ValueError(
            f"--max-model-len is {wanted}, but this base is right up to {model.max_positions} "
            "positions only; give at most that"
        )
    return wanted


def _plan_memory(
    model: BaseModel, config: EngineConfig, limits: StepLimits, max_model_len: int
) -> MemoryPlan:
    if model.device.type == "cpu":
        return MemoryPlan(
            config.kv_memory_bytes or _CPU_KV_BYTES,
            config.adapter_memory_bytes or _CPU_ADAPTER_BYTES,
        )
    n_pages = -(-max_model_len // PAGE_SIZE)
    return plan_memory(
        profile_memory(model, n_tokens=limits.max_step_tokens, n_requests=limits.max_batch_size),
        utilization=config.gpu_memory_utilization,
        kv_bytes=config.kv_memory_bytes,
        adapter_bytes=config.adapter_memory_bytes,
        min_kv_bytes=0
        if config.kv_memory_bytes is not None
        else n_pages * _geometry(model, limits).page_bytes(PAGE_SIZE, kv_dtype(config, model)),
    )


def _geometry(model: BaseModel, limits: StepLimits) -> KvGeometry:
    windows = [layer.spec.window for layer in model.layers]
    # Twice: one step may be launched while the pages of the step before it are not given up yet.
    window = Window.of_layers(windows, 2 * limits.max_step_tokens)
    return KvGeometry(len(model.layers), model.n_kv_heads, model.head_dim, window)


def _kv_cache(
    model: BaseModel,
    config: EngineConfig,
    limits: StepLimits,
    max_model_len: int,
    n_bytes: int,
) -> KvCache:
    geometry, dtype = _geometry(model, limits), kv_dtype(config, model)
    n_pages = n_bytes // geometry.page_bytes(PAGE_SIZE, dtype)
    if n_pages < 1:
        raise ValueError(
            f"--kv-memory {n_bytes} bytes does not hold one page of "
            f"{geometry.page_bytes(PAGE_SIZE, dtype)} bytes; give it more"
        )
    return KvCache(
        geometry,
        n_pages=n_pages,
        page_size=PAGE_SIZE,
        max_requests=limits.max_batch_size,
        max_model_len=max_model_len,
        dtype=dtype,
        device=model.device,
        prefix_cache=config.prefix_cache,
        shard=model.shard,
    )
