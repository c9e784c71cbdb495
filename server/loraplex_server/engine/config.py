"""Settings of the engine, fixed at start."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from loraplex_server.options import Bytes, Options, Panel, option

__all__ = ["EngineConfig"]

_AtLeastOne = Annotated[int, Field(ge=1)]
_Size = Annotated[Bytes, Field(ge=1)]


class EngineConfig(Options):
    """The engine reads no flags and no environment.

    ``auto`` and None mean that the engine picks what fits the device and the model.
    """

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "auto, bfloat16, float16 or float32.", Panel.MODEL
    )
    quantization: Literal["none", "int8", "int4", "fp8"] = option(
        "none", "Hold the base's linears in 8 or 4 bits: none, int8, int4 or fp8.", Panel.MODEL
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N.", Panel.MODEL)
    tensor_parallel_size: _AtLeastOne = option(
        1, "Processes that each compute a part of every layer: one on each GPU.", Panel.MODEL
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = option(
        0.9,
        "Share of a GPU's memory for weights, KV cache and adapters.",
        Panel.MODEL,
        metavar="SHARE",
    )
    max_model_len: _AtLeastOne | None = option(
        None, "Tokens of prompt and output. Default: the model's own.", Panel.MODEL
    )
    max_batch_size: _AtLeastOne | None = option(
        None, "Requests of one step. Default: 256; 64 on a CPU.", Panel.ENGINE
    )
    max_step_tokens: _AtLeastOne | None = option(
        None, "Tokens of one step, prefill included. Default: 2048; 128 on a CPU.", Panel.ENGINE
    )
    max_queue: _AtLeastOne = option(512, "Waiting requests of a tenant before 429.", Panel.ENGINE)
    kv_memory_bytes: _Size | None = option(
        None,
        "Of the KV cache, as 2GiB. Default: what fits; 1GiB on a CPU.",
        Panel.ENGINE,
        name="kv_memory",
        metavar="SIZE",
    )
    page_size: _AtLeastOne = option(16, "Tokens of a KV page.", Panel.ENGINE, hidden=True)
    forced_tokens: bool = option(
        True,
        "Where a grammar leaves no choice, compute its tokens at once; no answer changes.",
        Panel.ENGINE,
        hidden=True,
    )
    prefix_cache: bool = option(True, "Share the KV of common prompt beginnings.", Panel.ENGINE)
    cuda_graphs: bool = option(
        True, "On a GPU, record steps at start and replay them.", Panel.ENGINE
    )
    cuda_graph_tokens: Annotated[int, Field(ge=0)] = option(
        512, "Tokens of the largest step with prompt chunks to record. 0: none.", Panel.ENGINE
    )
    async_scheduling: bool = option(
        True, "On a GPU, schedule the next step while one runs.", Panel.ENGINE
    )
    lora_side_stream: bool = option(
        False, "On a GPU, shrink x of adapters beside the base's product.", Panel.ENGINE
    )
    attention_backend: Literal["auto", "triton", "flashinfer"] = option(
        "auto",
        "On a GPU: triton, flashinfer (pip install loraplex[flashinfer]), or auto: what is there.",
        Panel.ENGINE,
    )
    deterministic: bool = option(
        False,
        "On a GPU, give a row the same bits in every batch; slower prompts. A CPU always does.",
        Panel.ENGINE,
    )
    kernels: Literal["native", "reference"] = option(
        "native", "native, or reference: PyTorch, to compare.", Panel.ENGINE, hidden=True
    )
    fuse: bool = option(True, "Layers as one list of kernels.", Panel.ENGINE, hidden=True)
    self_check: bool = option(
        True, "At start, hold the base against transformers' own forward.", Panel.ENGINE
    )
    threads: _AtLeastOne | None = option(None, "CPU threads. Default: torch's.", Panel.ENGINE)
    max_loras: _AtLeastOne | None = option(
        None, "Distinct adapters of one step. Default: 512; 64 on a CPU.", Panel.ADAPTERS
    )
    max_lora_rank: _AtLeastOne | None = option(None, "Default: any rank that fits.", Panel.ADAPTERS)
    adapter_memory_bytes: _Size | None = option(
        None,
        "Of adapters on the device. Default: what fits; 1GiB on a CPU.",
        Panel.ADAPTERS,
        name="adapter_memory",
        metavar="SIZE",
    )
